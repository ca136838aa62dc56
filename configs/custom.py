r"""A data set of one's own on one machine, float and 4-bit: the folder says the rest.

aqdetr finetune FOLDER --workdir=runs/mine            (all of the below, with a report)

aqdetr pretrain --config=configs/custom.py:FAMILY-pretrain --workdir=runs/custom_pretrain
aqdetr train    --config=configs/custom.py:FAMILY-teacher  --workdir=runs/custom_teacher \
    --config.init_from=runs/custom_pretrain
aqdetr train    --config=configs/custom.py:FAMILY-VARIANT  --workdir=runs/custom_VARIANT \
    --config.init_from=runs/custom_teacher

FAMILY: "deformable" or "detr". VARIANT: "aqdetr", or "lsq", "lsq_plus", "qdetr", "auxiliary",
"distill" to compare (all 4-bit; --config.quant.policy=w3a3 or w2a2 for fewer). Add
--config.data.root=FOLDER: COCO's layout, Roboflow's COCO export, Pascal VOC, YOLO, or a folder of
aqdetr prepare-data, told by its files. Buckets, resizes, max_boxes, queries and classes follow from
the training set (data.fit is the most that images are padded to); the number of passes is BCCD's,
with a limit on the steps of large sets.

Result: BCCD (trainval 292 images, test 72; seed 0, commit 05e666bd5163): teacher AP 0.505, 4-bit by
calibration alone 0.471, 4-bit aqdetr 0.494 (97.8 %); experiments/results/finetune_bccd.json. Cost:
100 minutes on two CPU cores that had other work as well.
"""

from ml_collections import ConfigDict

from configs import shapes_base, shapes_w4a4


def get_config(variant: str = "deformable-aqdetr") -> ConfigDict:
    """``variant``: "FAMILY-pretrain", "FAMILY-teacher", or FAMILY and a student variant."""
    family, _, kind = variant.rpartition("-")
    if family not in ("detr", "deformable"):
        raise ValueError(f"unknown variant {variant!r}: 'detr-...' or 'deformable-...'")
    student = kind in shapes_w4a4.VARIANTS
    if student:
        config = shapes_w4a4.get_config(variant.removeprefix("detr-"))
        config.init_from = ""
        if config.model.num_auxiliary:
            config.auxiliary.repeats = 3
            config.model.num_auxiliary = -1
        passes, most = 66.0, 2400
    else:
        config = shapes_base.get_config(family)
        passes, most = 165.0, 6000
        if kind == "pretrain":
            config.task = "pretrain"
            config.model.backbone.norm = "batch"
            config.optimizer.update(lr=2e-3, lr_backbone=2e-3)
            passes, most = 82.5, 3000
        elif kind == "teacher":
            config.auxiliary = ConfigDict(dict(weight=1.0, repeats=3, start="random"))
            config.model.num_auxiliary = -1
        else:
            known = ", ".join(("pretrain", "teacher", *shapes_w4a4.VARIANTS))
            raise ValueError(f"unknown variant {variant!r}: FAMILY- and one of {known}")
    config.name = f"custom_{family}_{kind}"
    config.data = ConfigDict(
        dict(
            kind="auto",
            root="",
            fit=320,
            max_boxes=0,
            augment=dict(crop_probability=0.3),
        )
    )
    # Output stride 16 is enough for boxes of the size that data.fit aims at, and four times as
    # fast as 8; several encoder layers, so that "layer by layer" says something.
    config.model.backbone.update(widths=(32, 64, 128), strides=(1, 2, 2), dilations=(1, 1, 1))
    config.model.update(num_queries=0, encoder_layers=3)
    config.loss = ConfigDict(dict(eos=0.35))
    if family == "deformable":
        # Strides 16 and 32.
        config.model.deformable.update(levels=2, stages=1)
        config.model.encoder_layers = 2
        config.loss = ConfigDict(dict(cls=2.0, kind="focal"))
        if kind != "pretrain":  # as long as DETR's: a step takes 1.3 times as long
            passes, most = passes * 3 / 4, most * 3 // 4
    config.train.update(steps=most, epochs=passes, batch_size=16, eval_batch_size=24)
    config.train.eval_every = 0 if kind == "pretrain" else 1000
    return config
