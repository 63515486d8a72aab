"""Evaluations of the teacher while it trains."""

from __future__ import annotations

import jax
from ml_collections import ConfigDict

from dino_jax.data.pipeline import make_eval_dataset
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval.features import Frozen, extract
from dino_jax.eval.knn import knn_classify
from dino_jax.train_step import Recipe, TrainState


def frozen_teacher(config: ConfigDict, recipe: Recipe, state: TrainState) -> Frozen:
    """The teacher's backbone, copied whole to this process's first device."""

    def local(tree):
        return jax.tree.map(lambda x: jax.device_get(x), tree)

    variables = {"params": local(state.ema.teacher["backbone"])}
    if "backbone" in state.teacher_stats:
        variables["batch_stats"] = local(state.teacher_stats["backbone"])
    return Frozen(recipe.network.backbone, variables, config.data.mean, config.data.std)


def knn(config: ConfigDict, recipe: Recipe, state: TrainState) -> dict[str, float]:
    """`knn_top1` and `knn_top5` in percent of `eval.knn_test` among `eval.knn_train`."""
    options = config.eval
    model, sets = frozen_teacher(config, recipe, state), {}
    for key in ("knn_train", "knn_test"):
        if options[key] is None:
            raise UserError(f"eval.{key}: a labelled source is needed for eval.knn_every={options.knn_every}")
        batches = make_eval_dataset(
            open_source(options[key]),
            resize=options.resize,
            crop=options.crop,
            batch_size=options.batch_size,
            channels=config.model.in_chans,
            workers=config.run.workers,
            threads=config.run.threads,
        )
        features, labels = extract(model, batches)
        sets[key] = features, labels
    top1, top5 = knn_classify(
        *sets["knn_train"], *sets["knn_test"], ks=(options.knn_k,), temperature=options.knn_temperature
    )[options.knn_k]
    return {"knn_top1": top1, "knn_top5": top5}
