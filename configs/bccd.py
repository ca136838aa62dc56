"""Blood cells (BCCD: Pascal VOC layout, 640x480 photographs, 3 classes), float and 4-bit.

aqdetr pretrain --config=configs/bccd.py:pretrain --workdir=runs/bccd_pretrain
aqdetr train    --config=configs/bccd.py:teacher  --workdir=runs/bccd_teacher
aqdetr train    --config=configs/bccd.py:VARIANT  --workdir=runs/bccd_VARIANT

VARIANT as in configs/shapes_w4a4.py: "lsq", "lsq_plus", "qdetr", "auxiliary", "distill" or "aqdetr"
(all 4-bit); of Deformable DETR "deformable-pretrain", "deformable-teacher", "deformable-aqdetr" and
so on. On EfficientNet-Lite0 with ImageNet weights (configs/lite0.py has the commands that fetch
them) and no pretraining "lite-teacher", "deformable-lite-teacher", "deformable-lite-aqdetr" etc.
Add --config.data.root=FOLDER. Trained on the trainval split (292 images), numbers are on test (72).

Result: DETR (seed 0), teacher AP 0.423, AP50 0.701; 4-bit lsq 0.374 (88 %), auxiliary 0.374,
distill 0.369, aqdetr 0.364, which 72 images do not tell apart. Deformable DETR (mean of seeds 0
and 1), teacher 0.488, AP50 0.782; 4-bit lsq 0.482 (99 %), auxiliary 0.487, distill 0.485, aqdetr
0.488. On EfficientNet-Lite0, Deformable DETR (seed 0), teacher 0.530, AP50 0.835; 4-bit by
calibration alone 0.248 at best, aqdetr 0.541, AP50 0.843. See docs/results.md.
Cost on two CPU cores: pretraining 8 minutes, teacher 25 to 28, a student 10 to 16; on
EfficientNet-Lite0 the teacher 97 minutes and the student 79 on one core.
"""

from ml_collections import ConfigDict

from configs import lite0

STEPS = {"pretrain": 1500, "teacher": 3000}


def get_config(variant: str = "teacher") -> ConfigDict:
    """``variant``: see ``lite0.named``."""
    config, family, kind = lite0.named("bccd", variant)
    config.data = ConfigDict(
        dict(
            kind="voc",
            root="",
            train_split="trainval",
            eval_split="test",
            max_boxes=32,
            buckets=((192, 256),),
            eval_short_side=192,
            eval_max_size=256,
            augment=dict(
                scales=(160, 176, 192),
                max_size=256,
                crop_probability=0.3,
                crop_resize=(192, 224, 256),
                crop_size=(144, 192),
            ),
        )
    )
    # 13 cells an image.
    auxiliary = 120 if config.model.num_auxiliary else 0
    config.model.update(num_queries=60, num_auxiliary=auxiliary)
    # ImageNet's features are good from the first step, and a step of "lite" takes thrice as long.
    steps = STEPS.get(kind, 1200) * (2 if "lite" in variant else 3) // 3
    if family == "deformable" and kind != "pretrain":
        steps = steps * 3 // 4
    evaluations = {"pretrain": 0, "teacher": 6 if family == "detr" else 3}.get(kind, 3)
    every = steps // evaluations if evaluations else 0
    config.train.update(steps=steps, epochs=0.0, eval_every=every)
    return config
