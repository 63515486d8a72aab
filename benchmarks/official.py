"""The train step beside the official PyTorch code's on the same machine: images a second, memory, a process for each.

    git clone https://github.com/facebookresearch/dino
    python benchmarks/official.py --official=dino [--config=configs/vit_s16.py] [--batches=64,128] [--steps=20]
        [--types=float16,bfloat16] [--config.KEY=VALUE ...]

The official side is its own `train_one_epoch`, unchanged, over batches that lie on the GPU already: forward passes of
both networks under autocast, loss and center, backward pass, clipping, AdamW, teacher. Ours is the jitted step that
`dino-jax train` runs, in bfloat16, over the same sizes of crops. Neither includes input. Needs torch, torchvision and
JAX, all with CUDA or all without: on a CPU, with `--types=float32,float32`, the official calls of `.cuda()` do nothing.
Prints a line for each run and, last, one JSON object; `ratio` is ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

WARM_UP = 5  # steps
SIDES = {"official": "float16", "ours": "bfloat16"}  # and the compute type by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True, type=pathlib.Path, help="a clone of facebookresearch/dino")
    parser.add_argument("--config", default="configs/vit_s16.py")
    parser.add_argument("--batches", default="64", help="images a step, several with commas")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--types", default=",".join(SIDES.values()), help="of the official code, of ours")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of a process that measures
    args, overrides = parser.parse_known_args()
    types = dict(zip(SIDES, args.types.split(","), strict=True))
    if args.side:
        measure = {"official": measure_official, "ours": measure_ours}[args.side]
        print(json.dumps(measure(args, int(args.batches), types[args.side], overrides)))
        return
    results = []
    for batch in args.batches.split(","):
        entry: dict[str, Any] = {"batch_size": int(batch)}
        for side, dtype in types.items():
            entry[side] = {"dtype": dtype} | in_process(side, batch)
            print(f"batch {batch}, {side}: {entry[side]}", file=sys.stderr, flush=True)
        entry["ratio"] = round(entry["ours"]["images_per_s"] / entry["official"]["images_per_s"], 3)
        results.append(entry)
    print(json.dumps(results))


def in_process(side: str, batch: str) -> dict[str, Any]:
    """The same command line for one side and batch; its memory is gone afterwards."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, *sys.argv, f"--side={side}", f"--batches={batch}"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{side} with a batch of {batch} failed")
    return json.loads(done.stdout.splitlines()[-1])


def measure_ours(args: argparse.Namespace, batch: int, dtype: str, overrides: list[str]) -> dict[str, Any]:
    """`dino-jax bench step`."""
    from dino_jax import config_io
    from dino_jax.tools.bench import bench_step

    fixed = [f"--config.batch_size={batch}", f"--config.model.dtype={dtype}"]
    found = bench_step(config_io.load(args.config, [*overrides, *fixed]), args.steps)
    return {name: round(float(value), 3) for name, value in found.items()}


def measure_official(args: argparse.Namespace, batch: int, dtype: str, overrides: list[str]) -> dict[str, Any]:
    """The official loop over resident batches, as its `train_dino` sets it up for one GPU."""
    if dtype not in ("float16", "float32"):
        sys.exit("--types: the official code knows float16 and float32")
    sys.path.insert(0, str(args.official))
    import main_dino
    import torch
    import torch.distributed
    import utils
    import vision_transformer
    from torch import nn

    from dino_jax import config_io

    config = config_io.load(args.config, overrides)
    device, backend = (torch.device("cuda", 0), "nccl") if torch.cuda.is_available() else (None, "gloo")
    if device is None:  # the official code asks for a GPU without looking
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor
        torch.cuda.synchronize = lambda *_: None
        utils.SmoothedValue.synchronize_between_processes = lambda _: None
    torch.backends.cudnn.benchmark = True
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.distributed.init_process_group(backend, rank=0, world_size=1, device_id=device)
    build = getattr(vision_transformer, config.model.name)
    networks = []
    for options in ({"drop_path_rate": config.model.drop_path}, {}):
        backbone = build(patch_size=config.model.patch_size, **options)
        head = main_dino.DINOHead(backbone.embed_dim, config.head.out_dim, config.head.use_bn)
        networks.append(utils.MultiCropWrapper(backbone, head).cuda())
    student, teacher = nn.parallel.DistributedDataParallel(networks[0], device_ids=device and [0]), networks[1]
    teacher.load_state_dict(student.module.state_dict())
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    loss = main_dino.DINOLoss(config.head.out_dim, 2 + config.crops.local_count, 0.04, 0.04, 0, 2).cuda()
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    sizes = [config.crops.global_size] * 2 + [config.crops.local_size] * config.crops.local_count
    crops = [torch.randn(batch, config.model.in_chans, *size).cuda() for size in sizes]
    options = argparse.Namespace(
        epochs=2,
        clip_grad=config.optim.clip_grad,
        freeze_last_layer=config.optim.freeze_last_layer,
    )
    scaler = torch.amp.GradScaler("cuda") if dtype == "float16" else None

    def epoch(number: int, steps: int) -> float:
        schedules = [[value] * (2 * args.steps + 2 * WARM_UP) for value in (1e-4, 0.04, 0.996)]
        begin = time.perf_counter()
        main_dino.train_one_epoch(
            student, teacher, teacher, loss, [(crops, None)] * steps, optimizer, *schedules, number, scaler, options
        )
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    sys.stdout = sys.stderr  # the loop prints
    epoch(0, WARM_UP)  # the last layer is frozen in it
    epoch(1, WARM_UP)
    seconds = epoch(1, args.steps)
    sys.stdout = sys.__stdout__
    return {
        "images_per_s": round(args.steps * batch / seconds, 3),
        "ms_per_step": round(1e3 * seconds / args.steps, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device else None,
    }


if __name__ == "__main__":
    main()
