"""JPEG decoders on generated 500 x 375 images at quality 90: milliseconds of CPU time an image, one thread.

    python benchmarks/decoders.py [--repeats=5]

PIL, simplejpeg and, where it is installed, OpenCV. Prints one JSON object: the best repeat of each,
and how many of its pixel values differ from PIL's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from dino_jax.tools.bench import JpegSource

Decoder = Callable[[bytes], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    source = JpegSource(16)
    images = [source[i].image for i in range(16)]
    decoders = available()
    best = dict.fromkeys(decoders, float("inf"))
    for _ in range(repeats):  # in turns, since a shared machine's speed drifts
        for name, decode in decoders.items():
            begin = time.process_time()
            for data in images:
                decode(data)
            best[name] = min(best[name], 1e3 * (time.process_time() - begin) / len(images))
    exact = [decoders["pil"](data) for data in images]
    different = {
        name: float(np.mean([(decode(data) != pixels).mean() for data, pixels in zip(images, exact, strict=True)]))
        for name, decode in decoders.items()
    }
    print(json.dumps({name: {"ms": round(best[name], 3), "different": round(different[name], 4)} for name in decoders}))


def available() -> dict[str, Decoder]:
    """Decoders to uint8 [H, W, 3], by name."""
    decoders: dict[str, Decoder] = {
        "pil": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "simplejpeg": simplejpeg.decode_jpeg,
        "simplejpeg, fast DCT and upsampling": lambda data: simplejpeg.decode_jpeg(
            data, fastdct=True, fastupsample=True
        ),
    }
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        decoders["opencv"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return decoders


if __name__ == "__main__":
    main()
