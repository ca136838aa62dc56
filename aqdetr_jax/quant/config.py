"""Bits and the start of step sizes, as a frozen dataclass; it builds the policy table."""

from __future__ import annotations

import dataclasses
from typing import Literal

from aqdetr_jax.quant.policy import RESIDUAL_BITS, Policy, Rule, stock_policy
from aqdetr_jax.quant.spec import SUPPORTED_BITS


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """Bits and how step sizes start.

    Attributes:
      policy: stock policy by name, e.g. "float", "w4a4", "w4a4-attn8".
      rules: rows put before the stock ones (first match wins).
      residual: bits of what the backbone's residual sums add, 0 = float.
      attention_granularity: one attention step per "head" or per "tensor".
      zero_point: asymmetric activation grids.
      renormalize: divide the attention output by the sum of the quantized probabilities.
      center: dense inputs are shifted and scaled per channel before their grid (see ``Policy``).
      equalize: how much of the channels' unequal spread the scales take, 0 to 1.
      calibration_batches: batches of training images that set the step sizes.
      calibration_method: "mse" (least squared error), "lsq" (2 mean|v| / sqrt(Qp)) or "percentile".
    """

    policy: str = "float"
    rules: tuple[Rule, ...] = ()
    residual: int = RESIDUAL_BITS
    attention_granularity: Literal["head", "tensor"] = "head"
    zero_point: bool = False
    renormalize: bool = False
    center: bool = False
    equalize: float = 0.7
    calibration_batches: int = 8
    calibration_method: Literal["mse", "lsq", "percentile"] = "mse"

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
            zero_point=self.zero_point,
            renormalize=self.renormalize,
            center=self.center,
        )
        return dataclasses.replace(policy, rules=self.rules + policy.rules)

    @property
    def quantized(self) -> bool:
        """Whether anything is quantized."""
        return self.policy != "float" or bool(self.rules)
