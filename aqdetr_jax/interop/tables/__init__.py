"""Tables of names, one module a source; ``interop.names`` reads them both ways."""

from __future__ import annotations

from aqdetr_jax.interop.names import Row
from aqdetr_jax.interop.tables import efficientnet_lite, huggingface, original, resnet

TABLES: dict[str, tuple[Row, ...]] = {
    "huggingface_detr": huggingface.DETR,
    "huggingface_deformable": huggingface.DEFORMABLE,
    "huggingface_deformable_shared": huggingface.DEFORMABLE_SHARED,
    "detr": original.DETR,
    "deformable_detr": original.DEFORMABLE,
    "deformable_detr_shared": original.DEFORMABLE_SHARED,
    "torchvision_resnet": resnet.TORCHVISION,
    "timm_resnet": resnet.TIMM,
    "timm_efficientnet_lite": efficientnet_lite.TIMM,
    "efficientnet_lite_pytorch": efficientnet_lite.PYTORCH,
}
"""By source; "shared" is a Deformable DETR without box refinement (one head for all layers)."""
