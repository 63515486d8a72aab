"""The quick start: trains DINO on `scenes` on a CPU, in minutes, and shows what it learned in a table and an image.

    python -m dino_jax.tools.quickstart [--workdir=DIR] [--config=FILE|NAME] [--config.KEY=VALUE ...]

The last line is one JSON object: `knn_pixels knn_untrained knn_trained jaccard_untrained jaccard_trained` in percent,
and `seconds`. Training uses no labels; k-NN and the Jaccard index read labels and object masks afterwards.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dino_jax import config_io
from dino_jax.cli import config_argument, prepare, refuse_empty
from dino_jax.data.arrays_source import ArraySource
from dino_jax.data.pipeline import make_eval_dataset, steps_per_epoch
from dino_jax.data.scenes_source import Scenes
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.eval.features import ClsAttention, extract, run
from dino_jax.eval.protocols import voc
from dino_jax.eval.protocols.knn import knn_classify
from dino_jax.eval.results import optional
from dino_jax.inference.model import Model
from dino_jax.parallel import sharding
from dino_jax.show import drawing
from dino_jax.training import online
from dino_jax.training.loop import train
from dino_jax.training.step import jit_init_state, make_recipe

BANK, QUERIES, MASKED = 2400, 1200, 240  # images: k-NN bank (training set), k-NN queries, with object masks
SIZE, ATTENTION_SIZE = 96, 192  # image side in pixels: for k-NN, for attention (a finer grid)
SHOWN = 8  # images in attention.png


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, evaluates, prints; returns the exit status."""
    prepare()
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="dino_jax.tools.quickstart", description=about, allow_abbrev=False)
    parser.add_argument("--workdir", default="runs/quickstart", help="default: runs/quickstart")
    config_argument(parser, default="quickstart")
    args, overrides = parser.parse_known_args(argv)
    try:
        refuse_empty(args)
        figures = quickstart(config_io.load(args.config, overrides), pathlib.Path(args.workdir))
    except UserError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures))
    return 0


def quickstart(config: ConfigDict, workdir: pathlib.Path) -> dict[str, float]:
    """Trains in `workdir/run`, writes `workdir/attention.png`, prints the table, returns the figures."""
    start = time.monotonic()
    print(f"quickstart: drawing the images of {config.data.train}", file=sys.stderr)
    source = in_memory(open_source(config.data.train))
    state = train(config, workdir / "run", source=source)
    recipe = make_recipe(config, steps_per_epoch(len(source), config.batch_size))
    fresh = jit_init_state(recipe, sharding.make_mesh(config.run.mesh))
    trained, untrained = (online.frozen_teacher(config, recipe, s) for s in (state, fresh))
    print("quickstart: k-NN and attention, before and after training", file=sys.stderr)
    sets = [in_memory(source, BANK), in_memory(Scenes("test", QUERIES, image_size=SIZE))]
    masked = Scenes("test", MASKED, image_size=ATTENTION_SIZE)
    figures = {
        "knn_pixels": knn_pixels(config, sets),
        "knn_untrained": knn(config, untrained, sets),
        "knn_trained": knn(config, trained, sets),
        "jaccard_untrained": attention_jaccard(untrained, masked),
        "jaccard_trained": attention_jaccard(trained, masked),
    }
    with optional(str(workdir / "attention.png")):
        Image.fromarray(attention_image(trained, masked)).save(workdir / "attention.png")
    figures = {name: round(value, 1) for name, value in figures.items()}
    figures["seconds"] = round(time.monotonic() - start, 1)
    print(report(figures, workdir))
    return figures


def report(figures: dict[str, float], workdir: pathlib.Path) -> str:
    """The table of figures as text."""
    rows: list[tuple[str, float, float | None]] = [("raw pixels", figures["knn_pixels"], None)]
    rows += [(f"{k} network", figures[f"knn_{k}"], figures[f"jaccard_{k}"]) for k in ("untrained", "trained")]
    lines = [f"{'':20}{'k-NN top-1':>12}{'attention Jaccard':>20}"]
    for name, accuracy, overlap in rows:
        lines.append(f"{name:20}{accuracy:>11.1f}%" + (f"{overlap:>19.1f}%" if overlap is not None else f"{'-':>20}"))
    return "\n".join([*lines, f"{figures['seconds']:.0f} seconds; attention maps: {workdir / 'attention.png'}"])


def in_memory(source: Source, most: int | None = None) -> ArraySource:
    """A source, or its first `most` images, held in memory."""
    images, labels, _ = zip(*(source[i] for i in range(len(source))[:most]), strict=True)
    return ArraySource(np.stack(images), labels)


def knn_pixels(config: ConfigDict, sets: Sequence[ArraySource]) -> float:
    """20-NN top-1 in percent on raw pixels, centered on the training mean."""
    pixels = [s.images.reshape(len(s), -1).astype(np.float32) for s in sets]
    return _knn(config, *((p - pixels[0].mean(0), s.labels) for p, s in zip(pixels, sets, strict=True)))


def knn(config: ConfigDict, model: Model, sets: Sequence[ArraySource]) -> float:
    """20-NN top-1 in percent on the CLS feature."""
    return _knn(config, *(extract(model, make_eval_dataset(s, resize=0, crop=SIZE, batch_size=200)) for s in sets))


def _knn(config: ConfigDict, bank: tuple, queries: tuple) -> float:
    k = config.eval.knn_k
    return knn_classify(*bank, *queries, ks=(k,), temperature=config.eval.knn_temperature)[k][0]


def cls_attention(model: Model, scenes: Scenes) -> np.ndarray:
    """The last block's attention of CLS to the patches, for every image: float32 [B, H, h, w]."""
    batches = make_eval_dataset(scenes, resize=0, crop=scenes.height, batch_size=40)
    return np.concatenate([maps[batch["valid"]] for maps, batch in run(model, ClsAttention(), batches)])


def head_masks(attention: np.ndarray, side: int) -> np.ndarray:
    """Attention masks that keep 60% of the mass: [.., H, h, w] -> bool [.., H, side, side]."""
    flat = attention.reshape(*attention.shape[:-2], -1)
    return voc.enlarge(voc.attention_masks(flat, 0.6).reshape(attention.shape), side, side)


def attention_jaccard(model: Model, scenes: Scenes) -> float:
    """The best head's Jaccard index with the object mask, averaged over images, in percent."""
    masks = head_masks(cls_attention(model, scenes), scenes.height)  # [B, H, side, side]
    return 100 * float(np.mean([voc.jaccard(masks[i], scenes.mask(i)).max() for i in range(len(scenes))]))


def attention_image(model: Model, scenes: Scenes) -> np.ndarray:
    """An image table, rows of: image, attention of each head, best head's mask, object mask. uint8 [h, w, 3]."""
    shown = Scenes(scenes.split, SHOWN, image_size=scenes.height)
    attention = cls_attention(model, shown)
    masks = head_masks(attention, shown.height)
    rows = []
    for i in range(SHOWN):
        image, truth = np.asarray(shown[i].image), shown.mask(i)
        best = masks[i][voc.jaccard(masks[i], truth).argmax()]
        maps = [drawing.heat(head) for head in attention[i]]
        rows.append([image, *maps, drawing.outline(image, best), drawing.outline(image, truth)])
    titles = [f"head {h}" for h in range(attention.shape[1])]
    return drawing.table(rows, ["image", *titles, "best head, 60%", "object mask"])


if __name__ == "__main__":
    sys.exit(main())
