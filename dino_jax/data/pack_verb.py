"""The verb `pack`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, number, whole


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder, list, arrays, tar:PATTERN, tfds:NAME:SPLIT, ...: any source")
    parser.add_argument("--out", required=True, metavar="DIR", help="for the shards; local or gs://")
    parser.add_argument(
        "--shorter-side", type=whole(0, 65536), default=0, metavar="PIXELS", help="shrink larger images to this"
    )
    parser.add_argument("--channels", type=whole(1, 65536), default=3, metavar="C", help="of the images; default: 3")
    parser.add_argument(
        "--shard-size", type=whole(1), default=1000, metavar="N", help="images in a shard; default: 1000"
    )
    parser.add_argument("--workers", type=whole(1, 1024), metavar="N", help="processes; default: one for each core")
    parser.add_argument(
        "--max-bad-share",
        type=number(0, 1),
        default=0.01,
        metavar="X",
        help="a larger share of unreadable images is an error",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.data.pack import pack, report

    options = ("shorter_side", "channels", "shard_size", "workers", "max_bad_share")
    print(report(args.out, pack(args.source, args.out, **{name: getattr(args, name) for name in options})))


VERB = Verb("pack", "pack a data set into ArrayRecord shards, or resume packing", arguments, run)
