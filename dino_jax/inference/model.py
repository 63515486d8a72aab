"""Features in five lines, for images of any size.

    import dino_jax
    model = dino_jax.load("dino_vits16")                      # a released name, a weight file, a run's workdir
    images = [model.preprocess(path) for path in paths]     # float32 [h, w, c], at their own sizes
    cls = model.features(images)                            # [n, D]
    cls, patches = model.features(images, patches=True)     # and a list of [rows, columns, D]

Images of different sizes share batches (`models.packing`): no image is resized, and few sizes need a compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.data.decode import BadImage, decode, read_bytes
from dino_jax.data.pipeline import center_crop, resize_shorter
from dino_jax.data.sources import open_source
from dino_jax.data.storage import absolute, ensure_new_file, new_file
from dino_jax.errors import UserError, printable
from dino_jax.models import Backbone, build_backbone
from dino_jax.models.packing import AnySize, Array, Packed
from dino_jax.progress import track
from dino_jax.weights.load import open_weights

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | jax.Array

BATCH_TOKENS = 16384  # patches per device and batch
LARGEST = 4  # times the smallest std: of a normalized value; at most 1 if it was a pixel
log = logging.getLogger(__name__)


def load(name_or_path: epath.PathLike, *, heads: int | None = None, **choice: Any) -> Model:
    """Loads a model (the teacher) from a released name, a weight file, a workdir or a checkpoint folder.

    `heads`: number of attention heads, if a weight file does not say. `choice`: `key`, `prefix` and `grid` of
    `weights.importer.read`, for weight files with several networks. Raises `UserError`.
    """
    weights = open_weights(name_or_path, heads=heads, **choice)
    return Model(
        weights.config, {name: tree["backbone"] for name, tree in weights.teacher.items() if "backbone" in tree}
    )


class Forward(NamedTuple):
    """A model without its weights: hashable, so jitted functions can take it as a static argument.

    `mean` and `std` are for pixels in 0..1.
    """

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, variables: Any, pixels: Array, view: Callable[[Any, Array], Any]) -> Any:
        """Applies `view(backbone, images)` to pixels 0..255 [B, h, w, c], uint8 or float."""
        return self.backbone.apply(variables, self.normalize(pixels), method=view)

    def normalize(self, pixels: Array) -> Array:
        """Normalizes pixels 0..255 [..., c] to float32 by the training images' mean and deviation."""
        mean, std = jnp.array(self.mean, jnp.float32), jnp.array(self.std, jnp.float32)
        return (pixels.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A backbone with its weights, for inference and evaluation.

    Cheap to create: nothing goes to a device until it is used. `dataclasses.replace(model, variables=...)` gives the
    same network other weights.

    Attributes:
      config: the whole configuration; `preprocess` uses `config.data.mean` and `std`.
      variables: `{"params": ..., "batch_stats": ...}` of the backbone, NumPy or JAX arrays.
      backbone: the Linen module; None: built from `config`.
      devices: used by `features`; None: all of this process.
    """

    config: ConfigDict
    variables: Any
    backbone: Any = None
    devices: Sequence[jax.Device] | None = None

    def __post_init__(self) -> None:
        if self.backbone is None:
            size = self.config.crops.global_size
            object.__setattr__(self, "backbone", build_backbone(self.config.model, size))

    @functools.cached_property
    def forward(self) -> Forward:
        """The model as a hashable function of variables and pixels."""
        return Forward(self.backbone, tuple(self.config.data.mean), tuple(self.config.data.std))

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over the training images, in 0..1."""
        return self.forward.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over the training images, in 0..1."""
        return self.forward.std

    @property
    def embed_dim(self) -> int:
        """D, the width of the features."""
        return self.backbone.embed_dim

    def preprocess(self, image: ImageLike, *, resize: int = 0, crop: int | tuple[int, int] = 0) -> np.ndarray:
        """Turns an image into normalized float32 [h, w, c].

        Args:
          image: a path, encoded bytes, a PIL image (the same pixels as from its file: upright, laid over white), or an
            array [h, w] or [h, w, c] of a type that `data.decode` takes (uint8, or floating-point in 0..1).
          resize: pixels of the shorter side (bicubic); 0: not resized. The protocols use 256.
          crop: size of the center crop, taken after that; 0: none. The protocols use 224.

        Raises:
          UserError: the image cannot be read, has other channels, or a size is negative.
        """
        if isinstance(crop, int):
            crop = (crop, crop)
        if not all(isinstance(n, int | np.integer) and n >= 0 for n in (resize, *crop)) or len(crop) != 2:
            raise UserError(f"preprocess: resize={resize}, crop={crop}: sizes in pixels are needed, or 0")
        try:
            return self._normalized(image, resize, crop)
        except BadImage as error:
            name = image if isinstance(image, str | os.PathLike) else f"an image ({type(image).__name__})"
            raise UserError(f"{name}: {error}") from None

    def _normalized(self, image: ImageLike, resize: int, crop: tuple[int, int]) -> np.ndarray:
        pixels = decode(_readable(image), self.config.model.in_chans)
        if resize:
            pixels = resize_shorter(pixels, resize)
        if any(crop):
            pixels = center_crop(pixels, crop)
        mean, std = (np.asarray(values, np.float32) for values in (self.config.data.mean, self.config.data.std))
        return (pixels.astype(np.float32) / 255 - mean) / std

    def features(
        self, images: Iterable[ImageLike], *, patches: bool = False, progress: bool = False
    ) -> np.ndarray | tuple[np.ndarray, list[np.ndarray]]:
        """Features of each image in order, [n, D] float32: CLS after the final norm (ResNet: the pooled map).

        Args:
          images: float [h, w, c] as `preprocess` gives them, of any sizes, or [n, h, w, c]; anything else that
            `preprocess` takes is preprocessed first, at its own size. Pixels beyond the last whole patch, at the right
            and the bottom, are cut off; for a ViT they still decide whether positions are resized (`ViT.any_size`).
          patches: also return the last block's patch tokens after the final norm, a list of [rows, columns, D].
          progress: show a progress bar on stderr.

        Raises:
          UserError: no images, one image instead of a list, or an image that cannot be used.
        """
        if isinstance(images, str | os.PathLike | bytes | Image.Image) or getattr(images, "ndim", 4) != 4:
            raise UserError("features: one image where a list of images is expected: give [image]")
        done: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        waiting: dict[Any, list[tuple[int, Packed]]] = {}
        flying: list[tuple[Any, list[tuple[int, Packed]]]] = []

        def land(most: int) -> None:
            while len(flying) > most:
                output, group = flying.pop(0)
                cls, tokens = jax.tree.map(lambda x: np.asarray(x, np.float32), output)
                for i, (place, packed) in enumerate(group):
                    done[place] = cls[i], None if tokens is None else packed.own(tokens[i])

        def launch(key: Any) -> None:
            group = waiting.pop(key)
            flying.append((self._run([packed.inputs for _, packed in group], patches), group))
            land(2)

        for place, image in enumerate(track(images, "features", active=progress)):
            packed = self._any_size.pack(self.check(image))
            group = waiting.setdefault(packed.key, [])
            group.append((place, packed))
            if len(group) >= self._batch_size(packed.tokens):
                launch(packed.key)
        for key in list(waiting):
            launch(key)
        land(0)
        if not done:
            raise UserError("features: no images were given")
        outputs = [done[place] for place in range(len(done))]
        cls = np.stack([feature for feature, _ in outputs])
        return (cls, [tokens for _, tokens in outputs if tokens is not None]) if patches else cls

    def check(self, image: ImageLike) -> np.ndarray:
        """The normalized image, float32 [h, w, c], preprocessed if it is not floating-point.

        Raises:
          UserError: its shape does not fit, it holds NaN, or values that no normalized image has.
        """
        if not (isinstance(image, np.ndarray | jax.Array) and jnp.issubdtype(image.dtype, np.floating)):
            image = self.preprocess(image)
        image = np.asarray(image, np.float32)
        channels, patch = self.config.model.in_chans, self.backbone.patch_size or 1
        if image.ndim != 3 or image.shape[-1] != channels or min(image.shape[:2]) < patch:
            expected = f"[h, w, {channels}] with h, w >= {patch}"
            raise UserError(f"features: an image of shape {image.shape}; expected {expected}")
        largest = float(np.abs(image).max())
        if not largest <= LARGEST / min(self.std):
            raise UserError(
                f"features: a floating-point image with values up to {largest:g}: it is taken as normalized; give "
                "uint8 pixels, or use `preprocess`"
            )
        return image

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.local_devices() if self.devices is None else self.devices), ("data",))

    @functools.cached_property
    def _any_size(self) -> AnySize:
        return self.backbone.any_size(self.variables)

    @functools.cached_property
    def _placed(self) -> Any:
        """The variables, replicated on each device."""
        return jax.device_put(self.variables, NamedSharding(self._mesh, P()))

    @functools.cached_property
    def _packed_forward(self) -> Callable[..., Any]:
        rows = NamedSharding(self._mesh, P("data"))
        return jax.jit(self._any_size.forward, static_argnums=2, out_shardings=rows)

    def _batch_size(self, tokens: float) -> int:
        """Images in a full batch: a power of two per device."""
        return self._mesh.size << (max(1, int(BATCH_TOKENS / tokens)).bit_length() - 1)

    def _run(self, inputs: list[tuple[np.ndarray, ...]], patches: bool) -> Any:
        """The forward pass on one batch, padded to a power of two per device."""
        each = -(-len(inputs) // self._mesh.size)
        missing = (self._mesh.size << (each - 1).bit_length()) - len(inputs)
        stacked = tuple(np.stack([*values, *values[:1] * missing]) for values in zip(*inputs, strict=True))
        placed = jax.device_put(stacked, NamedSharding(self._mesh, P("data")))
        return self._packed_forward(self._placed, placed, patches)


def write_features(
    ckpt: epath.PathLike,
    images: str,
    out: epath.PathLike,
    *,
    heads: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    patches: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """The verb `features`: writes the features of a source's images by a CKPT to an `.npz`.

    The file holds `features` [n, D] float32, `labels` [n] (-1: unknown) and `names` [n]; with `patches` also the patch
    tokens of all images concatenated, `patches` [sum of rows * columns, D], and `grids` [n, 2]. `resize` and
    `crop`: as for `Model.preprocess`. Unreadable images are skipped, logged and listed in `unreadable`, each by its
    name and the reason.

    Returns the number of `images` written and of `unreadable` ones.
    """
    if absolute(out).suffix not in (".npz", ""):
        raise UserError(f"--out={out}: features are written as .npz: give such a name")
    ensure_new_file(out, f"--out={out}")
    model, source = load(ckpt, heads=heads), open_source(images)
    names, labels, bad = [], [], []

    def readable() -> Iterable[np.ndarray]:
        for index in track(range(len(source)), "features", active=progress):
            name = f"{images}[{index}]"
            try:
                _, label, name = example = source[index]
                pixels = model.check(model._normalized(example.image, resize or 0, (crop or 0,) * 2))
            except (BadImage, UserError) as error:
                name = getattr(error, "name", "") or name
                bad.append(printable(f"{name}: {error}"))
                continue
            names.append(name)
            labels.append(label)
            yield pixels

    try:
        found = model.features(readable(), patches=patches)
    except UserError:
        if names or not bad:
            raise
        raise UserError(f"{images}: none of the {len(bad)} images can be read, first {bad[0]}") from None
    finally:
        for line in bad:
            log.warning("skipped: %s", line)
    arrays: dict[str, Any] = {
        "names": np.array(names, np.str_),
        "labels": np.array(labels, np.int64),
        "unreadable": np.array(bad, np.str_),
    }
    if patches:
        arrays["features"], grids = found
        arrays["patches"] = np.concatenate([grid.reshape(-1, model.embed_dim) for grid in grids])
        arrays["grids"] = np.array([grid.shape[:2] for grid in grids])
    else:
        arrays["features"] = found
    with new_file(absolute(out)) as local, local.open("wb") as file:
        np.savez(file, **arrays)
    return {"images": len(names), "unreadable": len(bad)}


def _readable(image: Any) -> bytes | Image.Image | np.ndarray:
    """What `decode` takes: the bytes of a path, or an array of anything else that is like one."""
    if isinstance(image, str | os.PathLike):
        return read_bytes(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    return image if isinstance(image, Image.Image) else np.asarray(image)
