"""The verb `bench`."""

from __future__ import annotations

import argparse

from dino_jax.cli import CONFIG, Verb, config_argument


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("input", "step", "loss"), help="the part to measure")
    config_argument(parser, help=f"{CONFIG}; without it, the defaults with a batch of 64 (a CPU: a small model)")
    parser.add_argument("--source", help="input: images to read; without it, generated JPEGs of 500 x 375 pixels")
    parser.add_argument("--seconds", type=float, default=5.0, help="input: CPU time for each host part; default: 5")
    parser.add_argument("--steps", type=int, help="for each rate; default: 10 (a CPU: 3); input: 0 for no training")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.tools import bench

    bench.run(args.what, args.config, overrides, source=args.source, seconds=args.seconds, steps=args.steps)


VERB = Verb("bench", "measure how fast the parts of a run are here", arguments, run)
