"""Low-bit students of the embedded set's teacher, with the two contributions on or off.

aqdetr train --config=configs/shapes_w4a4.py:VARIANT --workdir=DIR

VARIANT: "aqdetr" (auxiliary queries and distillation), "lsq" (neither), "auxiliary", "distill".
Bits: --config.quant.policy=w3a3 (or w2a2, w4a4-attn8, w8a8).
"""

from ml_collections import ConfigDict

from configs import shapes_base

VARIANTS = {"lsq": (False, False), "auxiliary": (True, False), "distill": (False, True)}
VARIANTS["aqdetr"] = (True, True)


def get_config(variant: str = "aqdetr") -> ConfigDict:
    """A 4-bit student from the float teacher."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; one of {sorted(VARIANTS)}")
    auxiliary, distill = VARIANTS[variant]
    config = shapes_base.get_config()
    config.name = f"shapes_w4a4_{variant}"
    config.init_from = "packaged:shapes_teacher"
    config.quant = ConfigDict(dict(policy="w4a4", calibration_batches=4))
    config.auxiliary = ConfigDict(dict(weight=1.0, repeats=2, start="object", noise=0.1))
    config.model.num_auxiliary = 50 if auxiliary else 0
    config.distill = ConfigDict(dict(weights=dict(encoder=1.0 if distill else 0.0, kind="kl")))
    config.optimizer.update(lr=3e-4, lr_backbone=1e-4, lr_steps=1e-3, warmup=50, ema=0.99)
    config.train.update(steps=2000, eval_every=500)
    return config
