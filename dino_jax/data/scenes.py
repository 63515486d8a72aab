"""`scenes`: embedded, procedurally rendered, labelled pictures with exact object masks, and short clips.

A picture shows one object of twelve classes on a cluttered, textured background. A class is a shape with a texture;
colours, polarity, position, area, rotation, aspect, shear, frequency and phase are drawn alike for every class, and the
clutter wears the same textures. Everything is a function of (seed, split, index): nothing is on disk.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator

import numpy as np

from ..errors import UserError
from .example import Example
from .scenes_render import (
    SHAPES,
    TEXTURES,
    Background,
    Outline,
    Pattern,
    Piece,
    Scene,
    fragment,
    normalise,
    render,
)

CLASSES: dict[str, str] = dict(zip(SHAPES, TEXTURES, strict=True))  # shape -> the texture it wears
_HUES = np.array([0, -2 * np.pi / 3, 2 * np.pi / 3])  # of red, green, blue


class Scenes:
    """A source of `size` pictures, uint8 [H, W, 3]; `image_size` is one number or (height, width).

    The scene at an index depends on neither `size` nor `image_size`. Splits of different names share no picture.
    """

    class_names = tuple(CLASSES)

    def __init__(
        self, split: str = "train", size: int = 20000, seed: int = 0, image_size: int | tuple[int, int] = 64
    ) -> None:
        if not isinstance(split, str) or not split:
            raise UserError(f"scenes: split must be a name such as train or test, not {split!r}")
        self.split, self.seed, self.size = split, _integer("seed", seed), _integer("size", size, 1)
        sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if len(sides) != 2:
            raise UserError(f"scenes: image_size must be one number or (height, width), not {image_size!r}")
        self.height, self.width = (_integer("image_size", side, 8) for side in sides)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        index = self._check(index)
        image, _ = render(self.scene(index), self.height, self.width)
        return Example(image, self.label(index), f"{self.split}-{index:06d}-{self.class_names[self.label(index)]}")

    def label(self, index: int) -> int:
        """The class of a picture. Every twelve pictures in a row hold each class once."""
        block, place = divmod(self._check(index), len(CLASSES))
        return int(_block_order(self.seed, self.split, block)[place])

    def mask(self, index: int) -> np.ndarray:
        """The pixels of which the object shows on at least half, bool [H, W]; what occludes it is not in it."""
        return render(self.scene(self._check(index)), self.height, self.width)[1] == 1

    def scene(self, index: int) -> Scene:
        """The description that is rendered: the object is the piece with owner 1."""
        rng = _generator(self.seed, self.split, "picture", index)
        area = math.exp(rng.uniform(math.log(0.1), math.log(0.42)))
        centre = 0.5 + rng.uniform(-1, 1, 2) * max(0.06, 0.5 - 0.75 * math.sqrt(area))
        thing = _object(rng, self.class_names[self.label(index)], area, centre, owner=1)
        behind = [_clutter(rng, 0.008, 0.06) for _ in range(rng.integers(3, 8))]
        before = [_clutter(rng, 0.004, 0.02) for _ in range(rng.integers(0, 3))]
        return Scene(_background(rng), (*behind, thing, *before), _light(rng), rng.uniform(0, 0.03), index)

    def clip(self, index: int, frames: int = 12, objects: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """A clip of `objects` that move, turn and pass in front of one another, before and behind clutter that stays.

        Returns the frames, uint8 [T, H, W, 3], and the index masks, uint8 [T, H, W]: 0 background, 1..objects, a higher
        number in front. A longer clip begins with the shorter one.
        """
        index, frames, objects = self._check(index), _integer("frames", frames, 1), _integer("objects", objects, 1)
        rng = _generator(self.seed, self.split, "clip", index)
        background, light, noise = _background(rng), _light(rng), rng.uniform(0, 0.03)
        behind = [_clutter(rng, 0.008, 0.05) for _ in range(rng.integers(3, 8))]
        before = [_clutter(rng, 0.004, 0.015) for _ in range(rng.integers(0, 2))]
        actors = _actors(rng, objects)
        images, masks = [], []
        for t in range(frames):
            pieces = (*behind, *(_moved(*actor, t) for actor in actors), *before)
            image, owner = render(Scene(background, pieces, light, noise, t), self.height, self.width)
            images.append(image)
            masks.append(owner)
        return np.stack(images), np.stack(masks)  # [T, H, W, 3], [T, H, W]

    def _check(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"scenes: index {index} is outside 0..{self.size - 1}")
        return index


def _integer(name: str, value: int, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"scenes: {name} must be an integer, not {value!r}") from None
    if least is not None and number < least:
        raise UserError(f"scenes: {name} must be at least {least}, not {number}")
    return number


def _generator(seed: int, split: str, kind: str, index: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{split}:{kind}:{index}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


@functools.lru_cache(maxsize=4096)
def _block_order(seed: int, split: str, block: int) -> np.ndarray:
    return _generator(seed, split, "labels", block).permutation(len(CLASSES))


def _colour(lightness: float, chroma: float, hue: float) -> np.ndarray:
    return np.clip(lightness + chroma * np.cos(hue + _HUES), 0.02, 0.98).astype(np.float32)


def _pair(rng: np.random.Generator, contrast: tuple[float, float], chroma: tuple[float, float]) -> np.ndarray:
    """Two colours, float32 [2, 3], of random hues, the lighter one first or second."""
    middle, half, hue = rng.uniform(0.3, 0.7), rng.uniform(*contrast) / 2, rng.uniform(0, 2 * np.pi)
    half *= rng.choice((-1, 1))
    other = hue + rng.uniform(-1.5, 1.5)
    return np.stack([_colour(middle + half, rng.uniform(*chroma), hue), _colour(middle - half, rng.uniform(*chroma), other)])


def _pattern(rng: np.random.Generator, texture: str, frequency: float, colours: np.ndarray) -> Pattern:
    return Pattern(
        texture, frequency, rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, 2), int(rng.integers(4096)), colours
    )


def _matrix(rng: np.random.Generator, area: float, mirrored: bool) -> np.ndarray:
    """A linear map of determinant +-area: aspect and shear, then rotation."""
    aspect, shear, angle = math.exp(rng.uniform(-0.2, 0.2)), rng.uniform(-0.2, 0.2), rng.uniform(0, 2 * np.pi)
    stretch = np.array([[aspect, shear], [0, 1 / aspect]]) * ((-1 if mirrored else 1), 1)
    return math.sqrt(area) * _rotation(angle) @ stretch


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def _object(rng: np.random.Generator, name: str, area: float, centre: np.ndarray, owner: int) -> Piece:
    outline: Outline = normalise(SHAPES[name](rng))
    pattern = _pattern(rng, CLASSES[name], rng.uniform(3.0, 5.0), _pair(rng, (0.3, 0.6), (0.08, 0.3)))
    return Piece(outline, _matrix(rng, area, bool(rng.integers(2))), centre, pattern, owner)


def _clutter(rng: np.random.Generator, least: float, most: float) -> Piece:
    """A fragment of `least` to `most` of the picture's area, in any of the textures."""
    area = math.exp(rng.uniform(math.log(least), math.log(most)))
    texture = tuple(TEXTURES)[rng.integers(len(TEXTURES))]
    frequency = rng.uniform(3.0, 5.0) * math.sqrt(area / 0.2)  # the stripes of clutter are as wide as those of an object
    pattern = _pattern(rng, texture, frequency, _pair(rng, (0.2, 0.6), (0.08, 0.3)))
    return Piece(normalise(fragment(rng)), _matrix(rng, area, False), rng.uniform(0, 1, 2), pattern, 0)


