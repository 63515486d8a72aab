"""Checkpoints: named pytrees and a config, one folder per step. Only this module uses Orbax.

    DIRECTORY/                      a run's `checkpoints/`, local or gs://
      1200/                         a step; valid only when complete (renamed or, on gs://, committed)
        student/ teacher/ rest/     one item each, so evaluation reads only the teacher
        config/                     the run's configuration as JSON
        format/                     the format version of the items (see `dino_jax.migrations`); its and config's CRC
        checksums/                  one number per array, to detect damaged steps

Saving and restoring are collective: every process must make the same calls.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from dino_jax.data.storage import absolute, cause, is_remote, unwritable
from dino_jax.errors import UserError
from dino_jax.migrations import FORMAT_VERSION, migrate
from dino_jax.weights import quiet
from dino_jax.weights.trees import by_path, checksums, map_by_path

PyTree = Any
T = TypeVar("T")
MAX_RATIO = 40_000  # the most that the compression gains, for zeros
CONFIG, CHECKSUMS, FORMAT = "config", "checksums", "format"
log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores checkpoints in one folder, which the first `save` creates.

    Args:
        directory: holds a folder per step; any `etils.epath` path, including gs://.
        keep: how many of the latest steps to keep, at least 1.
        keep_every_steps: also keep every multiple of this for good; 0: none.
        asynchronous: `save` returns once the arrays are on the host; threads write them.

    A failed write (full disk, no permission) is a `UserError` from `save` or, when asynchronous, from the next
    `save`, `wait` or `close`. Existing steps are unaffected.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep: int = 1, keep_every_steps: int = 0, asynchronous: bool = True
    ):
        if keep < 1:
            raise UserError(f"keep={keep}: at least one checkpoint must be kept")
        self.directory = absolute(directory)
        self._policy = _Keep(keep, keep_every_steps)
        self._asynchronous = asynchronous
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, items: Mapping[str, PyTree], config_json: str) -> bool:
        """Write `items` (name -> pytree of arrays) and the config as `step`.

        Returns whether it was written: an existing checkpoint of that step is kept, unless `latest_step` found it
        damaged; then it is renamed to `STEP.damaged`. Half-written ones are replaced.
        """
        self.wait()
        if step in self._policy.damaged:
            self._set_aside(step)
        if step in self._write(lambda: self._open().all_steps()):
            return False
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args[CONFIG] = ocp.args.JsonSave(json.loads(config_json))
        signed = {"format_version": FORMAT_VERSION}
        args[FORMAT] = ocp.args.JsonSave(signed | {"config_crc32": _signature(signed, json.loads(config_json))})
        args[CHECKSUMS] = ocp.args.JsonSave({name: checksums(tree) for name, tree in items.items()})
        self._write(lambda: self._open().save(step, args=ocp.args.Composite(**args), force=True))
        return True

    def wait(self) -> None:
        """Block until any pending save is complete."""
        if self._manager is not None:
            self._write(self._manager.wait_until_finished)

    def close(self) -> None:
        """`wait`, then release Orbax's resources; a later `save` reopens them."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
            quiet.end()

    def latest_step(self) -> int | None:
        """The newest undamaged step, or None. Logs one warning about newer damaged ones.

        Process 0 reads the data of every item and tells the others.
        """
        self.wait()
        found = _newest_whole(self.directory)
        self._policy.damaged = {step for step in steps(self.directory) if found is None or step > found}
        return found

    def restore(self, step: int, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """`restore` (below) from this folder."""
        self.wait()
        return restore(self.directory, step, items)

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                enable_async_checkpointing=self._asynchronous,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            )
            quiet.begin()
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _write(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except Exception as error:  # ValueError for a full disk (TensorStore), storage clients' own types
            self._manager = None  # it believes the lost step is saved
            raise unwritable(f"{self.directory}: cannot write a checkpoint", error) from error

    def _set_aside(self, step: int) -> None:
        self.close()  # Orbax caches the list of steps
        if jax.process_index() == 0:
            self._write(lambda: (self.directory / str(step)).rename(self.directory / f"{step}.damaged"))
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._policy.damaged.discard(step)


def steps(directory: epath.PathLike) -> list[int]:
    """The complete steps in a folder, ascending; empty if there is no folder."""
    found = ocp.path.step.standard_name_format().find_all(absolute(directory))
    return sorted(metadata.step for metadata in found)


def belongs_to_run(path: epath.PathLike) -> bool:
    """Whether a folder is a run's workdir, a folder of its steps, or one of them, whatever else lies in it."""
    path = absolute(path)
    some = [path / "checkpoints", *(path / str(step) / CONFIG for step in steps(path)[-1:])]
    return any(place.exists() for place in some) or (path.name.isdigit() and (path / CONFIG).is_dir())


def resolve(path: epath.PathLike) -> tuple[epath.Path, int]:
    """`(directory, step)` of a CKPT: a run's workdir or its checkpoints folder (latest step), or one step's folder.

    Raises `UserError` with the path if there is nothing, no complete step or only damaged ones.
    """
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such checkpoint")
    if path.name.isdigit() and int(path.name) in steps(path.parent):
        return path.parent, int(path.name)
    directory = path / "checkpoints" if (path / "checkpoints").exists() else path
    step = _newest_whole(directory, deep=False)
    if step is None:
        what = "only damaged checkpoints" if steps(directory) else "no complete checkpoint"
        raise UserError(f"{path}: {what} here; give a run's workdir, its checkpoints folder or one step's folder")
    return directory, step


def restore(directory: epath.PathLike, step: int, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Restores the named items of a step bit for bit, and reads nothing else.

    `items`: name -> pytree of `jax.ShapeDtypeStruct`. A leaf with a sharding is restored as a `jax.Array` with that
    sharding, whatever devices wrote it; a leaf without one as a NumPy array. Older formats are migrated.
    Raises `UserError` if the step or an item is missing, if tree, shapes or dtypes differ (naming the first few
    keys), if a checksum does not match, or if a newer version wrote it.
    """
    folder = absolute(directory) / str(step)
    restored = {}
    for name, wanted in items.items():
        saved = _abstract(folder, name)
        places = _places(folder, name, saved)
        _check_tree(folder / name, {key: by_path(saved)[old] for key, old in places.items()}, wanted)
        try:
            restored[name] = _read_as(folder, name, saved, places, wanted)
        except UserError as error:
            raise UserError(f"{error}; steps here: {', '.join(map(str, steps(directory)))}") from error
    return restored


def abstract(directory: epath.PathLike, step: int, item: str) -> PyTree:
    """The structure of an item: nested dicts and lists of `jax.ShapeDtypeStruct`, without shardings or reading data.

    Older formats are migrated.
    """
    folder = absolute(directory) / str(step)
    saved = _abstract(folder, item)
    places = _places(folder, item, saved)
    if all(new == old for new, old in places.items()):
        return saved
    leaves = by_path(saved)
    return traverse_util.unflatten_dict({key: leaves[old] for key, old in places.items()}, sep="/")


def restore_config(directory: epath.PathLike, step: int) -> str:
    """The saved configuration, as JSON. Raises `UserError` if it is damaged."""
    return json.dumps(_config(absolute(directory) / str(step)))


@dataclasses.dataclass
class _Keep:
    """Orbax preservation policy: keeps the latest `keep` steps, multiples of `every`, and damaged steps."""

    keep: int
    every: int
    damaged: set[int] = dataclasses.field(default_factory=set)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        whole = sorted({checkpoint.step for checkpoint in checkpoints} - self.damaged)
        stay = {*whole[-self.keep :], *self.damaged, *(step for step in whole if self.every and step % self.every == 0)}
        return [checkpoint.step in stay for checkpoint in checkpoints]


def _newest_whole(directory: epath.Path, deep: bool = True) -> int | None:
    """The newest undamaged step, found by process 0; logs one warning about the newer ones."""
    found, complaints = -1, []
    if jax.process_index() == 0:
        for step in reversed(steps(directory)):
            reason = _damage(directory / str(step), deep)
            if reason is None:
                found = step
                break
            complaints.append(reason)
        if deep:
            complaints += _half_written(directory, found)
        if complaints:
            instead = f"using step {found} instead" if found >= 0 else "there is no other step to use"
            log.warning("%s; %s", "; ".join(complaints), instead)
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    return found if found >= 0 else None


def _damage(folder: epath.Path, deep: bool) -> str | None:
    """What is wrong with a step, in one line, or None. `deep`: also read the data, in this process only."""
    try:
        _config(folder)
        if _format_version(folder) > FORMAT_VERSION:
            return None  # not damaged; reading it says why it cannot be used
        for name, recorded in _read(folder, CHECKSUMS, _json).items():
            tree = _abstract(folder, name)
            if by_path(tree).keys() != recorded.keys():
                raise UserError(f"{folder / name}: arrays are missing")
            if deep:
                _read_item(folder, name, tree, alone=True)
    except Exception as error:  # damaged files may raise anything
        return str(error) if isinstance(error, UserError) else f"{folder}: {cause(error)}"
    return None


def _half_written(directory: epath.Path, after: int) -> list[str]:
    """Incomplete steps above `after`, left by a killed process."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    heads = {name.split(".")[0] for name in names if not name.endswith(".damaged")}
    left = sorted(int(head) for head in heads if head.isdigit())
    complete = steps(directory)
    return [f"{directory / str(step)}: half-written" for step in left if step > after and step not in complete]


def _read(folder: epath.Path, item: str, action: Callable[[epath.Path], T]) -> T:
    """`action(path of the item)`; any failure becomes a `UserError` with the path."""
    if not folder.exists():
        there = ", ".join(map(str, steps(folder.parent))) or "none"
        raise UserError(f"{folder}: there is no such checkpoint; complete steps here: {there}")
    if not (folder / item).exists():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "nothing"
        raise UserError(f"{folder}: no {item!r} in this checkpoint; it has {there}")
    try:
        with quiet.quiet():
            return action(folder / item)
    except Exception as error:  # damaged files raise JSON, key, value or OS errors
        raise UserError(f"{folder / item}: cannot be read: {cause(error)}") from error


def _json(path: epath.Path) -> Any:
    return ocp.JsonCheckpointHandler().restore(path)  # the bare handler does not wait for other processes


def _config(folder: epath.Path) -> Any:
    """The saved configuration, verified by its CRC if the step has one."""
    config = _read(folder, CONFIG, _json)
    signed = _read(folder, FORMAT, _json) if (folder / FORMAT).exists() else {}
    if not (isinstance(config, dict) and isinstance(signed, dict)):
        raise UserError(f"{folder}: damaged: its configuration is not an object")
    crc = signed.pop("config_crc32", None)
    if crc is not None and crc != _signature(signed, config):
        raise UserError(f"{folder / CONFIG}: checksum mismatch")
    return config


def _signature(*values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _format_version(folder: epath.Path) -> int:
    if folder.exists() and not (folder / FORMAT).exists():
        return 1  # the first version did not record it
    version = _read(folder, FORMAT, _json)
    if not (isinstance(version, dict) and type(version.get("format_version")) is int):
        raise UserError(f"{folder / FORMAT}: damaged: it has no version")
    return version["format_version"]


def _places(folder: epath.Path, item: str, saved: PyTree) -> dict[str, str]:
    """Path of each leaf in this version -> its path in the files."""
    names = {f"{item}/{key}": key for key in by_path(saved)}
    return {key.removeprefix(f"{item}/"): old for key, old in migrate(names, _format_version(folder), folder).items()}


def _abstract(folder: epath.Path, item: str) -> PyTree:
    saved = _read(folder, item, lambda path: ocp.StandardCheckpointHandler().metadata(path).tree)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved)


def _read_item(folder: epath.Path, item: str, wanted: PyTree, alone: bool = False) -> PyTree:
    """The item's data, verified by checksums. `alone`: only this process reads."""
    processes = ocp.options.MultiprocessingOptions()
    if alone and jax.process_count() > 1:
        mine = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(mine, {mine}, barrier_sync_key_prefix="alone")
    _check_size(folder / item, wanted)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),  # a second description, not needed
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=processes, type_handler_registry=handlers)
    reader = ocp.Checkpointer(handler, multiprocessing_options=processes)
    target = jax.tree.map(lambda leaf: leaf if leaf.sharding else np.empty(leaf.shape, leaf.dtype), wanted)
    kinds = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=kinds)
    tree = _read(folder, item, lambda path: reader.restore(path, args=args))
    recorded = _read(folder, CHECKSUMS, _json)[item]
    changed = [key for key, value in checksums(tree).items() if recorded[key] != value]
    if changed:
        raise UserError(f"{folder / item}: checksum mismatch in {_first(changed)}")
    return tree


