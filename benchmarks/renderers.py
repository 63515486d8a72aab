"""Does a run learn as well with crops rendered on the device as with PIL's? Same seeds and budget, k-NN of each.

    python benchmarks/renderers.py [--config=configs/quickstart.py] [--seeds=3] [--workdir=runs/renderers]
        [--config.KEY=VALUE ...]

Trains once for each seed and renderer and prints a line for each run, then one JSON object: k-NN top-1 (20 neighbors,
`scenes`: 2,400 and 1,200 images) of each run, mean and standard deviation for each renderer, and the mean over the
seeds of the difference with its standard error. Runs that are finished in --workdir are not trained again, and
interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import numpy as np
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.data.pipeline import steps_per_epoch
from dino_jax.data.scenes_source import Scenes
from dino_jax.data.sources import Source, open_source
from dino_jax.tools.quickstart import BANK, QUERIES, SIZE, in_memory, knn
from dino_jax.training import online
from dino_jax.training.loop import train
from dino_jax.training.step import make_recipe

RENDERERS = ("host", "device")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--workdir", default="runs/renderers", type=pathlib.Path)
    parser.add_argument("--bank", type=int, default=BANK, help="images among which neighbors are looked for")
    parser.add_argument("--queries", type=int, default=QUERIES)
    args, overrides = parser.parse_known_args()
    config = config_io.load(args.config, overrides)
    source = in_memory(open_source(config.data.train))
    counts = {"train": args.bank, "test": args.queries}
    sets = [in_memory(Scenes(split, count, image_size=SIZE)) for split, count in counts.items()]
    found: dict[str, list[float]] = {render: [] for render in RENDERERS}
    for seed in range(args.seeds):
        for render in RENDERERS:
            begin = time.monotonic()
            top1 = one_run(config, source, sets, seed, render, args.workdir / f"{render}-{seed}")
            found[render].append(round(top1, 2))
            print(f"seed {seed}  {render:<6}  k-NN {top1:5.2f}%  {time.monotonic() - begin:6.0f} s", flush=True)
    print(json.dumps(summary(found) | {"steps": config.epochs * steps_per_epoch(len(source), config.batch_size)}))


def one_run(config: ConfigDict, source: Source, sets: list, seed: int, render: str, workdir: pathlib.Path) -> float:
    """k-NN top-1 in percent of one run's teacher."""
    config = config.copy_and_resolve_references()
    config.seed, config.data.render, config.data.canvas = seed, render, SIZE
    state = train(config, workdir, source=source)
    recipe = make_recipe(config, steps_per_epoch(len(source), config.batch_size))
    return knn(config, online.frozen_teacher(config, recipe, state), sets)


def summary(found: dict[str, list[float]]) -> dict[str, object]:
    """Means, deviations, and how far apart the renderers are."""
    result: dict[str, object] = {f"knn_{render}": values for render, values in found.items()}
    for render, values in found.items():
        result[f"mean_{render}"] = round(float(np.mean(values)), 2)
        result[f"deviation_{render}"] = round(float(np.std(values, ddof=1)), 2) if len(values) > 1 else None
    difference = np.subtract(found["device"], found["host"])
    result["difference"] = round(float(difference.mean()), 2)
    if len(difference) > 1:
        result["standard_error"] = round(float(difference.std(ddof=1) / np.sqrt(len(difference))), 2)
    return result


if __name__ == "__main__":
    main()
