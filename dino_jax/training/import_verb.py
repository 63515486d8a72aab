"""The verb `import`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, whole


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a .pth or .safetensors file, or a released name such as dino_vits16")
    parser.add_argument("--out", required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--heads", type=whole(1, 65536), metavar="H", help="attention heads, if the file does not say")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="a local copy of the released file")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.training.start import import_weights

    print(import_weights(args.file, args.out, heads=args.heads, from_file=args.from_file))


VERB = Verb("import", "convert released or other weights to a checkpoint", arguments, run)
