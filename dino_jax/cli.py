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
    return parser


def _verb(verbs: Any, name: str, run: Callable[..., None], description: str) -> argparse.ArgumentParser:
    epilog = "Any key of the configuration can be set with --config.KEY=VALUE."
    parser = verbs.add_parser(name, help=description, description=description, epilog=epilog, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax import config_io
    from dino_jax.train import train

    train(config_io.load(args.config, overrides), args.workdir)


if __name__ == "__main__":
    sys.exit(main())
