"""Reads the ground-truth pickles of revisited Oxford and Paris (`gnd_*.pkl`) without running code from them.

Only containers, numbers, strings and numeric NumPy arrays are allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from dino_jax.errors import UserError
from dino_jax.weights.unpickle import ARRAYS, NUMERIC, STATES, RefusedError, Unpickler, plain

MAX_BYTES = 64 << 20
KEYS = ("imlist", "qimlist", "gnd")
ALLOWED = {**NUMERIC, **ARRAYS}


def read_gnd(path: epath.PathLike) -> dict[str, Any]:
    """`{"imlist": names, "qimlist": names, "gnd": [{"easy", "hard", "junk": int arrays, ...} per query]}`.

    Raises:
      UserError: the file is missing, damaged or hostile, or lacks one of these.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file: download it from the revisited Oxford and Paris page")
    data = path.read_bytes()
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: {len(data)} bytes is too large for a ground-truth file")
    try:
        content = plain(Unpickler(data, ALLOWED, STATES, encoding="latin1").load())
    except RefusedError as refused:
        raise UserError(f"{path}: uses {refused}, which is not allowed: it may be hostile; nothing was run") from None
    except Exception as error:  # damaged or hostile pickles raise anything
        raise UserError(f"{path}: not a ground-truth file ({type(error).__name__}: {error})") from None
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}: not a revisited Oxford or Paris file")
    if len(content["gnd"]) != len(content["qimlist"]):
        raise UserError(f"{path}: {len(content['qimlist'])} queries but ground truth for {len(content['gnd'])}")
    for entry in content["gnd"]:
        if not {"easy", "hard", "junk"} <= set(entry):
            raise UserError(f"{path}: a query lacks easy, hard or junk: take the *revisited* annotations")
        entry.update({key: np.asarray(entry[key], np.int64) for key in ("easy", "hard", "junk")})
        if any((rows < 0).any() or (rows >= len(content["imlist"])).any() for rows in _rows(entry)):
            raise UserError(f"{path}: a query refers to images beyond the {len(content['imlist'])} in imlist")
    return content


def _rows(entry: dict[str, Any]) -> list[np.ndarray]:
    return [entry[key] for key in ("easy", "hard", "junk")]
