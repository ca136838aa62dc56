"""Blood cells (BCCD: Pascal VOC layout, 640x480 photographs, 3 classes), float and 4-bit.

aqdetr pretrain --config=configs/bccd.py:pretrain --workdir=runs/bccd_pretrain
aqdetr train    --config=configs/bccd.py:teacher  --workdir=runs/bccd_teacher
aqdetr train    --config=configs/bccd.py:VARIANT  --workdir=runs/bccd_VARIANT

VARIANT as in configs/shapes_w4a4.py: "lsq", "auxiliary", "distill" or "aqdetr" (all 4-bit); of
Deformable DETR "deformable-pretrain", "deformable-teacher", "deformable-aqdetr" and so on.
Add --config.data.root=FOLDER. Trained on the trainval split (291 images), numbers are on test (72).

Result: DETR (seed 0), teacher AP 0.423, AP50 0.701; 4-bit lsq 0.374 (88 %), auxiliary 0.374,
distill 0.369, aqdetr 0.364, which 72 images do not tell apart. Deformable DETR (mean of seeds 0
and 1), teacher 0.488, AP50 0.782; 4-bit lsq 0.482 (99 %), auxiliary 0.487, distill 0.485, aqdetr
0.488. See docs/results.md.
Cost on two CPU cores: pretraining 8 minutes, teacher 25 to 28, a student 10 to 16.
"""

from ml_collections import ConfigDict

from configs import shapes_base, shapes_w4a4

AUXILIARY = 120


def get_config(variant: str = "teacher") -> ConfigDict:
    """``variant``: "pretrain", "teacher", or a student variant of ``shapes_w4a4``."""
    family, _, kind = variant.rpartition("-")
    family = family or "detr"
    prefix = "bccd" if family == "detr" else f"bccd_{family}"
    if kind in shapes_w4a4.VARIANTS:
        config = shapes_w4a4.get_config(variant)
        config.init_from = f"runs/{prefix}_teacher"
        config.auxiliary.repeats = 3
        config.model.num_auxiliary = AUXILIARY if config.model.num_auxiliary else 0
        config.train.update(steps=1200, eval_every=400)
    else:
        config = shapes_base.get_config(family)
        config.auxiliary = ConfigDict(dict(weight=1.0, repeats=3, start="random"))
        config.train.update(steps=3000, eval_every=500)
        if kind == "pretrain":
            config.task = "pretrain"
            config.model.backbone.norm = "batch"
            config.optimizer.update(lr=2e-3, lr_backbone=2e-3)
            config.train.update(steps=1500, eval_every=0)
        elif kind == "teacher":
            config.init_from = f"runs/{prefix}_pretrain"
            config.model.num_auxiliary = AUXILIARY
        else:
            raise ValueError(
                f"unknown variant {variant!r}: pretrain, teacher, a student variant, "
                "or deformable- and one of these"
            )
    config.name = f"{prefix}_{kind}"
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
    # Cells are large: output stride 16 (192 tokens) is enough, and four times as fast as 8.
    config.model.backbone.update(widths=(32, 64, 128), strides=(1, 2, 2), dilations=(1, 1, 1))
    # More encoder layers, so that "layer by layer" says something; 13 cells an image, 60 queries.
    config.model.update(num_queries=60, encoder_layers=3)
    config.loss = ConfigDict(dict(eos=0.35))
    if family == "deformable":
        # Strides 16 and 32: 240 tokens.
        config.model.deformable.update(levels=2, stages=1)
        config.model.encoder_layers = 2
        config.loss = ConfigDict(dict(cls=2.0, kind="focal"))
        if kind != "pretrain":  # as long as DETR's: a step takes 1.3 times as long
            config.train.update(steps=config.train.steps * 3 // 4)
            config.train.update(eval_every=config.train.steps // 3)
    config.train.update(batch_size=16, eval_batch_size=24)
    return config
