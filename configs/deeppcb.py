"""Defects of circuit boards (DeepPCB: COCO folder, 640x640 scans, 6 classes), float and 4-bit.

aqdetr pretrain --config=configs/deeppcb.py:pretrain --workdir=runs/deeppcb_pretrain
aqdetr train    --config=configs/deeppcb.py:teacher  --workdir=runs/deeppcb_teacher
aqdetr train    --config=configs/deeppcb.py:VARIANT  --workdir=runs/deeppcb_VARIANT

VARIANT: "lsq", "lsq_plus", "qdetr", "auxiliary", "distill" or "aqdetr" (all 4-bit); of Deformable
DETR "deformable-pretrain", "deformable-teacher", "deformable-aqdetr" and so on; on EfficientNet-
Lite0 with ImageNet weights (configs/lite0.py) "lite-teacher", "deformable-lite-teacher" etc.
Add --config.data.root=FOLDER, which holds train/, test/ and annotations/ (1000 and 500 images).

Deformable DETR starts from the backbone that "pretrain" leaves
(--config.init_from=runs/deeppcb_pretrain). DETR, which learned nothing from that in 800 steps
(looked at once), goes on from the embedded set's packaged teacher.

Result (seed 0, 500 test images): Deformable DETR, teacher AP 0.388, AP50 0.721; 4-bit lsq 0.366,
aqdetr 0.371 (95.7 %). DETR: not run to the end. Cost on one CPU core: pretraining 26 minutes,
Deformable DETR's teacher 60, its students 14 (lsq) to 20 (aqdetr).
"""

from ml_collections import ConfigDict

from configs import lite0, shapes_base


def get_config(variant: str = "teacher") -> ConfigDict:
    """``variant``: see ``lite0.named``."""
    config, family, kind = lite0.named("deeppcb", variant)
    # At 320 pixels half of the defects are 14 to 19 pixels large, a cell at stride 16; DETR has
    # stride 8 and pays for every token.
    embedded = family == "detr" and "lite" not in variant and kind != "pretrain"
    size = 256 if embedded else 320
    config.data = ConfigDict(
        dict(
            kind="coco",
            root="",
            train_images="train",
            train_annotations="annotations/instances_train.json",
            eval_images="test",
            eval_annotations="annotations/instances_test.json",
            max_boxes=16,
            buckets=((size, size),),
            eval_short_side=size,
            eval_max_size=size,
            augment=dict(
                scales=tuple(size * part // 20 for part in (18, 19, 20)),
                max_size=size,
                crop_probability=0.3,
                crop_resize=tuple(size * part // 20 for part in (20, 22, 24)),
                crop_size=(size * 3 // 4, size),
            ),
        )
    )
    # 7 defects an image, 15 at most.
    auxiliary = 80 if config.model.num_auxiliary else 0
    if embedded:
        config.model = shapes_base.get_config("detr").model
        if kind == "teacher":  # with queries of its own
            config.init_from = "packaged:shapes_teacher"
    config.model.update(num_queries=40, num_auxiliary=auxiliary)
    steps = {"pretrain": 1000, "teacher": 2400}.get(kind, 480)
    config.train.update(steps=steps, epochs=0.0)
    # A look at 500 images costs a student as much as a dozen steps.
    config.train.eval_every = 800 if kind == "teacher" else 0
    return config
