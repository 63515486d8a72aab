"""The verb `plan`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, config_argument, whole


def arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser, required=True)
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:4x4x4, cpu:8, gpu; several by commas")
    parser.add_argument(
        "--images", type=whole(1), metavar="N", help="images in the data set; default: data.train's or ImageNet's"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax import config_io
    from dino_jax.tools import plan

    plan.print_plans(config_io.load(args.config, overrides), args.topology, args.images)


VERB = Verb("plan", "compile a run for hardware you do not have: memory, FLOPs, days", arguments, run)
