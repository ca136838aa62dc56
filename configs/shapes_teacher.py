r"""The float teacher of the embedded set.

aqdetr train --config=configs/shapes_teacher.py --workdir=runs/shapes_teacher
aqdetr train --config=configs/shapes_teacher.py:deformable --workdir=runs/shapes_deformable_teacher

Result (seed 0, 1200 validation images): DETR AP 0.490, AP50 0.791; Deformable DETR AP 0.561, AP50
0.832 (after a sixth of the steps AP 0.449). Cost: 45 and 70 minutes on two CPU cores, after 20 and
30 of configs/shapes_pretrain.py. The packaged models are these runs':
cp -r runs/shapes_teacher/model aqdetr_jax/assets/shapes_teacher
python experiments/package_teacher.py --run=runs/shapes_deformable_teacher \
    --config=shapes_teacher:deformable --to=aqdetr_jax/assets/shapes_deformable_teacher
"""

from ml_collections import ConfigDict

from configs import shapes_base


def get_config(family: str = "detr") -> ConfigDict:
    """Float DETR with auxiliary query groups (dropped afterwards), from the pretrained backbone."""
    config = shapes_base.get_config(family)
    prefix = "" if family == "detr" else f"{family}_"
    config.name = f"shapes_{prefix}teacher"
    config.init_from = f"runs/shapes_{prefix}pretrain"
    config.model.num_auxiliary = 50
    config.model.auxiliary_groups = 2
    config.optimizer.lr_backbone = 1e-3
    config.auxiliary = ConfigDict(dict(weight=1.0, repeats=1, start="random"))
    return config