def _background(rng: np.random.Generator) -> Background:
    octaves = tuple(
        rng.standard_normal((n, n), dtype=np.float32) * np.float32(strength)
        for n, strength in ((3, rng.uniform(0, 0.5)), (6, rng.uniform(0, 0.35)), (12, rng.uniform(0, 0.25)), (32, 0.12))
    )
    blobs = rng.standard_normal((5, 5), dtype=np.float32) * 0.6 + np.float32(rng.uniform(-0.6, 0.6))
    texture = tuple(TEXTURES)[rng.integers(len(TEXTURES))]
    pattern = _pattern(rng, texture, rng.uniform(4.0, 12.0), _pair(rng, (0.05, 0.25), (0.02, 0.18)))
    return Background(_pair(rng, (0.1, 0.35), (0.02, 0.18)), rng.uniform(-0.8, 0.8, 2), octaves, blobs, pattern)


def _light(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    return rng.uniform(0.0, 0.35) * np.array([math.cos(angle), math.sin(angle)])


def _actors(rng: np.random.Generator, objects: int) -> list[tuple[Piece, np.ndarray, float]]:
    """Pieces with a velocity (fractions of the picture per frame) and a turn (radians per frame), apart at first."""
    names, actors, centres = tuple(CLASSES), [], []
    for k in range(objects):
        candidates = rng.uniform(0.2, 0.8, (16, 2))
        gaps = [min((np.hypot(*(p - q)) for q in centres), default=1.0) for p in candidates]
        centres.append(candidates[int(np.argmax(gaps))])
        piece = _object(rng, names[rng.integers(len(names))], rng.uniform(0.05, 0.12), centres[-1], owner=k + 1)
        heading = rng.uniform(0, 2 * np.pi)
        velocity = rng.uniform(0.02, 0.05) * np.array([math.cos(heading), math.sin(heading)])
        actors.append((piece, velocity, rng.choice((-1, 1)) * rng.uniform(0.05, 0.2)))
    return actors


def _moved(piece: Piece, velocity: np.ndarray, turn: float, t: int) -> Piece:
    """The piece after t frames; it bounces where its centre is 0.15 from the picture's edge."""
    low, span = 0.15, 0.7
    folded = np.mod(piece.centre + t * velocity - low, 2 * span)
    return piece._replace(
        centre=low + np.minimum(folded, 2 * span - folded), matrix=_rotation(turn * t) @ piece.matrix
    )
