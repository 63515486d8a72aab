"""The verb `bench`."""

from __future__ import annotations

import argparse

from dino_jax.cli import CONFIG, Verb, config_argument, number, whole


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("input", "step", "loss"), help="the part to measure")
    config_argument(parser, help=f"{CONFIG}; default: the built-in defaults with a batch of 64 (CPU: a small model)")
    parser.add_argument("--source", help="input: images to read; default: generated JPEGs of 500 x 375 pixels")
    parser.add_argument(
        "--seconds", type=number(0.01, 86400), default=5.0, help="input: CPU time for each host part; default: 5"
    )
    parser.add_argument(
        "--steps", type=whole(0), help="train steps per rate; default: 10 (CPU: 3); input: 0 skips training"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.tools import bench

    bench.run(args.what, args.config, overrides, source=args.source, seconds=args.seconds, steps=args.steps)


VERB = Verb("bench", "measure the speed of each part of a run", arguments, run)
