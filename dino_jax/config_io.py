"""Configurations in and out: files, command-line overrides, JSON, comparison, checks."""

from __future__ import annotations

import ast
import difflib
import json
import runpy
from collections.abc import Iterable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dino_jax.config import default, flat_keys
from dino_jax.errors import UserError
from dino_jax.migrations import FORMAT_VERSION, migrate

PER_CHANNEL = ("data.mean", "data.std")  # as many values as there are channels


def load(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The configuration of a file with a `get_config()`, with `--config.KEY=VALUE` overrides applied.

    Raises:
      UserError: the file is missing, fails, or has no `get_config`; an unknown key or a value of the wrong type.
    """
    return check(override(read(path), overrides))


def read(path: str) -> ConfigDict:
    """What a file's `get_config()` returns; `UserError` as in `load`."""
    try:
        namespace = runpy.run_path(str(path))
        config = namespace["get_config"]()
    except FileNotFoundError:
        raise UserError(f"--config={path}: there is no such file") from None
    except Exception as error:
        raise UserError(f"--config={path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={path}: get_config() must return a ConfigDict, not {type(config).__name__}")
    return config


def override(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Applies `--config.KEY=VALUE` arguments in place and returns the configuration.

    A bare number is accepted for a pair of numbers: `--config.crops.global_size=96` is `(96, 96)`.
    """
    known, given = flatten(config), {}
    for argument in overrides:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise UserError(f"{argument}: overrides have the form --config.KEY=VALUE")
        if key not in known:
            raise UserError(f"{argument}: there is no key {key!r}{suggest(key, known)}")
        given[key] = _as_pair(value, known[key])  # the last one counts
    argv = ["dino-jax", *(f"--config.{key}={value}" for key, value in given.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    for argument, (key, value) in zip(
        argv[1:], given.items(), strict=True
    ):  # one by one, to name the one that is wrong
        try:
            values([argv[0], argument])
        except (flags.Error, TypeError, ValueError) as error:
            owner, name = _place(config, key)
            kind = type(known[key]).__name__ if known[key] is not None else owner.get_type(name).__name__
            raise UserError(f"--config.{key}={value}: this key takes a value of type {kind}") from error
    return config


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'optim.lr'?`, or nothing where no known word is near."""
    known = list(known)
    same = [k for k in known if k.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(word, same or known, 1, 0.0 if same else 0.6)
    near = near or difflib.get_close_matches(word.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _as_pair(text: str, current: Any) -> str:
    if not (isinstance(current, tuple) and len(current) == 2):
        return text
    try:
        number = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return f"({number}, {number})" if isinstance(number, int | float) else text


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"optim.lr": 5e-4, ...}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The configuration as readable JSON, with the version of its keys; `from_json` inverts it."""
    return json.dumps({"format_version": FORMAT_VERSION, **config.to_dict()}, indent=2)


def from_json(text: str, where: str = "the saved configuration") -> ConfigDict:
    """A configuration from `to_json`'s text, of this version or an older one. Keys absent there keep their defaults.

    Raises:
      UserError: not JSON, a newer version's, or a key that is unknown.
    """
    try:
        content = json.loads(text)
        version = content.pop("format_version", 1)
        entries = {f"config.{key}": value for key, value in flatten(ConfigDict(content)).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not the JSON of a configuration ({error}); bring it back or remove it") from error
    config = default()
    known = flatten(config)
    for name, value in migrate(entries, version, where).items():
        key = name.removeprefix("config.")
        if key not in known:
            raise UserError(f"{where}: there is no key {key!r} in this version{suggest(key, known)}")
        owner, last = _place(config, key)
        owner[last] = tuple(value) if isinstance(value, list | tuple) else value
    return config


def _place(config: ConfigDict, key: str) -> tuple[Any, str]:
    """The group that holds a dotted key, and the key's name there."""
    *groups, name = key.split(".")
    owner: Any = config
    for group in groups:
        owner = owner[group]
    return owner, name


def differences(saved: ConfigDict, wanted: ConfigDict) -> list[str]:
    """`key: saved -> wanted` for every key that differs, `run.*` apart."""
    a, b = flatten(saved), flatten(wanted)
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in b if a[key] != b[key] and not key.startswith("run.")]


def check(config: ConfigDict) -> ConfigDict:
    """Returns the configuration; raises `UserError` for values that no run could use."""
    flat = flatten(config)
    for key, value in flatten(default()).items():
        if isinstance(value, tuple) and key not in PER_CHANNEL and len(flat[key]) != len(value):
            raise UserError(f"{key}={flat[key]}: {len(value)} values are needed, such as {value}")
        if isinstance(value, tuple) and not _alike(flat[key], value):
            raise UserError(f"{key}={flat[key]}: {type(value[0]).__name__} values are needed, such as {value}")
    for key in PER_CHANNEL:
        if len(flat[key]) != config.model.in_chans:
            raise UserError(f"{key}={flat[key]}: one value for each of the {config.model.in_chans} channels is needed")
    for name, declared in flat_keys():
        if (error := declared.error(flat[name])) is not None:
            near = suggest(flat[name], declared.choices) if declared.choices else ""
            raise UserError(f"{name}={flat[name]!r}: {error}{near}")
    for key in ("crops.global_scale", "crops.local_scale"):
        low, high = flat[key]
        if not 0 < low <= high <= 1:
            raise UserError(f"{key}={flat[key]}: two shares of the area are needed, 0 < low <= high <= 1")
    first, last = config.run.profile_steps
    if first > last:
        raise UserError(f"run.profile_steps=({first}, {last}): the first step and the last one are needed")
    if config.run.mesh.fsdp == 0 or config.run.mesh.model == 0 or config.run.mesh.data == 0:
        raise UserError("run.mesh: an axis cannot have 0 devices; use 1, or -1 for the rest")
    return config


def _alike(values: tuple[Any, ...], examples: tuple[Any, ...]) -> bool:
    """Whether all are numbers, and whole ones where the examples are."""
    kinds: tuple[type, ...] = (int,) if all(isinstance(example, int) for example in examples) else (int, float)
    return all(isinstance(value, kinds) for value in values)
