"""`scenes`: embedded, procedurally rendered, labelled pictures with exact object masks, and short clips.

A picture shows one object of twelve classes on a cluttered and textured background that is on average as light as it.
A class is a shape, freely turned, with a texture in strong contrast; colours, position, area, tilt, aspect, shear,
frequency and phase are drawn alike for every class, and the clutter wears the same textures. Everything is a function
of (seed, split, index): nothing is on disk.

How hard it is was settled by two measures, neither of them of a self-supervised run: nearest neighbours on raw pixels
should fail on most pictures, and a small ViT should learn from some ten thousand labelled ones (docs/benchmarks.md has
the figures). Dark objects of faint texture taught it nothing; objects lighter than everything else gave themselves away
by their outline.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator

import numpy as np

from ..errors import UserError
from .example import Example
from .scenes_render import TEXTURES, Background, Pattern, Piece, Scene, enlarge, render
from .scenes_shapes import SHAPES, Dice, fragment, normalise

TILT = 0.4  # radians: how far an object's texture may lean from upright, however the object is turned
MIDDLE = (0.48, 0.52)  # lightness, of 0..1, in the middle between the two colours of an object or a background
CLASSES: dict[str, str] = dict(zip(SHAPES, TEXTURES, strict=True))  # shape -> the texture it wears


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
        """The pixels that the object owns, bool [H, W]: it covers at least half of them and no occluder does."""
        return render(self.scene(self._check(index)), self.height, self.width)[1] == 1

    def scene(self, index: int) -> Scene:
        """The description that is rendered: the object is the piece with owner 1."""
        dice = Dice(_generator(self.seed, self.split, "picture", self._check(index)))
        area = dice.log_uniform(0.25, 0.5)
        reach = max(0.06, 0.5 - 0.55 * math.sqrt(area))
        centre = 0.5 + dice.uniform(-reach, reach), 0.5 + dice.uniform(-reach, reach)
        thing = _object(dice, self.class_names[self.label(index)], area, centre, owner=1)
        behind = [_clutter(dice, 0.008, 0.05) for _ in range(dice.integer(2, 6))]
        before = [_clutter(dice, 0.004, 0.015) for _ in range(dice.integer(0, 2))]
        pieces = (*behind, thing, *before)
        return Scene(_background(dice), pieces, _light(dice), dice.uniform(0, 0.03), dice.integer(0, 2**32))

    def clip(self, index: int, frames: int = 12, objects: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """A clip of `objects` that move, turn and pass in front of one another, among clutter that stays.

        Returns the frames, uint8 [T, H, W, 3], and the index masks, uint8 [T, H, W]: 0 background, 1..objects, a higher
        number in front. A longer clip begins with the shorter one.
        """
        index, frames, objects = self._check(index), _integer("frames", frames, 1), _integer("objects", objects, 1, 255)
        dice = Dice(_generator(self.seed, self.split, "clip", index))
        background, light, noise = _background(dice), _light(dice), dice.uniform(0, 0.03)
        seed = dice.integer(0, 2**32)
        behind = [_clutter(dice, 0.008, 0.05) for _ in range(dice.integer(3, 8))]
        before = [_clutter(dice, 0.004, 0.015) for _ in range(dice.integer(0, 2))]
        actors = _actors(dice, objects)
        images, masks = [], []
        for t in range(frames):
            pieces = (*behind, *(_moved(*actor, t) for actor in actors), *before)
            image, owner = render(Scene(background, pieces, light, noise, seed + t), self.height, self.width)
            images.append(image)
            masks.append(owner)
        return np.stack(images), np.stack(masks)  # [T, H, W, 3], [T, H, W]

    def _check(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"scenes: index {index} is outside 0..{self.size - 1}")
        return index


def _integer(name: str, value: int, least: float = -math.inf, most: float = math.inf) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"scenes: {name} must be an integer, not {value!r}") from None
    if number < least:
        raise UserError(f"scenes: {name} must be at least {least}, not {number}")
    if number > most:
        raise UserError(f"scenes: {name} must be at most {most}, not {number}")
    return number


def _generator(seed: int, split: str, kind: str, index: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{split}:{kind}:{index}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


@functools.lru_cache(maxsize=4096)
def _block_order(seed: int, split: str, block: int) -> np.ndarray:
    return _generator(seed, split, "labels", block).permutation(len(CLASSES))


def _colour(lightness: float, chroma: float, hue: float) -> list[float]:
    """Red, green, blue in 0..1."""
    return [min(max(lightness + chroma * math.cos(hue + k * math.tau / 3), 0.02), 0.98) for k in (0, 2, 1)]


def _pair(
    dice: Dice, middle: tuple[float, float], contrast: tuple[float, float], chroma: tuple[float, float]
) -> np.ndarray:
    """Two colours of random hues, the lighter one first: float32 [2, 3, 1, 1]."""
    lightness, half = dice.uniform(*middle), dice.uniform(*contrast) / 2
    hue = dice.uniform(0, math.tau)
    first = _colour(lightness + half, dice.uniform(*chroma), hue)
    second = _colour(lightness - half, dice.uniform(*chroma), hue + dice.uniform(-1.5, 1.5))
    return np.array(first + second, np.float32).reshape(2, 3, 1, 1)


def _pattern(dice: Dice, texture: str | None, frequency: float, colours: np.ndarray, turn: float = math.pi) -> Pattern:
    """A texture, or any of them, shifted at random and turned by up to `turn`."""
    texture = texture or tuple(TEXTURES)[dice.integer(0, len(TEXTURES))]
    phase = dice.uniform(-0.5, 0.5), dice.uniform(-0.5, 0.5)
    return Pattern(texture, frequency, dice.uniform(-turn, turn), phase, dice.integer(0, 4096), colours)


def _matrix(dice: Dice, area: float) -> np.ndarray:
    """A linear map of determinant +-area: aspect, shear and reflection, then any rotation."""
    aspect, shear = math.exp(dice.uniform(-0.15, 0.15)), dice.uniform(-0.15, 0.15)
    stretch = np.array([[dice.sign() * aspect, shear], [0, 1 / aspect]]) * math.sqrt(area)
    return _rotation(dice.uniform(-math.pi, math.pi)) @ stretch


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def _object(dice: Dice, name: str, area: float, centre: tuple[float, float], owner: int) -> Piece:
    """The shape of a class in its texture, whose periods are alike in every picture and which stands nearly upright."""
    matrix = _matrix(dice, area)
    outline = normalise(SHAPES[name](dice))
    if matrix[0, 0] * matrix[1, 1] < matrix[0, 1] * matrix[1, 0]:  # a reflected outline, so that the texture is not
        matrix, outline = matrix * (-1, 1), tuple(polygon * (-1, 1) for polygon in outline)
    upright = math.atan2(matrix[1, 0], matrix[0, 0])
    frequency = dice.uniform(8, 10) * math.sqrt(area)
    pattern = _pattern(dice, CLASSES[name], frequency, _pair(dice, MIDDLE, (0.6, 0.8), (0.05, 0.3)), TILT)
    return Piece(outline, matrix, centre, pattern._replace(angle=pattern.angle + upright), owner)


def _clutter(dice: Dice, least: float, most: float) -> Piece:
    """A fragment of `least` to `most` of the picture's area, its texture as coarse as that of an object."""
    area = dice.log_uniform(least, most)
    frequency = dice.uniform(3, 5) * math.sqrt(area / 0.2)
    pattern = _pattern(dice, None, frequency, _pair(dice, (0.3, 0.55), (0.2, 0.5), (0.08, 0.3)))
    centre = dice.uniform(0, 1), dice.uniform(0, 1)
    return Piece(normalise(fragment(dice)), _matrix(dice, area), centre, pattern, owner=0)


