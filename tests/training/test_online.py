"""k-NN and attention Jaccard of the teacher between steps, in the metrics of a run."""

from __future__ import annotations

import pytest

from dino_jax.errors import UserError
from dino_jax.training.loop import train
from dino_jax.training.metrics import read_metrics
from tests.tiny import tiny_config

SCENES = "scenes:val?size=12&image_size=32"


def test_both_are_written_at_their_intervals(tmp_path):
    config = tiny_config()
    config.epochs = 2  # of four steps
    config.eval.update({"knn_every": 1, "knn_train": SCENES, "knn_test": SCENES, "resize": 0, "crop": 32})
    config.eval.update({"voc_every": 2, "voc_data": SCENES, "voc_size": 32})
    train(config, tmp_path)
    records = {record["step"]: record for record in read_metrics(tmp_path) if "knn_top1" in record}
    assert sorted(records) == [4, 8]
    assert records[4]["knn_top1"] >= 100 / 12 and 0 <= records[4]["knn_top5"] <= 100
    assert "voc_jaccard_60" not in records[4]
    assert 0 < records[8]["voc_jaccard_60"] < 100 and 0 < records[8]["voc_jaccard_80"] < 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knn_every": 1}, r"eval\.knn_train: is needed for eval\.knn_every=1"),
        ({"voc_every": 5}, r"eval\.voc_data: is needed for eval\.voc_every=5"),
        ({"voc_every": 5, "voc_data": "absent"}, "absent: neither a VOC folder"),
        ({"knn_every": 1, "knn_train": "absent", "knn_test": SCENES}, "absent: no such file"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(settings, message, tmp_path):
    config = tiny_config()
    config.eval.update(settings)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())  # the workdir is still free for the fixed configuration


def test_no_attention_no_jaccard(tmp_path):
    config = tiny_config(name="resnet18", embed_dim=None, depth=None, heads=None, small_stem=True)
    config.eval.update({"voc_every": 1, "voc_data": SCENES})
    with pytest.raises(UserError, match="no attention"):
        train(config, tmp_path)
