"""Infers the model from a set of tensors: its format, its configuration, and the resulting key table."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.models import BACKBONES, build_backbone, build_head
from dino_jax.models.vit import ffn_width
from dino_jax.weights import keys

Tensors = Mapping[str, np.ndarray]


MAX_DEPTH = 128  # blocks; building a deeper model takes minutes
LAYER_SCALE = 1e-5  # the initial gain in every release: files do not say it
MEMBERS: dict[str, dict[str, Any]] = {name: getattr(make, "keywords", {}) for name, make in BACKBONES.items()}


class Hints(NamedTuple):
    """What shapes do not determine: from the user, or from files next to the weights."""

    heads: int | None = None
    image_size: tuple[int, int] | None = None  # height, width of the position table
    grid: tuple[int, int] | None = None  # its rows and columns, from the user


class Format(NamedTuple):
    """A naming scheme for a family's backbone tensors, recognized by a key that only it has."""

    name: str
    family: str
    marker: str
    rules: keys.Rules


FORMATS = (  # the first whose marker is present wins
    Format("official", "xcit", "cls_attn_blocks.0.attn.qkv.weight", keys.XCIT),
    Format("timm", "xcit", "cls_attn_blocks.0.attn.q.weight", keys.XCIT_TIMM),
    Format("official", "resnet", "layer1.0.conv1.weight", keys.RESNET),
    Format("hf", "vit", "encoder.layer.0.attention.attention.query.weight", keys.HUGGING_FACE),
    Format("hf", "vit", "layers.0.attention.q_proj.weight", keys.HUGGING_FACE_5),
    Format("official", "vit", "blocks.0.attn.qkv.weight", keys.VIT),
)


def rules(config: ConfigDict, name: str) -> keys.Rules:
    """Key rules of the format `official`, `timm` or `hf` for this model; `UserError` if it has no such model.

    With registers, `timm` also needs other tensors: see `networks.timm_prefix`.
    """
    _check_layout(config.model, name)
    family = config.model.name.partition("_")[0].rstrip("0123456789")
    known = {fmt.name: fmt.rules for fmt in reversed(FORMATS) if fmt.family == family}
    if name == "timm":
        name = name if name in known else "official"  # the same names
    if name not in known:
        raise UserError(f"--format={name}: transformers has no {config.model.name}; choose official or timm")
    if name == "hf" and config.model.registers:
        raise UserError("--format=hf: transformers' ViT has no registers (model.registers); choose official or timm")
    return known[name]


def _check_layout(model: ConfigDict, name: str) -> None:
    """Raises `UserError` for a ViT of the DINOv2 family that the layout cannot hold, or would read back as another."""
    options = [key for key in ("layer_scale", "ffn", "masking", "positions", "qkv_bias", "norm_eps") if model[key]]
    if options and name != "official":
        raise UserError(f"--format={name}: a model with model.{options[0]} is written by --format=official only")
    released = "antialias" if model.registers and model.layer_scale else "offset"  # what the layout implies
    if options and (model.qkv_bias or model.norm_eps or (model.positions or "offset") != released):
        raise UserError(
            f"--format={name}: DINOv2's layout implies model.positions={released}, and qkv_bias and norm_eps unset: "
            "there is none for this model"
        )


def recognize(backbone: Tensors, source: object) -> Format:
    """The format of a backbone's tensors; `UserError` if unknown."""
    for known in FORMATS:
        if known.marker in backbone:
            return known
    some = ", ".join(list(backbone)[:3]) or "nothing"
    raise UserError(
        f"{source}: not the weights of a ViT, ResNet or XCiT under the names of DINO, timm, torchvision or "
        f"transformers; it holds {some}, ..."
    )


def fill_model(config: ConfigDict, fmt: Format, backbone: Tensors, hints: Hints, source: object) -> None:
    """Sets `config.model` and the image size from the shapes of a backbone's tensors.

    Raises:
      UserError: the number of attention heads is unknown (a hint is needed), or the shapes are inconsistent.
    """
    if hints.grid and fmt.family != "vit":
        raise UserError(f"{source}: --grid is for the position table of a ViT; this {fmt.family} has none")
    with _identifying(source):
        fill = {"vit": _fill_vit, "xcit": _fill_xcit, "resnet": _fill_resnet}[fmt.family]
        fill(config, fmt, backbone, hints, source)


