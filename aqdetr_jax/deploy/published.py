"""Size and OPs as Q-DETR (CVPR 2023) counts them, and the values that it prints.

Its rule: Size = 32 x real weights + b x quantized weights; OPs = FLOPs of what is real + (1/32,
1/16, 1/8) x multiplications of 2, 3, 4 bits, where a FLOP is a multiply-add. It gives no factor for
8 bits; what it prints for 8 bits fits 1/4.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from aqdetr_jax.models.config import DetrConfig
from aqdetr_jax.models.resnet import resnet_config
from aqdetr_jax.quant.record import OpRecord
from aqdetr_jax.quant.report import merged_rows, operands

FACTORS = {2: 1 / 32, 3: 1 / 16, 4: 1 / 8, 5: 1 / 4, 6: 1 / 4, 7: 1 / 4, 8: 1 / 4}
"""Share of a multiply-add by the bits of its wider operand: 2 to 4 are Q-DETR's, 8 is inferred from
what it prints, 5 to 7 count as 8 [ours]."""

Q_DETR_R50 = {
    32: (159.32, 85.51),
    8: (39.83, 23.01),
    4: (19.92, 13.02),
    3: (15.03, 7.61),
    2: (10.03, 5.32),
}
"""Bits -> (Size in "MB", OPs in G) of DETR-R50 on COCO, Q-DETR's table 3."""

MEAN_SIZE = (800, 1111)
"""Height and width that stand for the first 100 images of COCO's val2017 at 800 / 1333, over which
published FLOPs are means: there DETR-R50 has its mean of multiply-adds within half a percent
[derived from that mean by interpolation], and so have R101, DC5 and Deformable DETR."""

STEM = "backbone/stem"

_SIZES = ("family", "num_queries", "dim", "heads", "encoder_layers", "decoder_layers", "ffn")


def as_papers_count(config: DetrConfig, rows: Sequence[OpRecord], numbers: int) -> dict[str, Any]:
    """Size and OPs by the rule above.

    Args:
      config: sizes.
      rows: the operations of one inference.
      numbers: of the float model, all of them.

    Returns:
      ``bits``: of most weights; ``size_mib``: by the rule, in MiB, which is what their "MB" is;
      ``size_if_all_mib``: had every number those bits; ``flops``: multiply-adds as they count
      (attention weights of deformable attention are part of the bilinear samples); ``ops``;
      ``ops_if_stem_float``: were the first convolution real, as the printed OPs suggest;
      ``real_flops``: of those, what is multiplied as floats; ``published``: ``size_mb`` and
      ``ops_g`` where Q-DETR prints this model with these bits, else None.
    """
    weights: collections.Counter[int] = collections.Counter()
    for row in merged_rows(rows):
        weights[32 if row.weight is None else row.weight.bits] += row.kernel_size
    bits = max(weights, key=lambda b: weights[b])
    quantized = {b: n for b, n in weights.items() if b != 32}
    real = numbers - sum(quantized.values())
    total, ops, floats, stem = 0, 0.0, 0, 0.0
    for row in rows:
        if not row.macs or row.kind == "mix_samples":
            continue
        total += row.macs
        grids = [spec for spec in operands(row) if spec is not None]
        if len(grids) == 2:
            cost = row.macs * FACTORS[max(spec.bits for spec in grids)]
            ops += cost
            stem += (row.macs - cost) * (row.path == STEM)
        else:
            floats += row.macs
    size, printed = 32 * real + sum(b * n for b, n in quantized.items()), None
    if _is_detr_r50(config) and bits in Q_DETR_R50:
        printed = dict(zip(("size_mb", "ops_g"), Q_DETR_R50[bits], strict=True))
    return {
        "bits": bits,
        "size_mib": size / 8 / 2**20,
        "size_if_all_mib": numbers * bits / 8 / 2**20,
        "flops": total,
        "ops": round(floats + ops),
        "ops_if_stem_float": round(floats + ops + stem),
        "real_flops": floats,
        "published": printed,
    }


def _is_detr_r50(config: DetrConfig) -> bool:
    """Whether a model has the sizes of DETR-R50, whatever its classes."""
    plain = DetrConfig()
    return config.backbone == resnet_config("resnet50", norm=config.backbone.norm) and all(
        getattr(config, name) == getattr(plain, name) for name in _SIZES
    )


def format_papers(papers: Mapping[str, Any]) -> list[str]:
    """Lines for people, with what differs from the printed values."""
    bits, flops, ops = papers["bits"], papers["flops"] / 1e9, papers["ops"] / 1e9
    lines = [
        f"as Q-DETR counts: Size {papers['size_mib']:.2f} MB (MiB), OPs {ops:.2f} G "
        f"of {flops:.2f} G FLOPs ({flops / ops:.2f} times fewer)"
    ]
    if papers["published"] is None:
        return lines
    printed = papers["published"]
    height, width = MEAN_SIZE
    lines += [
        f"Q-DETR prints for DETR-R50 at {bits} bits: Size {printed['size_mb']:.2f} MB, OPs "
        f"{printed['ops_g']:.2f} G. What differs:",
        f"  images: FLOPs and OPs are printed as means over images; --height={height} "
        f"--width={width} stands for them",
    ]
    if bits == 32:
        lines.append("  Size: its ResNet is a changed one, with parameters that a stock one lacks")
        return lines
    lines += [
        f"  Size: with every number at {bits} bits it would be {papers['size_if_all_mib']:.2f} MB, "
        "as printed there; ours has 8-bit first layers, float heads, biases, norms, embeddings",
        f"  OPs: with a float first convolution {papers['ops_if_stem_float'] / 1e9:.2f} G; which "
        "layers are real is not said there, nor a factor of 8-bit products (1/4 here)",
    ]
    return lines
