"""The record of an evaluation protocol, and the protocols there are: the modules of `eval/protocols`.

A new protocol is one file there. Its name is the file's; the first line of its docstring is its line in
`dino-jax eval --help`; and it defines

    KEYS = {"size": Key(224, "side of the square that images are resized to", "[1, inf)")}

    def evaluate(model, data, config, workdir=None):
        return {"figure": 50.0}

    PROTOCOL = Protocol(run=evaluate, keys=KEYS, data=CLASSES)  # of `eval.splits`; others describe theirs as `Data`

Its keys on the command line and their checks, its help, its place in `eval all` and the published figures beside its
own follow from the record.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from dino_jax import config_io
from dino_jax.config import Key, Keys, build
from dino_jax.errors import UserError, did_you_mean
from dino_jax.eval import protocols

if TYPE_CHECKING:
    from dino_jax.inference.model import Model

ALL = "all"  # the name of every protocol together

# Keys that several protocols have.
RESIZE = Key(256, "shorter side of test images before the center crop, bicubic; 0: no resize", "[0, inf)")
CROP = Key(224, "side of the center crop of test images", "[1, inf)")
SEED = Key(0, "random seed", "[0, 4294967295]")
THREADS = Key(4, "reading threads in each process", "[1, inf)")
WORKERS = Key(0, "reading processes; 0: threads of this one", "[0, inf)")


class Data(NamedTuple):
    """What data a protocol takes, for `eval all`: which folder, in words and as a test, and what of `TRAIN,TEST`."""

    words: str  # "no {words} in ..." where it is absent
    fits: Callable[[epath.Path], bool]
    sources: bool = False  # any two sources, TRAIN,TEST
    scenes: Literal["both", "test"] | None = None  # of two `scenes:` specs: both, or the test part alone


class Protocol(NamedTuple):
    """An evaluation protocol."""

    run: Callable[[Model, str, ConfigDict, str | None], dict[str, Any]]  # (model, data, config, workdir) -> figures
    keys: Keys
    data: Data
    needs_patches: bool = False  # does not work with a backbone that has no patch tokens
    whole_patches: tuple[str, ...] = ()  # keys of sizes in pixels that the patch must divide
    published: Mapping[str, Mapping[str, float]] = {}  # figure -> architecture (see `published`) -> percent
    source: str = ""  # where the published figures are from, and what they hold for
    order: int | None = 100  # place in `eval all`, quick ones first; None: not part of it

    def default_config(self) -> ConfigDict:
        """The protocol's keys with their defaults, locked."""
        return build(self.keys)


def names() -> list[str]:
    """The names of all protocols: the modules of `eval/protocols`, none of which is imported."""
    return [module.name for module in pkgutil.iter_modules(protocols.__path__) if not module.name.startswith("_")]


def get(name: str) -> Protocol:
    """The protocol of a name. Raises `UserError` for an unknown one."""
    if name not in (known := names()):
        near = did_you_mean(name, [*known, ALL])
        raise UserError(f"unknown protocol {name!r}{near} (one of {', '.join(known)}, {ALL})")
    found: Protocol = importlib.import_module(f"{protocols.__name__}.{name}").PROTOCOL
    return found


def about(name: str) -> str:
    """The docstring of a protocol's module, which is not imported."""
    spec: Any = importlib.util.find_spec(f"{protocols.__name__}.{name}")
    return ast.get_docstring(ast.parse(spec.loader.get_source(spec.name))) or ""


def members() -> dict[str, Protocol]:
    """The protocols of `eval all` by name, in their order."""
    found = [(protocol.order, name, protocol) for name in names() if (protocol := get(name)).order is not None]
    return {name: protocol for _, name, protocol in sorted(found, key=lambda entry: entry[:2])}


def keys_of(name: str) -> Keys:
    """The keys of a protocol, or of all of them as groups with their names. Raises `UserError` for an unknown one."""
    if name == ALL:
        return {member: protocol.keys for member, protocol in members().items()}
    return get(name).keys


def check(config: ConfigDict, keys: Keys) -> ConfigDict:
    """Returns a configuration of `keys`; raises `UserError` for a value outside of what they declare."""
    config_io.check_values(config_io.flatten(config), keys, "--config.")
    return config


def help_of(name: str | None = None) -> str:
    """What `dino-jax eval [NAME] --help` adds: the list of protocols, or what one is and its keys."""
    if name is None or name == ALL:
        lines = [f"  {known:15}{line}" for known in names() for line in about(known).splitlines()[:1] or [""]]
        lines.append(f"  {ALL:15}Every protocol that the data allow; its keys are --config.PROTOCOL.KEY=VALUE.")
        return "\n".join(["protocols (`dino-jax eval PROTOCOL --help` lists the keys of one):", *lines])
    keys, text = get(name).keys, about(name).partition("\n\nLegend")[0]
    return "\n".join([text, "", f"keys of {name} with their defaults:", config_io.describe(keys)])
