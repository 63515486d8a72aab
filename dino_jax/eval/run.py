"""Runs `dino-jax eval`: one protocol, or all that the data fit, on a checkpoint; prints tables, then JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.config import build
from dino_jax.data.sources import split_spec
from dino_jax.data.storage import absolute, ensure_new_file, ensure_writable, writing
from dino_jax.errors import UserError
from dino_jax.eval.protocol import ALL, Protocol, check, get, keys_of, members, names
from dino_jax.eval.published import architecture, table
from dino_jax.eval.results import save_json, to_json
from dino_jax.inference.model import Model, load

log = logging.getLogger(__name__)

Part = tuple[str, Protocol, dict[str, Any]]  # name, protocol, its figures


def evaluate(
    name: str,
    checkpoint: str,
    data: str,
    *,
    config_file: str | None = None,
    overrides: Iterable[str] = (),
    heads: int | None = None,
    workdir: str | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Returns the figures of protocol `name`, or of `all`, with keys `PROTOCOL/FIGURE`.

    Prints each protocol's figures, with published ones if any for the architecture, then the returned figures as one
    line of JSON.

    Args:
      config_file: a file with `get_config()` for the protocol's keys, such as those in `configs/finetune`.
      overrides: `--config.KEY=VALUE` for the protocol's keys (with `all`: `--config.PROTOCOL.KEY=VALUE`); model
        keys always come from the checkpoint.
      heads: number of attention heads, if a weight file does not determine it.
      workdir: folder for features, heads, drawings and resumable state.
      out: file for the figures as JSON; with `all`, rewritten after every protocol.

    Raises:
      UserError: bad names, keys, values, data or folders, as early as possible; with `all`, at the end if any
        protocol failed.
    """
    keys = keys_of(name)
    config = check(config_io.override(_settings(name, build(keys), config_file), overrides), keys)
    found = find(data) if name == ALL else {name: data}
    workdir = None if workdir is None else _writable(workdir)
    if out is not None and jax.process_index() == 0:
        ensure_new_file(out, f"--out={out}")
    model = load(checkpoint, heads=heads)
    _check_patches(name, config, model.backbone.patch_size)
    parts = _all(model, data, found, config, workdir) if name == ALL else _one(model, name, data, config, workdir)
    figures: dict[str, Any] = {}
    unwritten: UserError | None = None
    for part, protocol, values in _explained(parts):
        figures |= {f"{part}/{key}": value for key, value in values.items()} if name == ALL else values
        if jax.process_index() == 0:
            print(table(part, protocol, values, architecture(model.config.model)), flush=True)
            unwritten = None if out is None else _write(out, figures)
    if jax.process_index() == 0:
        print(to_json(figures), flush=True)
    if unwritten is not None:
        raise unwritten
    return figures


def find(data: str) -> dict[str, str]:
    """The data for each protocol of `all`: a folder, its direct subfolders, or two sources `TRAIN,TEST`.

    Raises:
      UserError: no such folder or source, or no data for any protocol.
    """
    protocols = members()
    if data.count(",") == 1:
        parts = [spec.strip() for spec in data.split(",")]
        if {split_spec(spec)[0] for spec in parts} == {"scenes"}:
            chosen = {"both": data, "test": parts[1]}
            return {name: chosen[p.data.scenes] for name, p in protocols.items() if p.data.scenes is not None}
        return {name: data for name, p in protocols.items() if p.data.sources}
    root = epath.Path(data)
    if not root.is_dir():
        raise UserError(f"--data={data}: no such folder; give a folder, or two sources as TRAIN,TEST")
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    found = {name: next((f for f in folders if p.data.fits(f)), None) for name, p in protocols.items()}
    if not any(found.values()):
        raise UserError(f"--data={data}: no protocol's data found in this folder or its direct subfolders")
    return {name: str(folder) for name, folder in found.items() if folder is not None}


def _one(model: Model, name: str, data: str, config: ConfigDict, workdir: str | None) -> Iterator[Part]:
    protocol = get(name)
    if protocol.needs_patches and model.backbone.patch_size is None:
        raise UserError(f"{name} needs patch tokens, which this backbone does not have: evaluate a ViT or an XCiT")
    yield name, protocol, protocol.run(model, data, config, workdir)


def _all(model: Model, data: str, found: dict[str, str], config: ConfigDict, workdir: str | None) -> Iterator[Part]:
    """Runs the protocols of `all` on the data `found`; logs those skipped."""
    failed: dict[str, str] = {}
    protocols = members()
    for name, protocol in protocols.items():
        if name not in found:
            log.info("%s is skipped: no %s in %s", name, protocol.data.words, data)
        elif protocol.needs_patches and model.backbone.patch_size is None:
            log.info("%s is skipped: it needs patch tokens, which this backbone does not have", name)
        else:
            try:
                yield name, protocol, protocol.run(model, found[name], config[name], workdir)
            except UserError as error:
                log.warning("%s failed: %s", name, error)
                failed[name] = str(error)
    for name in set(names()) - protocols.keys():
        log.info("%s is skipped: it is not part of `all`; run it by name", name)
    if failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {len(found)} protocols failed: {reasons}")


def _explained(parts: Iterator[Part]) -> Iterator[Part]:
    """Passes parts through; turns running out of device memory into a one-line error."""
    try:
        yield from parts
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        fix = "lower --config.batch_size, --config.crop or --config.size"
        raise UserError(f"out of memory on the devices: {fix}") from error


def _check_patches(name: str, config: ConfigDict, patch: int | None) -> None:
    """Raises `UserError` if a size is not a multiple of the patch size."""
    if patch is None:
        return
    chosen = {f"{member}.": p for member, p in members().items()} if name == ALL else {"": get(name)}
    flat = config_io.flatten(config)
    for key in (prefix + size for prefix, protocol in chosen.items() for size in protocol.whole_patches):
        if flat[key] is not None and flat[key] % patch:
            near = max(patch, flat[key] // patch * patch)
            raise UserError(
                f"--config.{key}={flat[key]}: not divisible into patches of {patch} pixels: set it to {near}"
            )


def _settings(name: str, default: ConfigDict, file: str | None) -> ConfigDict:
    """The configuration in `file`, which must have the protocol's keys; without a file the default."""
    if file is None:
        return default
    config = config_io.read(file)
    if foreign := sorted(config_io.flatten(config).keys() ^ config_io.flatten(default).keys()):
        raise UserError(f"--config={file}: not a configuration of {name}: it differs in the key {foreign[0]!r}")
    return config


def _writable(workdir: str) -> str:
    """The absolute path of the workdir, created and checked for writing by process 0."""
    if jax.process_index() == 0:
        ensure_writable(workdir, f"--workdir={workdir}")
    return str(absolute(workdir))


def _write(out: str, figures: dict[str, Any]) -> UserError | None:
    """Writes the figures; returns the error if that fails, which must not come before they are printed."""
    try:
        with writing(f"--out={out}: cannot be written"):
            save_json(absolute(out), figures)
    except UserError as error:
        return error
    return None
