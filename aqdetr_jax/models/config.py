"""The sizes of a detection transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from aqdetr_jax.models.backbone import AnyBackboneConfig
from aqdetr_jax.models.resnet import BackboneConfig
from aqdetr_jax.ops.deformable import Sampling


@dataclasses.dataclass(frozen=True)
class DeformableConfig:
    """What Deformable DETR has and DETR has not; defaults are its official ones.

    Attributes:
      levels: L feature levels; those beyond ``stages`` are strided convolutions of the last one.
      stages: backbone stages used at most, the last ones (3: strides 8, 16, 32 of a ResNet).
      points: K, samples of a head on each level.
      box_refine: every decoder layer refines the boxes of the one before it, with its own heads.
      two_stage: the encoder's best proposals are the decoder's queries (needs ``box_refine``).
      sampling: how values are sampled, see ``ops.deformable``.
      norm_groups: groups of the group norms after the input projections.
    """

    levels: int = 4
    stages: int = 3
    points: int = 4
    box_refine: bool = False
    two_stage: bool = False
    sampling: Sampling = "auto"
    norm_groups: int = 32

    def __post_init__(self):
        if self.two_stage and not self.box_refine:
            raise ValueError("two_stage=True needs box_refine=True: its queries are boxes")
        if min(self.levels, self.stages, self.points, self.norm_groups) < 1:
            raise ValueError("levels, stages, points and norm_groups must be at least 1")


@dataclasses.dataclass(frozen=True)
class DetrConfig:
    """A detection transformer by its sizes; defaults are DETR-R50 on COCO.

    Attributes:
      backbone: sizes of a ResNet or, with ``kind="efficientnet_lite"``, of an EfficientNet-Lite.
      num_classes: C, real classes; DETR's class head has C + 1 outputs (91 + 1 for COCO),
        Deformable DETR's C.
      num_queries: N object queries (0 in a configuration: follows from the data).
      num_auxiliary: M auxiliary queries, used in training only (0 = none; -1 in a configuration:
        follows from the data).
      auxiliary_groups: G sets of M/G auxiliary queries, apart from each other in self-attention.
      dim: model width d.
      heads: attention heads.
      encoder_layers: number of encoder layers.
      decoder_layers: number of decoder layers.
      ffn: hidden width of the feed-forward networks.
      query_start: "normal" as in DETR, or "points": the encodings of points spread over the image,
        a start with a place for every query that helps short trainings from scratch.
      dropout: rate everywhere DETR has dropout.
      pre_norm: norm before each sub-layer instead of after it (the original's option).
      remat: what the backward pass computes again to save memory: whole transformer layers (True),
        of a "deformable" model the sampled values alone ("samples"), or nothing (False). Unless it
        is False, deformable attention samples head by head.
      dtype: carrier dtype of products and of what lies between the layers, "float32" or
        "bfloat16"; sums and norms are computed in float32. "auto" in a configuration: follows from
        the platform, see ``training.sizing``.
      pixel_mean: RGB mean of images in [0, 1].
      pixel_std: RGB standard deviation.
      family: "detr" or "deformable".
      deformable: levels, points and variants of a "deformable" model.
    """

    backbone: AnyBackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    num_classes: int = 91
    num_queries: int = 100
    num_auxiliary: int = 0
    auxiliary_groups: int = 1
    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn: int = 2048
    query_start: Literal["normal", "points"] = "normal"
    dropout: float = 0.1
    pre_norm: bool = False
    remat: bool | Literal["samples"] = False
    dtype: str = "float32"
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    family: Literal["detr", "deformable"] = "detr"
    deformable: DeformableConfig = DeformableConfig()

    def __post_init__(self):
        if self.family == "deformable" and self.dim % self.deformable.norm_groups:
            raise ValueError(
                f"model width {self.dim} does not split into deformable.norm_groups="
                f"{self.deformable.norm_groups} groups"
            )
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(
                f"model.dtype must be 'float32', 'bfloat16' or 'auto', got {self.dtype!r}"
            )
        if self.family == "detr" and self.remat == "samples":
            raise ValueError("remat='samples' is of deformable attention: use True or False")
        if self.num_auxiliary > 0 and self.num_auxiliary % self.auxiliary_groups:
            raise ValueError(
                f"{self.num_auxiliary} auxiliary queries do not split into "
                f"{self.auxiliary_groups} equal groups"
            )

    @property
    def carrier(self) -> jnp.dtype:
        """``dtype`` as an array's.

        Raises:
          ValueError: it is still open.
        """
        if self.dtype == "auto":
            raise ValueError(
                "model.dtype='auto' is open: training.sizing.with_devices fills it in, or give "
                "model.dtype=float32 or model.dtype=bfloat16"
            )
        return jnp.dtype(self.dtype)

    @property
    def class_loss(self) -> Literal["softmax", "focal"]:
        """How class scores are read: DETR's softmax, Deformable DETR's sigmoids."""
        return "focal" if self.family == "deformable" else "softmax"

    @property
    def class_outputs(self) -> int:
        """Outputs of the class head: C, and "no object" under a softmax."""
        return self.num_classes + (self.class_loss == "softmax")

    @property
    def query_sets(self) -> tuple[int, ...]:
        """Sizes of the query sets in training: the object queries, then each auxiliary group."""
        if not self.num_auxiliary:
            return (self.num_queries,)
        size = self.num_auxiliary // self.auxiliary_groups
        return (self.num_queries, *(size,) * self.auxiliary_groups)

    def active_sets(self, auxiliary: bool, initializing: bool) -> tuple[int, ...]:
        """The query sets of one call; all of them where parameters are made.

        Raises:
          ValueError: auxiliary queries are asked for that the model has not.
        """
        if auxiliary and not self.num_auxiliary:
            raise ValueError("auxiliary=True, but the model has num_auxiliary=0")
        return self.query_sets if auxiliary or initializing else (self.num_queries,)
