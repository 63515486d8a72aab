"""Features in five lines, for pictures of any size.

    import dino_jax
    model = dino_jax.load("dino_vits16")                      # a released name, a weight file, a run's workdir
    pictures = [model.preprocess(path) for path in paths]     # float32 [h, w, c], at their own sizes
    cls = model.features(pictures)                            # [n, D]
    cls, patches = model.features(pictures, patches=True)     # and a list of [rows, columns, D]

Pictures of different sizes share batches (`inference.anysize`): no picture is resized, and a new size compiles nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dino_jax.data.decode import BadImage, decode
from dino_jax.data.pipeline import center_crop, resize_shorter
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.inference.anysize import Filled, any_size
from dino_jax.models import build_backbone
from dino_jax.models.layers import Array
from dino_jax.progress import track
from dino_jax.storage import absolute, new_file
from dino_jax.weights.load import open_weights

Picture = str | os.PathLike | bytes | np.ndarray

BATCH_TOKENS = 16384  # patches in a batch on one device
log = logging.getLogger(__name__)


def load(name_or_path: epath.PathLike, *, heads: int | None = None) -> Model:
    """The model of a released name, a weight file, a workdir or a checkpoint's folder (its teacher).

    `heads`: attention heads, where a weight file does not tell. Raises `UserError` in one line.
    """
    weights = open_weights(name_or_path, heads=heads)
    return Model(
        weights.config, {name: tree["backbone"] for name, tree in weights.teacher.items() if "backbone" in tree}
    )


class Model:
    """A backbone with its weights, spread over this process's devices.

    Attributes:
      config: the whole configuration; `config.data.mean` and `std` are those of `preprocess`.
      backbone: the Linen module.  variables: its `{"params": ..., "batch_stats": ...}`.
    """

    def __init__(self, config: ConfigDict, variables: Any, devices: Sequence[jax.Device] | None = None):
        self.config = config
        self.backbone = build_backbone(config.model, config.crops.global_size)
        self.mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
        self.variables = jax.device_put(variables, NamedSharding(self.mesh, P()))
        self._any_size = any_size(self.backbone, variables)
        self._rows = NamedSharding(self.mesh, P("data"))
        self._forward = jax.jit(self._any_size.forward, static_argnums=2, out_shardings=self._rows)

    @property
    def embed_dim(self) -> int:
        """D, the width of the features."""
        return self.backbone.embed_dim

    def preprocess(self, picture: Picture, *, resize: int = 0, crop: int | tuple[int, int] = 0) -> np.ndarray:
        """A path, encoded bytes or uint8 [h, w] or [h, w, c] as normalised float32 [h, w, c].

        `resize`: the shorter side becomes this many pixels (bicubic); `crop`: then this centre is cut out. 0: left as
        it is. The protocols' own are 256 and 224.
        """
        try:
            data = epath.Path(picture).read_bytes() if isinstance(picture, str | os.PathLike) else picture
            pixels = decode(data, self.config.model.in_chans)
        except (BadImage, OSError) as error:
            raise UserError(f"{picture if isinstance(picture, str | os.PathLike) else 'a picture'}: {error}") from None
        if resize:
            pixels = resize_shorter(pixels, resize)
        if crop:
            pixels = center_crop(pixels, (crop, crop) if isinstance(crop, int) else crop)
        mean, std = (np.asarray(values, np.float32) for values in (self.config.data.mean, self.config.data.std))
        return (pixels.astype(np.float32) / 255 - mean) / std

    def features(
        self, images: Iterable[Picture], *, patches: bool = False, progress: bool = False
    ) -> np.ndarray | tuple[np.ndarray, list[np.ndarray]]:
        """CLS after the final norm (ResNet: the pooled map) of each picture, [n, D] float32, in order.

        Args:
          images: float [h, w, c] as `preprocess` gives them, of any sizes, or [n, h, w, c]; anything else is
            preprocessed first, at its own size. What exceeds a multiple of the patch at the right and the bottom is
            left out, as by the official model.
          patches: also the last block's patch tokens after the final norm, a list of [rows, columns, D].
          progress: a bar on stderr.
        """
        done: dict[int, tuple[np.ndarray, Filled]] = {}
        waiting: dict[Any, list[tuple[int, Filled]]] = {}
        flying: list[tuple[Array, list[tuple[int, Filled]]]] = []

        def land(most: int) -> None:
            while len(flying) > most:
                output, group = flying.pop(0)
                rows = np.asarray(output, np.float32)
                done.update({place: (rows[i], filled._replace(inputs=())) for i, (place, filled) in enumerate(group)})

        def launch(key: Any) -> None:
            group = waiting.pop(key)
            flying.append((self._run([filled.inputs for _, filled in group], patches), group))
            land(2)

        for place, image in enumerate(track(images, "features", active=progress)):
            filled = self._any_size.fill(self._checked(image))
            group = waiting.setdefault(filled.key, [])
            group.append((place, filled))
            if len(group) >= self._batch_size(filled.tokens):
                launch(filled.key)
        for key in list(waiting):
            launch(key)
        land(0)
        if not done:
            raise UserError("features: no pictures were given")
        outputs = [done[place] for place in range(len(done))]
        cls = np.stack([tokens[0] for tokens, _ in outputs])
        return (cls, [_patch_grid(tokens, filled) for tokens, filled in outputs]) if patches else cls

    def _checked(self, image: Picture) -> np.ndarray:
        """The normalised picture, without what exceeds a multiple of the patch."""
        if not (isinstance(image, np.ndarray | jax.Array) and np.issubdtype(image.dtype, np.floating)):
            image = self.preprocess(image)
        image = np.asarray(image, np.float32)
        channels, patch = self.config.model.in_chans, self.backbone.patch_size or 1
        if image.ndim != 3 or image.shape[-1] != channels or min(image.shape[:2]) < patch:
            expected = f"[h, w, {channels}] with h, w >= {patch}"
            raise UserError(f"features: a picture of shape {image.shape}; expected {expected}")
        return image[: image.shape[0] // patch * patch, : image.shape[1] // patch * patch]

    def _batch_size(self, tokens: float) -> int:
        """Pictures in a full batch: a power of two on each device."""
        return self.mesh.size << (max(1, int(BATCH_TOKENS / tokens)).bit_length() - 1)

    def _run(self, inputs: list[tuple[np.ndarray, ...]], patches: bool) -> Array:
        """The forward pass over pictures that share a batch, filled up to a power of two on each device."""
        each = -(-len(inputs) // self.mesh.size)
        missing = (self.mesh.size << (each - 1).bit_length()) - len(inputs)
        stacked = tuple(np.stack([*values, *values[:1] * missing]) for values in zip(*inputs, strict=True))
        return self._forward(self.variables, jax.device_put(stacked, self._rows), patches)


def _patch_grid(tokens: np.ndarray, filled: Filled) -> np.ndarray:
    """A picture's own patch tokens [rows, columns, D] among its row [1 + N, D] of a batch."""
    (rows, columns), layout = filled.grid, filled.layout
    return tokens[1 : 1 + layout[0] * layout[1]].reshape(*layout, -1)[:rows, :columns]


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
    """The verb `features`: runs a source's pictures through a CKPT and writes an `.npz`.

    The file holds `features` [n, D] float32, `labels` [n] (-1: unknown) and `names` [n]; with `patches` also the patch
    tokens of all pictures one after another, `patches` [sum of rows * columns, D], and `grids` [n, 2]. `resize` and
    `crop`: as for `Model.preprocess`. A picture that cannot be read is left out and named.

    Returns the number of `pictures` and of those left out (`unreadable`).
    """
    model, source = load(ckpt, heads=heads), open_source(images)
    names, labels, bad = [], [], []

    def pictures() -> Iterable[np.ndarray]:
        for index in track(range(len(source)), "features", active=progress):
            try:
                example = source[index]
                pixels = model.preprocess(example.image, resize=resize or 0, crop=crop or 0)
            except (BadImage, UserError) as error:
                bad.append(f"{images}[{index}]: {error}")
                continue
            names.append(example.name)
            labels.append(example.label)
            yield pixels

    found = model.features(pictures(), patches=patches)
    arrays: dict[str, Any] = {"names": np.array(names), "labels": np.array(labels, np.int64)}
    if patches:
        arrays["features"], grids = found
        arrays["patches"] = np.concatenate([grid.reshape(-1, model.embed_dim) for grid in grids])
        arrays["grids"] = np.array([grid.shape[:2] for grid in grids])
    else:
        arrays["features"] = found
    if bad:
        log.warning("%d pictures could not be read and are left out: %s", len(bad), "; ".join(bad[:5]))
    with new_file(absolute(out)) as local, local.open("wb") as file:
        np.savez(file, **arrays)
    return {"pictures": len(names), "unreadable": len(bad)}
