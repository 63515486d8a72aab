"""Features in five lines, for pictures of any size.

    import dino_jax
    model = dino_jax.load("dino_vits16")                      # a released name, a weight file, a run's workdir
    pictures = [model.preprocess(path) for path in paths]     # float32 [h, w, c], at their own sizes
    cls = model.features(pictures)                            # [n, D]
    cls, patches = model.features(pictures, patches=True)     # and a list of [rows, columns, D]

A ViT sees pictures of different sizes in one batch: their patches are lined up, filled up to one of a few lengths and
masked, so a new size compiles nothing and no picture is resized. The result is that of the picture alone, to rounding.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from dino_jax.data.decode import BadImage, decode
from dino_jax.data.pipeline import centre_crop, resize_shorter
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.models import ViT, build_backbone
from dino_jax.models.layers import Array
from dino_jax.models.vit import resize_matrix
from dino_jax.weights.store import open_weights

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


class Group(NamedTuple):
    """Pictures that run together: their places in the input, and what the forward pass takes of each."""

    places: list[int]
    inputs: list[tuple[np.ndarray, ...]]
    grids: list[tuple[int, int]]


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
        rows = NamedSharding(self.mesh, P("data"))
        method = _padded_tokens if isinstance(self.backbone, ViT) else _plain

        def forward(variables: Any, patches: bool, *inputs: Array) -> Array:
            return self.backbone.apply(variables, *inputs, patches=patches, method=method)

        self._forward = jax.jit(forward, static_argnums=1, out_shardings=rows)
        self._rows = rows
        self._positions: dict[tuple[int, int], np.ndarray] = {}

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
            pixels = centre_crop(pixels, (crop, crop) if isinstance(crop, int) else crop)
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
        done: dict[int, tuple[np.ndarray, tuple[int, int]]] = {}
        waiting: dict[Any, Group] = {}
        flying: list[tuple[Array, Group]] = []

        def land(most: int) -> None:
            while len(flying) > most:
                output, group = flying.pop(0)
                rows = np.asarray(output, np.float32)
                done.update({place: (rows[i], group.grids[i]) for i, place in enumerate(group.places)})

        def launch(key: Any) -> None:
            group = waiting.pop(key)
            flying.append((self._run(group.inputs, patches), group))
            land(2)

        for place, image in enumerate(tqdm(images, disable=not progress, unit="picture")):
            key, inputs, grid = self._prepare(image)
            group = waiting.setdefault(key, Group([], [], []))
            for kept, new in zip(group, (place, inputs, grid), strict=True):
                kept.append(new)
            if len(group.places) == self._batch_size(key):
                launch(key)
        for key in list(waiting):
            launch(key)
        land(0)
        if not done:
            raise UserError("features: no pictures were given")
        cls = np.stack([done[place][0][0] for place in range(len(done))])
        if not patches:
            return cls
        grids = [done[place] for place in range(len(done))]
        return cls, [tokens[1 : 1 + grid[0] * grid[1]].reshape(*grid, -1) for tokens, grid in grids]

    def _prepare(self, image: Picture) -> tuple[Any, tuple[np.ndarray, ...], tuple[int, int]]:
        """Which pictures this one can share a batch with, what the forward pass takes of it, and its grid."""
        if not (isinstance(image, np.ndarray | jax.Array) and np.issubdtype(image.dtype, np.floating)):
            image = self.preprocess(image)
        image = np.asarray(image, np.float32)
        channels, patch = self.config.model.in_chans, self.backbone.patch_size or 1
        if image.ndim != 3 or image.shape[-1] != channels or min(image.shape[:2]) < patch:
            raise UserError(
                f"features: a picture of shape {image.shape}; expected [h, w, {channels}] with h, w >= {patch}"
            )
        rows, columns = image.shape[0] // patch, image.shape[1] // patch
        image = image[: rows * patch, : columns * patch]
        if not isinstance(self.backbone, ViT):
            return image.shape[:2], (image,), (rows, columns)
        count = rows * columns
        length = self._length(count)
        strip = image.reshape(rows, patch, columns, patch, channels).transpose(1, 0, 2, 3, 4)
        strip = np.pad(strip.reshape(patch, count * patch, channels), ((0, 0), (0, (length - count) * patch), (0, 0)))
        positions = np.pad(self._position_table(rows, columns), ((0, length - count), (0, 0)))
        return length, (strip, positions, np.arange(1 + length) <= count), (rows, columns)

    def _length(self, count: int) -> int:
        """Patches after filling up: the model's own number, or a quarter of a power of two further than the last."""
        own = self.config.crops.global_size
        if count == own[0] * own[1] // self.backbone.patch_size**2:
            return count
        step = max(4, 1 << max(0, count.bit_length() - 3))
        return -(-count // step) * step

    def _batch_size(self, key: Any) -> int:
        """Pictures in a full batch: a power of two on each device."""
        tokens = key if isinstance(key, int) else key[0] * key[1] / 256
        return self.mesh.size << (max(1, int(BATCH_TOKENS / tokens)).bit_length() - 1)

    def _position_table(self, rows: int, columns: int) -> np.ndarray:
        """The position table for a grid, CLS first: [1 + rows * columns, D] float32, by the official resize."""
        if (rows, columns) not in self._positions:
            table = np.asarray(self.variables["params"]["pos_embed"], np.float64)[0]
            own = [size // self.backbone.patch_size for size in self.config.crops.global_size]
            patches = table[1:]
            if [rows, columns] != own:
                down, across = resize_matrix(own[0], rows), resize_matrix(own[1], columns)
                patches = np.einsum("ir,jc,rcd->ijd", down, across, patches.reshape(*own, -1), optimize=True)
            flat = np.concatenate([table[:1], patches.reshape(rows * columns, -1)])
            self._positions[rows, columns] = flat.astype(np.float32)
        return self._positions[rows, columns]

    def _run(self, inputs: list[tuple[np.ndarray, ...]], patches: bool) -> Array:
        """The forward pass over pictures of one group, filled up to a power of two on each device."""
        each = -(-len(inputs) // self.mesh.size)
        filled = self.mesh.size << (each - 1).bit_length()
        stacked = [np.stack(values) for values in zip(*inputs, strict=True)]
        stacked = [np.concatenate([values, values[:1].repeat(filled - len(values), 0)]) for values in stacked]
        return self._forward(self.variables, patches, *jax.device_put(stacked, self._rows))


def _padded_tokens(backbone: ViT, strips: Array, positions: Array, valid: Array, patches: bool) -> Array:
    """Tokens after the final norm, [B, 1 + N, D], CLS first; without `patches` CLS alone, [B, 1, D].

    `strips` [B, p, N * p, c]: each picture's patches side by side, filled up; `positions` [B, 1 + N, D];
    `valid` bool [B, 1 + N]: CLS and the patches that are there.
    """
    x = backbone.patch_embed(strips)  # [B, N, D]
    cls = jnp.broadcast_to(backbone.cls_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([cls, x], axis=1) + positions.astype(x.dtype)
    for block in backbone.blocks:
        x = block(x, valid=valid)
    return backbone.norm(x if patches else x[:, :1])


def _plain(backbone: nn.Module, images: Array, patches: bool) -> Array:
    """The same of a backbone that takes one size at a time: [B, 1 + N, D], or [B, 1, D]."""
    return backbone.tokens(images)[0] if patches else backbone(images)[:, None]


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
    `crop`: as for `Model.preprocess`; None: `config.eval`'s. A picture that cannot be read is left out and named.

    Returns the number of `pictures` and of those left out (`unreadable`).
    """
    model, source = load(ckpt, heads=heads), open_source(images)
    resize = model.config.eval.resize if resize is None else resize
    crop = model.config.eval.crop if crop is None else crop
    names, labels, bad = [], [], []

    def pictures() -> Iterable[np.ndarray]:
        for index in tqdm(range(len(source)), disable=not progress, unit="picture"):
            try:
                example = source[index]
                pixels = model.preprocess(example.image, resize=resize, crop=crop)
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
    _save(epath.Path(out).expanduser(), arrays)
    return {"pictures": len(names), "unreadable": len(bad)}


def _save(path: epath.Path, arrays: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)
