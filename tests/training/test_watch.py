"""Simulated runs, healthy and not: what the watch says, when, and what it leaves unsaid."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from dino_jax.config import default
from dino_jax.training.watch import Verdict, Watch

EPOCH, TOTAL, EVERY = 100, 4000, 10  # steps an epoch, in all, between logged lines
LN_K = math.log(1024)


def make_config(**changes):
    config = default()
    config.head.out_dim, config.batch_size = 1024, 256
    config.optim.warmup_epochs = 5
    for key, value in changes.items():
        *groups, name = key.split("__")
        functools.reduce(lambda tree, group: tree[group], groups, config)[name] = value
    return config


def line(entropy: float, marginal: float, kl: float, *, bad: int = 0, wait: float = 0.0) -> dict[str, float]:
    """The metrics of one step; loss = entropy + KL, as the loss is defined."""
    loss = math.nan if bad else entropy + kl
    return {
        "loss": loss,
        "teacher_entropy": entropy,
        "marginal_entropy": marginal,
        "kl": kl,
        "ln_k_gap": LN_K - loss,
        "bad_steps": float(bad),
        "input_wait": wait,
    }


def healthy(step: int, noise: np.random.Generator) -> dict[str, float]:
    """Uniform at first; from step 300 on the teacher's distributions sharpen, while all prototypes stay in use."""
    progress = min(max(step - 300, 0) / 1500, 1.0)
    entropy = LN_K - (LN_K - 2.0) * progress + noise.normal(0, 0.02) * progress
    return line(entropy, LN_K - 0.5 * progress, 0.001 + 1.2 * progress)


def follow(stream, config=None, steps=TOTAL) -> list[tuple[int, Verdict]]:
    """The verdicts that say or ask for something, of a stream: step -> metrics."""
    watch = Watch(config or make_config(), EPOCH, TOTAL)
    verdicts = [(step, watch.update(step, stream(step))) for step in range(EVERY, steps + 1, EVERY)]
    return [(step, verdict) for step, verdict in verdicts if verdict.lines or verdict.action != "go on"]


def test_a_healthy_run_is_left_alone():
    noise = np.random.default_rng(0)
    assert follow(lambda step: healthy(step, noise)) == []


def test_a_run_that_starts_slowly_is_left_alone():
    """Uniform until well into the warm-up, and a while beyond."""
    noise = np.random.default_rng(0)
    assert follow(lambda step: healthy(max(step - 300, 0), noise)) == []


