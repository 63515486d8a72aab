"""Reads, writes, compares and checks configurations; applies overrides; lists the keys."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import logging
import os
import pathlib
import runpy
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from dino_jax.config import KEYS, RULES, Key, Keys, Rule, default, flat_keys, in_words
from dino_jax.errors import UserError, did_you_mean
from dino_jax.migrations import FORMAT_VERSION, migrate

PER_CHANNEL = ("data.mean", "data.std")  # one value for each channel
_PACKAGE = pathlib.Path(__file__).parent
log = logging.getLogger(__name__)


def load(name: str | os.PathLike[str], overrides: Iterable[str] = ()) -> ConfigDict:
    """The configuration of a training run: `name` is what `find` takes, `overrides` are `--config.KEY=VALUE`.

    Raises:
      UserError: the file is missing, fails, or has no `get_config`; a key is unknown or a value is invalid.
    """
    return check(override(read(name), overrides), f"--config={name}")


def read(name: str | os.PathLike[str]) -> ConfigDict:
    """The result of a file's `get_config()`; `name` and `UserError` as in `load`."""
    path = find(name)
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        raise UserError(f"--config={name}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config() must return a ConfigDict, not {type(config).__name__}")
    return config


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """The file at a path, or else the one of this name in `configs/`, with or without `.py` (`finetune/cifar10`).

    Raises:
      UserError: there is no such file or name.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return pathlib.Path(path)
    known, wanted = named(), str(name).removesuffix(".py")
    if wanted not in known:
        near = did_you_mean(wanted.removeprefix("configs/"), known)
        raise UserError(f"--config={name}: there is no such file or name{near} (names: {', '.join(known)})")
    return known[wanted]


def named() -> dict[str, pathlib.Path]:
    """The files of `configs/` by name, in alphabetical order. In a wheel the folder is inside the package."""
    folder = _PACKAGE / "configs"
    folder = folder if folder.is_dir() else _PACKAGE.parent / "configs"
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.py"))}


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
            [now] = migrate({f"config.{key}": value}, 1, argument)  # the name of an older version
            renamed = now.removeprefix("config.")
            hint = f"; did you mean {renamed!r}?" if renamed in known else did_you_mean(key, known)
            raise UserError(f"{argument}: there is no key {key!r}{hint}")
        given[key] = _as_pair(value, known[key])  # the last one wins
    argv = ["dino-jax", *(f"--config.{key}={value}" for key, value in given.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    for argument, (key, value) in zip(argv[1:], given.items(), strict=True):  # one by one, to name the bad one
        try:
            values([argv[0], argument])
        except (flags.Error, TypeError, ValueError) as error:
            owner, name = _place(config, key)
            kind = type(known[key]).__name__ if known[key] is not None else owner.get_type(name).__name__
            raise UserError(f"--config.{key}={value[:200]}: this key takes a value of type {kind}") from error
    return config


def _as_pair(text: str, current: Any) -> str:
    if not (isinstance(current, tuple) and len(current) == 2):
        return text
    try:
        number = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return f"({number}, {number})" if isinstance(number, int | float) else text


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The values by dotted key: `{"optim.lr": 5e-4, ...}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The configuration as readable JSON with its format version; `from_json` inverts it."""
    return json.dumps({"format_version": FORMAT_VERSION, **config.to_dict()}, indent=2)


def from_json(text: str, where: str = "the saved configuration") -> ConfigDict:
    """A configuration from `to_json`'s text, of this version or an older one. Absent keys get their defaults.

    Raises:
      UserError: not JSON, from a newer version, an unknown key, or a value that its key does not allow.
    """
    fix = "restore it or remove it"
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise UserError(f"{where}: holds {type(content).__name__} where an object is expected; {fix}")
        version = content.pop("format_version", 1)
        entries = {f"config.{key}": value for key, value in _leaves(content)}
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not the JSON of a configuration ({error}); {fix}") from error
    config = default()
    declared = dict(flat_keys())
    for name, value in migrate(entries, version, where).items():
        key = name.removeprefix("config.")
        if key not in declared:
            raise UserError(f"{where}: there is no key {key!r} in this version{did_you_mean(key, declared)}")
        value = tuple(value) if isinstance(value, list) else value
        if (wrong := declared[key].error(value)) is not None:
            raise UserError(f"{where}: {key}={_short(value)}: {wrong}; {fix}")
        owner, last = _place(config, key)
        owner[last] = value
    _check_lengths(flatten(config), f"{where}: ")
    return config


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects by dotted key. An empty object is a value: no group is empty."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _place(config: ConfigDict, key: str) -> tuple[Any, str]:
    """The group that holds a dotted key, and the key's name there."""
    *groups, name = key.split(".")
    owner: Any = config
    for group in groups:
        owner = owner[group]
    return owner, name