@contextlib.contextmanager
def _identifying(source: object) -> Iterator[None]:
    """Raises the block's errors about absent or misshaped tensors as `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{source}: cannot identify the model: {error} is missing or has a wrong shape") from None


def _fill_vit(config: ConfigDict, fmt: Format, backbone: Tensors, hints: Hints, source: object) -> None:
    embed_dim, chans, patch, _ = backbone[keys.renamed("patch_embed.weight", fmt.rules)].shape
    count = backbone[keys.renamed("pos_embed", fmt.rules)].shape[1] - 1
    rows, columns = hints.grid or [side // patch for side in hints.image_size or ()] or [math.isqrt(count)] * 2
    if rows * columns != count:
        said = f"not {rows} x {columns}" if hints.grid or hints.image_size else "not square, so its grid is unknown"
        raise UserError(
            f"{source}: a position table of {count} patches is {said}: give --grid=ROWS,COLUMNS to `import`"
        )
    depth = _count(backbone, lambda i: keys.renamed(f"blocks.{i}.norm1.weight", fmt.rules), source)
    if "register_tokens" in backbone:
        config.model.registers = backbone["register_tokens"].shape[1]
    if "mask_token" in backbone:
        config.model.masking = True
    if "blocks.0.ls1.gamma" in backbone:
        config.model.layer_scale = LAYER_SCALE
        if config.model.registers:
            config.model.positions = "antialias"  # as released
    _fill_shape(config, "vit_", {"embed_dim": embed_dim, "depth": depth}, hints.heads, source)
    _fill_ffn(config, fmt, backbone, embed_dim)
    _fill_input(config, chans, patch, (rows * patch, columns * patch))


def _fill_ffn(config: ConfigDict, fmt: Format, backbone: Tensors, embed_dim: int) -> None:
    """Sets the blocks' MLP, by another named model of the same shape if there is one."""
    kind = "swiglu" if "blocks.0.mlp.w3.weight" in backbone else "mlp"
    second = backbone[keys.renamed(f"blocks.0.mlp.{'w3' if kind == 'swiglu' else 'fc2'}.weight", fmt.rules)]

    def ffn(member: dict[str, Any]) -> tuple[str, int]:
        its = member.get("ffn", "mlp")
        return its, member.get("ffn_dim") or ffn_width(its, embed_dim)

    own, named = (kind, second.shape[1]), MEMBERS[config.model.name]
    if ffn(named) == own:
        return
    shape = [named[key] for key in ("embed_dim", "depth", "heads")]
    for name, member in MEMBERS.items():
        if (
            name.startswith("vit_")
            and [member[k] for k in ("embed_dim", "depth", "heads")] == shape
            and ffn(member) == own
        ):
            config.model.name = name
            return
    config.model.ffn, config.model.ffn_dim = own


def _fill_xcit(config: ConfigDict, fmt: Format, backbone: Tensors, hints: Hints, source: object) -> None:
    width, depth = backbone["cls_token"].shape[-1], _count(backbone, "blocks.{}.norm1.weight".format, source)
    heads = backbone["blocks.0.attn.temperature"].shape[0]
    patch = 2 ** _count(backbone, lambda i: f"patch_embed.proj.{2 * i}.0.weight", source)
    _fill_shape(config, "xcit_", {"embed_dim": width, "depth": depth}, heads, source)
    _fill_input(config, backbone["patch_embed.proj.0.0.weight"].shape[1], patch, hints.image_size or (224, 224))


