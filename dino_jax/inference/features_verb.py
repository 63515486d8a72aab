"""The verb `features`."""

from __future__ import annotations

import argparse
import json

from dino_jax.cli import Verb, checkpoint_arguments, whole


def arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint_arguments(parser)
    parser.add_argument(
        "--images",
        required=True,
        metavar="SOURCE",
        help="a folder, an image, a pattern such as photos/*.jpg, or any other source",
    )
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="the file to write")
    parser.add_argument(
        "--resize", type=whole(0, 16384), metavar="PIXELS", help="shorter side; by default images keep their size"
    )
    parser.add_argument("--crop", type=whole(0, 16384), metavar="PIXELS", help="side of a center crop")
    parser.add_argument("--patches", action="store_true", help="write the patch tokens too")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    from dino_jax.inference.model import write_features
    from dino_jax.parallel import distributed

    distributed.check_alone("features")
    options = {"heads": args.heads, "resize": args.resize, "crop": args.crop, "patches": args.patches}
    print(json.dumps(write_features(args.checkpoint, args.images, args.out, **options)))


VERB = Verb("features", "compute features of images", arguments, run)
