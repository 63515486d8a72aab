"""The training loop: `train(config, workdir) -> TrainState`."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.data.pipeline import steps_per_epoch
from dino_jax.data.sources import Source, open_source
from dino_jax.data.storage import absolute
from dino_jax.errors import Failure, UserError
from dino_jax.parallel import distributed, sharding
from dino_jax.progress import Progress
from dino_jax.training import online
from dino_jax.training.claims import claim, facts
from dino_jax.training.data_record import claim_data
from dino_jax.training.feed import Feed, InputError
from dino_jax.training.metrics import MetricWriter, Throughput
from dino_jax.training.owner import Owner, owning
from dino_jax.training.start import start_from
from dino_jax.training.step import (
    Metrics,
    Recipe,
    TrainState,
    abstract_state,
    check_batch,
    from_items,
    jit_init_state,
    jit_train_step,
    make_recipe,
    to_items,
)
from dino_jax.training.stop import Interrupted, StopSignal
from dino_jax.training.trace import Trace
from dino_jax.training.watch import Watch
from dino_jax.weights.checkpoint import Checkpointer, steps

log = logging.getLogger(__name__)

IN_FLIGHT = 2  # maximum steps in flight


def train(config: ConfigDict, workdir: str | epath.Path, *, source: Source | None = None) -> TrainState:
    """Trains for `config.epochs` epochs, resuming from the latest checkpoint in `workdir` if there is one.

    SIGTERM, SIGHUP and Ctrl-C save a checkpoint and return early; the same call resumes, bit for bit as if
    uninterrupted. `source` replaces `config.data.train`. With several processes (`distributed.session`) each makes the
    same call.

    Raises:
      UserError: a configuration, data set, workdir or checkpoint that cannot be used; a run that keeps diverging.
    """
    config_io.check(config)
    source = open_source(config.data.train) if source is None else source
    workdir = absolute(workdir)
    if distributed.several():
        distributed.check_same(facts(config, workdir, source))
        distributed.check_devices()
    mesh = sharding.make_mesh(config.run.mesh)
    recipe = make_recipe(config, steps_per_epoch(len(source), config.batch_size))
    check_batch(recipe, mesh)
    evaluations = online.Evaluations(config, recipe, steps_per_epoch(len(source), config.batch_size))
    with owning(workdir) if distributed.lead() else contextlib.nullcontext() as owner:
        claim(workdir, config)
        done = max(steps(workdir / "checkpoints"), default=0)
        claim_data(workdir, config, {"data.train": source} | evaluations.sources, done)
        distributed.check_shared(workdir)
        with StopSignal() as stop, _Session(config, workdir, source, recipe, mesh, evaluations, owner) as session:
            return session.loop(stop)


class _Session:
    """One session of a run: from start or resume to end or interruption."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        source: Source,
        recipe: Recipe,
        mesh: Mesh,
        evaluations: online.Evaluations,
        owner: Owner | None,
    ):
        self.config, self.workdir, self.source, self.recipe, self.mesh = config, workdir, source, recipe, mesh
        self.owner = owner  # process 0's
        self.lead = jax.process_index() == 0
        self.epoch_steps = steps_per_epoch(len(source), config.batch_size)
        self.total = config.epochs * self.epoch_steps
        self.save_every = max(1, round(config.run.checkpoint_every * self.epoch_steps))
        self.evaluations = evaluations
        self.watch = Watch(config, self.epoch_steps, self.total)
        self.throughput = Throughput()
        self.feed = Feed(config, workdir, source, mesh, self.throughput)
        self.stopping = distributed.StopTogether(mesh)
        self.steady = False  # whether this session's first step, which compiles, is over
        self.trace = Trace(workdir / "profile")
        self.pending: collections.deque[tuple[int, Metrics, Any]] = collections.deque()  # steps in flight

    def __enter__(self) -> _Session:
        run = self.config.run
        self.checkpoints = Checkpointer(
            self.workdir / "checkpoints",
            keep=run.keep,
            keep_every_steps=run.keep_every * self.epoch_steps,
            asynchronous=run.async_checkpoint,
        )
        with contextlib.ExitStack() as stack:  # closes each, even if another fails
            stack.callback(self.checkpoints.close)
            self.state, restored = self.restore()
            self.step = int(self.state.step)
            self.writer = self.open_writer(self.step if restored else None)
            stack.callback(lambda: self.writer.close())  # a rewind replaces it
            self.progress = Progress(self.total, self.step, "train", active=self.lead and run.progress)
            stack.callback(self.progress.close)
            stack.callback(self.trace.stop, save=False)
            self.say(self.introduction(restored))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def loop(self, stop: StopSignal) -> TrainState:
        """Trains until the end, a signal or `run.stop_after`; after a rewind, from the restored step."""
        last = min(self.total, self.step + (self.config.run.stop_after or self.total))
        train_step = jit_train_step(self.recipe, self.mesh)
        self.stop, pending = stop, self.pending
        if self.step:
            self.evaluate(self.recorded())  # if a signal came during the evaluation of this step
        self.feed.start(self.step, int(self.state.salt))
        self.throughput.reset()
        try:
            while self.step < last and not self.stopping.reason:
                self.profile()
                self.check_owner(look=False)
                try:
                    inputs = self.feed.inputs(self.step + 1, stop)
                except Interrupted:
                    self.stopping.count(stop.number)
                    break
                self.state, metrics = train_step(self.state, inputs)
                self.step += 1
                pending.append((self.step, metrics, self.stopping.vote(stop.number)))
                due = self.due() or self.step == last
                if not all(self.see(*pending.popleft()) for _ in range(len(pending) - (0 if due else IN_FLIGHT))):
                    self.feed.close()
                    pending.clear()
                    self.rewind()
                    self.feed.start(self.step, int(self.state.salt))
                elif due:
                    self.milestone()
            self.save_for_good()
        except InputError as error:
            self.save_for_good()
            saved = f"; saved at step {self.step}" if self.step else ""
            raise type(error.cause)(f"{error.cause}{saved}") from error.cause
        finally:
            self.feed.close()
        self.say(self.conclusion())
        return self.state

    def restore(self) -> tuple[TrainState, bool]:
        """The state of the latest good checkpoint or a fresh one, and whether it was restored."""
        step = self.checkpoints.latest_step()
        if step is None:
            if damaged := ", ".join(map(str, steps(self.checkpoints.directory))):
                raise UserError(
                    f"{self.checkpoints.directory}: none of the checkpoints there can be used ({damaged}): "
                    "restore them from a backup, or choose another --workdir to start over"
                )
            state = jit_init_state(self.recipe, self.mesh)
            if self.config.init_from is not None:
                state, notes = start_from(state, self.config)
                log.info("; ".join(notes))
            return state, False
        wanted = to_items(abstract_state(self.recipe, self.mesh))
        return from_items(self.checkpoints.restore(step, wanted)), True

    def open_writer(self, resume_step: int | None) -> MetricWriter:
        return MetricWriter(
            self.workdir,
            active=self.lead,
            resume_step=resume_step,
            every=self.config.run.log_every,
            tensorboard=self.config.run.tensorboard,
            wandb_project=self.config.run.wandb,
            config_json=config_io.to_json(self.config),
        )

    def recorded(self) -> Collection[str]:
        """The names of the figures in metrics.jsonl for this step, the same on all processes."""
        names = self.evaluations.names
        known = np.array([name in self.writer.recorded for name in names])
        if jax.process_count() > 1:
            known = multihost_utils.broadcast_one_to_all(known)
        return [name for name, there in zip(names, known, strict=True) if there]

    def due(self) -> bool:
        """Whether an evaluation or a checkpoint follows this step."""
        return self.step % self.save_every == 0 or self.evaluations.due(self.step)

    def see(self, step: int, metrics: Metrics, votes: Any) -> bool:
        """Waits for a step to end and logs it if due; False asks for a rewind."""
        # Longer than the input's limit, so that the process short of input is named, not those waiting for it.
        limit = 1.5 * self.config.run.stall_timeout * self.steady
        with distributed.bounded(f"the end of step {step}, done by all devices together", limit):
            bad = int(metrics["bad_steps"])
            self.stopping.count(votes)
        self.steady = True
        self.throughput.count(self.config.batch_size)
        if not bad and step % self.config.run.log_every and step != self.total:
            return True
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values |= {"epoch": step / self.epoch_steps, **self.throughput.read()}
        self.writer.write(step, values)
        self.progress.update(
            step, epoch=values["epoch"], loss=values["loss"], **{"images/s": values["images_per_second"]}
        )
        verdict = self.watch.update(step, values)
        for line in verdict.lines:
            self.say(line)
        if verdict.action == "stop":
            raise UserError(verdict.lines[-1])
        return verdict.action == "go on"

    def rewind(self) -> None:
        """Returns to the last good checkpoint (or the start), with a new salt that draws other crops."""
        salt = int(self.state.salt) + 1
        self.checkpoints.wait()
        self.state, restored = self.restore()
        place = self.state.salt.sharding
        self.state = self.state.replace(salt=jax.make_array_from_callback((), place, lambda _: np.int32(salt)))
        self.step = int(self.state.step)
        self.writer.close()
        self.writer = self.open_writer(self.step if restored else None)
        self.throughput.reset()
        self.say(f"went back to step {self.step}")

    def milestone(self) -> None:
        """Runs the online evaluation and saves a checkpoint, if due."""
        if self.evaluate() and self.step % self.save_every == 0:
            self.save()
        self.throughput.reset()

    def evaluate(self, recorded: Collection[str] = ()) -> bool:
        """Runs the evaluations due whose figures are not yet recorded; False if a signal came first."""
        if not self.evaluations.due(self.step, recorded):
            return True
        try:
            with contextlib.nullcontext() if distributed.several() else self.stop.interrupting():
                figures = self.evaluations.run(self.step, self.state, recorded)
        except Interrupted:
            self.stopping.count(self.stop.number)
            return False
        self.writer.write(self.step, figures)
        self.say(f"step {self.step}: " + ", ".join(f"{name} {value:.2f}%" for name, value in figures.items()))
        return True

    def save_for_good(self) -> None:
        """Ends the steps in flight and saves a checkpoint, whatever signal comes; none if nothing was trained."""
        while self.pending:
            self.see(*self.pending.popleft())
        self.profile(over=True)
        if self.step:
            self.save(wait=True)

    def save(self, wait: bool = False) -> None:
        """Saves a checkpoint of this step unless there is one, after flushing the metrics."""
        with self.stop.protecting():
            self.check_owner()
            self.writer.flush()
            self.checkpoints.save(self.step, to_items(self.state), config_io.to_json(self.config))
            if wait:
                self.checkpoints.wait()

    def check_owner(self, look: bool = True) -> None:
        """Raises `Failure`, and writes nothing more, if another run has taken the workdir over."""
        try:
            if self.owner:
                self.owner.check(look)
        except Failure:
            self.writer.abandon()
            raise

    def profile(self, over: bool = False) -> None:
        """Starts or ends the trace of `run.profile_steps`; `over`: there are no more steps."""
        first, last = self.config.run.profile_steps if self.lead else (0, 0)
        if self.trace.running and (over or self.step >= last):
            jax.block_until_ready(self.state.step)
            self.trace.stop()
            self.say(f"{self.trace.folder}: a trace of steps {first} to {self.step}, for xprof or TensorBoard")
        elif self.step == first < last and not (over or self.trace.running):
            self.trace.start()

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, or logs it."""
        if self.config.run.progress:
            self.progress.note(line)
        elif self.lead:
            log.info(line)

    def introduction(self, restored: bool) -> str:
        config, students = self.config, self.state.student["params"]
        count = sum(x.size for x in jax.tree.leaves(students))
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        beginning = f"resuming at step {self.step}" if restored else "starting"
        if self.lead and config.run.accum_steps > 1 and jax.tree.leaves(self.state.student["batch_stats"]):
            log.warning(
                "batch norm uses the statistics of each of the %d microbatches, not of the whole batch",
                config.run.accum_steps,
            )
        return (
            f"{beginning} of {self.total} ({config.epochs} epochs of {self.epoch_steps}): {config.model.name}, "
            f"{count / 1e6:.1f}M parameters with the head, {len(self.source)} images, batch {config.batch_size} on "
            f"{self.mesh.size} {jax.devices()[0].platform} device(s){processes}; workdir {self.workdir}"
        )

    def conclusion(self) -> str:
        if self.step == self.total:
            return f"done: {self.total} steps; checkpoint in {self.checkpoints.directory}"
        reason = self.stopping.reason or "run.stop_after"
        if not self.step:
            return f"stopped by {reason} before the first step"
        return f"stopped by {reason} at step {self.step} of {self.total}; saved: the same command resumes"