def _fill_resnet(config: ConfigDict, fmt: Format, backbone: Tensors, hints: Hints, source: object) -> None:
    stages = tuple(_count(backbone, f"layer{stage}.{{}}.conv1.weight".format, source) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in backbone
    for name, make in MEMBERS.items():
        if make.get("stages") == stages and make["bottleneck"] == bottleneck:
            config.model.name = name
            break
    else:
        raise UserError(f"{source}: no registered ResNet has {stages} blocks")
    _, chans, side, _ = backbone["conv1.weight"].shape
    config.model.small_stem = side == 3
    size = (32, 32) if side == 3 else (224, 224)
    _fill_input(config, chans, config.model.patch_size, hints.image_size or size)


def _count(backbone: Tensors, name: Callable[[int], str], source: object) -> int:
    """How many of the keys name(0), name(1), ... exist."""
    count = next(i for i in itertools.count() if name(i) not in backbone)
    if count > MAX_DEPTH:
        raise UserError(f"{source}: {count} blocks, {name(0)} and on; more than {MAX_DEPTH} are not read")
    return count


def _fill_shape(config: ConfigDict, family: str, shape: dict[str, int], heads: int | None, source: object) -> None:
    """Sets `config.model.name` to the family's closest model, and the keys in which this one differs."""
    members = {name: member for name, member in MEMBERS.items() if name.startswith(family)}
    alike = [name for name, member in members.items() if member["embed_dim"] == shape["embed_dim"]]
    if not alike and heads is None:
        widths = ", ".join(str(member["embed_dim"]) for member in members.values())
        raise UserError(
            f"{source}: the number of attention heads is unknown for a width of {shape['embed_dim']} (the named models "
            f"have {widths}): give --heads=N"
        )
    if heads is not None and (heads < 1 or shape["embed_dim"] % heads):
        raise UserError(f"{source}: a width of {shape['embed_dim']} is not divisible by --heads={heads}")
    exact = [name for name in alike if members[name]["depth"] == shape["depth"]]
    config.model.name = (exact or alike or list(members))[0]
    member = members[config.model.name]
    for key, value in {**shape, "heads": heads or member["heads"]}.items():
        if member[key] != value:
            config.model[key] = value


def _fill_input(config: ConfigDict, chans: int, patch: int, size: tuple[int, int]) -> None:
    config.model.patch_size, config.model.in_chans = patch, chans
    config.crops.global_size = size
    config.crops.local_size = tuple(max(1, round(length * 96 / 224 / patch)) * patch for length in size)
    if chans != len(config.data.mean):
        config.data.mean, config.data.std = (0.5,) * chans, (0.5,) * chans


def fill_head(config: ConfigDict, head: Tensors, train_gain: bool, source: object) -> None:
    """Sets `config.head` from the shapes of a projection head's tensors (`mlp.0.weight`, ...)."""
    if not ("last_layer.weight_v" in head and any(head[f"mlp.{i}.weight"].ndim == 2 for i in _indices(head))):
        raise UserError(
            f"{source}: its head lacks mlp.*.weight or last_layer.weight_v; it holds {', '.join(list(head)[:9])}"
        )
    with _identifying(source):
        _fill_head(config, head, train_gain, source)


def _fill_head(config: ConfigDict, head: Tensors, train_gain: bool, source: object) -> None:
    linear = [head[f"mlp.{i}.weight"].shape for i in _indices(head) if head[f"mlp.{i}.weight"].ndim == 2]
    config.head.out_dim, config.head.bottleneck_dim = head["last_layer.weight_v"].shape
    if len(linear) > MAX_DEPTH:
        raise UserError(f"{source}: its head has {len(linear)} layers; more than {MAX_DEPTH} are not read")
    config.head.hidden_dim = linear[0][0]
    config.head.layers = len(linear)
    config.head.use_bn = any(key.endswith("running_mean") for key in head)
    config.head.norm_last_layer = not train_gain


def _indices(head: Tensors) -> list[int]:
    return sorted({int(found[1]) for key in head if (found := re.match(r"mlp\.(\d+)\.weight$", key))})


def backbone_shapes(config: ConfigDict) -> Any:
    """The shapes of the backbone's variables."""
    size = tuple(config.crops.global_size)
    return _shapes(build_backbone(config.model, size), (1, *size, config.model.in_chans))


def head_shapes(config: ConfigDict) -> Any:
    """The shapes of the head's variables."""
    width = build_backbone(config.model, config.crops.global_size).embed_dim
    return _shapes(build_head(config), (1, width))


@functools.lru_cache(maxsize=16)
def _shapes(module: nn.Module, shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def network_table(config: ConfigDict, rules: keys.Rules, with_head: bool) -> list[keys.Entry]:
    """The key table of backbone and head, keys under `backbone.` and `head.`."""
    table = keys.key_table(backbone_shapes(config), rules, "backbone")
    return table + (keys.key_table(head_shapes(config), (), "head") if with_head else [])
