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
    _processes(train)

    evaluate = _verb(verbs, "eval", _eval, "evaluate a checkpoint by a protocol of the paper, or all", add_help=False)
    evaluate.add_argument(
        "-h", "--help", action=_EvalHelp, nargs=0, help="this help, with the protocols, or one's keys"
    )
    evaluate.add_argument("protocol", help="one of the protocols below, or all")
    _checkpoint(evaluate)
    evaluate.add_argument("--data", required=True, help="a source or folder, as the protocol takes it")
    evaluate.add_argument("--config", help="a file with the protocol's keys, such as configs/finetune/cifar10.py")
    evaluate.add_argument("--workdir", help="where features, drawings and resumable state go")
    evaluate.add_argument("--out", help="the figures as JSON")
    _processes(evaluate)

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

    plan = _verb(verbs, "plan", _plan, "compile a run for hardware you do not have: fits? FLOPs? bytes? days?")
    plan.add_argument("--config", required=True, help="a file with get_config(); the batch and run.* count")
    plan.add_argument("--topology", required=True, help="v5e:4x4, v5p:4x4x4, cpu:8, gpu; several with commas")
    plan.add_argument("--images", type=int, help="pictures in the data set; by default data.train's or ImageNet's")

    pack = _verb(verbs, "pack", _pack, "pack a data set into ArrayRecord shards; goes on where it was killed")
    pack.add_argument("source", help="a folder, list, arrays, tar:PATTERN, tfds:NAME:SPLIT, ...: any source")
    pack.add_argument("--out", required=True, help="the folder of shards; local or gs://")
    pack.add_argument("--shorter-side", type=int, default=0, help="pixels; larger pictures are shrunk to it")
    pack.add_argument("--channels", type=int, default=3, help="of the pictures, where they are not RGB")
    pack.add_argument("--shard-size", type=int, default=1000, help="pictures in a shard")
    pack.add_argument("--workers", type=int, help="processes; by default one for each core")
    pack.add_argument("--max-bad-share", type=float, default=0.01, help="more unreadable pictures are an error")

    doctor = _verb(verbs, "doctor", _doctor, "what a machine lacks before a run, with the mend")
    doctor.add_argument("--config", help="a file with get_config(): checked, with its data, batch and workdir")
    doctor.add_argument("--workdir", help="of the run; is it writable?")
    doctor.add_argument("--data", help="a source; does it open, and its first picture decode?")
    doctor.add_argument("--devices", type=int, help="that the run will have, where that is not this machine")
    doctor.add_argument("--launch", choices=("tpu", "gke", "slurm", "hosts"), help="how the run is started from here")

    bench = _verb(verbs, "bench", _bench, "how fast the parts of a run are here; the last line is one JSON object")
    bench.add_argument("what", choices=("input", "step", "loss"), help="the part")
    bench.add_argument("--config", help="a file with get_config(); without it, the defaults with a batch of 64")
    bench.add_argument("--source", help="pictures to read (input); without it, generated JPEGs of 500 x 375 pixels")
    bench.add_argument("--seconds", type=float, default=5.0, help="CPU time for each host part (input)")
    bench.add_argument("--steps", type=int, help="for each rate, by default 10 (a CPU: 3); input: 0 for no training")
    return parser


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, a step's folder, or a weight file")
    parser.add_argument("--heads", type=int, help="attention heads, where a weight file does not tell")


def _processes(parser: argparse.ArgumentParser) -> None:
    """What `distributed` describes; under launch/multihost.sh, SLURM and on TPU pods none of it is needed."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, 0 to N - 1")


class _EvalHelp(argparse.Action):
    """`eval --help` with the list of protocols, `eval PROTOCOL --help` with the protocol's keys."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        from dino_jax.eval.protocol import help_of

        parser.print_help()
        try:
            print(f"\n{help_of(getattr(namespace, 'protocol', None))}")
        except UserError as error:
            parser.error(str(error))
        parser.exit()


def _verb(
    verbs: Any, name: str, run: Callable[..., None], description: str, add_help: bool = True
) -> argparse.ArgumentParser:
    epilog = "train, eval, plan and bench: any key of the configuration can be set with --config.KEY=VALUE."
    parser = verbs.add_parser(
        name, help=description, description=description, epilog=epilog, allow_abbrev=False, add_help=add_help
    )
    parser.set_defaults(run=run)
    return parser


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax import config_io
    from dino_jax.parallel import distributed
    from dino_jax.training.loop import train

    with distributed.session(args.coordinator, args.processes, args.process):
        train(config_io.load(args.config, overrides), args.workdir)


def _eval(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.eval.run import evaluate
    from dino_jax.parallel import distributed

    options = {"heads": args.heads, "workdir": args.workdir, "out": args.out}
    call = {
        "protocol": args.protocol,
        "checkpoint": args.checkpoint,
        "data": args.data,
        "overrides": " ".join(overrides),
    }
    with distributed.session(args.coordinator, args.processes, args.process):
        distributed.check_same(call)
        distributed.check_devices()
        evaluate(args.protocol, args.checkpoint, args.data, config_file=args.config, overrides=overrides, **options)


def _features(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.inference.model import write_features
    from dino_jax.parallel import distributed

    _none(overrides)
    distributed.check_alone("features")
    options = {"heads": args.heads, "resize": args.resize, "crop": args.crop, "patches": args.patches}
    print(write_features(args.checkpoint, args.images, args.out, **options))


def _import(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.training.start import import_weights

    _none(overrides)
    print(import_weights(args.file, args.out, heads=args.heads, from_file=args.from_file))


def _export(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.weights.exporter import export_weights

    _none(overrides)
    options = {"format": args.format, "heads": args.heads, "attention": args.attention}
    print(export_weights(args.checkpoint, args.out, **options))


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax import config_io
    from dino_jax.tools import plan

    plan.print_plans(config_io.load(args.config, overrides), args.topology, args.images)


def _pack(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.data.pack import pack, report

    _none(overrides)
    options = ("shorter_side", "channels", "shard_size", "workers", "max_bad_share")
    print(report(args.out, pack(args.source, args.out, **{name: getattr(args, name) for name in options})))


def _doctor(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.tools.doctor import doctor, report

    options = {"data": args.data, "workdir": args.workdir, "devices": args.devices, "launch": args.launch}
    if missing := report(doctor(config=args.config, overrides=overrides, **options)):
        raise UserError(f"missing: {', '.join(missing)}; each with its mend above")


def _bench(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.tools import bench

    bench.run(args.what, args.config, overrides, source=args.source, seconds=args.seconds, steps=args.steps)


def _none(overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"{overrides[0]}: this verb takes no configuration")


if __name__ == "__main__":
    sys.exit(main())
