"""The verb `doctor`."""

from __future__ import annotations

import argparse

from dino_jax.cli import CONFIG, Verb, config_argument
from dino_jax.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser, help=f"{CONFIG}; checked with its data, batch and workdir")
    parser.add_argument("--workdir", metavar="DIR", help="of the run; is it writable?")
    parser.add_argument("--data", metavar="SOURCE", help="does it open, and can its first image be decoded?")
    parser.add_argument("--devices", type=int, metavar="N", help="of the run, if it is for another machine")
    parser.add_argument("--launch", choices=("tpu", "gke", "slurm", "hosts"), help="how the run is started from here")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.tools.doctor import doctor, report

    options = {"data": args.data, "workdir": args.workdir, "devices": args.devices, "launch": args.launch}
    if missing := report(doctor(config=args.config, overrides=overrides, **options)):
        raise UserError(f"missing: {', '.join(missing)}; the fix for each is above")


VERB = Verb("doctor", "find what a machine lacks before a run, with the fix", arguments, run)