COLLAPSES = {  # teacher entropy, marginal entropy, KL
    "uniform collapse": (LN_K - 0.002, LN_K - 0.001, 0.001),
    "one-prototype collapse": (0.001, 0.002, 0.0005),
    "constant output": (3.0, 3.01, 0.01),
    "stuck loss": (5.0, 6.5, LN_K - 5.0),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_each_collapse_is_named_once_with_evidence_and_a_remedy(name):
    entropy, marginal, kl = COLLAPSES[name]
    [(step, verdict)] = follow(lambda step: line(entropy, marginal, kl))
    [text] = verdict.lines
    assert verdict.action == "go on"
    assert text.startswith(f"step {step}: {name}: ") and "\n" not in text
    assert f"teacher_entropy {entropy:.3f}" in text and f"ln K {LN_K:.3f}" in text
    assert "Try " in text and "=" in text.split("Try ")[1]
    assert step < (400 if name == "one-prototype collapse" else 800)  # the warm-up ends at 500


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_late_in_a_healthy_run(name):
    noise = np.random.default_rng(0)
    entropy, marginal, kl = COLLAPSES[name]
    [(step, verdict)] = follow(lambda step: healthy(step, noise) if step < 3000 else line(entropy, marginal, kl))
    assert name in verdict.lines[0] and 3000 < step <= 3300


def test_told_again_only_after_it_went_away():
    noise = np.random.default_rng(0)
    collapsed = line(*COLLAPSES["uniform collapse"])

    def stream(step):
        return healthy(4000, noise) if 2000 <= step < 2500 else collapsed

    assert [step for step, _ in follow(stream)] == [700, 2700]


def test_a_short_spell_is_not_told():
    noise = np.random.default_rng(0)
    collapsed = line(*COLLAPSES["one-prototype collapse"])
    assert follow(lambda step: collapsed if 2000 <= step < 2150 else healthy(step, noise)) == []


@pytest.mark.parametrize(
    ("name", "settings", "remedy"),
    [
        ("uniform collapse", {"teacher__temp": 0.07}, "teacher.temp=0.04 (now 0.07)"),
        (
            "uniform collapse",
            {"objective__dino__center_momentum": 0.999},
            "objective.dino.center_momentum=0.9 (now 0.999)",
        ),
        (
            "one-prototype collapse",
            {"objective__dino__center_momentum": 0.99},
            "objective.dino.center_momentum=0.9 (now 0.99)",
        ),
        ("one-prototype collapse", {"teacher__temp": 0.01}, "teacher.temp=0.04 (now 0.01)"),
        ("one-prototype collapse", {}, "larger batch_size (now 256"),
        ("constant output", {}, "teacher.momentum=0.9995 (now 0.996)"),
        ("stuck loss", {}, "optim.freeze_last_layer=3 (now 1)"),
        ("stuck loss", {"head__norm_last_layer": False}, "head.norm_last_layer=True"),
    ],
)
def test_the_remedy_fits_the_configuration(name, settings, remedy):
    [(_, verdict)] = follow(lambda step: line(*COLLAPSES[name]), make_config(**settings))
    assert remedy in verdict.lines[0]


def test_no_remedy_that_is_in_place_already():
    [(_, verdict)] = follow(lambda step: line(*COLLAPSES["uniform collapse"]), make_config(teacher__momentum=0.9996))
    for key in ("teacher.temp=", "center_momentum", "teacher.momentum"):
        assert key not in verdict.lines[0]


def test_a_bad_step_is_told_and_several_ask_for_a_rewind_and_then_a_stop():
    good, config = line(5.0, 6.0, 1.0), make_config(model__dtype="bfloat16")
    watch = Watch(config, EPOCH, TOTAL)
    assert watch.update(1000, good) == Verdict("go on", [])
    first = watch.update(1001, line(5.0, 6.0, 1.0, bad=1))
    assert first.action == "go on" and "not finite; the step was skipped" in first.lines[0]
    assert watch.update(1002, line(5.0, 6.0, 1.0, bad=2)) == Verdict("go on", [])  # the same spell
    assert watch.update(1003, good) == Verdict("go on", [])  # over

    for _ in range(config.run.max_rewinds):
        verdict = watch.update(1010, line(5.0, 6.0, 1.0, bad=3))
        assert verdict.action == "rewind" and "3 non-finite steps in a row" in verdict.lines[0]
        assert watch.update(1000, good) == Verdict("go on", [])  # restored
    verdict = watch.update(1010, line(5.0, 6.0, 1.0, bad=3))
    assert verdict.action == "stop" and "after 2 rewinds" in verdict.lines[-1]
    assert "model.dtype=float32 (now bfloat16)" in verdict.lines[-1] and "optim.lr=0.00025" in verdict.lines[-1]


def test_progress_after_a_rewind_forgives_it():
    good, bad = line(5.0, 6.0, 1.0), line(5.0, 6.0, 1.0, bad=3)
    watch = Watch(make_config(), EPOCH, TOTAL)
    for failure in (1000, 2000, 3000, 3900):
        assert watch.update(failure, bad).action == "rewind"
        assert watch.update(failure + 300, good).action == "go on"


def test_waiting_for_input_is_told_once():
    noise = np.random.default_rng(0)

    def stream(step):
        return healthy(step, noise) | {"input_wait": 0.6 if 1000 <= step < 2000 or step == 3000 else 0.05}

    [(step, verdict)] = follow(stream)
    assert 1000 < step <= 1200
    assert "60% of the time waiting for input" in verdict.lines[0] and "run.workers=4 (now 0)" in verdict.lines[0]


def test_a_short_run_too():
    """The quick start's length: a few hundred steps, uniform for the first third."""
    watch = Watch(make_config(optim__warmup_epochs=1), 64, 320)
    lines = []
    for step in range(5, 321, 5):
        progress = min(max(step - 100, 0) / 200, 1.0)
        lines += watch.update(step, line(LN_K - 3 * progress, LN_K - progress, 0.001 + progress)).lines
    assert lines == []
