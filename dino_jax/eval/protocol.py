"""The `Protocol` record, and the registered protocols: the modules in `eval/protocols`.

A new protocol is one file there, which names it. The first line of its docstring is its line in
`dino-jax eval --help`. It defines

    KEYS = {"size": Key(224, "side of the square that images are resized to", "[1, inf)")}

    def evaluate(model, data, config, workdir=None):
        return {"figure": 50.0}

    PROTOCOL = Protocol(run=evaluate, keys=KEYS, data=CLASSES)  # from `eval.splits`; or define a `Data`

Its command-line keys and their checks, its help, its place in `eval all` and the comparison with published figures all
come from the record.
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
from dino_jax.config import MOST_PIXELS, MOST_READERS, Key, Keys, Rule, build
from dino_jax.errors import UserError, did_you_mean
from dino_jax.eval import protocols

if TYPE_CHECKING:
    from dino_jax.inference.model import Model

ALL = "all"  # the name of every protocol together

# Keys shared by protocols.
RESIZE = Key(
    256,
    "shorter side of test images before the center crop, resized bicubic; 0: no resize",
    "[0, inf)",
    most=MOST_PIXELS,
)
CROP = Key(224, "side of the center crop of test images", "[1, inf)", most=MOST_PIXELS)
SEED = Key(0, "random seed", "[0, 4294967295]")
THREADS = Key(4, "image-reading threads per process", "[1, inf)", most=MOST_READERS)
WORKERS = Key(0, "image-reading worker processes; 0: threads instead", "[0, inf)", most=MOST_READERS)

RULES = (  # for every protocol that has these keys
    Rule(
        ("crop", "resize"),
        lambda crop, resize: 0 < resize < crop,
        "each image would get a black frame: lower crop or raise resize",
    ),
    Rule(("warmup_epochs", "epochs"), lambda warmup, run: warmup > run, "the warm-up is longer than the run"),
    Rule(
        ("min_lr", "lr", "batch_size"),
        lambda low, peak, batch: low > peak * batch / 512,
        "the rate would rise to the end: min_lr is above the peak, lr * batch_size / 512",
    ),
)


class Data(NamedTuple):
    """What data a protocol accepts, for `eval all`: a folder, and perhaps `TRAIN,TEST` sources."""

    words: str  # description of the folder: "no {words} in ..." if missing
    fits: Callable[[epath.Path], bool]
    sources: bool = False  # accepts any two sources TRAIN,TEST
    scenes: Literal["both", "test"] | None = None  # given two `scenes:` specs: takes both, or only the test one


class Protocol(NamedTuple):
    """An evaluation protocol."""

    run: Callable[[Model, str, ConfigDict, str | None], dict[str, Any]]  # (model, data, config, workdir) -> figures
    keys: Keys
    data: Data
    needs_patches: bool = False  # requires a backbone with patch tokens
    whole_patches: tuple[str, ...] = ()  # size keys (pixels) that must be multiples of the patch size
    published: Mapping[str, Mapping[str, float]] = {}  # figure -> architecture (see `published`) -> percent
    source: str = ""  # where the published figures are from, and their settings
    order: int | None = 100  # position in `eval all`, fast ones first; None: not in it

    def default_config(self) -> ConfigDict:
        """The keys with their defaults, locked."""
        return build(self.keys)


def names() -> list[str]:
    """The names of all protocols, without importing them."""
    return [module.name for module in pkgutil.iter_modules(protocols.__path__) if not module.name.startswith("_")]


def get(name: str) -> Protocol:
    """The protocol with this name. Raises `UserError` if unknown."""
    if name not in (known := names()):
        near = did_you_mean(name, [*known, ALL])
        raise UserError(f"unknown protocol {name!r}{near} (one of {', '.join(known)}, {ALL})")
    found: Protocol = importlib.import_module(f"{protocols.__name__}.{name}").PROTOCOL
    return found


def about(name: str) -> str:
    """The docstring of a protocol's module, without importing it."""
    spec: Any = importlib.util.find_spec(f"{protocols.__name__}.{name}")
    return ast.get_docstring(ast.parse(spec.loader.get_source(spec.name))) or ""


def members() -> dict[str, Protocol]:
    """The protocols in `eval all` by name, in order."""
    found = [(protocol.order, name, protocol) for name in names() if (protocol := get(name)).order is not None]
    return {name: protocol for _, name, protocol in sorted(found, key=lambda entry: entry[:2])}


def keys_of(name: str) -> Keys:
    """The keys of a protocol, or of `all`, grouped by protocol. Raises `UserError` if unknown."""
    if name == ALL:
        return {member: protocol.keys for member, protocol in members().items()}
    return get(name).keys


def check(config: ConfigDict, keys: Keys) -> ConfigDict:
    """Returns `config`; raises `UserError` for a value outside its key's range, and for values that contradict."""
    flat = config_io.flatten(config)
    config_io.check_values(flat, keys, "--config.")
    for name, value in flat.items():
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise UserError(f"--config.{name}={value}: the values must differ")
    for group in {name.rpartition(".")[0] for name in flat}:
        prefix = f"{group}." if group else ""
        part = {name.removeprefix(prefix): value for name, value in flat.items() if name.startswith(prefix)}
        rules = [rule for rule in RULES if part.keys() >= set(rule.keys)]
        config_io.check_rules(part, rules, f"--config.{prefix}")
    return config


def help_of(name: str | None = None) -> str:
    """Text for `dino-jax eval [NAME] --help`: the list of protocols, or one protocol's description and keys."""
    if name is None or name == ALL:
        lines = [f"  {known:15}{line}" for known in names() for line in about(known).splitlines()[:1] or [""]]
        lines.append(f"  {ALL:15}Every protocol that the data fit; set keys by --config.PROTOCOL.KEY=VALUE.")
        return "\n".join(["protocols (`dino-jax eval PROTOCOL --help` lists the keys of one):", *lines])
    keys, text = get(name).keys, about(name).partition("\n\nLegend")[0]
    return "\n".join([text, "", f"keys of {name} with their defaults:", config_io.describe(keys)])
