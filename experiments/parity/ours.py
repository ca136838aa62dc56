"""What our model computes from another implementation's parameters, and how far it is from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from aqdetr_jax.interop import names
from aqdetr_jax.losses.auxiliary import AuxiliaryLossConfig, aqdetr_detection_loss
from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.proposals import proposal_loss
from aqdetr_jax.losses.targets import Predictions, Targets
from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.detector import build_detector
from experiments.parity.cases import direction
from experiments.parity.store import Groups

WEIGHTS = {"detr": LossWeights(), "deformable": LossWeights(cls=2.0, kind="focal")}
"""The official ones."""


def compute(
    config: DetrConfig, given: dict[str, np.ndarray], theirs: Groups, rows: Sequence[names.Row]
) -> Groups:
    """Outputs, losses and gradients of our float model, named as theirs are.

    Args:
      config: sizes.
      given: the batch.
      theirs: the parameters under "state", and the names of the gradients under "gradient".
      rows: the table of their names.
    """
    module = build_detector(config)
    params, stats = names.translate(theirs["state"], rows)
    statistics = traverse_util.unflatten_dict(stats, sep="/")
    targets = Targets(given["boxes"], given["labels"], given["valid"])
    weights = WEIGHTS[config.family]

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        seen: dict[str, Any] = {}
        with nn.intercept_methods(functools.partial(_watch, seen)):
            output = module.apply(
                {"params": params, "batch_stats": statistics}, given["images"], given["mask"]
            )
        found = Predictions(output.logits, output.boxes)
        total, terms, _ = aqdetr_detection_loss(
            found, None, targets, weights, AuxiliaryLossConfig()
        )
        if output.proposal_logits is not None:
            found = Predictions(output.proposal_logits, output.proposal_boxes)
            more, proposed, _ = proposal_loss(found, targets, weights)
            total, terms = total + more, terms | proposed
        return total, (_stages(seen, output), terms)

    (total, (stages, terms)), gradients = jax.jit(loss)(
        traverse_util.unflatten_dict(params, sep="/")
    )
    flat = {
        path: np.asarray(x, np.float64)
        for path, x in traverse_util.flatten_dict(gradients, sep="/").items()
        # Frozen batch norms: constants, not parameters.
        if not (path.startswith("backbone/") and path.endswith(("/scale", "/bias")))
    }
    written = names.untranslate(flat, {}, rows, theirs["gradient"])
    return {
        "output": {k: np.asarray(v) for k, v in stages.items()},
        "loss": {k: np.asarray(v) for k, v in {**terms, "total": total}.items()},
        "gradient": {
            key: np.array([np.linalg.norm(x), np.sum(direction(key, x.shape) * x)])
            for key, x in written.items()
        },
    }


def _watch(seen: dict[str, Any], call, args, kwargs, context) -> Any:
    """Keeps what a module is given and what it returns."""
    result = call(*args, **kwargs)
    if context.method_name == "__call__":
        seen["/".join(context.module.path)] = (args, result)
    return result


def _stages(seen: dict[str, Any], output: Any) -> dict[str, jax.Array]:
    """Every stage; what stands at padded tokens is zeroed: nothing depends on it."""
    valid = output.memory_valid
    stages = {
        "valid": valid,
        "position": jnp.where(valid[..., None], seen["encoder"][0][1], 0),
        "decoded": output.decoder_features,
        "logits": output.logits,
        "boxes": output.boxes,
    }
    for i, x in enumerate(seen["backbone"][1]):
        stages[f"backbone_{i + 1}"] = x
    last = len(output.encoder_attention) - 1
    for i, maps in enumerate(output.encoder_attention):
        x = output.memory if i == last else seen[f"encoder/layer_{i}"][1][0]
        stages[f"encoder_{i}"] = jnp.where(valid[..., None], x, 0)
        stages[f"encoder_weights_{i}"] = jnp.where(valid[:, None, :, None], maps.probabilities, 0)
    for i, maps in enumerate(output.decoder_cross_attention):
        stages[f"decoder_{i}"] = seen[f"decoder/layer_{i}"][1][0]
        stages[f"cross_weights_{i}"] = maps.probabilities
        stages[f"self_weights_{i}"] = output.decoder_self_attention[i].probabilities
    if output.proposal_logits is not None:
        stages["proposal_logits"] = output.proposal_logits[0]
        stages["proposal_boxes"] = output.proposal_boxes[0]
    return stages


def differences(ours: Groups, theirs: Groups) -> dict[str, float]:
    """The greatest difference of every stage: absolute; of losses and gradients relative.

    The norm of a gradient is measured against itself and a thousandth of the norm of all of them
    (a bias before a norm or under a softmax has no gradient but rounding), its product with the
    random direction against four times as much.

    Raises:
      ValueError: a stage that is on one side only.
    """
    found = {}
    for group in ("output", "loss", "gradient"):
        if ours[group].keys() != theirs[group].keys():
            unlike = ours[group].keys() ^ theirs[group].keys()
            raise ValueError(f"{group}: {sorted(unlike)} on one side only")
    for key, want in theirs["output"].items():
        own = ours["output"][key]
        if own.shape != want.shape:
            raise ValueError(f"{key} is {own.shape} here and {want.shape} there")
        found[key] = float(np.max(np.abs(own.astype(np.float64) - want)))
    for key, want in theirs["loss"].items():
        found[f"loss/{key}"] = float(abs(ours["loss"][key] - want) / abs(want))
    everything = np.sqrt(sum(norm**2 for norm, _ in theirs["gradient"].values()))
    found["gradients"] = max(
        float(np.max(np.abs(ours["gradient"][key] - want) / (1, 4)) / (want[0] + everything / 1e3))
        for key, want in theirs["gradient"].items()
    )
    return found
