"""`scenes`: procedurally rendered, labeled images with exact object masks, and short clips.

An image shows one object of twelve classes on a cluttered, textured background of the same average lightness. A class
is a shape in any rotation with a texture in strong contrast. Colors, position, area, tilt, aspect, shear, frequency and
phase have the same distribution for every class, and the clutter has the same textures. Everything is a function of
(seed, split, index): nothing is on disk.

The difficulty was set by two measures, neither from self-supervised training: nearest neighbors on raw pixels fail on
most images, and a small ViT learns from about ten thousand labeled ones (docs/benchmarks.md has the figures). It
learned nothing from dark objects with faint texture; objects lighter than everything else were easy by their outline.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import re

import numpy as np

from ..errors import UserError, did_you_mean
from .example import Example, Kind
from .scenes_render import TEXTURES, Background, Pattern, Piece, Scene, enlarge, render
from .scenes_shapes import SHAPES, Dice, fragment, normalize

SPLITS = ("train", "val", "test")  # of a spec; `Scenes` takes any name
TILT = 0.4  # radians: how far an object's texture may lean from upright, however the object is turned
MIDDLE = (0.48, 0.52)  # range of the mean lightness (0..1) of the two colors of an object or a background
CLASSES: dict[str, str] = dict(zip(SHAPES, TEXTURES, strict=True))  # shape -> its texture


class Scenes:
    """A source of `size` images, uint8 [H, W, 3]; `image_size` is one number or (height, width).

    The scene at an index depends on neither `size` nor `image_size`. Splits of different names share no image.
    """

    class_names = tuple(CLASSES)

    def __init__(
        self, split: str = "train", size: int = 20000, seed: int = 0, image_size: int | tuple[int, int] = 64
    ) -> None:
        if not isinstance(split, str) or not split:
            raise UserError(f"scenes: split must be a name such as train or test, not {split!r}")
        self.split, self.seed, self.size = split, _integer("seed", seed), _integer("size", size, 1, 2**31 - 1)
        sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
        if len(sides) != 2:
            raise UserError(f"scenes: image_size must be one number or (height, width), not {image_size!r}")
        self.height, self.width = (_integer("image_size", side, 8, 4096) for side in sides)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        index = self._check(index)
        image, _ = render(self.scene(index), self.height, self.width)
        return Example(image, self.label(index), f"{self.split}-{index:06d}-{self.class_names[self.label(index)]}")

    def label(self, index: int) -> int:
        """The class of an image. Every twelve images in a row hold each class once."""
        block, place = divmod(self._check(index), len(CLASSES))
        return int(_block_order(self.seed, self.split, block)[place])

    def mask(self, index: int) -> np.ndarray:
        """The object mask, bool [H, W]: pixels of which the object covers at least half, and no occluder does."""
        return render(self.scene(self._check(index)), self.height, self.width)[1] == 1

    def scene(self, index: int) -> Scene:
        """The description that is rendered: the object is the piece with owner 1."""
        dice = Dice(_generator(self.seed, self.split, "picture", self._check(index)))
        area = dice.log_uniform(0.25, 0.5)
        reach = max(0.06, 0.5 - 0.55 * math.sqrt(area))
        center = 0.5 + dice.uniform(-reach, reach), 0.5 + dice.uniform(-reach, reach)
        thing = _object(dice, self.class_names[self.label(index)], area, center, owner=1)
        behind = [_clutter(dice, 0.008, 0.05) for _ in range(dice.integer(2, 6))]
        before = [_clutter(dice, 0.004, 0.015) for _ in range(dice.integer(0, 2))]
        pieces = (*behind, thing, *before)
        return Scene(_background(dice), pieces, _light(dice), dice.uniform(0, 0.03), dice.integer(0, 2**32))

    def clip(self, index: int, frames: int = 12, objects: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """A clip of `objects` objects that move, turn and occlude one another, among clutter that stays.

        Returns the frames, uint8 [T, H, W, 3], and the object masks, uint8 [T, H, W]: 0 background, 1..objects; higher
        numbers are in front. A longer clip begins with the shorter one.
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


def _color(lightness: float, chroma: float, hue: float) -> list[float]:
    """Red, green, blue in 0..1."""
    return [min(max(lightness + chroma * math.cos(hue + k * math.tau / 3), 0.02), 0.98) for k in (0, 2, 1)]


def _pair(
    dice: Dice, middle: tuple[float, float], contrast: tuple[float, float], chroma: tuple[float, float]
) -> np.ndarray:
    """Two colors of random hues, the lighter one first: float32 [2, 3, 1, 1]."""
    lightness, half = dice.uniform(*middle), dice.uniform(*contrast) / 2
    hue = dice.uniform(0, math.tau)
    first = _color(lightness + half, dice.uniform(*chroma), hue)
    second = _color(lightness - half, dice.uniform(*chroma), hue + dice.uniform(-1.5, 1.5))
    return np.array(first + second, np.float32).reshape(2, 3, 1, 1)


