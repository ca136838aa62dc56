"""Which operation gets which bits: an ordered table of rules, first match wins.

A rule names operations by a regular expression on their module path (the path under which their
parameters lie, e.g. ``encoder/layer_0/self_attention/q_proj``) and gives the bits of weight,
activation and attention operands. ``None`` keeps an operand float.

Stock policies by name: ``float``, ``w8a8``, ``w4a4``, ``w3a3``, ``w2a2`` (attention at the same
bits: "4-4-4") and ``w4a4-attn8`` etc. (Q-DETR's "4-4-8" setting). All of them keep the first
convolution and the input projection at 8 bits, as LSQ does for first and last layers, the residual
sums of the backbone at 8 bits, and the class and box heads float; these are rows of the table, not
code.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Literal

from aqdetr_jax.quant.product import Arithmetic
from aqdetr_jax.quant.spec import SUPPORTED_BITS, QuantSpec

Grid = Literal["symmetric", "zero_point", "offset", "centred"]
"""How activations that can be negative lie on their grid; what cannot is on an unsigned one.

* "symmetric": 0 in the middle of the codes [L];
* "zero_point": 0 on a code that calibration finds, Q-DETR's asymmetric grid as integers carry it;
* "offset": LSQ+, the same with a number of steps that is learned (Q-DETR, eq. 1-2);
* "centred": the inputs of dense layers are shifted and scaled channel by channel before a symmetric
  grid; shift and scale fold into bias and weights [ours].
"""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
      pattern: regular expression, searched (not anchored) in the module path.
      weight: bits of weights, None = float.
      activation: bits of the input of a dense or convolution layer, or (``BLOCK/residual``) of both
        operands of a residual sum, None = float.
      attention: bits of q, k, probabilities and v in the attention products, None = float.
      note: why the row is there; shown in the bit report.
    """

    pattern: str
    weight: int | None
    activation: int | None
    attention: int | None
    note: str = ""

    def __post_init__(self):
        check_pattern(self.pattern)
        for bits in (self.weight, self.activation, self.attention):
            if bits is not None and bits not in SUPPORTED_BITS:
                raise ValueError(
                    f"rule {self.pattern!r}: bits must be None or one of {SUPPORTED_BITS}, "
                    f"got {bits!r}"
                )


