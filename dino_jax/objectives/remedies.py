"""What to try when a run learns nothing or diverges: settings, each only where the configuration has another value."""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

MOST = 4  # remedies in one line

Remedy = tuple[bool, str]  # whether it is not in place already, and the setting


def common(config: ConfigDict) -> dict[str, Remedy]:
    """Remedies that concern no single term: `lr`, `clip`, `freeze`, `gain`, `float32`, `batch`, `teacher`."""
    optim, teacher, head = config.optim, config.teacher, config.head
    return {
        "lr": (True, f"half the learning rate: optim.lr={optim.lr / 2:g}"),
        "clip": (not 0 < optim.clip_grad <= 0.3, f"optim.clip_grad=0.3 (now {optim.clip_grad:g})"),
        "freeze": (True, f"optim.freeze_last_layer={optim.freeze_last_layer + 2} (now {optim.freeze_last_layer})"),
        "gain": (not head.norm_last_layer, "head.norm_last_layer=True"),
        "float32": (config.model.dtype != "float32", f"model.dtype=float32 (now {config.model.dtype})"),
        "batch": (
            config.batch_size < 1024,
            f"a larger batch_size (now {config.batch_size}; run.accum_steps makes room)",
        ),
        "teacher": (
            config.batch_size <= 256 and teacher.momentum < 0.9995,
            f"a slower teacher: teacher.momentum=0.9995 (now {teacher.momentum:g})",
        ),
    }


def advice(remedies: Iterable[Remedy]) -> str:
    """One sentence with the first few remedies that are not in place already."""
    return "Try " + "; ".join([text for wanted, text in remedies if wanted][:MOST])
