"""The verb `train`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, config_argument, process_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser, required=True)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="for checkpoints and metrics; local or gs://")
    process_arguments(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax import config_io
    from dino_jax.parallel import distributed
    from dino_jax.training.loop import train

    with distributed.session(args.coordinator, args.processes, args.process):
        train(config_io.load(args.config, overrides), args.workdir)


VERB = Verb("train", "train a model, or resume a run", arguments, run)
