"""Two processes with two devices each give the same figures as one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

WORKER = """
import json, sys
import jax
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if process >= 0:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import jax.numpy as jnp
import numpy as np
from dino_jax.eval.protocols import finetune, knn, linear
from dino_jax.config import default
from dino_jax.data.sources import open_source
from dino_jax.eval.features import source_features
from dino_jax.inference.model import Model
from dino_jax.models import ViT

backbone = ViT(embed_dim=16, depth=2, heads=2, patch_size=4, image_size=(16, 16))
shapes = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
rng = np.random.default_rng(0)
variables = jax.tree.map(lambda x: rng.normal(x.ndim == 1, 0.1, x.shape).astype(np.float32), shapes)
model = Model(default(), variables, backbone)
small = {"resize": 16, "crop": 16, "batch_size": 8}
figures = {}
config = knn.PROTOCOL.default_config()
config.update(small | {"k": (3, 9)})
figures |= knn.evaluate(model, folder, config)
features, labels = source_features(model, open_source(folder + "/train"), "train", config)
figures |= {"features": float(np.abs(features).sum()), "labels": labels.tolist()}
config = linear.PROTOCOL.default_config()
config.update(small | {"features": ("1+avg",), "lrs": (0.1,), "epochs": 2})
figures |= {f"linear_{key}": value for key, value in linear.evaluate(model, folder, config).items()}
config = finetune.PROTOCOL.default_config()
config.update(small | {"size": 16, "epochs": 1, "repeats": 1, "warmup_epochs": 0})
figures |= {f"finetune_{key}": value for key, value in finetune.evaluate(model, folder, config).items()}
print("FIGURES", json.dumps(figures), flush=True)
"""


def figures_of(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=600)
    lines = [line for line in out.splitlines() if line.startswith("FIGURES")]
    assert process.returncode == 0 and lines, err[-3000:]
    return json.loads(lines[0].removeprefix("FIGURES "))


@pytest.mark.extra
def test_two_processes_equal_one(class_folders):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    start = lambda number: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", WORKER, str(number), str(port), str(class_folders)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    alone = figures_of(start(-1))
    for found in [figures_of(process) for process in [start(0), start(1)]]:
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            if isinstance(value, str):
                assert found[key] == value
            else:
                np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)
