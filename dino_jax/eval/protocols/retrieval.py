"""Image retrieval on revisited Oxford and Paris (Radenovic et al. 2018; paper table 3).

As in the official `eval_image_retrieval.py`. Layout: `DATA/roxford5k` (or `rparis6k`) with `gnd_roxford5k.pkl` and
`jpg/NAME.jpg`, or that folder itself. Images are shrunk to fit a square (PIL's thumbnail), queries are not cropped to
their box, and features are compared by cosine similarity. Multiscale features are averages over scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.data.crops import to_pil
from dino_jax.errors import UserError
from dino_jax.eval.draw import GRAY, GREEN, RED, SHOWN, save_rows, tile
from dino_jax.eval.features import Cls, run
from dino_jax.eval.gnd import read_gnd
from dino_jax.eval.images import batches_by_size, linear_resize, parallel, read_image
from dino_jax.eval.protocol import THREADS, Data, Protocol
from dino_jax.eval.ranking import revisited_scores, similarity
from dino_jax.eval.results import optional
from dino_jax.inference.model import Model

PAPER = {"roxford5k": (224, False), "rparis6k": (512, True)}  # size, multiscale
SETS = tuple(PAPER)
SCALES = (1.0, 2**-0.5, 0.5)
SIDE = 128  # of a tile in retrieval-*.png, pixels

KEYS = {
    "size": Key(
        int,
        "side of the square that images are shrunk to fit; unset: Oxford 224, Paris 512",
        "[1, inf)",
        most=MOST_PIXELS,
    ),
    "multiscale": Key(
        bool, "average features at scales 1, 0.71 and 0.5; unset: Oxford False, Paris True, as in the paper"
    ),
    "batch_size": Key(32, "images per batch", "[1, inf)"),
    "threads": THREADS,
}


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """`<set>_map_medium`, `<set>_map_hard` and `<set>_mp@<k>_<level>` in percent, for every set in `data`.

    With a `workdir`, `retrieval-<set>.png` there shows some queries and their top results: easy and hard positives
    framed in green, junk in gray, wrong ones in red.
    """
    figures = {}
    for folder in _sets(data):
        truth = read_gnd(folder / f"gnd_{folder.name}.pkl")
        size, multiscale = PAPER[folder.name]
        size = size if config.size is None else config.size
        scales = SCALES if (multiscale if config.multiscale is None else config.multiscale) else (1.0,)
        paths = {key: [folder / "jpg" / f"{name}.jpg" for name in truth[key]] for key in ("qimlist", "imlist")}
        _check_files(folder / "jpg", paths)
        queries, database = (multiscale_features(model, p, config, size, scales) for p in paths.values())
        scores = similarity(database, queries)
        for level, level_scores in revisited_scores(scores, truth["gnd"]).items():
            figures[f"{folder.name}_map_{level}"] = 100 * level_scores["map"]
            figures |= {f"{folder.name}_mp@{k}_{level}": 100 * value for k, value in level_scores["mpk"].items()}
        if workdir is not None:
            path = epath.Path(workdir) / f"retrieval-{folder.name}.png"
            with optional(str(path)):
                _draw(path, paths, scores, truth["gnd"], len(model.mean))
    return figures


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=Data("roxford5k or rparis6k", lambda folder: any((folder / name).is_dir() for name in SETS)),
    published={
        "roxford5k_map_medium": {"S/16": 41.8},
        "roxford5k_map_hard": {"S/16": 13.7},
        "rparis6k_map_medium": {"S/16": 63.1},
        "rparis6k_map_hard": {"S/16": 34.4},
    },
    source="ImageNet weights; the paper, table 3: Oxford at 224 on one scale, Paris at 512 on three; "
    "with dino_vits16_gldv2 51.5 and 24.3, 75.3 and 51.6",
    order=40,
)


def _check_files(folder: epath.Path, paths: dict[str, list[epath.Path]]) -> None:
    """Raises `UserError` if the folder lacks an image, before the work."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    absent = [path for part in paths.values() for path in part if path.name not in held]
    if absent:
        raise UserError(f"{absent[0]}: no such file ({len(absent)} images of the list are missing)")


def _draw(path: epath.Path, paths: dict, scores: np.ndarray, truth: list[dict], channels: int) -> None:
    rows = []
    for query in np.unique(np.linspace(0, len(truth) - 1, SHOWN).astype(int)):
        row = [tile(read_image(paths["qimlist"][query], channels), SIDE)]
        for place in np.argsort(-scores[:, query], kind="stable")[:SHOWN]:
            good = place in truth[query]["easy"] or place in truth[query]["hard"]
            color = GREEN if good else GRAY if place in truth[query]["junk"] else RED
            row.append(tile(read_image(paths["imlist"][place], channels), SIDE, color))
        rows.append(row)
    save_rows(path, rows)


def _sets(data: str) -> list[epath.Path]:
    root = epath.Path(data)
    found = [root / name for name in SETS if (root / name / f"gnd_{name}.pkl").exists()]
    if root.name in SETS and (root / f"gnd_{root.name}.pkl").exists():
        found.append(root)
    if not found:
        raise UserError(f"--data={data}: it has neither roxford5k/gnd_roxford5k.pkl nor rparis6k/gnd_rparis6k.pkl")
    return found


def multiscale_features(
    model: Model, paths: Sequence[epath.Path], config: ConfigDict, size: int, scales: Sequence[float]
) -> np.ndarray:
    """Features [N, D] of images shrunk to fit a square of side `size`, averaged over `scales`."""
    patch = model.backbone.patch_size or 1

    def load(path: epath.Path) -> np.ndarray:
        return shrink_to_fit(read_image(path, len(model.mean)), size)

    total = np.zeros(1)
    for scale in scales:
        images = (scaled(pixels, scale, patch) for pixels in parallel(load, paths, config.threads))
        rows = [(out, b["index"]) for out, b in run(model, Cls(), batches_by_size(images, config.batch_size))]
        order = np.argsort(np.concatenate([index for _, index in rows]))
        total = total + np.concatenate([out for out, _ in rows])[order]
    return total / len(scales)


def shrink_to_fit(pixels: np.ndarray, size: int) -> np.ndarray:
    """PIL's `thumbnail` into a square of side `size`, Lanczos; smaller images are unchanged."""
    planes = to_pil(pixels)
    for plane in planes:
        plane.thumbnail((size, size), Image.Resampling.LANCZOS)
    arrays = [np.asarray(plane) for plane in planes]
    return arrays[0] if pixels.shape[-1] == 3 else np.stack(arrays, axis=-1)


def scaled(pixels: np.ndarray, scale: float, patch: int) -> np.ndarray:
    """Resizes [h, w, C] as torch's `interpolate(scale_factor=scale)`, cropped at right and bottom to whole patches."""
    if scale != 1:
        height, width = (int(side * scale) for side in pixels.shape[:2])
        pixels = linear_resize(pixels, height, width, 1 / scale)
    height, width = (side // patch * patch for side in pixels.shape[:2])
    if not height or not width:
        raise UserError(f"an image of {pixels.shape[0]} x {pixels.shape[1]} pixels is smaller than a patch of {patch}")
    return pixels[:height, :width]
