"""Names collapse and divergence while a run is young, with the remedy to try.

It reads the metrics of `train_step`: `loss`, `teacher_entropy` (of each picture's distribution, averaged),
`marginal_entropy` (of the batch's mean distribution), `kl`, `bad_steps`; and `input_wait`. With K prototypes, in nats:

- **uniform collapse**: every picture gets the uniform distribution: entropy ln K, KL 0. Centring won over sharpening.
- **one-prototype collapse**: one prototype takes the whole batch: both entropies 0. Sharpening won over centring.
- **constant output**: neither, but every picture gets the same distribution: the two entropies are equal.
- **stuck loss**: the loss stays at ln K, the price of knowing nothing, though the teacher says something.

A young run looks uniform and is not, so a finding must persist, and after the warm-up (one prototype: at any time).
Paper: section 3.1 and the ablations of centring and sharpening (5.3, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from ml_collections import ConfigDict

NEAR = 0.01  # of ln K: what counts as equal
FEW = math.log(2.0)  # marginal entropy of two prototypes
MIN_PATIENCE, MAX_PATIENCE = 100, 2000  # steps
UNIFORM, ONE, CONSTANT, STUCK = "uniform collapse", "one-prototype collapse", "constant output", "stuck loss"
DIVERGED = "divergence"
SHOWN = ("loss", "teacher_entropy", "marginal_entropy", "kl")
INPUT_BOUND = 0.2  # share of the time waiting for input that is worth a line


class Verdict(NamedTuple):
    """What to do, and what to tell the user, a line each."""

    action: Literal["go on", "rewind", "stop"]
    lines: list[str]


class _Spell:
    """How long a finding has lasted, and whether it was told."""

    def __init__(self):
        self.finding: str | None = None
        self.since = 0
        self.told = False

    def ripe(self, finding: str | None, step: int, patience: int, start: int = 0) -> bool:
        """True once in a spell: when `finding` has lasted `patience` steps, those before `start` not counted."""
        if finding != self.finding:
            self.finding, self.since, self.told = finding, step, False
        if finding is None or self.told or step - max(self.since, start) < patience:
            return False
        self.told = True
        return True


class Watch:
    """Follows a run through its logged metrics. A finding is told once, and again only if it went away in between.

    Args:
        config: the run's configuration.
        steps_per_epoch: turns the configuration's epochs into steps.
        total_steps: of the run; a finding must persist for a twentieth of it, at least 100 and at most 2,000 steps.
    """

    def __init__(self, config: ConfigDict, steps_per_epoch: int, total_steps: int):
        self._config = config
        self._ln_k = math.log(config.head.out_dim)
        self._warm = max(config.optim.warmup_epochs * steps_per_epoch, total_steps // 10)
        self._patience = min(max(total_steps // 20, MIN_PATIENCE), MAX_PATIENCE)
        self._learning, self._input = _Spell(), _Spell()
        self._rewinds = 0
        self._failed_at = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Judges the metrics of one step; to be called for every logged step, in order.

        "rewind": `run.max_bad_steps` non-finite steps in a row. Restore the last checkpoint, bump the salt, go on.
        "stop": that again, after `run.max_rewinds` rewinds with no progress in between. The last line is the reason.
        """
        bad = int(metrics["bad_steps"])
        if bad >= self._config.run.max_bad_steps:
            return self._diverged(step, bad)
        if step > self._failed_at + self._patience:
            self._rewinds = 0
        return Verdict("go on", self._judge_learning(step, bad, metrics) + self._judge_input(step, metrics))

    def _judge_learning(self, step: int, bad: int, metrics: Mapping[str, float]) -> list[str]:
        if bad:
            line = f"step {step}: the loss or its gradient is not finite; the step was skipped"
            return [line] if self._learning.ripe(DIVERGED, step, 0) else []
        finding = self._diagnose(metrics)
        start = 0 if finding == ONE else self._warm
        if not self._learning.ripe(finding, step, self._patience, start) or finding is None:
            return []
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN)
        found = f"step {step}: {finding}: {shown}, ln K {self._ln_k:.3f}, for {self._patience} steps or more"
        return [f"{found}. {advice(finding, self._config)}"]

    def _judge_input(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        lines = _input_bound(step, metrics["input_wait"], self._config)
        return lines if self._input.ripe("input" if lines else None, step, MIN_PATIENCE) else []

    def _diagnose(self, metrics: Mapping[str, float]) -> str | None:
        entropy, marginal = metrics["teacher_entropy"], metrics["marginal_entropy"]
        near = NEAR * self._ln_k
        if marginal < FEW:
            return ONE
        if entropy > self._ln_k - near:
            return UNIFORM if metrics["kl"] < near else STUCK
        if marginal - entropy < near:
            return CONSTANT
        return STUCK if metrics["loss"] > self._ln_k - near else None

    def _diverged(self, step: int, bad: int) -> Verdict:
        self._learning, self._failed_at = _Spell(), step
        self._rewinds += 1
        found = f"step {step}: {bad} non-finite steps in a row"
        if self._rewinds > self._config.run.max_rewinds:
            return Verdict("stop", [f"{found}, after {self._rewinds - 1} rewinds. {advice(DIVERGED, self._config)}"])
        return Verdict("rewind", [f"{found}; back to the last checkpoint, with other crops"])


def advice(finding: str, config: ConfigDict) -> str:
    """What to try, best first: only what this configuration does not do already."""
    optim, teacher, loss, head = config.optim, config.teacher, config.loss, config.head
    cooler = (teacher.temp > 0.04, f"a sharper teacher: teacher.temp=0.04 (now {teacher.temp:g})")
    cooler_start = (
        teacher.warmup_temp > 0.03,
        f"a sharper start: teacher.warmup_temp=0.03 (now {teacher.warmup_temp:g}) for more teacher.warmup_temp_epochs",
    )
    quicker_center = (loss.center_momentum > 0.9, f"loss.center_momentum=0.9 (now {loss.center_momentum:g})")
    batch = (config.batch_size < 1024, f"a larger batch_size (now {config.batch_size}; run.accum_steps makes room)")
    slower = (
        config.batch_size <= 256 and teacher.momentum < 0.9995,
        f"a slower teacher: teacher.momentum=0.9995 (now {teacher.momentum:g})",
    )
    smaller_lr = (True, f"half the learning rate: optim.lr={optim.lr / 2:g}")
    clip = (not 0 < optim.clip_grad <= 0.3, f"optim.clip_grad=0.3 (now {optim.clip_grad:g})")
    freeze = (True, f"optim.freeze_last_layer={optim.freeze_last_layer + 2} (now {optim.freeze_last_layer})")
    gain = (not head.norm_last_layer, "head.norm_last_layer=True")
    float32 = (config.model.dtype != "float32", f"model.dtype=float32 (now {config.model.dtype})")
    warmer = (teacher.temp < 0.04, f"a softer teacher: teacher.temp=0.04 (now {teacher.temp:g})")
    fewer = (
        head.out_dim > 4096 and config.batch_size < 256,
        f"fewer prototypes: head.out_dim=4096 (now {head.out_dim})",
    )
    remedies = {
        UNIFORM: [cooler, cooler_start, quicker_center, smaller_lr, freeze, slower],
        ONE: [quicker_center, warmer, batch, slower, smaller_lr, clip],
        CONSTANT: [quicker_center, smaller_lr, batch, slower, clip, freeze],
        STUCK: [freeze, gain, cooler_start, smaller_lr, fewer, slower],
        DIVERGED: [float32, gain, smaller_lr, clip, freeze],
    }
    return "Try " + "; ".join([text for wanted, text in remedies[finding] if wanted][:4])


def _input_bound(step: int, share: float, config: ConfigDict) -> list[str]:
    """A line where the devices wait for input for more than `INPUT_BOUND` of the time: what is slow, what to change."""
    if share <= INPUT_BOUND:
        return []
    run = config.run
    remedies = [f"run.workers={max(2 * run.workers, 4)} (now {run.workers})"]
    if config.data.render == "host":
        remedies.append("data.render=device (crops are rendered on the accelerator)")
    remedies.append("`dino-jax pack` (fewer, larger files)")
    return [f"step {step}: {share:.0%} of the time waiting for input: the devices starve. Try {'; '.join(remedies)}"]
