"""`dino-jax eval`: a protocol, or all that the data allow, on a checkpoint; tables, and JSON where asked."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.errors import UserError
from dino_jax.eval import everything, protocol
from dino_jax.eval.features import Frozen
from dino_jax.eval.published import table
from dino_jax.inference.model import load
from dino_jax.storage import absolute, write_atomically

# Keys, by their last part: values are more than 0; shares of 1; shares below 1.
POSITIVE = {"batch_size", "crop", "epochs", "eval_every", "k", "layer_decay", "lr", "lrs", "masses", "multiple"}
POSITIVE |= {"penalty", "repeats", "scale", "size", "temperature", "threads", "tolerance", "topk"}
SHARES, PARTS = {"erasing", "masses", "scale", "smoothing"}, {"drop_path", "ema", "holdout"}
# of a protocol, the sizes in pixels that the patches must divide
WHOLE = {
    "knn": ["crop"],
    "linear": ["crop"],
    "lowshot": ["crop"],
    "finetune": ["size", "crop"],
    "copydetection": ["size"],
}


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
    """The figures of protocol `name`, or of `all`: then each key is `PROTOCOL/FIGURE`.

    Prints a table of each protocol, beside the published figures where the architecture has some.

    Args:
      config_file: a file whose `get_config()` gives the protocol's keys, such as those in `configs/finetune`.
      overrides: `--config.KEY=VALUE` for the protocol's own keys (of `all`: `--config.PROTOCOL.KEY=VALUE`); the
        model's always come from the checkpoint.
      heads: attention heads, where `checkpoint` is a weight file that does not tell.
      workdir: features, heads, pictures and resumable state go there.
      out: the figures as JSON; those of `all` are written after every protocol.
    """
    module = everything if name == "all" else protocol(name)
    config = check(config_io.override(_settings(name, module.default_config(), config_file), overrides))
    if name == "all":
        everything.find(data)  # before anything is loaded
    loaded = load(checkpoint, heads=heads)
    _check_patches(name, config, loaded.backbone.patch_size)
    workdir = None if workdir is None else _made("workdir", workdir)
    if out is not None:
        _made("out", str(epath.Path(out).parent))
    model = Frozen(loaded.backbone, loaded.variables, loaded.config.data.mean, loaded.config.data.std)
    figures: dict[str, Any] = {}

    def parts() -> Iterator[tuple[str, dict[str, Any]]]:
        if name == "all":
            yield from everything.evaluate(model, data, config, workdir)
        else:
            yield name, module.evaluate(model, data, config, workdir)

    for part, found in _spoken(parts()):
        figures |= {f"{part}/{key}": value for key, value in found.items()} if name == "all" else found
        if jax.process_index() == 0:
            print(table(part, found, model), flush=True)
            if out is not None:
                _write(out, figures)
    return figures


def keys(name: str) -> str:
    """What `dino-jax eval NAME --help` adds: what the protocol is, and its keys with their defaults and comments."""
    if name == "all":
        return "Keys of every protocol: --config.PROTOCOL.KEY=VALUE; `dino-jax eval PROTOCOL --help` has them."
    module = protocol(name)
    lines = [line.strip() for line in inspect.getsource(module.default_config).splitlines()]
    found = [f"  --{line}" for line in lines if line.startswith("config.")]
    return "\n".join([str(module.__doc__).strip(), "", f"Keys of {name} with their defaults:", *found])


def check(config: ConfigDict) -> ConfigDict:
    """Returns a protocol's configuration; raises `UserError` for numbers that none could use."""
    for key, value in config_io.flatten(config).items():
        name, values = key.rpartition(".")[2], value if isinstance(value, tuple) else (value,)
        if name in POSITIVE and not (values and all(x is None or x > 0 for x in values)):
            raise UserError(f"--config.{key}={value}: must be greater than 0")
        if (name in SHARES and max(values) > 1) or (name in PARTS and not 0 <= max(values) < 1):
            raise UserError(f"--config.{key}={value}: must lie between 0 and 1")
    return config


def _check_patches(name: str, config: ConfigDict, patch: int | None) -> None:
    """Raises `UserError` for a size in pixels that the patches do not divide, where it is not cut to whole ones."""
    for key, value in config_io.flatten(config).items():
        part, size = key.split(".") if name == "all" else (name, key)
        if patch and size in WHOLE.get(part, ()) and value % patch:
            near = max(patch, value // patch * patch)
            raise UserError(f"--config.{key}={value}: not divisible into patches of {patch} pixels: give {near}, say")


def _spoken(parts: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same; what does not fit the devices is an error in one line."""
    try:
        yield from parts
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        mend = "lower --config.batch_size, or --config.crop or --config.size where pictures are seen too large"
        raise UserError(f"out of memory on the devices: {mend}") from error


def _settings(name: str, default: ConfigDict, file: str | None) -> ConfigDict:
    """The configuration of a file, which must have the protocol's keys; without one the default."""
    if file is None:
        return default
    config = config_io.read(file)
    if foreign := sorted(config_io.flatten(config).keys() ^ config_io.flatten(default).keys()):
        raise UserError(f"--config={file}: not a configuration of {name}: it differs in the key {foreign[0]!r}")
    return config


def _made(option: str, path: str) -> str:
    """The folder at `path`, made and tried by process 0 before the long part."""
    folder = absolute(path)
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".tried").write_text("")
            (folder / ".tried").unlink()
    except OSError as error:
        raise UserError(f"--{option}={path}: cannot be written: {error.strerror or error}") from error
    return str(folder)


def _write(out: str, figures: dict[str, Any]) -> None:
    try:
        write_atomically(absolute(out), json.dumps(figures, indent=2, default=float) + "\n")
    except OSError as error:
        raise UserError(f"--out={out}: cannot write: {error.strerror or error}") from error
