"""Video object segmentation on DAVIS 2017 by label propagation (paper table 5).

As in the official `eval_video_segmentation.py`, the first frame's annotation is propagated through the video by patch
similarity (`propagation`) and scored by J and F (`davis`). Layout: `DATA/JPEGImages/480p/VIDEO/*.jpg`,
`DATA/Annotations/480p/VIDEO/*.png` and `DATA/ImageSets/2017/val.txt`. `scenes:` specs use rendered clips instead.

Own clips: frames are ordered by the numbers in their names and have the size of the annotations. A mask is an indexed,
gray or color image (VOC's palette); 255 is void, unless a clip's masks hold just 0 and 255. A clip with an annotation
of its first frame only is segmented into `--workdir`, not scored.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from dino_jax.config import MOST_PIXELS, Key
from dino_jax.data.scenes_source import Scenes
from dino_jax.data.sources import open_source
from dino_jax.errors import UserError
from dino_jax.eval import davis
from dino_jax.eval.draw import SHOWN, palette, save_rows, tile, tinted
from dino_jax.eval.features import Patches, fingerprint, run
from dino_jax.eval.images import (
    check_all,
    grouped,
    linear_resize,
    list_images,
    listed,
    nearest,
    parallel,
    read_image,
    read_labels,
)
from dino_jax.eval.masks import as_objects, is_binary
from dino_jax.eval.propagation import hard_labels, propagate
from dino_jax.eval.protocol import THREADS, Data, Protocol
from dino_jax.eval.results import optional, save_json
from dino_jax.inference.model import Model

STD = (0.228, 0.224, 0.225)  # as in the official script; ImageNet's first value is 0.229
CLIP = 12  # frames of a `scenes:` clip
LABELS = 4  # round the number of labels up to a multiple of this, so videos share compiled programs

_log = logging.getLogger(__name__)

KEYS = {
    "size": Key(480, "shorter side of the frames", "[1, inf)", most=MOST_PIXELS),
    "multiple": Key(64, "the longer side is rounded down to a multiple of this", "[1, inf)"),
    "context": Key(7, "previous frames used besides the first", "[0, inf)", most=1024),
    "radius": Key(12, "window radius in patches, in rows and columns; 0: the whole frame", "[0, inf)"),
    "topk": Key(5, "number of most similar patches whose labels are averaged", "[1, inf)"),
    "temperature": Key(0.1, "temperature of the softmax over similarities", "(0, inf)"),
    "split": Key("val", "list in ImageSets/2017"),
    "batch_size": Key(4, "frames per batch", "[1, inf)"),
    "threads": THREADS,
}


class Video(NamedTuple):
    """A video: name, file stems, `frame(t) -> uint8 [H, W, C]` and `truth() -> uint8 [T, H, W]`."""

    name: str
    stems: Sequence[str]
    frame: Callable[[int], np.ndarray]
    truth: Callable[[], np.ndarray]


def evaluate(model: Model, data: str, config: ConfigDict, workdir: str | None = None) -> dict[str, float]:
    """J&F, and mean, recall and decay of J and F, in percent over all objects.

    A video with an annotation of just its first frame is segmented, not scored: `unscored_videos` counts them.

    With a `workdir`, label maps go to `vos-<settings>/VIDEO/*.png` with a palette, and finished videos are not
    recomputed. `objects.json` there has each object's figures, and `vos.png` in `workdir` shows some videos.
    """
    if len(model.mean) == len(STD):
        config_of_model = model.config.copy_and_resolve_references()
        config_of_model.data.std = STD
        model = dataclasses.replace(model, config=config_of_model)
    folder = None
    if workdir is not None:
        folder = epath.Path(workdir) / f"vos-{_settings(model, data, config)}"
    videos = open_videos(data, config.split, len(model.mean))
    if not data.startswith("scenes:"):
        check_all(lambda i: _check(videos[i], model, config, folder is not None), len(videos), config.threads)
    objects: dict[str, Any] = {}
    shown: list[list[np.ndarray]] = []
    unscored = 0
    for video in videos:
        truth = video.truth()
        labels = None if folder is None else _load(folder / video.name, video.stems, truth)
        if labels is None:
            labels = segment(model, video, truth[0], config)
            if folder is not None and jax.process_index() == 0:
                with optional(str(folder / video.name)):
                    _save(folder / video.name, video.stems, labels)
        if folder is not None and len(shown) < SHOWN:
            with optional(f"{workdir}/vos.png"):
                chosen = np.linspace(0, len(labels) - 1, 4).astype(int)
                shown.append([tile(tinted(video.frame(t), labels[t], palette()), 200) for t in chosen])
        if len(truth) < len(labels):
            unscored += 1
            _log.warning("%s: not scored: only the first frame is annotated", video.name)
            continue
        scores = davis.score_video(labels, truth, video.name)
        objects |= {f"{video.name}_{number}": entry for number, entry in enumerate(scores, 1)}
        _log.info("%s: J&F %.1f over %d objects", video.name, davis.summarize(scores)["J&F_mean"], len(scores))
    if folder is not None and jax.process_index() == 0:
        with optional(str(folder / "objects.json")):
            save_json(folder / "objects.json", objects)
        with optional(f"{workdir}/vos.png"):
            save_rows(epath.Path(folder.parent) / "vos.png", shown)
    figures = davis.summarize(objects.values()) if objects else {}
    return figures | ({"unscored_videos": unscored} if unscored else {})


PROTOCOL = Protocol(
    run=evaluate,
    keys=KEYS,
    data=Data("DAVIS's ImageSets/2017", lambda folder: (folder / "ImageSets" / "2017").is_dir(), scenes="test"),
    needs_patches=True,
    published={"J&F_mean": {"S/16": 61.8, "S/8": 69.9, "B/16": 62.3, "B/8": 71.4}},
    source="DAVIS 2017 val; the paper, table 5",
    order=60,
)


def _settings(model: Model, data: str, config: ConfigDict) -> str:
    """A short hash of everything that the label maps depend on."""
    keys = ("size", "multiple", "context", "radius", "topk", "temperature")
    key = f"{data} {fingerprint(model)} {[config[key] for key in keys]}"
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def segment(model: Model, video: Video, first: np.ndarray, config: ConfigDict) -> np.ndarray:
    """Label maps uint8 [T, H, W] of all frames, from the first one's annotation uint8 [H, W], included unchanged."""
    patch = model.backbone.patch_size
    height, width = _size(first.shape, patch, config)

    def load(t: int) -> np.ndarray:
        pixels = linear_resize(video.frame(t), height, width)  # as OpenCV: no antialiasing, rounded
        return np.rint(pixels).astype(np.uint8)

    count = -(-(int(first[first != davis.VOID].max(initial=0)) + 1) // LABELS) * LABELS
    small = nearest(np.where(first == davis.VOID, 0, first), height // patch, width // patch)
    soft = jnp.asarray(np.eye(count, dtype=np.float32)[small])  # [h, w, L]
    context: collections.deque = collections.deque(maxlen=config.context)
    anchor, maps = None, [first]
    frames = grouped(parallel(load, range(len(video.stems)), config.threads), config.batch_size)
    for outputs, _ in run(model, Patches(), ({"image": np.stack(group)} for group in frames)):
        for features in outputs:  # [h, w, D]
            features = jnp.asarray(features)
            if anchor is None:
                anchor = features, soft
                continue
            soft = _propagate([anchor, *context], features, config)
            context.append((features, soft))
            labels = np.asarray(hard_labels(soft, patch))  # [height, width]
            maps.append(nearest(labels, *first.shape))
    return np.stack(maps)


def _propagate(context: list, features: jnp.ndarray, config: ConfigDict) -> jnp.ndarray:
    """Soft labels of a frame; the context is padded to a fixed length with invalid frames."""
    full = config.context + 1
    valid = np.arange(full) < len(context)
    context = context + [context[0]] * (full - len(context))
    sources, labels = (jnp.stack(column) for column in zip(*context, strict=True))
    return propagate(
        sources,
        features,
        labels,
        valid,
        radius=config.radius,
        topk=config.topk,
        temperature=config.temperature,
    )


def frame_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """Height and width of a resized frame: shorter side `size`, longer side rounded down to a `multiple`."""
    longer = int(size * max(height, width) / min(height, width) // multiple * multiple)
    return (longer, size) if height > width else (size, longer)


def _size(shape: tuple[int, ...], patch: int, config: ConfigDict) -> tuple[int, int]:
    """Height and width of the network's input. Raises `UserError` if they are not whole patches."""
    height, width = frame_size(shape[0], shape[1], config.size, config.multiple)
    if not height or not width or height % patch or width % patch:
        raise UserError(
            f"--config.size={config.size}: frames of {height} x {width} are not whole patches of {patch}: change it "
            f"or --config.multiple={config.multiple}"
        )
    return height, width


def open_videos(data: str, split: str, channels: int = 3) -> list[Video]:
    """The videos of `data`, a DAVIS folder or `scenes:` spec; their frames are not read yet.

    Raises:
      UserError: a list or folder is missing, or the first annotation of a video.
    """
    if data.startswith("scenes:"):
        source = open_source(data)
        if not isinstance(source, Scenes):
            raise UserError(f"{data}: not scenes")
        clip = functools.lru_cache(2)(source.clip)
        return [_clip(clip, source.split, index) for index in range(len(source))]
    root = epath.Path(data)
    names = listed(root / "ImageSets" / "2017" / f"{split}.txt", "give the DAVIS 2017 folder as --data")
    return [_davis(root, name, channels) for name in names]


def _clip(clip: Callable[[int], tuple[np.ndarray, np.ndarray]], split: str, index: int) -> Video:
    stems = [f"{t:05d}" for t in range(CLIP)]
    return Video(f"{split}-{index:03d}", stems, lambda t: clip(index)[0][t], lambda: clip(index)[1])


def _davis(root: epath.Path, name: str, channels: int) -> Video:
    frames = list_images(root / "JPEGImages" / "480p" / name)
    stems = [path.stem for path in frames]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UserError(f"{frames[0].parent}: two frames are named {twice[0]}: keep one of them")
    masks = [root / "Annotations" / "480p" / name / f"{stem}.png" for stem in stems]
    if not masks[0].exists():
        raise UserError(f"{masks[0]}: no such file: the first frame needs an annotation")
    if not any(path.exists() for path in masks[1:]):
        masks = masks[:1]

    @functools.cache
    def size() -> tuple[int, ...]:
        return read_labels(masks[0]).shape

    def frame(t: int) -> np.ndarray:
        pixels = read_image(frames[t], channels)
        if pixels.shape[:2] != size():
            raise UserError(f"{frames[t]}: {_pixels(pixels)}, but {masks[0]} has {_pixels(size())}: resize it")
        return pixels

    return Video(name, stems, frame, lambda: _annotations(masks))


def _annotations(paths: list[epath.Path]) -> np.ndarray:
    """Label maps [T, H, W]; 255 is an object if no other number occurs."""
    maps = [read_labels(path) for path in paths]
    for path, labels in zip(paths, maps, strict=True):
        if labels.shape != maps[0].shape:
            raise UserError(f"{path}: {_pixels(labels)}, but {paths[0]} has {_pixels(maps[0])}: resize it")
    return as_objects(np.stack(maps), all(map(is_binary, maps)))


def _pixels(image: np.ndarray | tuple[int, ...]) -> str:
    height, width = (image.shape if isinstance(image, np.ndarray) else image)[:2]
    return f"{height} x {width} pixels"


def _check(video: Video, model: Model, config: ConfigDict, kept: bool) -> None:
    """Reads a whole video; `UserError` for what would end its segmentation or its scoring, with the frame's name."""
    truth, count = video.truth(), len(video.stems)
    _size(truth.shape[1:], model.backbone.patch_size, config)
    if not np.isin(truth[0], (0, davis.VOID), invert=True).any():
        raise UserError(f"{video.name}: the first annotation has no object")
    if len(truth) == 1 < count and not kept:
        raise UserError(
            f"{video.name}: only the first frame is annotated, so there is nothing to score; --workdir=DIR keeps the "
            "label maps"
        )
    if count < 3 and (count < 2 or len(truth) == count):
        raise UserError(f"{video.name}: {count} annotated frames; at least 3 are needed: first and last do not count")
    for t in range(count):
        video.frame(t)


def _save(folder: epath.Path, stems: Sequence[str], labels: np.ndarray) -> None:
    """Writes indexed images, then renames the folder, so that a partial one is never read back."""
    partial = folder.parent / f"{folder.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    for stem, frame in zip(stems, labels, strict=True):
        image = Image.fromarray(frame)
        image.putpalette(palette().tobytes())
        with (partial / f"{stem}.png").open("wb") as file:
            image.save(file, "PNG")
    partial.rename(folder)


def _load(folder: epath.Path, stems: Sequence[str], truth: np.ndarray) -> np.ndarray | None:
    """The label maps of an earlier run on the same first annotation, or None."""
    if not folder.exists():
        return None
    maps = [read_labels(folder / f"{stem}.png") for stem in stems]
    if any(labels.shape != truth.shape[1:] for labels in maps):
        raise UserError(f"{folder}: label maps of another size than the video's {truth.shape[1:]}: remove the folder")
    if (maps[0] != truth[0]).any():
        _log.warning("%s: made from another first annotation: made again", folder)
        folder.rmtree()
        return None
    return np.stack(maps)
