"""The two DAVIS 2017 measures of video object segmentation (Perazzi et al. 2016; Pont-Tuset et al. 2017).

J, the region similarity, is intersection over union. F, the boundary accuracy, is the harmonic mean of precision and
recall of boundary pixels, which match within a radius of 0.8% of the image's diagonal. Each has a mean over frames, a
recall (share of frames above 0.5) and a decay (first quarter minus last quarter), averaged over all objects of all
videos. As in the official semi-supervised track, the first and last frames do not count, and void pixels (255) are
background.

Legend: T frames, h height, w width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy import ndimage

from dino_jax.errors import UserError

VOID = 255
TOLERANCE = 0.008  # of the diagonal


def region(
    prediction: Bool[np.ndarray, "*frames h w"], truth: Bool[np.ndarray, "*frames h w"]
) -> Float[np.ndarray, "*frames"]:
    """J of boolean masks [..., h, w]; 1 if both are empty."""
    overlap = np.sum(prediction & truth, axis=(-2, -1))
    union = np.sum(prediction | truth, axis=(-2, -1))
    return np.where(union == 0, 1.0, overlap / np.maximum(union, 1))


def boundary(
    prediction: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"], tolerance: float = TOLERANCE
) -> float:
    """F of two boolean masks [h, w]; 1 if neither has a boundary, 0 if only one has."""
    radius = np.ceil(tolerance * np.hypot(*truth.shape))
    edges, true_edges = contour(prediction), contour(truth)
    if not edges.any() or not true_edges.any():
        return float(edges.any() == true_edges.any())
    either = edges | true_edges  # crop to their bounding box
    rows, columns = (np.flatnonzero(either.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    edges, true_edges = edges[box], true_edges[box]
    precision = np.mean(_near(true_edges, radius)[edges])
    recall = np.mean(_near(edges, radius)[true_edges])
    return float(2 * precision * recall / max(precision + recall, np.finfo(float).tiny))


def contour(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Boundary pixels of a boolean mask [h, w]: they differ from their right, lower or lower right neighbor.

    The last row and column are compared only within themselves. Boundaries are shifted half a pixel to the origin.
    """
    right, below, both = (mask[:-1, 1:] ^ mask[:-1, :-1], mask[1:, :-1] ^ mask[:-1, :-1], mask[1:, 1:] ^ mask[:-1, :-1])
    edges = np.zeros(mask.shape, bool)
    edges[:-1, :-1] = right | below | both
    edges[-1, :-1] = mask[-1, 1:] ^ mask[-1, :-1]
    edges[:-1, -1] = mask[1:, -1] ^ mask[:-1, -1]
    return edges


def _near(edges: np.ndarray, radius: float) -> np.ndarray:
    """Pixels within `radius` of an edge pixel: dilation by a disk."""
    return ndimage.distance_transform_edt(~edges) <= radius


def statistics(values: Float[np.ndarray, " T"]) -> dict[str, float]:
    """`mean`, `recall` and `decay` of one object's values [T] over frames."""
    edges = np.floor(np.linspace(0, len(values) - 1, 5) + 0.5).astype(int)  # quarters share border frames
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return {
        "mean": float(np.mean(values)),
        "recall": float(np.mean(values > 0.5)),
        "decay": float(np.mean(first) - np.mean(last)),
    }


def score_video(
    prediction: Integer[np.ndarray, "..."], truth: Integer[np.ndarray, "..."], name: str = "video"
) -> list[dict[str, dict[str, float]]]:
    """`{"J": statistics, "F": statistics}` per object of the first frame, from label maps [T, h, w].

    Raises:
      UserError: unequal shapes, fewer than three frames, or no object in the first frame.
    """
    if prediction.shape != truth.shape:
        raise UserError(f"{name}: predictions {prediction.shape} and annotations {truth.shape} differ in shape")
    if len(truth) < 3:
        raise UserError(f"{name}: {len(truth)} annotated frames; at least 3 are needed: first and last do not count")
    truth = np.where(truth == VOID, 0, truth)
    objects = []
    for number in np.setdiff1d(truth[0], 0):
        masks, true_masks = prediction[1:-1] == number, truth[1:-1] == number
        f = np.array([boundary(*pair) for pair in zip(masks, true_masks, strict=True)])
        objects.append({"J": statistics(region(masks, true_masks)), "F": statistics(f)})
    if not objects:
        raise UserError(f"{name}: the first annotation has no object")
    return objects


def summarize(objects: Iterable[dict[str, dict[str, float]]]) -> dict[str, float]:
    """The benchmark's figures in percent over all objects: J&F, then mean, recall and decay of J and F."""
    objects = list(objects)
    table = {
        f"{measure}_{figure}": 100 * float(np.mean([entry[measure][figure] for entry in objects]))
        for measure in "JF"
        for figure in ("mean", "recall", "decay")
    }
    return {"J&F_mean": (table["J_mean"] + table["F_mean"]) / 2, **table}