def _background(dice: Dice) -> Background:
    noise = np.zeros((3, 3), np.float32)
    for n, strength in ((3, dice.uniform(0, 0.5)), (6, dice.uniform(0, 0.35)), (12, dice.uniform(0, 0.25)), (32, 0.12)):
        noise = enlarge(noise, n, n) + dice.rng.standard_normal((n, n), np.float32) * np.float32(strength)
    blobs = dice.rng.standard_normal((5, 5), np.float32) * np.float32(0.6) + np.float32(dice.uniform(-0.6, 0.6))
    pattern = _pattern(dice, None, dice.uniform(4, 12), _pair(dice, MIDDLE, (0.05, 0.15), (0.05, 0.35)))
    ramp = dice.uniform(-1.5, 1.5), dice.uniform(-1.5, 1.5)
    return Background(_pair(dice, MIDDLE, (0.3, 0.7), (0.05, 0.35)), ramp, noise, blobs, pattern)


def _light(dice: Dice) -> tuple[float, float]:
    strength, angle = dice.uniform(0, 0.35), dice.uniform(0, math.tau)
    return strength * math.cos(angle), strength * math.sin(angle)


def _actors(dice: Dice, objects: int) -> list[tuple[Piece, tuple[float, float], float]]:
    """Pieces with a velocity (fractions of the picture per frame) and a turn (radians per frame), apart at first."""
    names, actors = tuple(CLASSES), []
    centres: list[tuple[float, float]] = []
    for k in range(objects):
        candidates = [(dice.uniform(0.2, 0.8), dice.uniform(0.2, 0.8)) for _ in range(16)]
        centres.append(max(candidates, key=lambda p: min((math.dist(p, q) for q in centres), default=0.0)))
        name = names[dice.integer(0, len(names))]
        piece = _object(dice, name, dice.log_uniform(0.04, 0.1), centres[-1], owner=k + 1)
        speed, heading = dice.uniform(0.02, 0.05), dice.uniform(0, math.tau)
        velocity = speed * math.cos(heading), speed * math.sin(heading)
        actors.append((piece, velocity, dice.sign() * dice.uniform(0.05, 0.2)))
    return actors


def _moved(piece: Piece, velocity: tuple[float, float], turn: float, t: int) -> Piece:
    """The piece after t frames; its centre bounces 0.15 from the edges of the picture."""
    x, y = (0.85 - 0.7 * abs((p + t * v - 0.15) / 0.7 % 2 - 1) for p, v in zip(piece.centre, velocity, strict=True))
    return piece._replace(centre=(x, y), matrix=_rotation(turn * t) @ piece.matrix)
