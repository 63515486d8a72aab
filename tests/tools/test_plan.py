"""Plans: the compiler's figures for a run, and FLOPs counted by hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import pytest

from dino_jax.cli import main
from dino_jax.config import default
from dino_jax.errors import UserError
from dino_jax.tools import plan
from dino_jax.tools.plan import compiler
from dino_jax.tools.plan.chips import CHIPS, chip_of
from dino_jax.tools.plan.flops import step_flops
from dino_jax.tools.plan.hlo import collectives
from tests.tiny import tiny_config

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def wide_config():
    """A model so wide that nearly all work is matrix products."""
    config = tiny_config(embed_dim=256)
    config.head.update({"out_dim": 512, "hidden_dim": 256, "bottleneck_dim": 64})
    return config


@pytest.fixture(scope="module")
def four():
    """A plan for four of this machine's CPU devices."""
    return plan.plan(wide_config(), "cpu:4")


def test_flops_compiled_and_analytic_agree(four):
    assert four.flops == pytest.approx(four.analytic_flops, rel=0.1)


def test_collectives_are_gradients_center_and_metrics(four):
    center = metrics = 4 * wide_config().head.out_dim
    assert set(four.collectives) == {"all-reduce"}
    assert four.collective_bytes == pytest.approx(four.gradient_bytes + center + metrics, rel=0.05)


def test_memory_is_what_the_state_and_batch_take(four):
    crops = 4 * 4 * 3 * (2 * 32 * 32 + 2 * 16 * 16)  # 4 images, float32
    state = four.parameter_bytes + four.teacher_bytes + four.optimizer_bytes
    assert four.argument_bytes == pytest.approx(state + crops, rel=0.02)
    assert four.parameter_bytes == four.teacher_bytes == four.gradient_bytes
    assert four.fits and four.peak_bytes > four.argument_bytes
    assert (four.devices, four.hosts, four.images_per_device, four.images) == (4, 1, 4, 64)
    assert four.roofline_step_ms is None  # no published figures of a CPU


def test_the_last_line_is_json(monkeypatch, capsys, tmp_path, four):
    """One object for one topology, a list for several."""
    monkeypatch.setattr(plan, "plan", lambda config, topology, images: dataclasses.replace(four, topology=topology))
    file = tmp_path / "config.py"
    file.write_text("from tests.tiny import tiny_config as get_config\n")
    for topologies in ("cpu:4", "cpu:2,cpu:4"):
        assert main(["plan", f"--config={file}", f"--topology={topologies}", "--config.batch_size=8"]) == 0
        out = capsys.readouterr().out
        last = json.loads(out.splitlines()[-1])
        first = last[0] if "," in topologies else last
        wanted = {"flops", "bytes", "temp_bytes", "argument_bytes", "hbm_bytes", "roofline_step_ms", "fits"}
        assert wanted <= set(first)
        assert "fits" in out and "all-reduce" in out
    assert [entry["topology"] for entry in last] == ["cpu:2", "cpu:4"]


def test_a_plan_for_a_known_chip_says_days_and_what_to_change(four):
    config = wide_config()
    big = dataclasses.replace(
        four, device="TPU v5 lite", images_per_device=64, hbm_bytes=2**34, peak_bytes=3 * 2**34, fits=False
    )
    lines = "\n".join(plan.advice(big, config))
    assert "--config.run.remat=blocks" in lines
    assert "--config.run.accum_steps=4" in lines
    assert "--config.model.dtype=bfloat16" in lines
    config.run.remat, config.head.out_dim = "blocks", 2**24
    lines = "\n".join(plan.advice(dataclasses.replace(big, parameter_bytes=2**33), config))
    assert "remat=blocks" not in lines
    assert "--config.run.mesh.fsdp=4" in lines and "--config.run.mesh.model=2" in lines
    assert not list(plan.advice(dataclasses.replace(four, device="cpu"), config))


@pytest.mark.parametrize(("name", "gmacs"), [("vit_small", 4.6), ("vit_base", 17.6), ("vit_large", 61.6)])
def test_forward_flops_are_the_published_ones(name, gmacs):
    """Multiplications at 224 pixels, patch 16, as timm and the DeiT paper list them."""
    config = default()
    config.model.name = name
    from dino_jax.models import build_backbone

    macs = sum(build_backbone(config.model, 224).flops(224, 224)) / 2
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_step_flops_follow_rows_remat_and_shards():
    config = default()
    plain = step_flops(config, 1)
    assert step_flops(config, 64) == pytest.approx(64 * plain)
    assert step_flops(config, 1, model_ways=4) < plain
    config.run.remat = "blocks"
    assert 1.2 < step_flops(config, 1) / plain < 1.3
    config.model.name = "resnet50"
    assert step_flops(config, 1) is None


