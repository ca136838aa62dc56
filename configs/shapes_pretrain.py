r"""Dense pretraining of backbone and encoder on the embedded set: stands in for ImageNet.

aqdetr train --config=configs/shapes_pretrain.py --workdir=runs/shapes_pretrain
aqdetr train --config=configs/shapes_pretrain.py:deformable \
    --workdir=runs/shapes_deformable_pretrain

Result: features, no detector. Cost: 20 minutes on two CPU cores, Deformable DETR's 30.
"""

from ml_collections import ConfigDict

from configs import shapes_base


def get_config(family: str = "detr") -> ConfigDict:
    """Learning norms, no decoder."""
    config = shapes_base.get_config(family)
    config.name = "shapes_pretrain" if family == "detr" else f"shapes_{family}_pretrain"
    config.task = "pretrain"
    config.model.backbone.norm = "batch"
    config.optimizer.update(lr=2e-3, lr_backbone=2e-3)
    config.train.update(steps=4000, eval_every=0)
    return config
