r"""The float teacher of the embedded set.

aqdetr train --config=configs/shapes_teacher.py --workdir=runs/shapes_teacher
aqdetr train --config=configs/shapes_teacher.py:deformable --workdir=runs/shapes_deformable_teacher
aqdetr train --config=configs/shapes_teacher.py:queries100 --workdir=runs/shapes_queries100_teacher

Result (seed 0, 1200 validation images): DETR AP 0.490, AP50 0.791; Deformable DETR AP 0.561, AP50
0.832 (after a sixth of the steps AP 0.449). Cost: 55 and 73 minutes on two CPU cores, after 20 and
30 of configs/shapes_pretrain.py. The packaged models are these runs':
cp -r runs/shapes_teacher/model aqdetr_jax/assets/shapes_teacher
python experiments/package_teacher.py --run=runs/shapes_deformable_teacher \
    --config=shapes_teacher:deformable --to=aqdetr_jax/assets/shapes_deformable_teacher

"queries100" has DETR's own balance, 100 queries for 4.5 objects and "no object" at a tenth, and no
auxiliary queries: what those bring is its students' subject. It goes on from the packaged DETR with
queries of its own, for half of its steps. Result: not run.
"""

from ml_collections import ConfigDict

from configs import shapes_base


def get_config(family: str = "detr") -> ConfigDict:
    """A float detector; "detr" and "deformable" with auxiliary groups, dropped afterwards."""
    config = shapes_base.get_config(family)
    prefix = "" if family == "detr" else f"{family}_"
    config.name = f"shapes_{prefix}teacher"
    config.init_from = f"runs/shapes_{prefix}pretrain"
    if family == "queries100":
        config.init_from = "packaged:shapes_teacher"
        config.optimizer.update(lr=7e-4, lr_backbone=3e-4)
        config.train.steps = 3000
        return config
    config.model.num_auxiliary = 50
    config.model.auxiliary_groups = 2
    config.optimizer.lr_backbone = 1e-3
    config.auxiliary = ConfigDict(dict(weight=1.0, repeats=1, start="random"))
    return config
