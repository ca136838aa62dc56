"""The sum of a backbone's block: branch and block input, each on a grid of its own."""

from __future__ import annotations

import flax.linen as nn
from jax import Array

from aqdetr_jax.models.layers import FLOAT
from aqdetr_jax.models.quantized import activation_quantizer, module_path
from aqdetr_jax.quant import lsq
from aqdetr_jax.quant.policy import Policy
from aqdetr_jax.quant.record import OpRecord, record
from aqdetr_jax.quant.spec import QuantSpec


def residual_sum(
    module: nn.Module, policy: Policy, branch: Array, identity: Array, *, unsigned: bool
) -> Array:
    """``branch + identity``, in the branch's dtype.

    Both operands have grids, the sum has none: it goes to those of its readers.

    Args:
      module: the block, which owns the grids.
      policy: bits by module path; the sum's is the block's with "/residual".
      branch: [B, H, W, C].
      identity: likewise.
      unsigned: the identity cannot be negative.
    """
    path = f"{module_path(module)}/residual"
    spec_branch = policy.residual_spec(path, unsigned=False)
    spec_identity = policy.residual_spec(path, unsigned=unsigned)
    rule = policy.rule_for(path)
    note = (rule.note if rule else "") or (FLOAT if spec_branch is None else "")
    record(OpRecord(path, "add", activation=spec_branch, other=spec_identity, note=note))
    total = _on_grid(module, policy, "branch", branch, spec_branch)
    total += _on_grid(module, policy, "identity", identity, spec_identity)
    return total.astype(branch.dtype)


def _on_grid(
    module: nn.Module, policy: Policy, name: str, x: Array, spec: QuantSpec | None
) -> Array:
    """``x`` as it is added: float32 on its grid, or as it is."""
    quantizer = activation_quantizer(module, name, x, spec)
    if quantizer is None or policy.arithmetic == "observe":
        return x
    return lsq.fake_quantize(x, quantizer.step, *quantizer.ends, quantizer.gradient_scale)
