"""The numbers of DINOv2's official code and of DINOv3 in transformers, file by file; see `test_reference`."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dino_jax.config import default
from dino_jax.models import Head, ViT, resize_pos_embed
from dino_jax.models.positions import rope_table
from dino_jax.models.vit import Block
from dino_jax.objectives.centering import centered, moved, sinkhorn_knopp
from dino_jax.objectives.dino import dino_loss
from dino_jax.training.optim import decayed, lr_factors
from dino_jax.training.schedules import cosine, make_schedules
from dino_jax.weights.keys import torch_name
from tests.models.torch_names import section, sequence, to_variables

BOTH = pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-8)])


def sizes(data: dict, prefix: str = "in/") -> list[str]:
    return [key.removeprefix(prefix) for key in data if key.startswith(prefix)]


def nhwc(data: dict, size: str, dtype: str) -> np.ndarray:
    return data[f"in/{size}"].transpose(0, 2, 3, 1).astype(dtype)


def blocks_and_tokens(model: ViT, variables: dict, images: np.ndarray, n: int, masked=None):
    """The tokens of the last `n` blocks, and every block's output without the final norm."""
    tokens, kept = model.apply(
        variables,
        images,
        n,
        masked=masked,
        method="tokens",
        capture_intermediates=lambda module, name: isinstance(module, Block) and name == "__call__",
    )
    outputs = kept["intermediates"]
    return tokens, [outputs[f"blocks_{i}"]["__call__"][0] for i in range(model.depth)]


def dinov2_model(said: dict, positions: str, dtype: str) -> ViT:
    return ViT(
        said["embed_dim"],
        said["depth"],
        said["heads"],
        said["patch"],
        (said["image"],) * 2,
        dtype=jnp.dtype(dtype),
        registers=said["registers"],
        ffn=said["ffn"].removesuffix("fused"),
        layer_scale=said["layerscale_init"],
        norm_eps=said["layernorm_eps"],
        positions=positions,
        masking=True,
    )


@BOTH
@pytest.mark.parametrize("file", ["family/dinov2_vit.npz", "family/dinov2_vit_reg_swiglu.npz"])
def test_dinov2_backbone(load_reference, file, dtype, tolerance):
    data = load_reference(file)
    said = json.loads(str(data["config"]))
    with jax.enable_x64(dtype == "float64"):
        variables = {"params": to_variables(section(data, "param/", np.dtype(dtype)))["params"]}
        for positions in said["variants"]:
            model = dinov2_model(said, positions, dtype)
            assert model.hidden == said["hidden"]
            for size in sizes(data):
                check_dinov2(data, model, variables, positions, size, dtype, tolerance)


