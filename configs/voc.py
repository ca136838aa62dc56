r"""DETR on Pascal VOC 2007 + 2012, as Q-DETR trains it: float, and 4 / 3 / 2 bits.

aqdetr train --config=configs/voc.py:BACKBONE,BITS --workdir=DIR --config.data.root=VOC \
    --config.init_from=RUN

BACKBONE, BITS and RUN as in configs/coco.py. VOC: what ``aqdetr prepare-data`` made of both years'
archives (training on trainval of both, 16 551 images; judged on 2007's test, 4 952).

300 epochs at the rates of batch 16, dropped at 200 (Q-DETR, CVPR 2023); 8 images a chip.
Published by Q-DETR: R50 float 83.3 AP50, at 4-4-8 82.7, plain LSQ+ 78.0. Here: not run
(docs/results.md has the ledger).
"""

from ml_collections import ConfigDict

from configs import coco


def get_config(variant: str = "r50,w4a4-attn8") -> ConfigDict:
    """``variant``: "BACKBONE,BITS"."""
    config = coco.get_config(variant)
    config.name = config.name.replace("coco_", "voc_")
    config.data.update(kind="tfds", train_split="trainval", eval_split="test")
    config.optimizer.update(reference_batch=16, drop_at=(2 / 3,))
    config.train.epochs = 300.0
    return config
