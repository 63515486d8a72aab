"""`dino-jax bench input|step|loss`: the speed of each part of a run on this machine."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dino_jax import config_io
from dino_jax.config import default
from dino_jax.data.example import Example
from dino_jax.data.masking import example_masks
from dino_jax.data.pipeline import make_dataset, steps_per_epoch
from dino_jax.data.reader import Reader
from dino_jax.data.sources import Source, open_source
from dino_jax.errors import UserError
from dino_jax.models.network import Outputs, Views
from dino_jax.objectives.objective import total_loss
from dino_jax.parallel import sharding
from dino_jax.training.prefetch import Ready, device_batches
from dino_jax.training.step import abstract_inputs, check_batch, jit_init_state, jit_train_step, make_recipe

Results = dict[str, float | str]
Work = Generator[int, None, None]  # yields the number of images since the last yield

ROUNDS = 2  # the host parts take turns, since a shared machine's speed drifts
WARM_UP = 1.0  # CPU seconds before each measurement, until memory is reused
HOST_BATCH = 64  # images in a batch for the host parts; fewer if the source has fewer


def run(
    what: str,
    config_file: str | None,
    overrides: Iterable[str] = (),
    *,
    source: str | None = None,
    seconds: float = 5.0,
    steps: int | None = None,
) -> None:
    """Prints one benchmark's results as a table, then as one JSON object on the last line.

    Without a configuration: the defaults with a batch of 64. On a CPU, where one step would take minutes: ViT-T of
    depth 2, 4,096 prototypes, a batch of 8. `steps`: None means 10, or 3 on a CPU.
    """
    on_cpu = jax.default_backend() == "cpu"
    steps = steps if steps is not None else 3 if on_cpu else 10
    if seconds <= 0 or steps < 0 or (what != "input" and not steps):
        raise UserError(f"--seconds={seconds:g} --steps={steps}: must be greater than 0 (bench input: steps may be 0)")
    if source is not None and what != "input":
        raise UserError(f"--source={source}: bench {what} reads no images")
    if config_file is None:
        config = config_io.check(config_io.override(_small(default(), on_cpu), overrides))
    else:
        config = config_io.load(config_file, overrides)
    about: Results = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "model": config.model.name,
        "batch_size": config.batch_size,
    }
    if what == "input":
        results = bench_input(config, source, seconds, steps)
    else:
        results = {"step": bench_step, "loss": bench_loss}[what](config, steps)
    print_results(about | results)


def _small(config: ConfigDict, on_cpu: bool) -> ConfigDict:
    config.batch_size = 64
    if on_cpu:
        config.batch_size, config.model.name, config.model.depth, config.head.out_dim = 8, "vit_tiny", 2, 4096
    return config


class JpegSource:
    """Generated stand-ins for photographs: noise with a 1/f spectrum as JPEG of quality 90, without labels.

    500 x 375 pixels and about 110 kB, like most images of ImageNet.
    """

    class_names = None

    def __init__(self, count: int = 16, height: int = 375, width: int = 500):
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
    """Speed of decoding, of the host part of both renderers, and of training from data and from resident crops.

    Args:
      config: of the run; `data.render` is set to each mode in turn.
      source: what to read, as for `data.train`; None: generated JPEGs (`JpegSource`).
      seconds: CPU time for each host part.
      steps: train steps for each training rate; 0: no training.

    Returns images per second:
      `*_per_core`: per second of CPU time of all threads of this process. Other load on the machine matters little;
        waiting for storage does not count.
      `ratio`: device mode's host part over host rendering.
      `train_*`: on all devices together, with the config's `run.workers` and `run.threads`; `resident` repeats the
        same crops.
      `share_*`: training from data over training from resident crops.
    """
    data: Source = open_source(source) if source else JpegSource()
    batch_size = min(HOST_BATCH, len(data))
    works: dict[str, Callable[[], Work]] = {
        "decode": lambda: _decoded(data, config),
        "host": lambda: _prepared(data, _in_process(_in_mode(config, "host"), batch_size)),
        "device": lambda: _prepared(data, _in_process(_in_mode(config, "device"), batch_size)),
    }
    rates = _rates_per_core(works, seconds)
    results: Results = {f"{name}_images_per_s_per_core": rate for name, rate in rates.items()}
    results["ratio"] = rates["device"] / rates["host"]
    return results | _train_rates(data, config, steps) if steps else results


def bench_step(config: ConfigDict, steps: int = 10) -> Results:
    """Speed of the train step on resident crops of noise.

    Returns images/s over all devices, milliseconds, seconds of compilation and, if known, the first device's peak
    memory in GB.
    """
    mesh = sharding.make_mesh(config.run.mesh)
    recipe = make_recipe(config, 1000)
    check_batch(recipe, mesh)
    state, train_step = jit_init_state(recipe, mesh), jit_train_step(recipe, mesh)
    rng = np.random.default_rng(0)  # not zeros, on which a GPU clocks higher
    shapes = abstract_inputs(recipe)
    crops = [rng.standard_normal(x.shape, np.float32).astype(x.dtype) for x in shapes.crops]
    masked = None if recipe.masking is None else example_masks(recipe.masking, config.batch_size)
    inputs = Views(*sharding.to_devices((crops, masked), mesh, config.batch_size))
    batches = itertools.repeat(Ready(inputs, []))
    begin = time.perf_counter()
    state, _ = _timed(train_step, state, batches, 1)
    first = time.perf_counter() - begin
    state, seconds = _timed(train_step, state, batches, steps)
    results: Results = {
        "images_per_s": steps * config.batch_size / seconds,
        "ms_per_step": 1e3 * seconds / steps,
        "compile_s": first - seconds / steps,
    }
    if memory := jax.devices()[0].memory_stats():
        results["peak_gb"] = memory["peak_bytes_in_use"] / 1e9
    return results


def bench_loss(config: ConfigDict, steps: int = 10) -> Results:
    """Speed of the loss and its gradient alone, on random outputs on one device.

    Returns milliseconds, GB/s of logits, and temporary memory in MB.
    """
    recipe = make_recipe(config, 1000)

    def outputs(seed: int, count: int) -> Outputs:
        features, logits = jax.random.split(jax.random.key(seed))
        rows, dtype = (config.batch_size, count), config.model.dtype
        outputs = Outputs(
            cls=jax.random.normal(features, (*rows, recipe.network.backbone.embed_dim), dtype),
            logits=jax.random.normal(logits, (*rows, config.head.out_dim), dtype),
        )
        if recipe.masking is None:
            return outputs
        chosen = recipe.chosen(jnp.asarray(example_masks(recipe.masking, config.batch_size)))
        width = (recipe.network.patch_head or recipe.network.head).out_dim
        return outputs._replace(
            patch_logits=jax.random.normal(logits, (len(chosen.place), width), dtype), chosen=chosen
        )

    def loss(student: Outputs, teacher: Outputs, states: dict[str, Any], step: jax.Array) -> jax.Array:
        losses = {}
        for term in recipe.objectives:
            targets, _ = term.targets(states[term.name], teacher, step)
            losses[term.name], _ = term.loss(student, targets, step)
        return total_loss(recipe.objectives, losses)

    student, teacher = outputs(0, 2 + config.crops.local_count), outputs(1, 2)
    arguments = student, teacher, {term.name: term.init() for term in recipe.objectives}, jnp.int32(0)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    begin = time.perf_counter()
    for _ in range(steps):
        out = compiled(*arguments)
    jax.block_until_ready(out)
    seconds = (time.perf_counter() - begin) / steps
    results: Results = {
        "ms_per_loss": 1e3 * seconds,
        "gb_per_s": (student.logits.nbytes + teacher.logits.nbytes) / seconds / 1e9,
    }
    if (memory := compiled.memory_analysis()) is not None:
        results["temporary_mb"] = memory.temp_size_in_bytes / 1e6
    return results


def print_results(results: Results) -> None:
    """Prints a table and, as the last line, one JSON object."""
    width = max(map(len, results))
    for name, value in results.items():
        print(f"{name:<{width}}  {value:>12.4g}" if isinstance(value, float) else f"{name:<{width}}  {value:>12}")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in results.items()}))


def _in_mode(config: ConfigDict, mode: str) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.data.render = mode
    return config


def _in_process(config: ConfigDict, batch_size: int) -> ConfigDict:
    """Reads with threads of this process, so that their CPU time counts."""
    config.run.workers, config.batch_size = 0, batch_size
    return config


def _decoded(source: Source, config: ConfigDict) -> Work:
    """Decodes one image after another."""
    reader = Reader(source, config.model.in_chans, None, config.seed, 1.0, "the data set")
    for index in itertools.cycle(range(len(source))):
        reader.read_or_replace(index)
        yield 1


def _prepared(source: Source, config: ConfigDict) -> Work:
    """Takes the training pipeline's batches."""
    for batch in make_dataset(source, config):
        yield len(batch["label"])


