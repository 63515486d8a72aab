"""Tells what the weights of other models and methods are, from the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

READ = (
    "this package reads DINO's and DINOv2's official files, plain ViT and XCiT of timm and transformers, and "
    "torchvision's ResNet"
)

# What it is, and patterns of which each must match a name; the first that fits counts. (?m) lines are names.
KNOWN = (
    ("DINOv3 weights (rotary positions)", (r"(^|\.)(storage_tokens|rope_embed\.periods|local_cls_norm\.weight)$",)),
    ("DINOv3 weights (transformers' names)", (r"^(model\.)?layer\.\d+\.layer_scale1\.lambda1$",)),
    ("DINOv3 weights (timm's names)", (r"(^|\.)reg_token$", r"blocks\.\d+\.gamma_1$")),
    ("Swin weights", (r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table$",)),
    ("BEiT weights", (r"relative_position_bias_table$", r"(gamma_1|lambda_1|q_bias)$")),
    ("CaiT weights", (r"(^|\.)blocks_token_only\.",)),
    ("DINOv2 weights with registers", (r"(\.ls1\.gamma|layer_scale1\.lambda1)$", r"(^|[._])(register|reg)_tokens?$")),
    ("DINOv2 weights", (r"(\.ls1\.gamma|layer_scale1\.lambda1)$", r"(^|\.)(cls_token|mask_token)$")),
    (
        "DINOv2 weights in chunks (its training's teacher_checkpoint.pth)",
        (r"(^|\.)blocks\.\d+\.\d+\.attn\.qkv\.weight$",),
    ),
    ("an iBOT network: --prefix=backbone. of `import` reads its backbone", (r"(^|\.)(last_layer2|mlp2)\.",)),
    ("an iBOT student (its masked_embed is for training); use the teacher", (r"(^|\.)masked_embed$",)),
    (
        "an MAE pretraining checkpoint: without decoder_* and mask_token, its encoder could be read",
        (r"(^|\.)(decoder_embed|decoder_blocks|decoder_pred)\.",),
    ),
    ("a distilled DeiT, whose second token has no place here; use a plain DeiT", (r"(^|\.)(dist_token|head_dist\.)",)),
    ("I-JEPA weights, which have no CLS token", (r"(^|\.)predictor_blocks\.",)),
    ("CLIP weights (or SigLIP)", (r"(^|\.)(visual\.|vision_model\.|text_projection|logit_scale)",)),
    ("SAM weights", (r"(^|\.)rel_pos_h$",)),
    ("MoCo weights", (r"(^|\.)(encoder_q|encoder_k|base_encoder|momentum_encoder)\.",)),
    ("SwAV weights", (r"(^|\.)prototypes\.", r"(^|\.)layer1\.0\.conv1\.weight$")),
    ("torchvision's ViT, whose names differ; use timm's of the same", (r"encoder_layer_0\.self_attention\.",)),
    ("a ConvNeXt", (r"(dwconv|conv_dw)\.weight$",)),
    ("a Vision Transformer of big_vision or Flax", (r"(^|/)encoderblock(_0)?/",)),
    ("one shard of an FSDP run: gather the full state dict where it was trained", (r"flat_param",)),
    ("a linear classifier on features, not a backbone", (r"\A(linear\.)?(weight|bias)\n(linear\.)?(weight|bias)\Z",)),
)


def name_of(names: Iterable[str]) -> str:
    """What tensors with these names are, with a way on if there is one; "" if unknown."""
    text = "\n".join(names)
    return next((what for what, signs in KNOWN if all(re.search(sign, text, re.MULTILINE) for sign in signs)), "")
