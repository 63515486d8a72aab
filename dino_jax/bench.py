"""`dino-jax bench`: how fast the parts of a run are on this machine. Each benchmark returns `{name: value}`."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dino_jax import sharding
from dino_jax.data.decode import decode
from dino_jax.data.example import Example
from dino_jax.data.pipeline import make_dataset, steps_per_epoch
from dino_jax.data.sources import Source, open_source
from dino_jax.input import Ready, device_batches
from dino_jax.train_step import jit_init_state, jit_train_step, make_recipe

Results = dict[str, float]
Pictures = Generator[int, None, None]  # yields the number of pictures since the last yield


class JpegSource:
    """Pictures like photographs for lack of a data set: noise with a 1/f spectrum, JPEG at quality 90 without labels.

    500 x 375 pixels, the size of most ImageNet pictures, in about 110 kB, as those have.
    """

    class_names = None

    def __init__(self, count: int = 64, height: int = 375, width: int = 500):
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # cycles a pixel
        amplitude = 1 / np.maximum(frequency, 1 / width)
        rng = np.random.default_rng(0)
        self._jpegs = []
        for _ in range(count):
            gray, *tint = (np.fft.irfft2(amplitude * np.fft.rfft2(rng.normal(size=(height, width)))) for _ in range(4))
            planes = [128 + 50 * (gray / gray.std() + 0.3 * part / part.std()) for part in tint]
            file = io.BytesIO()
            Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            self._jpegs.append(file.getvalue())

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Example:
        return Example(self._jpegs[index % len(self._jpegs)], -1, f"generated {index}")


def bench_input(config: ConfigDict, source: str | None = None, seconds: float = 5.0, steps: int = 10) -> Results:
    """Decoding, either renderer's host part, and training from the data beside training from resident crops.

    Args:
      config: of the run; `data.render` is set to either mode in turn.
      source: what to read, as for `data.train`; None: generated JPEGs (`JpegSource`).
      seconds: how long each host part is measured.
      steps: train steps for each rate with training; 0: no training.

    Returns images a second. `*_per_core` are images per second of CPU time, all threads of this process together, so
    that other load on the machine matters little; waiting for storage is not in them. `ratio` is the device mode's host
    part over host rendering. `train_*`: on all devices together, `resident` with the same crops again and again;
    `share_*`: the part of the resident rate that training from the data reaches.
    """
    pictures: Source = open_source(source) if source else JpegSource()
    results = {"decode_images_per_s_per_core": _rate_per_core(_decoded(pictures, config), seconds)}
    for mode in ("host", "device"):
        results[f"{mode}_images_per_s_per_core"] = _rate_per_core(_prepared(pictures, _in_mode(config, mode)), seconds)
    results["ratio"] = results["device_images_per_s_per_core"] / results["host_images_per_s_per_core"]
    if steps:
        results |= _train_rates(pictures, config, steps)
    return results


def print_results(results: Results) -> None:
    """A table, and as the last line one JSON object."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:>10.4g}")
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


def _in_mode(config: ConfigDict, mode: str) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.render = mode
    config.run.workers = 0  # threads of this process, whose CPU time it knows
    return config


def _decoded(source: Source, config: ConfigDict) -> Pictures:
    """Decodes one picture after another."""
    index = 0
    while True:
        decode(source[index % len(source)].image, config.model.in_chans)
        index += 1
        yield 1


def _prepared(source: Source, config: ConfigDict) -> Pictures:
    """Takes the training pipeline's batches."""
    for batch in make_dataset(source, config):
        yield len(batch["label"])


def _rate_per_core(work: Pictures, seconds: float) -> float:
    """Pictures per second of this process's CPU time, measured for some seconds after the first yield."""
    next(work)
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds or not count:
        count += next(work)
    rate = count / (time.process_time() - cpu)
    work.close()
    return rate


def _train_rates(source: Source, config: ConfigDict, steps: int) -> Results:
    """Images/s of training from resident crops and from the data in both modes."""
    mesh = sharding.make_mesh(config.run.mesh)
    recipe = make_recipe(config, steps_per_epoch(len(source), config.batch_size))
    state, train_step = jit_init_state(recipe, mesh), jit_train_step(recipe, mesh)
    images, results = steps * config.batch_size, Results()
    for mode in ("host", "device"):
        batches = device_batches(_in_mode(config, mode), source, mesh, position=0, salt=0)
        if mode == "host":
            resident = itertools.repeat(next(batches))
            state, _ = _timed(train_step, state, resident, 1)  # compiles
            state, seconds = _timed(train_step, state, resident, steps)
            results["train_resident_images_per_s"] = images / seconds
        state, _ = _timed(train_step, state, batches, config.run.prefetch + 2)  # uses up what was ready
        state, seconds = _timed(train_step, state, batches, steps)
        batches.close()
        results[f"train_{mode}_images_per_s"] = images / seconds
        results[f"share_{mode}"] = images / seconds / results["train_resident_images_per_s"]
    return results


def _timed(train_step: Callable[..., Any], state: Any, batches: Iterator[Ready], steps: int) -> tuple[Any, float]:
    """The state after some steps, and the seconds they took from an idle device to an idle device."""
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for _ in range(steps):
        state, _ = train_step(state, next(batches).crops)
    jax.block_until_ready(state)
    return state, time.perf_counter() - begin
