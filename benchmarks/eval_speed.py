"""Speed and memory of k-NN and label propagation, compared with plain formulations on the same machine.

    python benchmarks/eval_speed.py knn [--train=50000] [--test=10000] [--width=384]
    python benchmarks/eval_speed.py propagation [--patch=8]

Prints one JSON object. `knn` alternates between `eval.protocols.knn.nearest` with k = 200 and the official script's
chunked similarity matrix with `topk` in torch. `propagation` takes one 480 x 832 frame with 8 context frames: seconds,
and the peak memory that XLA plans for it and for the whole masked affinity.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dino_jax.eval import propagation
from dino_jax.eval.protocols.knn import nearest


def knn(args: argparse.Namespace) -> dict[str, float]:
    import torch

    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(n, args.width)).astype(np.float32) for n in (args.train, args.test))
    torch_train, torch_test = (torch.nn.functional.normalize(torch.from_numpy(x)) for x in (train, test))

    def official() -> None:
        for chunk in torch_test.split(max(len(torch_test) // 100, 1)):
            (chunk @ torch_train.T).topk(200)

    nearest(test, train, 200)  # compiles
    seconds: dict[str, list[float]] = {"dino_jax": [], "torch": []}
    for _ in range(args.repeats):
        for name, work in (("dino_jax", lambda: nearest(test, train, 200)), ("torch", official)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {f"{name}_seconds": round(min(values), 2) for name, values in seconds.items()}


def label_propagation(args: argparse.Namespace) -> dict[str, float]:
    count, height, width, features, labels = 8, 480 // args.patch, 832 // args.patch, 384, 4
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    step = propagation._compiled(mesh, height, width, 12, 5, 0.1)
    shapes = [(count, height, width, features), (height, width, features), (count, height, width, labels)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    ours: Any = jax.jit(step).lower(*inputs, jax.ShapeDtypeStruct((count,), bool)).compile().memory_analysis()
    theirs: Any = jax.jit(whole_affinity).lower(*inputs).compile().memory_analysis()
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    run = lambda: jax.block_until_ready(step(*arrays, np.ones(count, bool)))  # noqa: E731
    run()
    start = time.perf_counter()
    run()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "megabytes": round(ours.temp_size_in_bytes / 2**20, 1),
        "naive_megabytes": round(theirs.temp_size_in_bytes / 2**20, 1),
        "share": round(ours.temp_size_in_bytes / theirs.temp_size_in_bytes, 4),
    }


def whole_affinity(sources, target, labels):
    """The official formulation: all patch pairs, then a locality mask; [n, h, w, D], [h, w, D] -> [h, w, L]."""
    count, height, width, _ = sources.shape
    rows, columns = (jnp.abs(jnp.subtract.outer(jnp.arange(s), jnp.arange(s))) <= 12 for s in (height, width))
    near = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, -1)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    target = unit(target).reshape(height * width, -1)
    affinity = jnp.exp(jnp.einsum("qd,nsd->nsq", target, unit(sources).reshape(count, height * width, -1)) / 0.1)
    affinity = (affinity * near.T).reshape(-1, height * width)
    least = jax.lax.top_k(affinity.T, 5)[0].min(-1)
    affinity = jnp.where(affinity < least, 0, affinity)
    affinity = affinity / affinity.sum(0)
    return (affinity.T @ labels.reshape(-1, labels.shape[-1])).reshape(height, width, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("knn", "propagation"))
    for name, value in (("train", 50_000), ("test", 10_000), ("width", 384), ("patch", 8), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    print(json.dumps(knn(args) if args.what == "knn" else label_propagation(args)))


if __name__ == "__main__":
    main()
