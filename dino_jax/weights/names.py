"""The released models by name, and their files: downloaded once; interrupted downloads resume."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from typing import NamedTuple

from etils import epath

from dino_jax.data.storage import absolute, ensure_writable
from dino_jax.errors import UserError, did_you_mean
from dino_jax.progress import Progress

BASE = "https://dl.fbaipublicfiles.com/dino/"
CACHE = "DINO_JAX_CACHE"  # environment variable: where downloads are kept


class Pretrained(NamedTuple):
    """A released file: its path below `BASE`, and published ImageNet k-NN and linear accuracy (percent)."""

    file: str
    knn: float | None = None
    linear: float | None = None
    head: str | None = None  # its linear classifier, for `eval linear`


def _both(name: str, stem: str, knn: float, linear: float) -> dict[str, Pretrained]:
    """`<name>`: the teacher's backbone; `<name>_full`: student, teacher, heads, optimizer, objective state."""
    path, head = f"{stem}_pretrain/{stem}_pretrain", f"{stem}_pretrain/{stem}_linearweights.pth"
    return {
        name: Pretrained(f"{path}.pth", knn, linear, head),
        f"{name}_full": Pretrained(f"{path}_full_checkpoint.pth", knn, linear, head),
    }


PRETRAINED = {
    **_both("dino_vits16", "dino_deitsmall16", 74.5, 77.0),
    **_both("dino_vits8", "dino_deitsmall8", 78.3, 79.7),
    **_both("dino_vitb16", "dino_vitbase16", 76.1, 78.2),
    **_both("dino_vitb8", "dino_vitbase8", 77.4, 80.1),
    **_both("dino_resnet50", "dino_resnet50", 67.5, 75.3),
    **_both("dino_xcit_small_12_p16", "dino_xcit_small_12_p16", 76.0, 77.8),
    **_both("dino_xcit_small_12_p8", "dino_xcit_small_12_p8", 77.1, 79.2),
    **_both("dino_xcit_medium_24_p16", "dino_xcit_medium_24_p16", 76.4, 78.8),
    **_both("dino_xcit_medium_24_p8", "dino_xcit_medium_24_p8", 77.9, 80.3),
    "dino_vits16_gldv2": Pretrained(
        "dino_vitsmall16_googlelandmark_pretrain/dino_vitsmall16_googlelandmark_pretrain.pth"
    ),
}


def known(name: str = "") -> str:
    """The released names for the end of an error message, with the one closest to `name`."""
    names = ", ".join(key for key in PRETRAINED if not key.endswith("_full"))
    return f"names are {names} (or with _full){did_you_mean(name, PRETRAINED)}"


def cache_folder() -> epath.Path:
    """Where downloads are kept: `$DINO_JAX_CACHE`, or `~/.cache/dino-jax`."""
    return absolute(os.environ.get(CACHE) or "~/.cache/dino-jax")


def fetch(name: str, head: bool = False) -> epath.Path:
    """The local file of a released model, or of the linear `head` on it, downloaded if it is not in the cache.

    Raises:
      UserError: unknown name, no connection, or an interrupted download (kept, and resumed next time).
    """
    if name not in PRETRAINED:
        raise UserError(f"{name}: not a released model; {known(name)}")
    file = PRETRAINED[name].head if head else PRETRAINED[name].file
    if file is None:
        raise UserError(f"{name}: no linear head was released for it")
    target = cache_folder() / file.rpartition("/")[2]
    if not target.exists():
        ensure_writable(target.parent, f"{target.parent} ($DINO_JAX_CACHE, the folder of downloads)")
        download(BASE + file, target)
    return target


def download(address: str, target: epath.Path) -> None:
    """Downloads to `target`, which appears only when complete.

    Data goes to `<target>.part` first, which is kept after a failure (unlike `storage.new_file`) so downloads resume.

    Raises:
      UserError: the download failed or the server sent a web page.
    """
    partial = target.parent / f"{target.name}.part"
    have = partial.stat().length if partial.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    fix = f"try again (it resumes), or download it elsewhere and give it with --from: {address}"
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise UserError(f"{target.name}: the server sent a web page; {fix}")
            have = have if answer.status == 206 else 0  # 200: the server sends the whole file again
            total = have + int(answer.headers["Content-Length"])
            with (
                partial.open("ab" if have else "wb") as file,
                Progress(total, have, target.name, unit="B") as bar,
            ):
                while block := answer.read(1 << 20):
                    file.write(block)
                    have += len(block)
                    bar.update(have)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise UserError(f"{target.name}: the server answered {error.code} {error.reason}; {fix}") from None
        partial.unlink()  # the partial file is larger than the whole: not this file
        raise UserError(f"{target.name}: the partial download did not fit and was removed; {fix}") from None
    except (OSError, TypeError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{target.name}: the download failed ({error}); {fix}") from None
    if (got := partial.stat().length) != total:
        raise UserError(f"{target.name}: the download was interrupted after {got} of {total} bytes; {fix}")
    partial.replace(target)
