"""How well the attention of the CLS token outlines objects: Jaccard similarity on VOC12 (paper section 4.2, figure 4).

For every head the mask keeps the patches that carry the largest share of the attention (60% in the text, 80% in
appendix D). Each object counts with the best head's intersection over union, and an image with the mean of its objects
(the author's description in issue 54 of the official repository).

Legend: B batch, H heads, N patches.
"""

from __future__ import annotations

import numpy as np


def attention_masks(attention: np.ndarray, mass: float) -> np.ndarray:
    """Boolean [..., N]: the fewest patches of each row of `attention` [..., N] that carry at least `mass` of its sum.

    As in the official `visualize_attention.py`, the smallest values are dropped while their running sum stays within
    1 - mass.
    """
    attention = np.asarray(attention, np.float64)
    order = np.argsort(attention, axis=-1, kind="stable")
    rising = np.take_along_axis(attention, order, -1)
    share = np.cumsum(rising / rising.sum(-1, keepdims=True), axis=-1)
    masks = np.zeros(attention.shape, bool)
    np.put_along_axis(masks, order, share > 1 - mass, axis=-1)
    return masks


def jaccard(mask: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of boolean masks [..., h, w], broadcast against each other; 0 where both are empty."""
    overlap = np.sum(mask & truth, axis=(-2, -1))
    union = np.sum(mask | truth, axis=(-2, -1))
    return overlap / np.maximum(union, 1)


def image_jaccard(masks: np.ndarray, objects: np.ndarray, ignore: int = 255) -> float:
    """Mean over the objects of one image of the best head's Jaccard similarity; NaN for an image without objects.

    Args:
      masks: bool [H, h, w], one per head.
      objects: int [h, w]; 0 is background, `ignore` belongs to nothing, every other number is one object.
    """
    numbers = np.setdiff1d(objects, (0, ignore))
    if not len(numbers):
        return float("nan")
    return float(np.mean([jaccard(masks, objects == number).max() for number in numbers]))


def enlarge(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks [..., h, w] at [..., height, width] by nearest neighbour (integer multiples repeat each patch)."""
    rows = np.arange(height) * masks.shape[-2] // height
    columns = np.arange(width) * masks.shape[-1] // width
    return masks[..., rows[:, None], columns]
