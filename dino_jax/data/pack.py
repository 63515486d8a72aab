"""`dino-jax pack`: any source to ArrayRecord shards, in parallel. After a kill the same command resumes.

A shard is written under a temporary name, read back, and renamed. Its summary lies next to it until the manifest
is written. `packing.json` records the source and settings, so that others cannot mix in. Packing into a
finished folder checks it and makes damaged shards again.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from dino_jax.data.arrayrecord_source import FORMAT, MANIFEST, VERSION, read_manifest
from dino_jax.data.shards import Shards, Summary, begin_worker, intact, make_in_worker, merged
from dino_jax.data.sources import open_source
from dino_jax.data.storage import read_json, write_atomically
from dino_jax.data.workers import shielded
from dino_jax.errors import UserError
from dino_jax.progress import Progress

UNFINISHED = "packing.json"
SHARD_SIZE = 1000  # images: about 110 MB of ImageNet


def pack(
    spec: str,
    out: str | os.PathLike[str],
    *,
    shorter_side: int = 0,
    channels: int = 3,
    shard_size: int = SHARD_SIZE,
    workers: int | None = None,
    max_bad_share: float = 0.01,
    progress: bool = True,
) -> dict[str, Any]:
    """Packs the data set `spec` (as for `open_source`) into the folder `out`, and returns its manifest.

    Images keep their bytes, unless their shorter side exceeds `shorter_side` pixels: those are shrunk to it and
    stored as JPEG (quality 95) if they were JPEG, else without loss. Each is decoded once; unreadable ones are skipped
    and listed in the manifest. `workers`: processes; None: one for each core.

    Raises `UserError` for a source that cannot be read, a folder that cannot be written or holds something else, a full
    disk, and more than `max_bad_share` bad images.
    """
    for name, value, least in (
        ("shorter-side", shorter_side, 0),
        ("channels", channels, 1),
        ("shard-size", shard_size, 1),
        ("workers", 1 if workers is None else workers, 1),
    ):
        if value < least:
            raise UserError(f"--{name}={value}: at least {least}")
    source, out = open_source(spec), str(out)
    shards = Shards(source, out, shard_size, shorter_side, channels)
    settings = {
        "source": spec,
        "pictures": len(source),
        "shorter_side": shorter_side,
        "channels": channels,
        "shard_size": shard_size,
    }
    workers = min(workers or os.cpu_count() or 1, len(shards))
    with Progress(len(source), 0, "pack", unit="images", active=progress) as bar:
        if claim(out, settings):
            return _repair(shards, workers, bar)
        done = _pack(spec, shards, workers, max_bad_share, bar)
    names = list(source.class_names) if source.class_names is not None else None
    about = {"format": FORMAT, "version": VERSION, "packed": settings, "class_names": names}
    manifest = about | merged([done[shard] for shard in range(len(shards))])
    _finish(shards, manifest)
    return manifest


def _pack(spec: str, shards: Shards, workers: int, max_bad_share: float, bar: Progress) -> dict[int, Summary]:
    """Makes the shards that are not there yet; returns the summaries of all by number."""
    done = {shard: summary for shard in range(len(shards)) if (summary := shards.finished(shard)) is not None}
    if done:
        bar.note(f"{shards.out}: {len(done)} of {len(shards)} shards are there already")
    for shard, summary in _make(shards, [shard for shard in range(len(shards)) if shard not in done], workers):
        done[shard] = summary
        bad = _check_bad(spec, shards, done, max_bad_share)
        bar.update(sum(len(shards.indices(one)) for one in done), shards=f"{len(done)}/{len(shards)}", bad=bad)
    _check_bad(spec, shards, done, max_bad_share)
    return done


def report(out: str, manifest: dict[str, Any]) -> str:
    """The two lines that `dino-jax pack` prints at the end."""
    size = sum(shard["bytes"] for shard in manifest["shards"])
    bad = f", {len(manifest['bad'])} bad images left out (listed in {MANIFEST})" if manifest["bad"] else ""
    mean, std = (",".join(f"{value:.4g}" for value in manifest[key]) for key in ("mean", "std"))
    return (
        f"{out}: {manifest['count']} images in {len(manifest['shards'])} shards, {size / 1e6:.1f} MB{bad}\n"
        f"train on it: --config.data.train=arrayrecord:{out}; its own mean and std per channel: ({mean}) and ({std})"
    )


def claim(out: str, settings: dict[str, Any]) -> bool:
    """Reserves `out` for this source and these settings; returns whether it is finished already."""
    folder = epath.Path(out)
    try:
        if (folder / MANIFEST).exists():
            _compare(folder / MANIFEST, read_manifest(out).get("packed"), settings)
            return True
        if (folder / UNFINISHED).exists():
            _compare(folder / UNFINISHED, _read(folder / UNFINISHED), settings)
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out={out}: not an empty folder; name another")
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):  # of a run that was killed
            left.unlink()
        write_atomically(folder / UNFINISHED, json.dumps(settings))
    except OSError as error:
        raise UserError(f"--out={out}: cannot write there: {error.strerror or error}") from error
    return False


def _read(path: epath.Path) -> Any:
    """The settings of a packing that is not finished."""
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{error}; remove the folder, or name another --out") from error


def _compare(path: epath.Path, saved: Any, settings: dict[str, Any]) -> None:
    if not isinstance(saved, dict):
        raise UserError(f"{path}: does not say of what it was packed; name another --out")
    for key, value in settings.items():
        if saved.get(key) != value:
            raise UserError(
                f"{path}: of another packing ({key.replace('_', ' ')} {saved.get(key)!r}, now {value!r}); "
                "name another --out, or remove this one"
            )


def _repair(shards: Shards, workers: int, bar: Progress) -> dict[str, Any]:
    """Makes the damaged shards of a finished folder again, with the same content."""
    manifest = read_manifest(shards.out)
    damaged = []
    names = [about["file"] for about in manifest["shards"] if {"bytes", "crc32"} <= about.keys()]
    if names != [shards.path(shard).name for shard in range(len(shards))]:
        raise UserError(f"{epath.Path(shards.out) / MANIFEST}: does not list the shards; name another --out")
    for shard, about in enumerate(manifest["shards"]):
        if not intact(shards.path(shard), about):
            damaged.append(shard)
        bar.update(shards.indices(shard).stop, damaged=len(damaged))
    for shard, summary in _make(shards, damaged, workers):
        shards.summary_path(shard).unlink()
        if summary["crc32"] != manifest["shards"][shard]["crc32"]:
            raise UserError(f"{shards.path(shard)}: made again, it differs: the source has changed; name another --out")
    bar.note(f"{shards.out}: was packed already; {len(damaged)} of {len(shards)} shards were damaged and made again")
    return manifest


def _check_bad(spec: str, shards: Shards, done: dict[int, Summary], share: float) -> int:
    """The number of bad images. Raises `UserError` if they exceed a share of all, or are all."""
    total = len(shards.source)
    bad = [entry for summary in done.values() for entry in summary["bad"]]
    if len(bad) > share * total or len(bad) == total:
        first = ", ".join(f"{name} ({reason})" for name, reason in bad[:3])
        raise UserError(
            f"{spec}: at least {len(bad)} of {total} images cannot be read, more than --max-bad-share={share:g}; "
            f"first {first}; fix or remove them, or raise --max-bad-share"
        )
    return len(bad)


def _finish(shards: Shards, manifest: dict[str, Any]) -> None:
    """Writes the manifest and removes the files of an unfinished folder."""
    folder = epath.Path(shards.out)
    try:
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
        for shard in range(len(shards)):
            shards.summary_path(shard).unlink(missing_ok=True)
        (folder / UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder / MANIFEST}: cannot be written: {error.strerror or error}; run it again") from error


def _make(shards: Shards, wanted: Sequence[int], workers: int) -> Iterator[tuple[int, Summary]]:
    """Makes shards in processes (one worker: in this one); yields each with its summary when it is there."""
    if workers == 1:
        for shard in wanted:
            yield shard, shards.make(shard)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=begin_worker, initargs=(shards,)
    )
    try:
        with shielded():  # the pool starts its processes here
            futures = {pool.submit(make_in_worker, shard): shard for shard in wanted}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            f"{shards.out}: a worker process was killed (out of memory?): lower --workers and run it again: it resumes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
