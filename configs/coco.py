r"""DETR on COCO: float, and 4 / 3 / 2 bits by the paper's recipe, all official sizes.

aqdetr train --config=configs/coco.py:BACKBONE,BITS --workdir=DIR --config.data.root=COCO \
    --config.init_from=RUN

BACKBONE: r50, r50-dc5, r101, r101-dc5. BITS: float, w4a4, w3a3, w2a2 (attention at the same
bits), w4a4-attn8 (Q-DETR's 4-4-8). RUN: for float the pretrained backbone (aqdetr pretrain), for
low bits the float model. COCO: folder with train2017/, val2017/ and annotations/.

8 images a chip, which is what a TPU's layouts want; learning rates are those of batch 64 times the
square root of the batch's ratio to it (few chips: --config.train.accumulate=N).

float: DETR's own 300 epochs. Published by DETR, from an ImageNet backbone: R50 42.0 AP
(500 epochs), DC5 43.3, R101 43.5, DC5-R101 44.9. Here: not run.
low-bit: 50 epochs from the float checkpoint, learning rate dropped at 40, step sizes without decay,
auxiliary queries M=300, K=3, encoder attention distilled from the float model. Here: not run
(docs/results.md has the ledger). Cost: see docs/plan.md.
"""

import dataclasses

from ml_collections import ConfigDict

from aqdetr_jax.data.transforms import DETR_COCO
from aqdetr_jax.models.resnet import resnet_config


def get_config(variant: str = "r50,w4a4") -> ConfigDict:
    """``variant``: "BACKBONE,BITS"."""
    backbone, _, bits = variant.partition(",")
    name, _, dilated = backbone.partition("-")
    if name not in ("r50", "r101") or dilated not in ("", "dc5") or not bits:
        raise ValueError(f"unknown variant {variant!r}: BACKBONE,BITS with r50, r50-dc5, r101, ...")
    low_bit = bits != "float"
    config = ConfigDict()
    config.name = f"coco_{backbone}_{bits}"
    config.seed = 0
    config.init_from = ""
    config.data = ConfigDict(
        dict(
            kind="coco",
            root="",
            train_split="train2017",
            eval_split="val2017",
            max_boxes=100,
            # One compilation each; the bucket of a step is drawn from (seed, step).
            buckets=((800, 1344), (1344, 800), (1088, 1088)),
            eval_buckets=((800, 1344), (1344, 800), (1088, 1088)),
            eval_short_side=800,
            eval_max_size=1333,
            augment=dataclasses.asdict(DETR_COCO),
            num_threads=8,
            prefetch=8,
        )
    )
    config.model = ConfigDict(
        dict(
            backbone=dataclasses.asdict(
                resnet_config(f"resnet{name[1:]}", dc5=bool(dilated), norm="frozen")
            ),
            num_classes=0,
            num_queries=100,
            num_auxiliary=300 if low_bit else 0,
            remat=True,
            dtype="auto",  # bfloat16 on a TPU
        )
    )
    config.optimizer = ConfigDict(
        dict(
            lr=1e-4,
            lr_backbone=1e-5,
            reference_batch=64,
            weight_decay=1e-4,
            clip_norm=0.1,
            schedule="step",
            drop_at=(0.8 if low_bit else 2 / 3,),
            frozen=("backbone/stem", "backbone/layer1_"),
        )
    )
    config.train = ConfigDict(
        dict(
            epochs=50.0 if low_bit else 300.0,  # steps follow from the size of the data
            batch_per_chip=8,
            eval_batch_per_chip=8,
            eval_every=10_000,
            checkpoint_every=1000,
            log_every=50,
        )
    )
    if low_bit:
        config.optimizer.lr_steps = 1e-4
        config.quant = ConfigDict(dict(policy=bits, calibration_batches=16))
        config.auxiliary = ConfigDict(dict(weight=1.0, repeats=3, start="object"))
        config.distill = ConfigDict(dict(weights=dict(encoder=1.0, kind="kl")))
        # Quantized everywhere, so everything trains.
        config.optimizer.frozen = ()
    return config