PROGRAM = """\
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0:T(128)} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
  %a = (bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/f32[5]{0}) all-reduce-start(%p, %q), channel_id=1
  %d = (bf16[2,3]{1,0}, f32[5]{0}) all-reduce-done(%a)
  %g = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %s = f32[4]{0} reduce-scatter(%p), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  %t = f32[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %u = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""


def test_collectives_of_a_program():
    """Asynchronous ones count once; a loop's as often as it runs; sizes are those of whole arrays."""
    assert collectives(PROGRAM, trips=3) == {
        "all-reduce": {"count": 4, "bytes": 3 * 32 + 12 + 20},
        "all-gather": {"count": 1, "bytes": 64},
        "reduce-scatter": {"count": 3, "bytes": 64 + 64 + 32},
    }


def test_chips_by_their_device_kind():
    names = ["v4", "v5e", "v5p", "v6e", "tpu7x"]
    kinds = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"]
    assert [chip_of(kind).name for kind in kinds] == names
    assert chip_of("NVIDIA H100 80GB HBM3").name == "H100 SXM"
    assert chip_of("cpu") is None
    assert all(chip.source.startswith("https://") for chip in CHIPS.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=cpu:3"], "batch_size=16 is not divisible by 3 device(s)"),
        (["--topology=cpu:1000"], "give at most cpu:8"),
        (["--topology=cpu:many"], "is not a number of devices"),
        (["--topology=gpu"], "JAX finds no gpu here"),
        (["--topology=,"], "give one such as"),
        (["--topology=cpu:4", "--images=8"], "more than the 8 images"),
        (["--topology=cpu:4", "--config.run.mesh.fsdp=3"], "does not fit 4 device(s)"),
        (["--topology=cpu:4", "--config.run.remat=all"], "run.remat"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from tests.tiny import tiny_config as get_config\n")
    assert main(["plan", f"--config={file}", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_without_libtpu_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*pip install"):
        compiler.devices_of("v5e:4x4")


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ...", 20.5),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.80G) "
            "exceeds available HBM (15.75G).",
            18.8 + 2,
        ),
    ],
)
def test_a_program_too_large_for_its_memory_is_a_plan_too(message, peak):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    program = compiler.compile_step(Lowered(), state_bytes=2 * 2**30)
    assert (program.peak, program.text) == (pytest.approx(peak * 2**30), "")


@needs_libtpu
@pytest.mark.extra
@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:3x3"])
def test_unknown_topologies(name):
    with pytest.raises(UserError, match=f"--topology={name}: .* give one such as"):
        compiler.devices_of(name)


@needs_libtpu
@pytest.mark.extra
def test_a_tpu_compile_reduces_each_gradient_once_and_gathers_nothing():
    """Compiled for v5e:2x2 without a TPU: collectives, FLOPs, and a roofline from the chip's figures."""
    config = wide_config()
    config.model.dtype = "bfloat16"
    compiler.prepare(["v5e:2x2"])
    said = plan.plan(config, "v5e:2x2")
    assert (said.devices, said.hosts, said.dtype) == (4, 1, "bfloat16")
    assert set(said.collectives) == {"all-reduce"}
    center = metrics = 4 * config.head.out_dim
    assert said.collective_bytes == pytest.approx(said.gradient_bytes + center + metrics, rel=0.05)
    assert said.flops == pytest.approx(said.analytic_flops, rel=0.1)
    assert said.fits and said.hbm_bytes == 2**34
    assert said.roofline_step_ms == max(said.compute_ms, said.memory_ms, said.links_ms) > 0
    assert said.days == pytest.approx(3 * 4 * said.roofline_step_ms / 86.4e6)


@needs_libtpu
@pytest.mark.extra
def test_microbatches_are_counted_as_often_as_they_run():
    config = wide_config()
    config.run.accum_steps, config.batch_size = 4, 64
    compiler.prepare(["v5e:2x2"])
    said = plan.plan(config, "v5e:2x2")
    assert said.flops == pytest.approx(said.analytic_flops, rel=0.1)
    assert said.collective_bytes == pytest.approx(said.gradient_bytes, rel=0.05)
