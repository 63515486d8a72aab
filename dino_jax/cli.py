"""The command line: `dino-jax VERB ...`.

A verb is one file, `dino_jax/FOLDER/NAME_verb.py`, next to what it runs, with a `VERB`. It imports what it runs inside
functions, so that `--help` is quick. This module finds the verbs by file name.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dino_jax import __version__
from dino_jax.errors import UserError

CONFIG = "a file with get_config(), or the name of one in configs/, such as vit_s16"


class Verb(NamedTuple):
    """A verb of the command line: its arguments and what it runs.

    A verb with `--config` also takes overrides, `--config.KEY=VALUE`.
    """

    name: str
    help: str  # one line, without a period
    arguments: Callable[[argparse.ArgumentParser], object]  # adds them to the parser
    run: Callable[[argparse.Namespace, list[str]], object]  # takes the arguments and the overrides
    more: Callable[[argparse.Namespace], str] | None = None  # more help, for the arguments before `--help`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0 only on success, 1 or 2 for an error, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("dino_jax").setLevel(logging.INFO)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [argument for argument in rest if argument.startswith("--config.")]
    if unknown := [argument for argument in rest if argument not in overrides]:
        parser.error(f"unknown argument {unknown[0]!r}; see `dino-jax {args.verb} --help`")
    try:
        if overrides and "config" not in args:
            raise UserError(f"{overrides[0]}: the verb {args.verb} takes no configuration")
        args.run(args, overrides)
    except UserError as error:
        print(f"dino-jax: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("dino-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def verbs() -> Iterator[Verb]:
    """Every verb of the package, in alphabetical order."""
    for file in sorted(pathlib.Path(__file__).parent.glob("*/*_verb.py"), key=lambda file: file.name):
        yield importlib.import_module(f"dino_jax.{file.parent.name}.{file.stem}").VERB


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dino-jax",
        description="DINO for JAX.",
        epilog="`dino-jax VERB --help` describes a verb.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dino-jax {__version__}")
    choices = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in verbs():
        about = f"{verb.help[0].upper()}{verb.help[1:]}."
        one = choices.add_parser(verb.name, help=verb.help, description=about, allow_abbrev=False, add_help=False)
        one.add_argument("-h", "--help", action=_Print, text=_help_text(one, verb), help="show this help and exit")
        verb.arguments(one)
        one.set_defaults(run=verb.run)
    return parser


def _help_text(parser: argparse.ArgumentParser, verb: Verb) -> Callable[[argparse.Namespace], str]:
    def text(args: argparse.Namespace) -> str:
        more = verb.more(args) if verb.more is not None else ""
        return f"{parser.format_help()}\n{more}".strip()

    return text


class _Print(argparse.Action):
    """An option that prints `text(arguments before it)` and exits."""

    def __init__(self, option_strings: list[str], dest: str, text: Callable[[argparse.Namespace], str], help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        try:
            print(self._text(namespace), flush=True)
        except UserError as error:
            parser.error(str(error))
        except BrokenPipeError:  # `| head`; nothing is left to be flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


# Arguments that several verbs share.


def config_argument(parser: argparse.ArgumentParser, *, help: str = CONFIG, **options: Any) -> None:
    """Adds `--config` of a training run and `--help-config`, which lists its keys; `options` go to `add_argument`."""
    parser.add_argument("--config", metavar="FILE|NAME", help=help, **options)
    parser.add_argument("--help-config", action=_Print, text=_all_keys, help="list every key of a configuration")
    parser.epilog = "--config.KEY=VALUE sets any key of the configuration; --help-config lists them."


def _all_keys(_: argparse.Namespace) -> str:
    from dino_jax import config_io

    return config_io.describe()


def checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--checkpoint`, which `weights.load.open_weights` takes, and `--heads`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CKPT",
        help="a run's workdir, a step's folder, a weight file, or a released name such as dino_vits16",
    )
    parser.add_argument("--heads", type=int, metavar="H", help="attention heads, if the weight file does not say")


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `parallel.distributed`; launch/multihost.sh, SLURM and TPU pods need none of them."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="with several processes: where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="number of this process, 0 to N - 1")
