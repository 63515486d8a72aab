"""Reads the ground-truth pickles of revisited Oxford and Paris (`gnd_*.pkl`) without running code from them.

Only containers, numbers, strings and numeric NumPy arrays are allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from dino_jax.data.storage import cause, open_file
from dino_jax.errors import UserError
from dino_jax.weights.unpickle import ARRAYS, NUMERIC, STATES, RefusedError, Unpickler, plain

MAX_BYTES = 64 << 20
KEYS = ("imlist", "qimlist", "gnd")
LISTS = ("easy", "hard", "junk")  # of each query: row numbers in imlist
ALLOWED = {**NUMERIC, **ARRAYS}


def read_gnd(path: epath.PathLike) -> dict[str, Any]:
    """`{"imlist": names, "qimlist": names, "gnd": [{"easy", "hard", "junk": int arrays, ...} per query]}`.

    Raises:
      UserError: the file is missing, damaged or hostile, or lacks one of these.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file: download it from the revisited Oxford and Paris page")
    try:
        with open_file(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {cause(error)}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES} bytes is too large for a ground-truth file")
    try:
        content = plain(Unpickler(data, ALLOWED, STATES, encoding="latin1").load())
    except RefusedError as refused:
        raise UserError(f"{path}: uses {refused}, which is not allowed: it may be hostile; nothing was run") from None
    except Exception as error:  # damaged or hostile pickles raise anything
        raise UserError(f"{path}: not a ground-truth file ({type(error).__name__}: {error})") from None
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path}: has no {missing[0]!r}: not a revisited Oxford or Paris file")
    for key in ("imlist", "qimlist"):
        content[key] = _names(content[key], f"{path}: {key}")
    truth = content["gnd"]
    if not isinstance(truth, list | tuple) or not all(isinstance(entry, dict) for entry in truth):
        raise UserError(f"{path}: gnd is not a list with an entry for each query")
    if len(truth) != len(content["qimlist"]):
        raise UserError(f"{path}: {len(content['qimlist'])} queries but ground truth for {len(truth)}")
    for number, entry in enumerate(truth):
        if not entry.keys() >= set(LISTS):
            raise UserError(f"{path}: a query lacks easy, hard or junk: take the *revisited* annotations")
        for key in LISTS:
            entry[key] = _rows(entry[key], len(content["imlist"]), f"{path}: query {number}, {key}")
    return content


def _names(names: Any, where: str) -> list[str]:
    """Names of images, which become names of files in one folder."""
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where} is not a list of names")
    if odd := [name for name in names if set(name) & set("/\\\0")]:
        raise UserError(f"{where}: {odd[0]!r} is not the name of an image")
    return list(names)


def _rows(rows: Any, count: int, where: str) -> np.ndarray:
    """Row numbers of images, int64 [n], 0 <= row < count."""
    try:
        numbers = np.asarray(rows)
    except ValueError as error:  # lists of unequal lengths
        raise UserError(f"{where}: not a list of numbers") from error
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
        raise UserError(f"{where}: not a list of numbers")
    if (numbers != np.floor(numbers)).any():
        raise UserError(f"{where}: {numbers[numbers != np.floor(numbers)][0]} is not the number of an image")
    if (numbers < 0).any() or (numbers >= count).any():
        raise UserError(f"{where}: refers to images beyond the {count} in imlist")
    return numbers.astype(np.int64)
