from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from dino_jax.errors import UserError
from dino_jax.eval.features import Cls, run
from dino_jax.eval.gnd import read_gnd
from dino_jax.eval.protocols import retrieval
from tests.eval.conftest import COLORS


@pytest.fixture
def oxford(tmp_path):
    """A miniature revisited Oxford: three scenes of one color each, images of several sizes, one junk."""
    rng = np.random.default_rng(0)
    root = tmp_path / "roxford5k"
    (root / "jpg").mkdir(parents=True)

    def save(name, color, size):
        pixels = np.clip(rng.normal(color, 12, (*size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "jpg" / f"{name}.jpg", quality=95)

    names, truth = [], []
    for scene, color in enumerate(COLORS):
        save(f"query_{scene}", color, (36, 36))
        for i, size in enumerate([(24, 40), (33, 33), (24, 40)]):
            names.append(f"scene_{scene}_{i}")
            save(names[-1], color, size)
        rows = np.arange(3) + 3 * scene
        truth.append({"bbx": [1.0, 2.0, 30.0, 40.0], "easy": rows[:1], "hard": rows[1:2], "junk": list(rows[2:])})
    content = {"imlist": names, "qimlist": [f"query_{s}" for s in range(3)], "gnd": truth}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


def small():
    config = retrieval.PROTOCOL.default_config()
    config.size, config.batch_size = 32, 2
    return config


@pytest.mark.parametrize("multiscale", [False, True])
def test_protocol(vit, oxford, multiscale, tmp_path):
    config = small()
    config.multiscale = multiscale
    figures = retrieval.evaluate(vit, str(oxford), config, workdir=str(tmp_path / "work"))
    assert (tmp_path / "work" / "retrieval-roxford5k.png").exists()
    assert figures["roxford5k_map_medium"] == pytest.approx(100)
    assert figures["roxford5k_map_hard"] == pytest.approx(100) == figures["roxford5k_mp@1_hard"]
    assert figures == retrieval.evaluate(vit, str(oxford / "roxford5k"), config)


def test_features_do_not_depend_on_the_batches(vit, oxford):
    paths = sorted((oxford / "roxford5k" / "jpg").iterdir())
    config = small()
    together = retrieval.multiscale_features(vit, paths, config, 32, (1.0, 0.5))
    for i in (0, 5):
        pixels = retrieval.shrink_to_fit(retrieval.read_image(paths[i]), 32)
        rows = [
            next(run(vit, Cls(), [{"image": retrieval.scaled(pixels, scale, 4)[None]}]))[0][0] for scale in (1.0, 0.5)
        ]
        np.testing.assert_allclose(together[i], np.mean(rows, axis=0), atol=1e-4)


def test_thumbnails_fit_and_never_grow():
    assert retrieval.shrink_to_fit(np.zeros((100, 50, 3), np.uint8), 40).shape == (40, 20, 3)
    assert retrieval.shrink_to_fit(np.zeros((10, 20, 3), np.uint8), 40).shape == (10, 20, 3)
    assert retrieval.scaled(np.zeros((33, 47, 3), np.uint8), 1.0, 8).shape == (32, 40, 3)
    assert retrieval.scaled(np.zeros((33, 47, 3), np.uint8), 0.5, 8).shape == (16, 16, 3)
    with pytest.raises(UserError, match="smaller than a patch"):
        retrieval.scaled(np.zeros((7, 47, 3), np.uint8), 1.0, 8)


def test_missing_data_is_named(vit, oxford, tmp_path):
    with pytest.raises(UserError, match="gnd_roxford5k"):
        retrieval.evaluate(vit, str(tmp_path / "nothing"), small())
    (oxford / "roxford5k" / "jpg" / "scene_1_0.jpg").unlink()
    with pytest.raises(UserError, match=r"scene_1_0\.jpg: no such file"):
        retrieval.evaluate(vit, str(oxford), small())


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


def test_gnd_files_cannot_run_anything(tmp_path):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps({"imlist": [], "qimlist": [], "gnd": Evil()}))
    with pytest.raises(UserError, match="not allowed"):
        read_gnd(path)
    path.write_bytes(b"cnumpy\ndtype\n(N(Vpwned\nI1\ndtb.")  # BUILD with (None, {"pwned": 1}) sets attributes
    with pytest.raises(UserError, match="state for a type"):
        read_gnd(path)
    path.write_bytes(b"\x80\x02garbage")
    with pytest.raises(UserError, match="not a ground-truth file"):
        read_gnd(path)
    path.write_bytes(pickle.dumps({"imlist": [], "qimlist": []}))
    with pytest.raises(UserError, match="'gnd'"):
        read_gnd(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", [list, np.array, lambda rows: np.array(rows, np.int32)])
def test_gnd_files_of_every_pickle_protocol(tmp_path, protocol, form):
    entry = {"bbx": [0.5], "easy": form([2, 0]), "hard": form([1]), "junk": form([])}
    entry["junk"] = np.array([], np.int64) if form is not list else []
    content = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [entry], "empty": b"", "number": np.float32(2)}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    (got,) = read_gnd(tmp_path / "gnd.pkl")["gnd"]
    assert got["easy"].tolist() == [2, 0] and got["hard"].tolist() == [1] and got["junk"].tolist() == []


def test_rows_outside_of_the_list_are_an_error(tmp_path):
    entry = {"easy": [3], "hard": [], "junk": []}
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps({"imlist": ["a"], "qimlist": ["q"], "gnd": [entry]}))
    with pytest.raises(UserError, match="beyond the 1 in imlist"):
        read_gnd(tmp_path / "gnd.pkl")
