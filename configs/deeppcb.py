"""Defects of circuit boards (DeepPCB: COCO folder, 640x640 scans, 6 classes), float and 4-bit.

aqdetr pretrain --config=configs/deeppcb.py:pretrain --workdir=runs/deeppcb_pretrain
aqdetr train    --config=configs/deeppcb.py:teacher  --workdir=runs/deeppcb_teacher
aqdetr train    --config=configs/deeppcb.py:VARIANT  --workdir=runs/deeppcb_VARIANT

VARIANT: "lsq", "lsq_plus", "qdetr", "auxiliary", "distill" or "aqdetr" (all 4-bit); of Deformable
DETR "deformable-pretrain", "deformable-teacher", "deformable-aqdetr" and so on; on EfficientNet-
Lite0 with ImageNet weights (configs/lite0.py) "lite-teacher", "deformable-lite-teacher" etc.
Add --config.data.root=FOLDER, which holds train/, test/ and annotations/ (1000 and 500 images).

Result (seed 0, 500 test images): Deformable DETR, teacher AP 0.388, AP50 0.721, from the backbone
that "pretrain" leaves for both families (--config.init_from=runs/deeppcb_pretrain). DETR: not run
to the end. Cost on one CPU core: pretraining 26 minutes, that teacher 60.
"""

from ml_collections import ConfigDict

from configs import lite0


def get_config(variant: str = "teacher") -> ConfigDict:
    """``variant``: see ``lite0.named``."""
    config, _, kind = lite0.named("deeppcb", variant)
    config.data = ConfigDict(
        dict(
            kind="coco",
            root="",
            train_images="train",
            train_annotations="annotations/instances_train.json",
            eval_images="test",
            eval_annotations="annotations/instances_test.json",
            max_boxes=16,
            # Half size: half of the defects are 14 to 19 pixels large then, a cell at stride 16.
            buckets=((320, 320),),
            eval_short_side=320,
            eval_max_size=320,
            augment=dict(
                scales=(288, 304, 320),
                max_size=320,
                crop_probability=0.3,
                crop_resize=(320, 352, 384),
                crop_size=(240, 320),
            ),
        )
    )
    # 7 defects an image, 15 at most.
    auxiliary = 80 if config.model.num_auxiliary else 0
    config.model.update(num_queries=40, num_auxiliary=auxiliary)
    steps = {"pretrain": 1000, "teacher": 2400}.get(kind, 480)
    config.train.update(steps=steps, epochs=0.0)
    # A look at 500 images costs a student as much as a dozen steps.
    config.train.eval_every = 800 if kind == "teacher" else 0
    return config
