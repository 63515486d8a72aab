"""The verb `import`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, whole
from dino_jax.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a weight file, a folder of them, or a released name such as dino_vits16")
    parser.add_argument("--out", required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument("--heads", type=whole(1, 65536), metavar="H", help="attention heads, if the file does not say")
    parser.add_argument("--key", metavar="NAME", help="the state dict to take, such as model_ema, if there are several")
    parser.add_argument("--prefix", metavar="TEXT", help="what the backbone's names begin with, such as teacher.")
    parser.add_argument("--grid", metavar="H,W", help="rows and columns of a position table that is not square")
    parser.add_argument("--from", dest="from_file", metavar="FILE", help="a local copy of the released file")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.training.start import import_weights

    choice = {"key": args.key, "prefix": args.prefix, "grid": _grid(args.grid)}
    print(import_weights(args.file, args.out, heads=args.heads, from_file=args.from_file, **choice))


def _grid(text: str | None) -> tuple[int, int] | None:
    sides = [int(side) for side in (text or "").split(",") if side.isdecimal() and len(side) < 5 and int(side) > 0]
    if text is not None and (len(sides) != 2 or text.count(",") != 1):
        raise UserError(f"--grid={text}: give rows and columns, such as --grid=4,16")
    return (sides[0], sides[1]) if text is not None else None


VERB = Verb("import", "convert released or other weights to a checkpoint", arguments, run)
