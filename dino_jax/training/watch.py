"""Tells of collapse and divergence while a run is young, with the remedy to try.

It follows the metrics of `train_step`: each objective term's own `diagnose`, `bad_steps`, and `input_wait`. A young run
may look collapsed and is not, so a finding must persist, and after the warm-up unless the term says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from ml_collections import ConfigDict

from dino_jax.objectives import remedies
from dino_jax.objectives.objective import Objective, make_objectives

MIN_PATIENCE, MAX_PATIENCE = 100, 2000  # steps
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
        self._warm = max(config.optim.warmup_epochs * steps_per_epoch, total_steps // 10)
        self._patience = min(max(total_steps // 20, MIN_PATIENCE), MAX_PATIENCE)
        self._objectives = make_objectives(config)
        self._collapse = {term.name: _Spell() for term in self._objectives}
        self._divergence, self._input = _Spell(), _Spell()
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
        lines = []
        if self._divergence.ripe("divergence" if bad else None, step, 0):
            lines.append(f"step {step}: the loss or its gradient is not finite; the step was skipped")
        for term in self._objectives:
            lines += self._judge_term(term, step, None if bad else metrics)
        return lines

    def _judge_term(self, term: Objective, step: int, metrics: Mapping[str, float] | None) -> list[str]:
        spell, finding = self._collapse[term.name], term.diagnose(metrics) if metrics is not None else None
        if finding is None:
            spell.ripe(None, step, 0)
            return []
        if not spell.ripe(finding.name, step, self._patience, 0 if finding.early else self._warm):
            return []
        shown = ", ".join(f"{name} {value:.3f}" for name, value in finding.shown.items())
        return [f"step {step}: {finding.name}: {shown}, for {self._patience} steps or more. {finding.advice}"]

    def _judge_input(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        lines = _input_bound(step, metrics["input_wait"], self._config)
        return lines if self._input.ripe("input" if lines else None, step, MIN_PATIENCE) else []

    def _diverged(self, step: int, bad: int) -> Verdict:
        self._divergence, self._failed_at = _Spell(), step
        self._collapse = {name: _Spell() for name in self._collapse}
        self._rewinds += 1
        found = f"step {step}: {bad} non-finite steps in a row"
        if self._rewinds > self._config.run.max_rewinds:
            its = remedies.common(self._config)
            advice = remedies.advice(its[name] for name in ("float32", "gain", "lr", "clip", "freeze"))
            return Verdict("stop", [f"{found}, after {self._rewinds - 1} rewinds. {advice}"])
        return Verdict("rewind", [f"{found}; back to the last checkpoint, with other crops"])


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
