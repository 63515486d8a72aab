"""One changed byte in any file of a step: the same numbers come back, or the step counts as damaged."""

from __future__ import annotations

import json
import random

import jax
import numpy as np
import pytest
import tensorstore

from dino_jax.errors import UserError
from dino_jax.weights import checkpoint

CONFIG = '{"lr": 0.001, "epochs": 300}'


@pytest.fixture
def steps(tmp_path):
    """Two steps, what they hold, and the tree to restore into."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def tree(seed):
        rng = np.random.default_rng(seed)
        arrays = {"kernel": rng.normal(size=(24, 3)).astype(np.float32), "count": np.int32(seed)}
        return {"params": {"backbone": jax.tree.map(lambda x: jax.device_put(x, place), arrays)}}

    trees = {1: tree(1), 2: tree(2)}
    with checkpoint.Checkpointer(tmp_path, keep=2, asynchronous=False) as checkpoints:
        for step, content in trees.items():
            checkpoints.save(step, {"teacher": content}, CONFIG)
    return trees, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), trees[1])


def restored(folder, trees, wanted) -> int:
    """The step that is restored, and must be equal to what was saved."""
    with checkpoint.Checkpointer(folder) as checkpoints:
        step = checkpoints.latest_step()
        got = checkpoints.restore(step, {"teacher": wanted})["teacher"]
        open_ = checkpoint.restore(folder, step, {"teacher": checkpoint.abstract(folder, step, "teacher")})["teacher"]
    for other in (got, open_):
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), other, trees[step]))
    assert json.loads(checkpoint.restore_config(folder, step)) == json.loads(CONFIG)
    return step


def test_a_changed_byte_anywhere(tmp_path, steps, caplog):
    rng, damaged = random.Random(0), set()
    for path in sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for _ in range(4):
            data, place = bytearray(whole), rng.randrange(len(whole))
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            caplog.clear()
            step = restored(tmp_path, *steps)
            assert len(caplog.records) == (step == 1), (path, place)
            if step == 1:
                assert f"{tmp_path / '2'}" in caplog.text
                assert "using step 1 instead" in caplog.text
                damaged.add(path.relative_to(tmp_path / "2").parts[0])
        path.write_bytes(whole)
    assert restored(tmp_path, *steps) == 2
    assert {"teacher", "config", "format", "checksums"} <= damaged


def test_a_changed_number_in_the_configuration(tmp_path, steps):
    (file,) = [path for path in (tmp_path / "2" / "config").iterdir() if "lr" in path.read_text()]
    file.write_text(file.read_text().replace("0.001", "0.002"))
    with pytest.raises(UserError, match="config: checksum mismatch"):
        checkpoint.restore_config(tmp_path, 2)
    assert checkpoint.resolve(tmp_path) == (tmp_path, 1)


@pytest.mark.parametrize("shape", [[1 << 40, 3], [1 << 20, 1 << 12]])
def test_a_shape_that_the_files_cannot_hold(tmp_path, steps, shape, caplog):
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/2/teacher/"}).result()
    key = "params.backbone.kernel/.zarray"
    described = json.loads(store.read(key).result().value)
    store.write(key, json.dumps(described | {"shape": shape, "chunks": shape}).encode()).result()
    assert restored(tmp_path, *steps) == 1
    assert "cannot hold" in caplog.text
