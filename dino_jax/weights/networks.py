"""Finds the network in a weight file's contents: which state dict, which of its prefixes, and under regular names.

Every wrapper of names (DistributedDataParallel, FSDP, torch.compile, ...) is removed here and nowhere else.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dino_jax.errors import UserError, printable
from dino_jax.weights import foreign
from dino_jax.weights.architecture import FORMATS
from dino_jax.weights.unpickle import MAX_NAME, StandIn

log = logging.getLogger(__name__)

WRAPPERS = re.compile(  # at any depth
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
# Names from other versions of the official code and of torch: (pattern, replacement), applied in order.
RENAMED = (
    (r"\bprojection_head\.", "mlp."),  # the first release
    (r"\bprototypes\.", "last_layer."),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),  # weight_norm since torch 2.0
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"^(mlp|last_layer)\.", r"head.\1."),
)
HEAD = re.compile(r"(head\.)?(mlp|last_layer|projection_head|prototypes)\.")
AVERAGED = {"ema", "momentum", "target", "averaged"}  # words for what DINO calls the teacher
MAX_DEPTH, MAX_DICTS = 6, 1000  # of nested dicts that are looked through


class Network(NamedTuple):
    """A backbone found in a file, and what belongs to it."""

    key: str  # dotted path of the state dict; "" if the file is one
    prefix: str  # of the backbone's names, wrappers removed
    state: Mapping[str, np.ndarray]  # the whole state dict, wrappers removed

    def __str__(self) -> str:
        options = [f"--key={self.key}" if self.key else "", f"--prefix={self.prefix}" if self.prefix else ""]
        return printable(" ".join(filter(None, options))[:MAX_NAME] or "the file itself")

    @property
    def rank(self) -> int:
        """2 for a teacher, 1 for another averaged copy, 0 for the rest."""
        words = set(re.split(r"[._]", f"{self.key}.{self.prefix}"))
        return 2 if "teacher" in words else int(bool(words & AVERAGED))

    def tensors(self, alone: bool = False) -> dict[str, np.ndarray]:
        """The tensors under regular names (see `regular_names`). `alone`: without the head."""
        stem = self.prefix.removesuffix("backbone.")
        inside = {key: value for key, value in self.state.items() if key.startswith(self.prefix)}
        chosen = {f"backbone.{key[len(self.prefix) :]}": value for key, value in inside.items()}
        if not self.prefix:
            chosen = dict(self.state)
        elif not alone and stem != self.prefix and stem[-1:] in ("", "."):
            head = {key[len(stem) :]: value for key, value in self.state.items() if key.startswith(stem)}
            chosen |= {key: value for key, value in head.items() if HEAD.match(key)}
            inside |= {stem + key: value for key, value in head.items() if HEAD.match(key)}
        out = Counter(key.partition(".")[0] for key in self.state if key not in inside)
        if out:
            log.info("left out, not part of the network: %s", _listed(f"{k} ({n})" for k, n in out.items()))
        return regular_names(chosen)


def find(content: Any, key: str | None, prefix: str | None, source: object) -> Network:
    """The network that `key` and `prefix` choose, or else the only one or the only teacher (or averaged copy).

    Logs a warning that names what else could have been chosen.

    Raises:
      UserError: there is none, or several alike.
    """
    inside = content if key is None else at(content, key)
    if inside is None and key is not None:
        raise UserError(f"{source}: no {printable(key)!r} in it; {_offer(found_in(content, source))}")
    found = found_in(inside, source, key or "")
    if not found:
        raise UserError(f"{source}: {_nothing(inside)}")
    if prefix is not None:
        wanted = WRAPPERS.sub("", prefix if prefix.endswith(".") or not prefix else f"{prefix}.")
        offered = _offer(found)
        found = [one for one in found if one.prefix == wanted] or [
            one for one in found if wanted and one.prefix.startswith(wanted)
        ]
        if not found:
            raise UserError(f"{source}: no backbone under --prefix={printable(prefix)}; {offered}")
    top = max(one.rank for one in found)
    best = [one for one in found if one.rank == top]
    if len(best) > 1:
        states = {id(one.state): one.state for one in best}.values()
        name = foreign.name_of(key for state in states for key in state)
        what = f"several networks ({name})" if name else "several networks"
        raise UserError(f"{source}: {what}; choose with `import`: {_listed(map(str, best), ' or ')}")
    others = [one for one in found if one is not best[0]]
    if others and not (best[0].key == "teacher" and all(one.key == "student" for one in others)):
        log.warning("%s: took %s; also there, to choose with `import`: %s", source, best[0], _listed(map(str, others)))
    return best[0]


def found_in(content: Any, source: object, key: str = "") -> list[Network]:
    """All networks in nested dicts."""
    found = []
    for place, value in _dicts(content, key):
        state = unwrapped(value, source)
        prefixes = {name[: -len(fmt.marker)] for fmt in FORMATS for name in state if name.endswith(fmt.marker)}
        found += [Network(place, prefix, state) for prefix in sorted(prefixes) if prefix[-1:] in ("", ".")]
    return found


def unwrapped(value: Mapping[str, Any], source: object) -> dict[str, np.ndarray]:
    """The arrays of a dict, under names without wrappers.

    Raises:
      UserError: two names become one, or one is too long or not printable.
    """
    state: dict[str, np.ndarray] = {}
    for key, item in value.items():
        if isinstance(key, str) and isinstance(item, np.ndarray):
            if len(key) > MAX_NAME or not key.isprintable():
                raise UserError(f"{source}: damaged: the name {printable(key[:50])}... is too long or not printable")
            name = WRAPPERS.sub("", key)
            if name in state:
                raise UserError(
                    f"{source}: {printable(name)} is there twice, with and without a wrapper such as module."
                )
            state[name] = item
    return state


def _dicts(content: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """All dicts in nested dicts, each once, with their dotted paths."""
    waiting, seen = [(key, content, 0)], set[int]()
    while waiting and len(seen) < MAX_DICTS:
        place, value, depth = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        yield place, value
        if depth < MAX_DEPTH:
            names = [name for name in value if isinstance(name, str) and "optim" not in name]  # moments have the names
            waiting += [(f"{place}.{name}" if place else name, value[name], depth + 1) for name in names]


def at(content: Any, key: str) -> Any:
    """The value at a dotted path in nested dicts, whose names may have dots; or None."""
    if not isinstance(content, Mapping) or key in content:
        return content.get(key) if isinstance(content, Mapping) else None
    starts = (name for name in content if isinstance(name, str) and key.startswith(f"{name}."))
    found = (at(content[name], key[len(name) + 1 :]) for name in starts)
    return next((value for value in found if value is not None), None)


def _offer(found: list[Network]) -> str:
    return f"it has {_listed(map(str, found)) or 'no network that is known here'}"


def _nothing(content: Any) -> str:
    """Why there is no network, from what there is instead."""
    dicts = list(_dicts(content, ""))
    names = [name for _, value in dicts for name, item in value.items() if isinstance(item, np.ndarray)]
    if name := foreign.name_of(map(str, names)):
        return f"{name}; {foreign.READ}"
    objects = [(n, x.name) for _, value in dicts for n, x in value.items() if isinstance(x, StandIn)]
    whole = [f"{printable(str(n))[:50]} ({printable(x)})" for n, x in objects if "optim" not in x.lower()]
    if names:
        some = printable(", ".join(map(str, names[:3])))
        hint = "" if len(names) > 3 or not whole else f" and {whole[0]}"
        return f"not the weights of a ViT, ResNet or XCiT under known names; it holds {some}, ...{hint}"
    end = "neither named tensors nor a `teacher` with them"
    if whole:
        end = f"{whole[0]} is a pickled object, not tensors: where its code is, save its .state_dict() with torch.save"
    return f"no weights found: {end}"


def regular_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict with current names: `backbone.*`, `head.mlp.*`, `head.last_layer.weight_[gv]`.

    A last layer without weight norm (the released ResNet-50's) is converted to an equivalent direction and gain, and
    timm's registers and positions are converted back: see `timm_prefix`.
    """
    regular = {}
    for key, value in state.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        regular[key if key.startswith(("backbone.", "head.")) else f"backbone.{key}"] = value
    if (plain := regular.pop("head.last_layer.weight", None)) is not None:
        regular["head.last_layer.weight_v"] = plain
        regular["head.last_layer.weight_g"] = np.linalg.norm(plain.astype(np.float32), axis=1, keepdims=True)
    if (registers := regular.pop("backbone.reg_token", None)) is not None:
        regular["backbone.register_tokens"] = registers
        if (table := regular.get("backbone.pos_embed")) is not None:  # timm has no row for CLS: add zeros
            regular["backbone.pos_embed"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    return regular


def timm_prefix(backbone: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts a ViT with registers to timm's tensors (`reg_tokens`, `no_embed_class`); others are unchanged.

    timm calls `register_tokens` `reg_token`, and adds the position of CLS to `cls_token` instead of keeping its row.
    """
    if "register_tokens" not in backbone:
        return dict(backbone)
    table = backbone["pos_embed"]  # [1, 1 + N, D]
    changed = {"cls_token": backbone["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}
    return {"reg_token" if key == "register_tokens" else key: changed.get(key, x) for key, x in backbone.items()}


def section(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names start with `prefix`, which is removed."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _listed(items: Any, between: str = ", ", most: int = 8) -> str:
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + rest
