"""What a data set is: how many images it has, their names and labels, and the contents of a few."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from dino_jax.data.decode import BadImage
from dino_jax.data.sources import Source

SAMPLES = 16  # images whose content is compared, spread evenly

Identity = dict[str, Any]  # as JSON: images, listing, contents {index: hash or None}


def identity_of(source: Source) -> Identity:
    """The identity of a source, the same wherever its files are.

    `listing`: a hash of what the source's attribute `listing` (arrays of names, labels or checksums of all images)
    holds, if it has one, and of the class names. `contents`: a hash of image, label and name by index; None for an
    image that cannot be read.
    """
    count = len(source)
    chosen = sorted({place * (count - 1) // (SAMPLES - 1) for place in range(SAMPLES)})
    listing = hashlib.sha256(repr(source.class_names).encode(errors="surrogateescape"))
    for array in getattr(source, "listing", ()):
        listing.update(np.ascontiguousarray(array).view(np.uint8).data)
    return {
        "images": count,
        "listing": listing.hexdigest()[:16],
        "contents": {str(index): _content(source, index) for index in chosen},
    }


def _content(source: Source, index: int) -> str | None:
    try:
        image, label, name = source[index]
    except BadImage:
        return None
    pixels = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
    shape = None if isinstance(image, bytes) else (image.shape, image.dtype.str)
    head = f"{label} {name} {shape} {len(pixels)} ".encode(errors="surrogateescape")
    return hashlib.sha256(head + pixels).hexdigest()[:16]


def difference(saved: Identity, found: Identity) -> str | None:
    """What has changed, in words, or None. Images that could not be read before or cannot be read now are no change."""
    if saved["images"] != found["images"]:
        return f"{found['images']} images where there were {saved['images']}"
    if saved["listing"] != found["listing"]:
        return "other names, classes or labels"
    both = {index: (saved["contents"].get(index), value) for index, value in found["contents"].items()}
    changed = [index for index, pair in both.items() if None not in pair and pair[0] != pair[1]]
    return f"image {changed[0]} has another content" if changed else None


def data_fingerprint(source: Source) -> str:
    """A short hash of the identity."""
    return hashlib.sha256(json.dumps(identity_of(source)).encode()).hexdigest()[:16]