def _pattern(dice: Dice, texture: str | None, frequency: float, colors: np.ndarray, turn: float = math.pi) -> Pattern:
    """A texture, or any of them, shifted at random and turned by up to `turn`."""
    texture = texture or tuple(TEXTURES)[dice.integer(0, len(TEXTURES))]
    phase = dice.uniform(-0.5, 0.5), dice.uniform(-0.5, 0.5)
    return Pattern(texture, frequency, dice.uniform(-turn, turn), phase, dice.integer(0, 4096), colors)


def _matrix(dice: Dice, area: float) -> np.ndarray:
    """A linear map of determinant +-area: aspect, shear and reflection, then any rotation."""
    aspect, shear = math.exp(dice.uniform(-0.15, 0.15)), dice.uniform(-0.15, 0.15)
    stretch = np.array([[dice.sign() * aspect, shear], [0, 1 / aspect]]) * math.sqrt(area)
    return _rotation(dice.uniform(-math.pi, math.pi)) @ stretch


def _rotation(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, -s], [s, c]])


def _object(dice: Dice, name: str, area: float, center: tuple[float, float], owner: int) -> Piece:
    """The shape of a class with its texture, of about the same period in every image and nearly upright."""
    matrix = _matrix(dice, area)
    outline = normalize(SHAPES[name](dice))
    if matrix[0, 0] * matrix[1, 1] < matrix[0, 1] * matrix[1, 0]:  # a reflected outline, so that the texture is not
        matrix, outline = matrix * (-1, 1), tuple(polygon * (-1, 1) for polygon in outline)
    upright = math.atan2(matrix[1, 0], matrix[0, 0])
    frequency = dice.uniform(8, 10) * math.sqrt(area)
    pattern = _pattern(dice, CLASSES[name], frequency, _pair(dice, MIDDLE, (0.6, 0.8), (0.05, 0.3)), TILT)
    return Piece(outline, matrix, center, pattern._replace(angle=pattern.angle + upright), owner)


def _clutter(dice: Dice, least: float, most: float) -> Piece:
    """A fragment of `least` to `most` of the image's area, with a texture as coarse as an object's."""
    area = dice.log_uniform(least, most)
    frequency = dice.uniform(3, 5) * math.sqrt(area / 0.2)
    pattern = _pattern(dice, None, frequency, _pair(dice, (0.3, 0.55), (0.2, 0.5), (0.08, 0.3)))
    center = dice.uniform(0, 1), dice.uniform(0, 1)
    return Piece(normalize(fragment(dice)), _matrix(dice, area), center, pattern, owner=0)


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
    """Pieces with a velocity (fractions of the image per frame) and a turn (radians per frame), spread out at first."""
    names, actors = tuple(CLASSES), []
    centers: list[tuple[float, float]] = []
    for k in range(objects):
        candidates = [(dice.uniform(0.2, 0.8), dice.uniform(0.2, 0.8)) for _ in range(16)]
        centers.append(max(candidates, key=lambda p: min((math.dist(p, q) for q in centers), default=0.0)))
        name = names[dice.integer(0, len(names))]
        piece = _object(dice, name, dice.log_uniform(0.04, 0.1), centers[-1], owner=k + 1)
        speed, heading = dice.uniform(0.02, 0.05), dice.uniform(0, math.tau)
        velocity = speed * math.cos(heading), speed * math.sin(heading)
        actors.append((piece, velocity, dice.sign() * dice.uniform(0.05, 0.2)))
    return actors


def _moved(piece: Piece, velocity: tuple[float, float], turn: float, t: int) -> Piece:
    """The piece after t frames; its center bounces 0.15 from the edges of the image."""
    x, y = (0.85 - 0.7 * abs((p + t * v - 0.15) / 0.7 % 2 - 1) for p, v in zip(piece.center, velocity, strict=True))
    return piece._replace(center=(x, y), matrix=_rotation(turn * t) @ piece.matrix)


def open_scenes(split: str, **options: str) -> Scenes:
    """`Scenes` of a split in `SPLITS`, with the options of a spec, which are whole numbers in text."""
    if split not in SPLITS:
        raise UserError(f"scenes:{split}: no such split, only {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")
    numbers = {}
    for key, value in options.items():
        if not re.fullmatch("[0-9]{1,18}", value):
            raise UserError(f"scenes: {key} must be a whole number, not {value!r}")
        numbers[key] = int(value)
    return Scenes(split, **numbers)


KINDS = {"scenes": Kind(open_scenes, ("size", "seed", "image_size"))}
