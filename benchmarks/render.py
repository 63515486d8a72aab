"""Speed of the accelerator's crop renderer, and of PIL on one core, with the same parameters.

    python benchmarks/render.py [--batch=64] [--steps=20] [--flops] [--config.KEY=VALUE ...]

Prints one JSON object: images/s and temporary memory of the renderer, images/s of PIL. The renderer is made for the
matrix units of an accelerator; on a CPU it is no faster than PIL. With --flops, prints instead the FLOPs per image of
the renderer and of the train step (default: ViT-S/16), by the compiler's count.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.config import default
from dino_jax.data.crops import CropParams, draw_crops, render_crops
from dino_jax.render.renderer import make_renderer
from dino_jax.training import step as train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--flops", action="store_true", help="count FLOPs instead of measuring")
    args, overrides = parser.parse_known_args()
    config = config_io.override(default(), ["--config.data.render=device", *overrides])
    if args.flops:
        print(json.dumps(flops(config)))
        return
    rng = np.random.default_rng(0)
    side, height, width = config.data.canvas, *np.array([375, 500]) * config.data.canvas // 512
    canvas = np.zeros((args.batch, side, side, 3), np.uint8)
    canvas[:, :height, :width] = rng.integers(0, 256, (args.batch, height, width, 3), np.uint8)
    drawn = [draw_crops(rng, height, width, config.crops) for _ in range(args.batch)]
    batch = jax.device_put({"canvas": canvas, "params": CropParams(*map(np.stack, zip(*drawn, strict=True)))})

    compiled = make_renderer(config).lower(batch).compile()
    jax.block_until_ready(compiled(batch))
    start = time.perf_counter()
    for _ in range(args.steps):
        crops = compiled(batch)
    jax.block_until_ready(crops)
    rate = args.batch * args.steps / (time.perf_counter() - start)

    count = min(args.batch, 16)
    start = time.perf_counter()
    for i in range(count):
        render_crops(canvas[i, :height, :width], drawn[i], config.crops)
    pil_rate = count / (time.perf_counter() - start)
    result = {
        "device": jax.devices()[0].device_kind,
        "batch": args.batch,
        "images_per_s": round(rate, 1),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "pil_images_per_s": round(pil_rate, 1),
    }
    print(json.dumps(result))


def flops(config: ConfigDict, images: int = 2) -> dict[str, float]:
    """GFLOPs per image of the renderer and of the train step. Two images, so that no loop hides work."""
    side, channels, crops = config.data.canvas, config.model.in_chans, config.crops
    drawn = draw_crops(np.random.default_rng(0), side, side, crops)
    batch = {
        "canvas": jax.ShapeDtypeStruct((images, side, side, channels), np.uint8),
        "params": jax.tree.map(lambda x: jax.ShapeDtypeStruct((images, *x.shape), x.dtype), drawn),
    }
    rendered = make_renderer(config).lower(batch)
    recipe = train_step.make_recipe(config, 100)
    state = jax.eval_shape(lambda: train_step.init_state(recipe, jax.random.key(0)))
    step = jax.jit(lambda state, crops: train_step.train_step(recipe, state, crops)).lower(state, rendered.out_info)
    render, train = (lowered.compile().cost_analysis()["flops"] / images / 1e9 for lowered in (rendered, step))
    return {"render_gflops": round(render, 3), "step_gflops": round(train, 3), "share": round(render / train, 4)}


if __name__ == "__main__":
    main()
