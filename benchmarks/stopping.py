"""Cost of agreeing at each step whether to stop: an all-reduce of one number, or JAX's preemption service.

    python benchmarks/stopping.py                     two processes on this machine
    launch/supervise.py --local 2 -- python benchmarks/stopping.py --child      the same; --hosts A,B for other machines

The step is small (a gradient through three 512 x 512 matrices, 256 rows), so that the added time shows.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
STEPS, ROUNDS = 150, 3


def measure() -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils
    from ml_collections import ConfigDict

    from dino_jax.parallel import distributed, sharding

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    place = distributed.find_place(None, None, None, os.environ)
    assert place is not None
    jax.distributed.initialize(place.coordinator, place.processes, place.process, cluster_detection_method="deactivate")
    mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "model": 1}))
    everywhere = sharding.replicated(mesh)
    rows = sharding.to_devices(np.ones((len(sharding.process_rows(256, mesh)), 512), np.float32), mesh, 256)

    @jax.jit
    def step(weights, x):
        gradient = jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w @ w @ w)))(weights)
        return jax.lax.with_sharding_constraint(weights - gradient, everywhere), jnp.sum(gradient)

    weights = jax.device_put(np.eye(512, dtype=np.float32), everywhere)
    stopping, done = distributed.StopTogether(mesh), 0

    def milliseconds(kind: str) -> float:
        nonlocal weights, done
        pending: list = []
        start = time.perf_counter()
        for _ in range(STEPS):
            weights, metric = step(weights, rows)
            done += 1
            if kind == "service":
                multihost_utils.reached_preemption_sync_point(done)
            pending.append((metric, stopping.vote(0) if kind == "all-reduce" else 0))
            if len(pending) > 2:
                metric, votes = pending.pop(0)
                float(metric)
                stopping.count(votes)
        jax.block_until_ready(weights)
        return (time.perf_counter() - start) / STEPS * 1e3

    kinds = ("nothing", "all-reduce", "service")
    found = [[milliseconds(kind) for kind in kinds] for _ in range(ROUNDS + 1)][1:]
    if place.process == 0:
        for kind, column in zip(kinds, zip(*found, strict=True), strict=True):
            print(f"{kind:10} {min(column):7.3f} ms a step at best, {sorted(column)[ROUNDS // 2]:7.3f} in the middle")


if __name__ == "__main__":
    if "--child" in sys.argv:
        measure()
    else:
        command = [
            sys.executable,
            str(ROOT / "launch" / "supervise.py"),
            "--local",
            "2",
            "--",
            sys.executable,
            __file__,
        ]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        sys.exit(subprocess.run([*command, "--child"], env=environment).returncode)
