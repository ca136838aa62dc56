r"""Deformable DETR on COCO: float, and 4 / 3 / 2 bits by the paper's recipe, all official variants.

aqdetr train --config=configs/coco_deformable.py:VARIANT,BITS --workdir=DIR \
    --config.data.root=COCO --config.init_from=RUN

VARIANT: r50 (four levels), r50-single, r50-dc5 (one level), r50-refine, r50-two-stage (with
refinement). BITS: float, w4a4, w3a3, w2a2 (attention at the same bits), w4a4-attn8 (Q-DETR's
4-4-8). RUN: for float the pretrained backbone (aqdetr pretrain), for low bits the float model.
COCO: folder with train2017/, val2017/ and annotations/.

2 images a chip (6.6 of a v5e's 15.75 GiB, docs/plan.md); learning rates are those of batch 32 times
the square root of the batch's ratio to it (few chips: --config.train.accumulate=N).

float: Deformable DETR's own 50 epochs. Published by it, from an ImageNet backbone: R50
44.5 AP, with refinement 46.2, with two stages 46.9. Here: not run.
low-bit: as many epochs from the float checkpoint at its rates, step sizes without decay, auxiliary
queries M=1500, K=6 (H-DETR's), encoder attention distilled. Here: not run (docs/results.md has the
ledger). Cost: see docs/plan.md.
"""

from ml_collections import ConfigDict

from configs import coco

VARIANTS = {
    "r50": {},
    "r50-single": {"levels": 1},
    "r50-dc5": {"levels": 1},
    "r50-refine": {"box_refine": True},
    "r50-two-stage": {"box_refine": True, "two_stage": True},
}


def get_config(variant: str = "r50,w4a4") -> ConfigDict:
    """``variant``: "VARIANT,BITS"."""
    name, _, bits = variant.partition(",")
    if name not in VARIANTS or not bits:
        raise ValueError(f"unknown variant {variant!r}: VARIANT,BITS with {', '.join(VARIANTS)}")
    low_bit = bits != "float"
    dc5 = name == "r50-dc5"
    config = coco.get_config(f"r50{'-dc5' if dc5 else ''},{bits}")
    config.name = f"coco_deformable_{name}_{bits}"
    config.model.update(
        family="deformable",
        num_queries=300,
        num_auxiliary=1500 if low_bit else 0,
        ffn=1024,
        deformable=VARIANTS[name],
    )
    config.loss = ConfigDict(dict(cls=2.0, kind="focal"))
    config.optimizer.update(
        lr=2e-4,
        lr_backbone=2e-5,
        reference_batch=32,
        drop_at=(0.8,),
        slow=("sampling_offsets/", "reference_points/"),
    )
    if VARIANTS[name].get("two_stage"):
        config.optimizer.slow = ("sampling_offsets/",)  # its reference points are proposals
    config.train.update(epochs=50.0, batch_per_chip=2)
    if low_bit:
        config.optimizer.lr_steps = 2e-4
        config.auxiliary.repeats = 6
    return config