def differences(saved: ConfigDict, wanted: ConfigDict) -> list[str]:
    """`key: saved -> wanted` for every key that differs, except `run.*`."""
    a, b = flatten(saved), flatten(wanted)
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in b if a[key] != b[key] and not key.startswith("run.")]


def check(config: ConfigDict, where: str = "the configuration") -> ConfigDict:
    """Returns the configuration; raises `UserError` for keys that `default()` lacks and for invalid values."""
    flat, known = flatten(config), flatten(default())
    if foreign := sorted(flat.keys() ^ known.keys()):
        fix = "start from dino_jax.config.default()"
        raise UserError(f"{where}: not a training configuration: it differs in the key {foreign[0]!r}; {fix}")
    check_values(flat, KEYS)
    _check_lengths(flat)
    check_rules(flat, RULES)
    return config


def _check_lengths(flat: Mapping[str, Any], prefix: str = "") -> None:
    """Raises `UserError` for a tuple of another length than its key's."""
    for key, declared in flat_keys():
        value, channels = flat[key], flat["model.in_chans"]
        if key in PER_CHANNEL and len(value) != channels:
            said = f"{prefix}{key}={_short(value)} model.in_chans={channels}"
            raise UserError(f"{said}: one value for each of the {channels} channels is needed")
        if isinstance(value, tuple) and key not in PER_CHANNEL and len(value) != len(declared.default):
            size = len(declared.default)
            raise UserError(f"{prefix}{key}={_short(value)}: {size} values are needed, such as {declared.default}")


def check_values(flat: Mapping[str, Any], keys: Keys, prefix: str = "") -> None:
    """Raises `UserError` for a value (by dotted key) that `keys` do not allow; `prefix` goes before the key."""
    for name, key in flat_keys(keys):
        if (error := key.error(flat[name])) is not None:
            near = did_you_mean(flat[name], key.choices) if key.choices and isinstance(flat[name], str) else ""
            raise UserError(f"{prefix}{name}={_short(flat[name])}: {error}{near}")


def check_rules(flat: Mapping[str, Any], rules: Iterable[Rule], prefix: str = "") -> None:
    """Raises `UserError` for values (by dotted key) that break a rule, or warns once, as the rule says."""
    for rule in rules:
        if rule.broken(*(flat[key] for key in rule.keys)):
            said = f"{' '.join(f'{prefix}{key}={_short(flat[key])}' for key in rule.keys)}: {rule.meaning}"
            if rule.refused:
                raise UserError(said)
            _warn(said)


@functools.cache
def _warn(text: str) -> None:
    log.warning(text)


def _short(value: Any) -> str:
    """A value in a message, cut to a line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def describe(keys: Keys = KEYS) -> str:
    """Every key as `--config.KEY=DEFAULT`, with its meaning and bounds; a blank line between groups."""
    groups = itertools.groupby(flat_keys(keys), lambda item: item[0].rpartition(".")[0])
    return "\n\n".join("\n".join(_entry(name, key) for name, key in group) for _, group in groups)


def _entry(name: str, key: Key) -> str:
    unset = f" (unset: {key.default.__name__})" if isinstance(key.default, type) else f"={key.default}"
    head = f"  --config.{name}{unset}"
    bounds = [in_words(key.within)] if key.within else []
    bounds += [f"one of {', '.join(key.choices)}"] if key.choices else []
    meaning = f"{key.meaning} ({'; '.join(bounds)})" if bounds else key.meaning
    columns, indent = shutil.get_terminal_size((120, 24)).columns, " " * 42
    text = textwrap.fill(meaning, max(columns, 80), initial_indent=indent, subsequent_indent=indent)
    return head + text[len(head) :] if len(head) < len(indent) - 1 else f"{head}\n{text}"
