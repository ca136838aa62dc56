"""Lets every operation of a model say what it is while the model is traced.

The bit report must list *each* operation with its bits, kept-float ones included, and must not be a
second description of the model that could drift from it. So the layers call ``record`` as they run,
and ``recording`` collects the rows of one (abstract) forward pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

from aqdetr_jax.quant.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class OpRecord:
    """One operation of one forward pass.

    Attributes:
      path: module path.
      kind: "conv", "dense", "scores", "mix", "softmax", "norm", "add", "embedding", ...
      weight: grid of the weight; None = float or no weight.
      activation: grid of the input (dense, conv) or of the left operand (q, probabilities, the
        branch of a residual sum).
      other: grid of the right operand of an attention product (k, v) or a residual sum (what the
        branch is added to).
      parameters: number of weights and biases.
      kernel_size: of those, the number of kernel weights (the rest stay float).
      channels: output channels of the kernel.
      centred: input channels with a shift and a scale of their own (0 = none).
      heads: attention heads, each of which has its own step on a grid of one step a head.
      folds: a norm that is part of the layer before it once deployed.
      macs: multiply-adds for the traced batch (0 for elementwise operations).
      note: the rule's note, or why the operation is float.
    """

    path: str
    kind: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    other: QuantSpec | None = None
    parameters: int = 0
    kernel_size: int = 0
    channels: int = 0
    centred: int = 0
    heads: int = 1
    folds: bool = False
    macs: int = 0
    note: str = ""


_rows: contextvars.ContextVar[list[OpRecord] | None] = contextvars.ContextVar("rows", default=None)
_prefix: contextvars.ContextVar[str] = contextvars.ContextVar("prefix", default="")

FLOAT_PATH = "float_path"
"""First part of the paths of what the distillation from a float path computes, once and without a
gradient; see ``models.attention.float_maps``."""


def record(row: OpRecord) -> None:
    """Adds a row if a recording is active; otherwise does nothing."""
    rows = _rows.get()
    if rows is not None:
        rows.append(dataclasses.replace(row, path=_prefix.get() + row.path))


@contextlib.contextmanager
def recorded_under(path: str) -> Iterator[None]:
    """The rows of the body have paths under ``path``."""
    token = _prefix.set(f"{path}/")
    try:
        yield
    finally:
        _prefix.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[OpRecord]]:
    """Collects the rows of all operations traced in the body, in order."""
    rows: list[OpRecord] = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)