def _check_size(path: epath.Path, tree: PyTree) -> None:
    """Raises `UserError` if an item's metadata claims far more than its files can hold (local ones)."""
    if is_remote(path):
        return  # listing a bucket takes many requests
    claimed = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
    stored = sum(file.lstat().st_size for file in pathlib.Path(path).rglob("*"))
    if claimed > MAX_RATIO * stored:
        raise UserError(f"{path}: damaged: {stored} bytes cannot hold arrays of {claimed}")


def _read_as(folder: epath.Path, item: str, saved: PyTree, places: Mapping[str, str], wanted: PyTree) -> PyTree:
    """The item in the tree of `wanted`, each leaf laid out as there; `places`: its path there -> in the files."""
    layouts = {places[key]: leaf for key, leaf in by_path(wanted).items()}
    found = by_path(_read_item(folder, item, map_by_path(lambda key, leaf: layouts.get(key, leaf), saved)))
    return map_by_path(lambda key, _: found[places[key]], wanted)


def _check_tree(path: epath.Path, saved: PyTree, wanted: PyTree) -> None:
    """Raises `UserError` unless both have the same keys, shapes and dtypes."""
    have, want = by_path(saved), by_path(wanted)
    if missing := [key for key in want if key not in have]:
        raise UserError(f"{path}: the checkpoint lacks {_first(missing)}: it is of another model or configuration")
    if extra := [key for key in have if key not in want]:
        raise UserError(f"{path}: the checkpoint also has {_first(extra)}: it is of another model or configuration")

    def form(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    pairs = {key: (form(have[key]), form(leaf)) for key, leaf in want.items()}
    if differ := [f"{key} is {saved}, not {wanted}" for key, (saved, wanted) in pairs.items() if saved != wanted]:
        raise UserError(f"{path}: {_first(differ)}: it is of another model or configuration")
    placed = {key: leaf.dtype for key, leaf in want.items() if leaf.sharding is not None}
    if wide := [key for key, dtype in placed.items() if jax.dtypes.canonicalize_dtype(dtype) != dtype]:
        raise UserError(f"{path}: {_first(wide)} is in double precision; set JAX_ENABLE_X64=1 to read it")


def _first(keys: Sequence[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
