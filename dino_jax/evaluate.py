"""`dino-jax eval`: a protocol, or all that the data allow, on a checkpoint; a table, and JSON where asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

from etils import epath

from dino_jax import config_io
from dino_jax.errors import UserError
from dino_jax.eval import everything, protocol
from dino_jax.eval.features import Frozen
from dino_jax.features import load

log = logging.getLogger(__name__)


def evaluate(
    name: str,
    checkpoint: str,
    data: str,
    *,
    overrides: Iterable[str] = (),
    heads: int | None = None,
    workdir: str | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """The figures of protocol `name`, or of `all`: then each key is `PROTOCOL/FIGURE`. Prints them as a table.

    Args:
      overrides: `--config.KEY=VALUE` for the protocol's own keys; the model's always come from the checkpoint.
      heads: attention heads, where `checkpoint` is a weight file that does not tell.
      workdir: features, heads, pictures and resumable state go there.
      out: the figures as JSON.
    """
    overrides = list(overrides)
    if name != "all":
        module = protocol(name)
        config = config_io.override(module.default_config(), overrides)
    elif overrides:
        raise UserError(f"{overrides[0]}: `eval all` runs every protocol with its defaults; name one to change them")
    loaded = load(checkpoint, heads=heads)
    model = Frozen(loaded.backbone, loaded.variables, loaded.config.data.mean, loaded.config.data.std)
    figures: dict[str, Any] = {}
    if name == "all":
        for part, found in everything.evaluate(model, data, workdir):
            figures |= {f"{part}/{key}": value for key, value in found.items()}
            log.info("%s done", part)
    else:
        figures = module.evaluate(model, data, config, workdir)
    print(table(figures))
    if out is not None:
        _write(out, figures)
    return figures


def table(figures: dict[str, Any]) -> str:
    """A line a figure."""
    width = max(map(len, figures), default=0)
    return "\n".join(
        f"{key:{width}}  {value:10.2f}" if isinstance(value, float) else f"{key:{width}}  {value!s:>10}"
        for key, value in figures.items()
    )


def _write(out: str, figures: dict[str, Any]) -> None:
    try:
        path = epath.Path(out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2, default=float) + "\n")
    except OSError as error:
        raise UserError(f"--out={out}: cannot write: {error.strerror or error}") from error
