"""The figures of the paper and of the official repository, beside which ours are printed.

All in percent, under the names that the protocols give them; `SOURCES` says where each is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dino_jax.inference.model import Model

# (module, width, depth, patch) -> name
NAMES = {
    ("ViT", 384, 12, 16): "S/16",
    ("ViT", 384, 12, 8): "S/8",
    ("ViT", 768, 12, 16): "B/16",
    ("ViT", 768, 12, 8): "B/8",
    ("ResNet", 2048, 0, None): "RN50",
    ("XCiT", 384, 12, 16): "XCiT-S12/16",
    ("XCiT", 384, 12, 8): "XCiT-S12/8",
    ("XCiT", 512, 24, 16): "XCiT-M24/16",
    ("XCiT", 512, 24, 8): "XCiT-M24/8",
}

PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "knn": {
        "top1_k20": {
            "S/16": 74.5,
            "S/8": 78.3,
            "B/16": 76.1,
            "B/8": 77.4,
            "RN50": 67.5,
            "XCiT-S12/16": 76.0,
            "XCiT-S12/8": 77.1,
            "XCiT-M24/16": 76.4,
            "XCiT-M24/8": 77.9,
        }
    },
    "linear": {
        "top1": {
            "S/16": 77.0,
            "S/8": 79.7,
            "B/16": 78.2,
            "B/8": 80.1,
            "RN50": 75.3,
            "XCiT-S12/16": 77.8,
            "XCiT-S12/8": 79.2,
            "XCiT-M24/16": 78.8,
            "XCiT-M24/8": 80.3,
        }
    },
    "lowshot": {"top1_1%": {"S/16": 64.5}, "top1_10%": {"S/16": 72.2}, "top1_100%": {"S/16": 75.7}},
    "finetune": {"top1": {"S/16": 81.5, "B/16": 82.8}},
    "retrieval": {
        "roxford5k_map_medium": {"S/16": 41.8},
        "roxford5k_map_hard": {"S/16": 13.7},
        "rparis6k_map_medium": {"S/16": 63.1},
        "rparis6k_map_hard": {"S/16": 34.4},
    },
    "copydetection": {"map_strong": {"B/16": 81.7, "B/8": 85.5}},
    "vos": {"J&F_mean": {"S/16": 61.8, "S/8": 69.9, "B/16": 62.3, "B/8": 71.4}},
    "voc": {
        "jaccard_60": {"S/16": 45.9, "S/8": 44.7},
        "jaccard_60_random": {"S/16": 22.0, "S/8": 21.8},
        "jaccard_60_supervised": {"S/16": 27.3, "S/8": 23.7},
    },
    "dense": {},
}
# Where the published figures are from, and what they hold for.
SOURCES = {
    "knn": "ImageNet; the official README",
    "linear": "ImageNet; the official README",
    "lowshot": "ImageNet; the paper's appendix",
    "finetune": "ImageNet; the paper, table 6, which has for C10, C100, iNaturalist 18 and 19, Flowers, Cars: "
    "S/16 99.0 90.5 72.0 78.2 98.5 93.0, B/16 99.1 91.7 72.6 78.6 98.8 93.0",
    "retrieval": "ImageNet weights; the paper, table 3: Oxford at 224 on one scale, Paris at 512 on three; "
    "with dino_vits16_gldv2 51.5 and 24.3, 75.3 and 51.6",
    "copydetection": "the paper, table 4: B/16 at 224, B/8 at 320 pixels, whitened and with distractors",
    "vos": "DAVIS 2017 val; the paper, table 5",
    "voc": "VOC12 val; the paper, figure 4",
}


def name_of(model: Model) -> str | None:
    """The paper's name of an architecture such as `S/16`, or None."""
    backbone = model.backbone
    if backbone.registers:
        return None
    return NAMES.get((type(backbone).__name__, backbone.embed_dim, backbone.depth, backbone.patch_size))


def table(protocol: str, figures: Mapping[str, Any], model: Model) -> str:
    """The figures of a protocol in lines of name, value and, where there is one, the published value."""
    name = name_of(model)
    known = {key: row[name] for key, row in PUBLISHED[protocol].items() if name in row}
    lines = [(protocol, "here", f"published ({name})" if known else "")]
    for key, value in figures.items():
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        lines.append((f"  {key}", shown, f"{known[key]:.1f}" if key in known else ""))
    lines += [(f"  {key}", "", f"{value:.1f}") for key, value in known.items() if key not in figures]
    width = max(len(line[0]) for line in lines)
    text = [f"{first:{width}}  {second:>10}  {third}".rstrip() for first, second, third in lines]
    return "\n".join(text + ([f"  published: {SOURCES[protocol]}"] if known else []))