def _rates_per_core(works: dict[str, Callable[[], Work]], seconds: float) -> dict[str, float]:
    """Images per second of this process's CPU time for each kind of work, in alternating rounds."""
    totals = {name: [0, 0.0] for name in works}  # images, CPU seconds
    for _ in range(ROUNDS):
        for name, work in works.items():
            data = work()
            _work(data, WARM_UP)
            count, cpu = _work(data, seconds / ROUNDS)
            totals[name][0] += count
            totals[name][1] += cpu
            data.close()
            _settle()
    return {name: count / cpu for name, (count, cpu) in totals.items()}


def _work(data: Work, seconds: float) -> tuple[int, float]:
    """Works for `seconds` of CPU time, at most four times that by the clock; returns images and CPU seconds."""
    begin, cpu, count = time.perf_counter(), time.process_time(), 0
    while not count or (time.process_time() - cpu < seconds and time.perf_counter() - begin < 4 * seconds):
        count += next(data)
    return count, time.process_time() - cpu


def _settle() -> None:
    """Waits until this process is idle: threads of a closed pipeline finish their chunk first."""
    idle = False
    while not idle:
        before = time.process_time()
        time.sleep(0.1)
        idle = time.process_time() - before < 0.01


def _train_rates(source: Source, config: ConfigDict, steps: int) -> Results:
    """Images/s of training from resident crops and from data in both modes."""
    mesh = sharding.make_mesh(config.run.mesh)
    recipe = make_recipe(config, steps_per_epoch(len(source), config.batch_size))
    state, train_step = jit_init_state(recipe, mesh), jit_train_step(recipe, mesh)
    images, resident = steps * config.batch_size, 0.0
    results: Results = {}
    for mode in ("host", "device"):
        batches = device_batches(_in_mode(config, mode), source, mesh, position=0, salt=0)
        if mode == "host":
            again = itertools.repeat(next(batches))
            state, _ = _timed(train_step, state, again, 1)  # compiles
            state, seconds = _timed(train_step, state, again, steps)
            results["train_resident_images_per_s"] = resident = images / seconds
        state, _ = _timed(train_step, state, batches, config.run.prefetch + 2)  # uses up what was ready
        state, seconds = _timed(train_step, state, batches, steps)
        batches.close()
        results[f"train_{mode}_images_per_s"] = images / seconds
        results[f"share_{mode}"] = images / seconds / resident
    return results


def _timed(train_step: Callable[..., Any], state: Any, batches: Iterator[Ready], steps: int) -> tuple[Any, float]:
    """Runs some steps, idle device to idle device; returns the state and the seconds."""
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for _ in range(steps):
        state, _ = train_step(state, next(batches).inputs)
    jax.block_until_ready(state)
    return state, time.perf_counter() - begin
