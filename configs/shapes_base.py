"""What all experiments on the embedded set share: data, sizes, schedule. Not run on its own.

The models are for 128-pixel images on two CPU cores: a narrow ResNet, one encoder and three decoder
layers of width 144, pre-norm, 25 object queries. DETR sees one level of stride 8 (256 tokens),
Deformable DETR three of strides 8, 16 and 32 (336 tokens), with box refinement.
"""

from ml_collections import ConfigDict

FAMILIES = ("detr", "deformable", "queries100")


def get_config(family: str = "detr") -> ConfigDict:
    """Data and model of the embedded set.

    ``family``: "detr", "deformable", or "queries100", a DETR with its own balance of positives.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: one of {FAMILIES}")
    config = ConfigDict()
    config.name = "shapes_base"
    config.task = "detect"
    config.seed = 0
    config.init_from = ""
    config.data = ConfigDict(
        dict(
            kind="shapes",
            cache_dir="",
            max_boxes=12,
            augment=dict(
                scales=(112, 128), max_size=128, crop_probability=0.3, crop_size=(80, 128)
            ),
        )
    )
    config.model = ConfigDict(
        dict(
            backbone=dict(
                block="basic",
                depths=(1, 2, 1),
                widths=(32, 64, 96),
                strides=(1, 2, 1),
                dilations=(1, 1, 2),
                stem_width=32,
                stem_kernel=5,
                stem_stride=4,
                stem_pool=False,
                norm="frozen",
            ),
            num_classes=0,
            num_queries=25,
            query_start="points",
            num_auxiliary=0,
            auxiliary_groups=1,
            dim=144,
            heads=4,
            encoder_layers=1,
            decoder_layers=3,
            ffn=256,
            dropout=0.0,
            pre_norm=True,
        )
    )
    # Positives and "no object" in DETR's own balance: it has 100 queries for 7 objects, this model
    # 25 for 4.5, so that 0.1 would leave duplicates unpunished. Classes are the hard part here.
    config.loss = ConfigDict(dict(cls=2.0, eos=0.3))
    config.optimizer = ConfigDict(
        dict(
            lr=1e-3,
            lr_backbone=3e-4,
            weight_decay=0.05,
            clip_norm=1.0,
            warmup=200,
            schedule="cosine",
            final=0.02,
            ema=0.998,
        )
    )
    config.train = ConfigDict(
        dict(
            steps=6000,
            batch_size=32,
            eval_batch_size=48,
            eval_every=1000,
            checkpoint_every=500,
            log_every=20,
        )
    )
    if family == "queries100":  # for 4.5 objects an image: positives are rare, as in DETR itself
        config.model.num_queries = 100
        config.loss.eos = 0.1
    if family == "deformable":
        config.model.backbone.update(strides=(1, 2, 2), dilations=(1, 1, 1))
        config.model.update(
            family="deformable",
            query_start="normal",
            deformable=dict(levels=3, stages=2, points=4, box_refine=True, norm_groups=16),
        )
        config.loss = ConfigDict(dict(cls=2.0, kind="focal"))
        config.optimizer.slow = ("sampling_offsets/", "reference_points/")
    return config
