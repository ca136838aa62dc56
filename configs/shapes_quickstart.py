"""The quickstart's student: 4-bit AQ-DETR on the embedded set, short enough for two CPU cores.

aqdetr quickstart                 (the AQ-DETR student, from the packaged teacher)
aqdetr quickstart --baseline      (plain LSQ for as many steps beside it)
aqdetr quickstart --model deformable

Result (seed 0, 1200 validation images): teacher AP 0.490, calibrated 0.381, student 0.457 (93.2 %
of the teacher); Deformable DETR 0.561, 0.533 and 0.554 (98.7 %). Other variants and
seeds: docs/results.md. Cost: about 10 minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import shapes_w4a4


def get_config(variant: str = "aqdetr") -> ConfigDict:
    """``variant``: as in ``shapes_w4a4``; "baseline" is plain LSQ."""
    config = shapes_w4a4.get_config(variant.replace("baseline", "lsq"))
    config.name = f"shapes_quickstart_{variant.replace('-', '_')}"
    # As long as DETR's: a step of Deformable DETR takes 1.3 times as long.
    steps = 900 if config.model.get("family") == "deformable" else 1200
    # A look at the quantizers is a program of its own, whose compilation takes a dozen seconds.
    config.train.update(steps=steps, eval_every=0, quantizers_every=0)
    config.optimizer.update(warmup=40, ema=0.99)
    return config
