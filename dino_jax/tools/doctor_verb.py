"""The verb `doctor`."""

from __future__ import annotations

import argparse

from dino_jax.cli import CONFIG, Verb, config_argument, whole
from dino_jax.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    config_argument(parser, help=f"{CONFIG}; its data, batch and workdir are checked")
    parser.add_argument("--workdir", metavar="DIR", help="of the run; checked to be writable")
    parser.add_argument("--data", metavar="SOURCE", help="a data set to open; its first image is decoded")
    parser.add_argument(
        "--devices", type=whole(1), metavar="N", help="number of the run's devices, if on another machine"
    )
    parser.add_argument(
        "--launch", choices=("tpu", "gke", "slurm", "hosts"), help="how this machine will start the run"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.tools.doctor import doctor, report

    options = {"data": args.data, "workdir": args.workdir, "devices": args.devices, "launch": args.launch}
    if missing := report(doctor(config=args.config, overrides=overrides, **options)):
        raise UserError(f"missing: {', '.join(missing)}; the fix for each is above")


VERB = Verb("doctor", "check a machine before a run and name each fix", arguments, run)
