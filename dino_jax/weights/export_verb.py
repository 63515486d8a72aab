"""The verb `export`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, checkpoint_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument("--format", required=True, help="official, timm, hf, stablehlo or onnx")
    parser.add_argument("--out", required=True, metavar="PATH", help="a file or folder")
    parser.add_argument("--attention", action="store_true", help="programs also return the last block's attention")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.weights.exporter import export_weights

    options = {"format": args.format, "heads": args.heads, "attention": args.attention}
    print(export_weights(args.checkpoint, args.out, **options))


VERB = Verb("export", "write a checkpoint in the format of another library", arguments, run)
