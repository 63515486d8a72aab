"""The verb `eval`."""

from __future__ import annotations

import argparse

from dino_jax.cli import Verb, checkpoint_arguments, process_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("protocol", metavar="PROTOCOL", help="one of the protocols below, or all")
    checkpoint_arguments(parser)
    parser.add_argument("--data", required=True, help="the protocol's source or folder")
    parser.add_argument(
        "--config", metavar="FILE|NAME", help="the protocol's configuration: a file, or a name such as finetune/cifar10"
    )
    parser.add_argument("--workdir", metavar="DIR", help="folder for features, drawings and resumable state")
    parser.add_argument("--out", metavar="FILE.json", help="file for the figures as JSON")
    process_arguments(parser)
    parser.epilog = "--config.KEY=VALUE sets any key of the protocol; `dino-jax eval PROTOCOL --help` lists them."


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.eval.run import evaluate
    from dino_jax.parallel import distributed

    options = {"heads": args.heads, "workdir": args.workdir, "out": args.out}
    call = {name: getattr(args, name) for name in ("protocol", "checkpoint", "data")}
    with distributed.session(args.coordinator, args.processes, args.process):
        distributed.check_same(call | {"overrides": " ".join(overrides)})
        distributed.check_devices()
        evaluate(args.protocol, args.checkpoint, args.data, config_file=args.config, overrides=overrides, **options)


def more_help(args: argparse.Namespace) -> str:
    """The list of protocols, or the keys of the one named before `--help`."""
    from dino_jax.eval.protocol import help_of

    return help_of(args.protocol)


VERB = Verb("eval", "evaluate a checkpoint by one protocol or all", arguments, run, more_help)
