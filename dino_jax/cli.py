"""The command line: `dino-jax VERB ...`. Verbs and their arguments; no logic."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dino_jax import __version__
from dino_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0 only on success, 2 for bad input, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dino_jax").setLevel(logging.INFO)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}; see `dino-jax {args.verb} --help`")
    try:
        args.run(args, overrides)
    except UserError as error:
        print(f"dino-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dino-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dino-jax", description="DINO for JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dino-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = _verb(verbs, "train", _train, "train, or resume, a run")
    train.add_argument("--config", required=True, help="a file with get_config(), such as configs/vit_s16.py")
    train.add_argument("--workdir", required=True, help="where checkpoints and metrics go; local or gs://")

    evaluate = _verb(verbs, "eval", _eval, "evaluate a checkpoint by a protocol of the paper, or all")
    evaluate.add_argument("protocol", help="knn linear lowshot finetune retrieval copydetection vos voc dense, or all")
    _checkpoint(evaluate)
    evaluate.add_argument("--data", required=True, help="a source or folder, as the protocol takes it")
    evaluate.add_argument("--config", help="a file with the protocol's keys, such as configs/finetune/cifar10.py")
    evaluate.add_argument("--workdir", help="where features, pictures and resumable state go")
    evaluate.add_argument("--out", help="the figures as JSON")

    features = _verb(verbs, "features", _features, "features of pictures, as a .npz file")
    _checkpoint(features)
    features.add_argument("--images", required=True, help="a folder, a list, or any other source")
    features.add_argument("--out", required=True, help="the .npz file")
    features.add_argument("--resize", type=int, help="shorter side in pixels; by default pictures keep their size")
    features.add_argument("--crop", type=int, help="side of a centre crop")
    features.add_argument("--patches", action="store_true", help="patch tokens too")

    bring = _verb(verbs, "import", _import, "turn released or other weights into a checkpoint")
    bring.add_argument("file", help="a .pth or .safetensors file, or a released name such as dino_vits16")
    bring.add_argument("--out", required=True, help="the checkpoint's folder")
    bring.add_argument("--heads", type=int, help="attention heads, where the file does not tell")
    bring.add_argument("--from", dest="from_file", help="a local copy of the released file")

    export = _verb(verbs, "export", _export, "write a checkpoint in another code's format")
    _checkpoint(export)
    export.add_argument("--format", required=True, help="official, timm, hf, stablehlo, onnx")
    export.add_argument("--out", required=True, help="a file or folder")
    export.add_argument("--attention", action="store_true", help="programs also give the last block's attention")
    return parser


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, a step's folder, or a weight file")
    parser.add_argument("--heads", type=int, help="attention heads, where a weight file does not tell")


def _verb(verbs: Any, name: str, run: Callable[..., None], description: str) -> argparse.ArgumentParser:
    epilog = "train and eval: any key of the configuration can be set with --config.KEY=VALUE."
    parser = verbs.add_parser(name, help=description, description=description, epilog=epilog, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax import config_io
    from dino_jax.train import train

    train(config_io.load(args.config, overrides), args.workdir)


def _eval(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.evaluate import evaluate

    options = {"heads": args.heads, "workdir": args.workdir, "out": args.out}
    evaluate(args.protocol, args.checkpoint, args.data, config_file=args.config, overrides=overrides, **options)


def _features(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.features import write_features

    _none(overrides)
    options = {"heads": args.heads, "resize": args.resize, "crop": args.crop, "patches": args.patches}
    print(write_features(args.checkpoint, args.images, args.out, **options))


def _import(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.weights.store import import_weights

    _none(overrides)
    print(import_weights(args.file, args.out, heads=args.heads, from_file=args.from_file))


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.weights.exporter import export_weights

    _none(overrides)
    options = {"format": args.format, "heads": args.heads, "attention": args.attention}
    print(export_weights(args.checkpoint, args.out, **options))


def _none(overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"{overrides[0]}: this verb takes no configuration; the model's comes from the checkpoint")


if __name__ == "__main__":
    sys.exit(main())