def check_pattern(pattern: str) -> None:
    """Raises ``ValueError`` for a regular expression that cannot be compiled."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class Policy:
    """An ordered rule table and the options that hold for all its rows.

    Attributes:
      name: shown in reports.
      rules: first match wins; an operation that no rule matches stays float.
      arithmetic: "fake" to train, "integer" for int32 sums, "observe" for calibration.
      attention_granularity: "head" (one step per head for q, k, probabilities, v: each head is its
        own product, so it costs nothing) or "tensor".
      grid: of activations that can be negative, see ``Grid``.
      renormalize: divide the attention output by the sum of the quantized probabilities.
      align_queries: normalise the queries of the decoder's co-attention, with a learned scale and
        bias (Q-DETR's distribution alignment, eq. 9).
    """

    name: str = "float"
    rules: tuple[Rule, ...] = ()
    arithmetic: Arithmetic = "fake"
    attention_granularity: Literal["head", "tensor"] = "head"
    grid: Grid = "symmetric"
    renormalize: bool = False
    align_queries: bool = False

    @property
    def center(self) -> bool:
        """Whether dense inputs that can be negative are centred."""
        return self.grid == "centred"

    def rule_for(self, path: str) -> Rule | None:
        """The first rule whose pattern is found in ``path``, or None."""
        for rule in self.rules:
            if re.search(rule.pattern, path):
                return rule
        return None

    def only(self, patterns: Sequence[str]) -> Policy:
        """This policy for the operations that a pattern is found in; all others are float.

        Args:
          patterns: regular expressions.
        """
        found = "|".join(f"(?:{pattern})" for pattern in patterns)
        others = Rule(f"^(?!.*(?:{found}))", None, None, None, "float in this phase")
        return dataclasses.replace(self, rules=(others, *self.rules))

    def weight_spec(self, path: str) -> QuantSpec | None:
        """Weights: signed, one step per output channel."""
        rule = self.rule_for(path)
        if rule is None or rule.weight is None:
            return None
        return QuantSpec(rule.weight, signed=True, granularity="channel")

    def activation_spec(self, path: str, *, unsigned: bool) -> QuantSpec | None:
        """Inputs of dense and convolution layers: one step per tensor."""
        rule = self.rule_for(path)
        if rule is None or rule.activation is None:
            return None
        return self._activation(rule.activation, unsigned, "tensor")

    def attention_spec(self, path: str, *, unsigned: bool) -> QuantSpec | None:
        """Operands of the attention products (unsigned for the probabilities)."""
        rule = self.rule_for(path)
        if rule is None or rule.attention is None:
            return None
        return self._activation(rule.attention, unsigned, self.attention_granularity)

    def residual_spec(self, path: str, *, unsigned: bool) -> QuantSpec | None:
        """What a residual sum adds: one step per tensor, symmetric whatever ``grid`` says.

        Both operands are spread about zero or bounded by it, and have bits to spare.
        """
        rule = self.rule_for(path)
        if rule is None or rule.activation is None:
            return None
        return QuantSpec(rule.activation, signed=not unsigned)

    def _activation(self, bits: int, unsigned: bool, granularity) -> QuantSpec:
        if unsigned:
            return QuantSpec(bits, signed=False, granularity=granularity)
        if self.grid == "zero_point":
            return QuantSpec(bits, signed=False, granularity=granularity, zero_point=True)
        moved = self.grid == "offset"
        return QuantSpec(bits, signed=True, granularity=granularity, offset=moved)


FLOAT_HEADS = Rule(r"(class_head|box_head)", None, None, None, "output heads stay float")
COORDINATES = Rule(r"(^|/)reference_points$", None, None, None, "coordinates stay float")
FIRST_LAYERS = Rule(r"(backbone/stem|input_proj)", 8, 8, None, "first layers at 8 bits")
RESIDUAL_BITS = 8


def residual_rule(bits: int) -> Rule:
    """The row of the residual sums.

    Args:
      bits: of both operands; 0 = float.
    """
    note = f"residual sums at {bits} bits" if bits else "residual sums stay float"
    return Rule(r"(^|/)residual$", None, bits or None, None, note)


def uniform(
    weight: int, activation: int, attention: int, residual: int = RESIDUAL_BITS, **options
) -> Policy:
    """A stock policy: the four exceptions above, then the same bits everywhere.

    Args:
      weight: bits of weights.
      activation: bits of activations.
      attention: bits of q, k, probabilities and v.
      residual: bits of what the residual sums of the backbone add; 0 = float.
      **options: other fields of ``Policy``.
    """
    name = f"w{weight}a{activation}" + (f"-attn{attention}" if attention != activation else "")
    rest = Rule(r".*", weight, activation, attention)
    first = (FLOAT_HEADS, COORDINATES, FIRST_LAYERS, residual_rule(residual))
    return Policy(name, (*first, rest), **options)


def stock_policy(name: str, residual: int = RESIDUAL_BITS, **options) -> Policy:
    """A policy by name: ``float``, ``wNaM`` or ``wNaM-attnK``.

    Args:
      name: e.g. "w4a4", "w2a2", "w4a4-attn8".
      residual: bits of the residual sums, see ``uniform``; "float" has none.
      **options: other fields of ``Policy`` (``attention_granularity``, ``renormalize``, ...).

    Raises:
      ValueError: the name is not of that form; the message gives the nearest stock name.
    """
    if name == "float":
        return Policy(**options)
    match = re.fullmatch(r"w([2-8])a([2-8])(?:-attn([2-8]))?", name)
    if not match:
        known = ["float", "w8a8", "w4a4", "w3a3", "w2a2", "w4a4-attn8", "w3a3-attn8", "w2a2-attn8"]
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise ValueError(
            f"unknown quantization policy {name!r}; did you mean {near!r}? "
            f"Policies are 'float', 'wNaM' or 'wNaM-attnK' with 2 to 8 bits."
        )
    weight, activation = int(match[1]), int(match[2])
    return uniform(weight, activation, int(match[3] or activation), residual, **options)
