"""Device mode's host part beside a torchvision multi-crop loader: images per second of CPU time, same JPEGs, one run.

    python benchmarks/torchvision_loader.py [--source=SPEC] [--seconds=10] [--config.KEY=VALUE ...]

Needs torch and torchvision. The loader is a `DataLoader` in this process whose transform is the recipe of
`config.crops` in torchvision's operations on PIL images, as PyTorch codes of DINO have it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from PIL import Image, ImageFilter

from dino_jax import config_io
from dino_jax.config import default
from dino_jax.data.sources import Source, open_source
from dino_jax.tools.bench import JpegSource, bench_input


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="of encoded images, as for data.train; default: generated 500 x 375 JPEGs")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    args, overrides = parser.parse_known_args()
    config = config_io.override(default(), ["--config.batch_size=64", *overrides])
    results = bench_input(config, args.source, args.seconds, steps=0)
    source = open_source(args.source) if args.source else JpegSource()
    results["torchvision_images_per_s_per_core"] = loader_rate(source, config, args.seconds)
    for mode in ("host", "device"):
        ratio = results[f"{mode}_images_per_s_per_core"] / results["torchvision_images_per_s_per_core"]
        results[f"{mode}_over_torchvision"] = ratio
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


class Crops:
    """A map-style dataset: all crops of each image of a source, as normalized tensors."""

    def __init__(self, source: Source, config: ConfigDict):
        self.source = source
        self.transforms = [crop_transform(config, min(i, 2)) for i in range(2 + config.crops.local_count)]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Any]:
        image = self.source[index].image
        pil_image = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
        pil_image = pil_image.convert("RGB")
        return [transform(pil_image) for transform in self.transforms]


def crop_transform(config: ConfigDict, kind: int) -> Callable[[Image.Image], Any]:
    """The recipe of the first global crop (0), the second (1) or a local one (2)."""
    from torchvision import transforms

    crops = config.crops
    size, scale = (crops.local_size, crops.local_scale) if kind == 2 else (crops.global_size, crops.global_scale)
    bicubic = transforms.InterpolationMode.BICUBIC
    colors = transforms.ColorJitter(crops.brightness, crops.contrast, crops.saturation, crops.hue)

    def blur(pil_image: Image.Image) -> Image.Image:
        return pil_image.filter(ImageFilter.GaussianBlur(random.uniform(*crops.blur_radius)))

    steps: list[Any] = [
        transforms.RandomResizedCrop(tuple(size), tuple(scale), tuple(crops.ratio), interpolation=bicubic),
        transforms.RandomHorizontalFlip(crops.flip_prob),
        transforms.RandomApply([colors], crops.jitter_prob),
        transforms.RandomGrayscale(crops.gray_prob),
        transforms.RandomApply([transforms.Lambda(blur)], crops.blur_prob[kind]),
        transforms.RandomSolarize(crops.solarize_threshold, crops.solarize_prob[kind]),
        transforms.ToTensor(),
        transforms.Normalize(config.data.mean, config.data.std),
    ]
    return transforms.Compose(steps)


def loader_rate(source: Source, config: ConfigDict, seconds: float) -> float:
    """Images per second of CPU time."""
    import torch

    torch.set_num_threads(1)
    batches = iter(torch.utils.data.DataLoader(Crops(source, config), config.batch_size, shuffle=True))
    next(batches)
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds or not count:
        count += len(next(batches)[0])
    return count / (time.process_time() - cpu)


if __name__ == "__main__":
    main()
