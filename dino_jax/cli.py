"""The command line: `dino-jax VERB ...`.

A verb is one file, `dino_jax/FOLDER/NAME_verb.py`, next to what it runs, with a `VERB`. It imports what it runs inside
functions, so that `--help` is quick. This module finds the verbs by file name.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import logging
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from dino_jax import __version__
from dino_jax.errors import UserError, printable

CONFIG = "a file with get_config(), or the name of one in configs/, such as vit_s16"
LEAVING = 3.0  # seconds that the process may take to end after its work

_log = logging.getLogger(__name__)


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
    """Runs a command line; returns the exit status.

    0 only on success, 2 for bad input, 1 for another failure, 130 after Ctrl-C, 141 if the reader of the output went
    away (`| head`).

    The process's own command line (`argv` None) ends the process soon after, even if a thread is stuck in a read.
    """
    status = _run(argv)
    if argv is None:
        threading.Thread(target=_leave, args=(status,), name="leave", daemon=True).start()
    return status


def _leave(status: int) -> None:
    """Ends the process if it has not ended by itself: the interpreter would wait for all threads, however long."""
    time.sleep(LEAVING)
    os._exit(status)


def _run(argv: Sequence[str] | None) -> int:
    prepare()
    try:
        args, rest = _parser().parse_known_args(argv)
        overrides = [argument for argument in rest if argument.startswith("--config.")]
        if unknown := [argument for argument in rest if argument not in overrides]:
            raise UserError(f"unknown argument {unknown[0]!r}; see `dino-jax {args.verb} --help`")
        if overrides and "config" not in args:
            raise UserError(f"{overrides[0]}: the verb {args.verb} takes no configuration")
        refuse_empty(args)
        args.run(args, overrides)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        _say("dino-jax: interrupted")
        return 130
    except UserError as error:
        return _bad(str(error), error.status)
    except OSError as error:
        _log.debug("where it happened", exc_info=True)
        return _bad(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 0


def prepare() -> None:
    """Sets up logging and the standard streams, so that nothing that is printed can fail or control a terminal."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None or (number and stream is getattr(sys, f"__{name}__") and not _writable(number)):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)  # else the next file that is opened would take its place
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("dino_jax").setLevel(logging.INFO)


class _OneLine(logging.Formatter):
    """Formats a record on one `printable` line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def _bad(message: str, status: int = 2) -> int:
    _drop_output()
    _say(f"dino-jax: error: {printable(message)}")
    return status


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _writable(number: int) -> bool:
    """Whether a file descriptor is open for writing."""
    try:
        os.write(number, b"")
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _drop_output() -> None:
    """Drops what standard output still holds, if it cannot be written, so that the exit does not fail on it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def verbs() -> Iterator[Verb]:
    """Every verb of the package, in alphabetical order."""
    for file in sorted(pathlib.Path(__file__).parent.glob("*/*_verb.py"), key=lambda file: file.name):
        yield importlib.import_module(f"dino_jax.{file.parent.name}.{file.stem}").VERB


class _ArgumentParser(argparse.ArgumentParser):
    """Raises mistakes as `UserError`, instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see `{self.prog} --help`")


def refuse_empty(args: argparse.Namespace) -> None:
    """Raises `UserError` for an empty value, which as a path would be the current folder."""
    if empty := [name for name, value in vars(args).items() if value in ("", [])]:  # []: argparse's for "--"
        raise UserError(f"--{empty[0].replace('_', '-')}: must not be empty (an unset variable?)")


def _parser() -> argparse.ArgumentParser:
    parser = _ArgumentParser(
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
        except BrokenPipeError:
            _drop_output()
        parser.exit()


# Types of arguments, and arguments that several verbs share.


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number in a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {text[:40]!r}")
        return int(text)

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of an argument that is a number in a range, both ends included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be a number from {least:g} to {most:g}, not {text[:40]!r}")
        return value

    return parse


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
    parser.add_argument(
        "--heads", type=whole(1, 65536), metavar="H", help="attention heads, if the weight file does not say"
    )


def process_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `parallel.distributed`; launch/multihost.sh, SLURM and TPU pods need none of them."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="with several processes: where process 0 listens")
    parser.add_argument("--processes", type=whole(1), metavar="N", help="number of processes")
    parser.add_argument("--process", type=whole(0), metavar="I", help="number of this process, 0 to N - 1")
