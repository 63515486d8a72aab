"""Which patches of the global crops are masked for the iBOT term, drawn on the host.

Two ways to decide how much of a crop is masked:

- `spread` (DINOv2): in every group of `group` images a fixed number of the crops, `prob` of them, have a mask, and
  their ratios are spread over `ratio`: one in each of as many equal intervals. So a group masks at most a known number
  of patches, which is what bounds the buffer of masked patches on a device.
- `free` (iBOT): each crop has a mask with probability `prob` and a ratio uniform in `ratio`, on its own.

Legend: N patches of a crop, in a grid of rows x columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from dino_jax.errors import UserError

ASPECT = 0.3  # blocks are between this and its inverse as high as wide
TRIES = 10  # places tried for a block before a mask stays short
SMALLEST = 4  # DINOv2's least area of a block, in patches


class Masking(NamedTuple):
    """How masks are drawn: the keys of `config.objective.ibot`, and the grid of patches of a global crop."""

    grid: tuple[int, int]
    prob: float
    ratio: tuple[float, float]
    shape: str  # block, large_block or random
    spread: bool
    group: int  # images
    microbatches: int
    start_epoch: int

    @property
    def patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def edges(self) -> np.ndarray:
        """The bounds of the ratios' intervals in a group: one more than it has masked crops."""
        return np.linspace(*self.ratio, int(2 * self.group * self.prob) + 1)

    def capacity(self, images: int) -> int:
        """The most patches that `images` of one device and microbatch can have masked; never exceeded.

        Raises:
          UserError: the images are not whole groups.
        """
        if not self.spread:
            return 2 * images * int(self.patches * self.ratio[1])
        if images % self.group:
            raise UserError(
                f"objective.ibot.group={self.group}: {images} images of a device and microbatch are not whole groups; "
                f"set it to a divisor of {images}"
            )
        return images // self.group * sum(int(self.patches * most) for most in self.edges[1:])


def make_masking(config: Any) -> Masking | None:
    """The masks that a configuration asks for; None: none."""
    settings = config.objective.ibot
    if not settings.weight:
        return None
    patch = config.model.patch_size
    height, width = config.crops.global_size
    return Masking(
        (height // patch, width // patch),
        settings.mask_prob,
        tuple(settings.mask_ratio),
        settings.mask_shape,
        settings.mask_spread,
        settings.group,
        config.run.accum_steps,
        settings.start_epoch,
    )


def slots(masking: Masking, rows: np.ndarray, words: tuple[int, ...]) -> np.ndarray:
    """Which interval of ratios each crop has, int [rows, 2]; at least `len(edges) - 1`: the crop has no mask.

    `rows`: numbers in the global batch. `words`: seeds of the step. A group consists of images of one microbatch, and
    of one device if a device has whole groups.
    """
    a = masking.microbatches
    block, place = np.divmod(rows // a, masking.group)
    orders: dict[int, np.ndarray] = {}
    for group in np.unique(block * a + rows % a):
        orders[int(group)] = np.random.default_rng([*words, int(group)]).permutation(2 * masking.group)
    return np.array([orders[int(g)][2 * p : 2 * p + 2] for g, p in zip(block * a + rows % a, place, strict=True)])


def draw(masking: Masking, rng: np.random.Generator, slot: int) -> np.ndarray:
    """The mask of one crop, bool [N], row by row."""
    edges = masking.edges
    if masking.spread:
        if slot >= len(edges) - 1:
            return np.zeros(masking.patches, bool)
        ratio = rng.uniform(edges[slot], edges[slot + 1])
    else:
        ratio = rng.uniform(*masking.ratio) if rng.random() < masking.prob else 0.0
    asked = masking.patches * ratio
    if masking.shape == "random":
        return rng.permutation(masking.patches) < int(asked)
    if masking.shape == "block":
        return blocks(rng, masking.grid, int(asked), SMALLEST, masking.grid[0] // 2 * masking.grid[1]).ravel()
    return blocks(rng, masking.grid, asked, (min(masking.grid) // 3) ** 2, math.inf).ravel()


def example_masks(masking: Masking, images: int) -> np.ndarray:
    """Masks for a benchmark, bool [images, 2, N]."""
    places = slots(masking, np.arange(images), (0,))
    rng = np.random.default_rng(0)
    return np.array([[draw(masking, rng, int(slot)) for slot in pair] for pair in places])


def blocks(
    rng: np.random.Generator, grid: tuple[int, int], asked: float, smallest: float, largest: float
) -> np.ndarray:
    """A mask bool [rows, columns] of at most `asked` patches made of rectangles; rarely it is a few short of it.

    A rectangle's area is uniform between `smallest` and what is still missing or `largest`, its aspect log-uniform. It
    is smaller than the grid in both directions, and kept if it adds a patch and not too many; after ten failures the
    mask stays as it is. Official: `MaskingGenerator` of DINOv2, and iBOT's `loader.py`.
    """
    rows, columns = grid
    mask, count, slack = np.zeros(grid, bool), 0, -math.log(ASPECT)
    while count < asked:
        most = min(asked - count, largest)
        for _ in range(TRIES):
            area = rng.uniform(min(smallest, most), max(smallest, most))
            aspect = math.exp(rng.uniform(-slack, slack))
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high >= rows or wide >= columns:
                continue
            top, left = rng.integers(rows - high, endpoint=True), rng.integers(columns - wide, endpoint=True)
            place = mask[top : top + high, left : left + wide]
            added = place.size - int(place.sum())
            if 0 < added <= most:
                place[:] = True
                count += added
                break
        else:
            break
    return mask