def check_dinov2(data, model, variables, positions, size, dtype, tolerance):
    expected = section(data, f"{positions}/{size}/")
    if not expected:
        return

    def close(found, key):
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=tolerance, err_msg=f"{positions} {size} {key}")

    images = nhwc(data, size, dtype)
    grid = tuple(length // model.patch_size for length in images.shape[1:3])
    close(resize_pos_embed(variables["params"]["pos_embed"], grid, how=positions), "pos_embed")
    tokens, blocks = blocks_and_tokens(model, variables, images, 2)
    close(tokens.cls[-1], "x_norm_clstoken")
    close(tokens.flat_patches[-1], "x_norm_patchtokens")
    if model.registers:
        close(tokens.registers[-1], "x_norm_regtokens")
    close(blocks[-1], "x_prenorm")
    for i in range(2):
        close(tokens.cls[i], f"intermediate/{i}/cls")
        close(tokens.flat_patches[i], f"intermediate/{i}/patch")
    if "first_block_unnormed/cls" in expected:
        close(blocks[0][:, 0], "first_block_unnormed/cls")
        close(blocks[0][:, 1 + model.registers :], "first_block_unnormed/patch")
    close(model.apply(variables, images, method="attention"), "attn")
    close(model.apply(variables, images), "x_norm_clstoken")
    masked = model.apply(variables, images, masked=data[f"mask/{size}"], method="tokens")
    close(masked.cls[0], "masked/x_norm_clstoken")
    close(masked.flat_patches[0], "masked/x_norm_patchtokens")


def dinov3_params(state: dict[str, np.ndarray]) -> dict:
    """The tensors of a transformers file under the names that this package's parameters have in torch."""
    found: dict[str, np.ndarray] = {}
    names = {"embeddings.mask_token": "mask_token", "embeddings.cls_token": "cls_token"}
    names |= {"embeddings.register_tokens": "register_tokens", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}
    names |= {f"embeddings.patch_embeddings.{leaf}": f"patch_embed.proj.{leaf}" for leaf in ("weight", "bias")}
    for name, ours in names.items():
        found[ours] = state[name][0] if ours == "mask_token" else state[name]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layer."))
    for i in range(depth):
        layer, block = section(state, f"layer.{i}."), f"blocks.{i}."
        attention = section(layer, "attention.")
        found[f"{block}attn.qkv.weight"] = np.concatenate([attention[f"{x}_proj.weight"] for x in "qkv"])
        found |= {f"{block}attn.{x}_bias": attention[f"{x}_proj.bias"] for x in "qv" if f"{x}_proj.bias" in attention}
        found |= {f"{block}attn.proj.{leaf}": attention[f"o_proj.{leaf}"] for leaf in ("weight", "bias")}
        found |= {f"{block}ls{k}.gamma": layer[f"layer_scale{k}.lambda1"] for k in (1, 2)}
        gated = "mlp.gate_proj.weight" in layer
        for leaf in ("weight", "bias"):
            up = [layer[f"mlp.gate_proj.{leaf}"]] if gated else []
            found[f"{block}mlp.{'w12' if gated else 'fc1'}.{leaf}"] = np.concatenate(
                [*up, layer[f"mlp.up_proj.{leaf}"]]
            )
            found[f"{block}mlp.{'w3' if gated else 'fc2'}.{leaf}"] = layer[f"mlp.down_proj.{leaf}"]
            found |= {f"{block}norm{k}.{leaf}": layer[f"norm{k}.{leaf}"] for k in (1, 2)}
    return to_variables(found)["params"]


@BOTH
@pytest.mark.parametrize("variant", ["mlp", "gated", "no_qkv_bias"])
def test_dinov3_backbone(load_reference, variant, dtype, tolerance):
    data = load_reference("family/dinov3_vit.npz")
    said = json.loads(str(data[f"{variant}/config"]))
    with jax.enable_x64(dtype == "float64"):
        state = section(data, f"{variant}/param/", np.dtype(dtype))
        model = ViT(
            said["hidden_size"],
            said["depth"],
            said["heads"],
            said["patch"],
            dtype=jnp.dtype(dtype),
            registers=said["registers"],
            ffn="swiglu" if said["gated"] else "mlp",
            ffn_dim=said["intermediate_size"],
            layer_scale=1.0,
            positions="rope",
            qkv_bias="qv" if said["query_bias"] else "none",
            norm_eps=said["layer_norm_eps"],
            masking=True,
        )
        for size in sizes(data):
            check_dinov3(data, variant, model, {"params": dinov3_params(state)}, size, dtype, tolerance)


def check_dinov3(data, variant, model, variables, size, dtype, tolerance):
    def close(found, key):
        np.testing.assert_allclose(found, data[key], rtol=0, atol=tolerance, err_msg=key)

    images = nhwc(data, size, dtype)
    rows, columns = (length // model.patch_size for length in images.shape[1:3])
    table = rope_table(rows, columns, model.embed_dim // model.heads)
    close(table[:, 0], f"rope/{size}/cos")
    close(table[:, 1], f"rope/{size}/sin")
    tokens, blocks = blocks_and_tokens(model, variables, images, 1)
    close(sequence(tokens)[0], f"{variant}/{size}/last_hidden_state")
    close(tokens.cls[0], f"{variant}/{size}/pooler_output")
    for key in section(data, f"{variant}/{size}/hidden/"):
        close(blocks[int(key)], f"{variant}/{size}/hidden/{key}")
    close(model.apply(variables, images, method="attention"), f"{variant}/{size}/attn")
    masked = model.apply(variables, images, masked=data[f"mask/{size}"], method="tokens")
    close(sequence(masked)[0], f"{variant}/{size}/masked/last_hidden_state")


@BOTH
def test_dinov2_loss(load_reference, dtype, tolerance):
    """Loss and gradients of the CLS term with both ways of centering; the file keeps logits crop-major."""
    data = load_reference("family/dinov2_loss.npz")
    with jax.enable_x64(dtype == "float64"):
        for centering in ("centering", "sinkhorn_knopp"):
            for step, temp in enumerate(data["teacher_temp"]):
                check_dinov2_loss(data, section(data, f"{centering}/step{step}/", dtype), temp, dtype, tolerance)


def check_dinov2_loss(data: dict, held: dict, temp: float, dtype: str, tolerance: float) -> None:
    def batch_major(logits):
        return logits.reshape(-1, int(data["batch"]), logits.shape[-1]).swapaxes(0, 1)  # [C * B, K] -> [B, C, K]

    def crop_major(logits):
        return logits.swapaxes(0, 1).reshape(-1, logits.shape[-1])

    teacher = batch_major(held["teacher"])
    if "center_used" in held:
        center = held["center_used"][0]
        targets = centered(teacher, center, temp)
        after = moved(center, teacher.mean((0, 1)), float(data["center_momentum"]))
        np.testing.assert_allclose(after, held["center_after"][0], rtol=0, atol=tolerance)
    else:
        targets = sinkhorn_knopp(held["teacher"], temp).reshape(-1, *teacher.shape[:1], teacher.shape[-1])
        targets = targets.swapaxes(0, 1)
    np.testing.assert_allclose(crop_major(jnp.exp(targets)), held["teacher_probs"], rtol=0, atol=tolerance)

    def loss(student):
        return dino_loss(student, targets, float(data["student_temp"]))[0]

    student = np.concatenate([batch_major(held["student_global"]), batch_major(held["student_local"])], axis=1)
    value, grad = jax.value_and_grad(loss)(jnp.asarray(student))
    expected = held["loss_global"] + held["loss_local"]
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * max(1, expected))
    np.testing.assert_allclose(crop_major(grad[:, :2]), held["grad_global"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(crop_major(grad[:, 2:]), held["grad_local"], rtol=0, atol=tolerance)


def test_dinov2_schedules(load_reference, x64):
    data = load_reference("family/schedules_v2.npz")
    for run in ("short", "long"):
        said = json.loads(str(data[f"{run}/config"]))
        config = default()
        config.epochs, config.batch_size = said["epochs"], said["global_batch"]
        config.optim.update({"lr": said["base_lr"], "lr_scaling": "sqrt", "min_lr": said["min_lr"]})
        config.optim.update({"warmup_epochs": said["warmup_epochs"]})
        config.optim.update({"weight_decay": said["wd"], "weight_decay_end": said["wd_end"]})
        config.teacher.update({"momentum": said["momentum"], "momentum_end": float(said["final_momentum"])})
        config.teacher.update({"warmup_temp": said["warmup_teacher_temp"], "temp": said["teacher_temp"]})
        config.teacher.update({"warmup_temp_epochs": said["warmup_teacher_temp_epochs"], "warmup_temp_by": "step"})
        schedules = make_schedules(config, said["epoch_length"])
        steps = np.arange(len(data[f"{run}/lr"]))
        names = {"lr": "lr", "wd": "weight_decay", "momentum": "momentum", "teacher_temp": "teacher_temp"}
        for theirs, ours in names.items():
            values = jax.vmap(getattr(schedules, ours))(steps)
            np.testing.assert_allclose(values, data[f"{run}/{theirs}"], rtol=0, atol=1e-12, err_msg=f"{run} {theirs}")
        frozen = steps < said["freeze_last_layer_epochs"] * said["epoch_length"]
        last = np.where(frozen, 0, jax.vmap(schedules.lr)(steps))
        np.testing.assert_allclose(last, data[f"{run}/last_layer_lr"], rtol=0, atol=1e-12)


def test_dinov2_cosine(load_reference, x64):
    data = load_reference("family/schedules_v2.npz")
    for case in {key.split("/")[1] for key in data if key.startswith("cosine/")}:
        said = json.loads(str(data[f"cosine/{case}/config"]))
        frozen, warmup = said.get("freeze_iters", 0), said.get("warmup_iters", 0)
        start, steps = said.get("start_warmup_value", 0.0), np.arange(len(data[f"cosine/{case}/values"]))
        schedule = cosine(said["base_value"], said["final_value"], said["total_iters"] - frozen, warmup, start)
        values = np.where(steps < frozen, 0, jax.vmap(schedule)(steps - frozen))
        np.testing.assert_allclose(values, data[f"cosine/{case}/values"], rtol=0, atol=1e-12, err_msg=case)


@pytest.mark.parametrize("model", ["backbone", "backbone_chunked", "backbone_swiglu", "head"])
def test_dinov2_parameter_groups(load_reference, model):
    data = load_reference("family/schedules_v2.npz")
    names = [re.sub(r"^blocks\.\d+\.(\d+)", r"blocks.\1", name) for name in data[f"groups/{model}/name"]]
    vit = {"depth": 1, "layerwise_decay": 0.5, "patch_embed_lr_mult": 0.5}  # beside a head alone
    said = vit if model == "head" else json.loads(str(data[f"groups/{model}/config"]))
    options = {"registers": int("register_tokens" in names), "ffn": "swiglu" if "swiglu" in model else "mlp"}
    backbone = ViT(6, said["depth"], 2, 14, (28, 28), layer_scale=1e-5, masking=True, **options)
    head = Head(8, 6, 4, 3, norm_last_layer=False)
    params = {
        "backbone": jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"],
        "head": jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 6)))["params"],
    }
    part = model.partition("_")[0]
    factors = lr_factors(params, said["layerwise_decay"], said["patch_embed_lr_mult"])
    for found, expected in ((factors, "lr_multiplier"), (decayed(params), "wd_multiplier")):
        flat = traverse_util.flatten_dict({"params": found[part]})
        mine = {torch_name(path): float(value) for path, value in flat.items()}
        mine = {re.sub(r"^patch_embed\.", "patch_embed.proj.", name): value for name, value in mine.items()}
        assert mine == pytest.approx(dict(zip(names, data[f"groups/{model}/{expected}"], strict=True)))
