"""Online evaluation of the teacher: k-NN accuracy and attention Jaccard, each at its own interval."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.eval.features import source_features
from dino_jax.eval.masks import open_masks
from dino_jax.eval.protocols import voc
from dino_jax.eval.protocols.knn import knn_classify
from dino_jax.eval.splits import in_classes_of
from dino_jax.inference.model import Model
from dino_jax.training.step import Recipe, TrainState

Figures = dict[str, float]


class Evaluations:
    """The evaluations that `config.eval` asks for during training.

    Raises:
      UserError: at once, not at the first interval: data not given or missing, or a backbone without
        attention for `eval.voc_every`.
    """

    def __init__(self, config: ConfigDict, recipe: Recipe, epoch_steps: int):
        self.config, self.recipe = config, recipe
        # Interval in steps, the name of one of its figures, evaluation.
        self.jobs: list[tuple[int, str, Callable[[Model], Figures]]] = []
        self.sources: dict[str, Source] = {}  # by configuration key
        options = config.eval
        if options.knn_every:
            _require(options, "knn_every", "knn_train", "knn_test")
            train, test = open_source(options.knn_train), open_source(options.knn_test)
            test = in_classes_of(train, test, f"eval.knn_test={options.knn_test}")
            self.sources = {"eval.knn_train": train, "eval.knn_test": test}
            self.jobs.append((options.knn_every * epoch_steps, "knn_top1", self.knn))
        if options.voc_every:
            _require(options, "voc_every", "voc_data")
            if recipe.network.backbone.patch_size is None:
                raise UserError("eval.voc_every: this backbone has no attention to evaluate: set it to 0")
            open_masks(options.voc_data, "val", config.model.in_chans)
            self.jobs.append((options.voc_every * epoch_steps, "voc_jaccard_60", self.voc))

    @property
    def names(self) -> list[str]:
        """The name of one figure of each evaluation."""
        return [name for _, name, _ in self.jobs]

    def due(self, step: int, recorded: Collection[str] = ()) -> bool:
        """Whether anything is evaluated after this step, besides evaluations whose figure is `recorded`."""
        return any(step % steps == 0 and name not in recorded for steps, name, _ in self.jobs)

    def run(self, step: int, state: TrainState, recorded: Collection[str] = ()) -> Figures:
        """The results of all evaluations due, in percent, besides those `recorded`."""
        model = frozen_teacher(self.config, self.recipe, state)
        figures: Figures = {}
        for steps, name, job in self.jobs:
            if step % steps == 0 and name not in recorded:
                figures |= job(model)
        return figures

    def knn(self, model: Model) -> Figures:
        """`knn_top1` and `knn_top5` of `eval.knn_test` among `eval.knn_train`."""
        options = self.config.eval
        view = ConfigDict({key: options[key] for key in ("resize", "crop", "batch_size")})
        view.workers = self.config.run.workers
        specs = options.knn_train, options.knn_test
        train, test = (source_features(model, *pair, view) for pair in zip(self.sources.values(), specs, strict=True))
        k = min(options.knn_k, len(train[0]))
        top1, top5 = knn_classify(*train, *test, ks=(k,), temperature=options.knn_temperature)[k]
        return {"knn_top1": top1, "knn_top5": top5}

    def voc(self, model: Model) -> Figures:
        """`voc_jaccard_60` and `voc_jaccard_80` on `eval.voc_data`."""
        settings = voc.PROTOCOL.default_config()
        settings.size = self.config.eval.voc_size
        figures = voc.evaluate(model, self.config.eval.voc_data, settings)
        return {f"voc_{key}": value for key, value in figures.items()}


def _require(options: ConfigDict, reason: str, *keys: str) -> None:
    for key in keys:
        if options[key] is None:
            raise UserError(
                f"eval.{key}: is needed for eval.{reason}={options[reason]}: name a source, or set that to 0"
            )


def frozen_teacher(config: ConfigDict, recipe: Recipe, state: TrainState) -> Model:
    """The teacher's backbone as a `Model`, with its whole weights copied to this host."""

    def local(x: Any) -> Any:
        whole = x.is_fully_addressable or x.is_fully_replicated
        return jax.device_get(x) if whole else multihost_utils.process_allgather(x, tiled=True)

    variables = {"params": jax.tree.map(local, state.ema.teacher["backbone"])}
    if "backbone" in state.teacher_stats:
        variables["batch_stats"] = jax.tree.map(local, state.teacher_stats["backbone"])
    return Model(config, variables, recipe.network.backbone)
