"""Bits and the start of step sizes, as a frozen dataclass; it builds the policy table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from aqdetr_jax.quant.policy import RESIDUAL_BITS, Grid, Policy, Rule, stock_policy
from aqdetr_jax.quant.spec import SUPPORTED_BITS


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Bits and how step sizes start.

    Attributes:
      policy: stock policy by name, e.g. "float", "w4a4", "w4a4-attn8".
      rules: rows put before the stock ones (first match wins).
      residual: bits of what the backbone's residual sums add, 0 = float.
      attention_granularity: one attention step per "head" or per "tensor".
      grid: of activations that can be negative: "symmetric", "zero_point", "offset" or "centred".
      renormalize: divide the attention output by the sum of the quantized probabilities.
      align_queries: normalise the queries of the decoder's co-attention (Q-DETR, eq. 9).
      equalize: how much of the channels' unequal spread a centred grid's scales take, 0 to 1.
      calibration_batches: batches of training images that set the step sizes.
      calibration_method: "mse" (least squared error), "lsq" (2 mean|v| / sqrt(Qp)), "percentile" or
        "minmax", see ``calibrate.first_step``.
    """

    policy: str = "float"
    rules: tuple[Rule, ...] = ()
    residual: int = RESIDUAL_BITS
    attention_granularity: Literal["head", "tensor"] = "head"
    grid: Grid = "symmetric"
    renormalize: bool = False
    align_queries: bool = False
    equalize: float = 0.7
    calibration_batches: int = 8
    calibration_method: Literal["mse", "lsq", "percentile", "minmax"] = "mse"

    def __post_init__(self):
        if self.residual not in (0, *SUPPORTED_BITS):
            raise ValueError(
                f"residual must be 0 (float sums) or one of {SUPPORTED_BITS}, got {self.residual}"
            )
        self.build()  # a name or a rule that cannot be used is an error here, not in the model
        if not 0 <= self.equalize <= 1:
            raise ValueError(f"equalize must lie in [0, 1], got {self.equalize}")

    def build(self) -> Policy:
        """The policy table."""
        policy = stock_policy(
            self.policy,
            residual=self.residual,
            attention_granularity=self.attention_granularity,
            grid=self.grid,
            renormalize=self.renormalize,
            # Of a float model there is no query to align.
            align_queries=self.align_queries and self.quantized,
        )
        return dataclasses.replace(policy, rules=self.rules + policy.rules)

    @property
    def quantized(self) -> bool:
        """Whether anything is quantized."""
        return self.policy != "float" or bool(self.rules)


def saved_quant(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model's ``QuantConfig`` as plain values, in today's keys.

    Models saved before there was a ``grid`` have two switches in its place.

    Args:
      facts: as they stand in the file.

    Raises:
      ValueError: both switches are on, which no grid is.
    """
    facts = dict(facts)
    zero_point, center = facts.pop("zero_point", False), facts.pop("center", False)
    if zero_point and center:
        raise ValueError(
            "this model has centred inputs with zero points, which is no grid of this version: "
            "train it again with quant.grid='centred'"
        )
    if zero_point or center:
        facts["grid"] = "centred" if center else "zero_point"
    return facts
