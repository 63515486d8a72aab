"""Plans for five models on four TPU slices: `python benchmarks/plans.py > docs/scaling.md`.

Each plan is one call of `dino-jax plan`: minutes on two CPU cores, with libtpu (the extra `tpu`) but no TPU. Finished
plans are kept in benchmarks/plans.jsonl, so that an interrupted command resumes; remove a line to make that plan again.
`--done` only prints the page of the finished plans.
"""

from __future__ import annotations

import json
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "plans.jsonl"
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:4x4")
REMAT, TWICE, FOUR_TIMES = "run.remat=blocks", "run.accum_steps=2", "run.accum_steps=4"
# Model -> configuration, overrides everywhere, overrides of run.* that make it fit on some slices.
MODELS: dict[str, tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "ViT-S/16": ("vit_s16_800", (), {}),
    "ViT-B/16": ("vit_b16", (), {"v5e:4x4": (REMAT,)}),
    "ViT-S/8": ("vit_s8", (), {"v5e:4x4": (REMAT, TWICE), "v6e:4x4": (REMAT,)}),
    "ViT-L/16": ("vit_b16", ("model.name=vit_large",), {"v5e:4x4": (REMAT, FOUR_TIMES), "v6e:4x4": (REMAT,)}),
    "ViT-B/8": ("vit_b8", ("batch_size=1024",), {"v5e:4x4": (REMAT, FOUR_TIMES), "v6e:4x4": (REMAT, TWICE)}),
}
INTRODUCTION = """\
# Plans

The output of `dino-jax plan` for runs that this project has not done. libtpu compiled each train step for a TPU slice,
on a machine without TPUs. To make this page again: `python benchmarks/plans.py > docs/scaling.md`.

**No step was timed.** The traffic includes what stays in the chip's fast memory, and no chip reaches its peaks.

- Settings: ImageNet-1k, 2 x 224 + 10 x 96 pixels, 65,536 prototypes, bfloat16, AdamW, a global batch of 1,024, data
  parallel. `run.*` is what else was set to make the step fit.
- Sizes, FLOPs and bytes are for one chip and one step.
- *Roofline* is the largest of three times at the chip's published peaks: compute, memory traffic by the compiler's
  count, and links. *Images/s* and *days* assume the roofline. *Input* is the rate that each host (4 chips) must then
  read.
- Most steps were compiled before GELU kept one array instead of three for the backward pass. Compiled after it:
  ViT-S/16 on v5e:4x4 and v6e:4x4 (peaks 1.6 and 0.1 GiB smaller), ViT-L/16 and ViT-B/8 on v6e:4x4.

| model | slice | images a chip | `run.*` | peak of HBM, GiB | temporaries, GiB | FLOPs, T (analytic) | accessed, GB \
| collectives | reduced, MB (gradients) | roofline, ms | bound by | images/s | days | input, images/s a host |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Makes the missing plans one by one, then prints the page."""
    done = {}
    if RESULTS.exists():
        done = {
            (entry["name"], entry["topology"]): entry for entry in map(json.loads, RESULTS.read_text().splitlines())
        }
    wanted = [(name, topology) for topology in TOPOLOGIES for name in MODELS]
    for name, topology in wanted:
        if (name, topology) not in done and "--done" not in sys.argv:
            config, common, special = MODELS[name]
            settings = ("model.dtype=bfloat16", *common, *special.get(topology, ()))
            if (entry := make(config, topology, settings)) is not None:
                done[name, topology] = entry = {"name": name, "settings": settings, **entry}
                with RESULTS.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
    print(INTRODUCTION, end="")
    for name in MODELS:
        for topology in TOPOLOGIES:
            if (name, topology) in done:
                print(row(done[name, topology]))
    if missing := [f"{name} on {topology}" for name, topology in wanted if (name, topology) not in done]:
        print(f"\nNot made yet: {', '.join(missing)}.")


def make(config: str, topology: str, settings: tuple[str, ...]) -> dict | None:
    """The JSON of one plan; None if it failed (the reason is on stderr)."""
    command = [sys.executable, "-m", "dino_jax", "plan", f"--config=configs/{config}.py", f"--topology={topology}"]
    command += [f"--config.{setting}" for setting in settings]
    print(shlex.join(command[1:]), file=sys.stderr, flush=True)
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(result.stdout, file=sys.stderr, flush=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def row(plan: dict) -> str:
    """One line of the table."""
    run = " ".join(s.removeprefix("run.") for s in plan["settings"] if s.startswith("run.")) or "-"
    memory = f"{plan['peak_bytes'] / 2**30:.1f} of {plan['hbm_bytes'] / 2**30:.0f}"
    if not plan["fits"]:
        cells = [f"**{memory}: does not fit**", *["-"] * 10]
    else:
        times = {kind: plan[f"{kind}_ms"] for kind in ("compute", "memory", "links")}
        cells = [
            memory,
            f"{plan['temp_bytes'] / 2**30:.1f}",
            f"{plan['flops'] / 1e12:.2f} ({plan['analytic_flops'] / 1e12:.2f})",
            f"{plan['bytes'] / 1e9:.0f}",
            ", ".join(f"{entry['count']} {kind}" for kind, entry in plan["collectives"].items()),
            f"{plan['collective_bytes'] / 1e6:.1f} ({plan['gradient_bytes'] / 1e6:.1f})",
            f"{plan['roofline_step_ms']:.0f}",
            max(times, key=lambda kind: times[kind]),
            f"{plan['images_per_s']:,.0f}",
            f"{plan['days']:.1f} for {plan['epochs']} epochs",
            f"{plan['host_images_per_s']:,.0f}",
        ]
    return "| " + " | ".join([plan["name"], plan["topology"], f"{plan['images_per_device']:g}", run, *cells]) + " |"


if __name__ == "__main__":
    main()
