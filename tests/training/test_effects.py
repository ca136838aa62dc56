"""A key that is given and has no effect is an error; one that has, is none."""

from __future__ import annotations

import pytest

from aqdetr_jax.config_types import ConfigError
from aqdetr_jax.training.config import ExperimentConfig
from aqdetr_jax.training.config_tools import flatten_config
from aqdetr_jax.training.effects import idle
from aqdetr_jax.training.experiment import load_experiment


@pytest.mark.parametrize(
    ("config", "override", "reason"),
    [
        ("shapes_w4a4", "data.root=x", "data.kind is 'shapes'"),
        ("shapes_w4a4", "data.train_annotations=x.json", "data.kind is 'shapes'"),
        ("bccd:teacher", "data.eval_images=x", "data.kind is 'voc'"),
        ("coco:r50,float", "data.num_train=10", "it is of the generated set"),
        ("coco:r50,float", "data.image_size=10", "it is of the generated set"),
        ("coco:r50,float", "quant.renormalize=true", "quant.policy is 'float'"),
        ("coco:r50,float", "optimizer.lr_steps=1e-3", "there are no step sizes"),
        ("coco:r50,float", "distill.teacher=runs/x", "no distillation weight is positive"),
        ("coco:r50,float", "auxiliary.repeats=2", "model.num_auxiliary is 0"),
        ("coco:r50,float", "model.deformable.points=8", "model.family is 'detr'"),
        ("coco:r50,float", "loss.focal_gamma=1.0", "the class loss is a softmax"),
        ("coco_deformable:r50,float", "loss.eos=0.2", "no class 'no object'"),
        ("coco_deformable:r50-single,float", "model.deformable.stages=2", "with one level"),
        ("coco:r50,w4a4", "distill.weights.locations=1.0", "only deformable attention"),
        ("coco:r50,w4a4", "quant.equalize=0.5", "quant.center is False"),
        ("coco:r50,w4a4", "optimizer.final=0.1", "optimizer.schedule is 'step'"),
        ("coco:r50,w4a4", "optimizer.slow_factor=0.5", "optimizer.slow is ()"),
        ("shapes_teacher", "optimizer.drop_at=(0.5,)", "optimizer.schedule is 'cosine'"),
        ("shapes_teacher", "data.eval_max_size=64", "data.eval_short_side is None"),
        ("shapes_teacher", "auxiliary.noise=0.2", "auxiliary.start"),
        ("shapes_pretrain", "model.num_queries=5", "a dense pretraining trains"),
        ("shapes_pretrain", "loss.l1=5", "a dense pretraining trains"),
        ("custom:detr-teacher", "data.buckets=((64,64),)", "set data.fit=0 to give it"),
    ],
)
def test_idle_overrides_are_refused_with_the_reason(config, override, reason):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        load_experiment(config, (override,))
    assert f"command line: config.{key} has no effect: " in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("custom:detr-teacher", ("data.buckets=((64,64),)", "data.fit=0")),
        ("shapes_w4a4", ("data.kind=tfds", "data.root=x")),
        ("shapes_w4a4", ("model.num_auxiliary=0",)),  # makes keys of the file idle, not its own
        ("shapes_w4a4", ("quant.policy=float",)),
        ("coco:r50,float", ("train.steps=7",)),  # and epochs: what ends first
        ("coco:r50,float", ("quant.policy=w4a4", "quant.renormalize=true")),
        ("coco:r50,float", ("--config.data.train_images=x", "data.train_annotations=y")),
    ],
)
def test_overrides_that_change_something_are_taken(config, overrides):
    load_experiment(config, overrides)


def test_a_file_is_judged_as_it_stands(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(data=dict(kind='coco', root='x', num_train=5)))\n"
    )
    with pytest.raises(ConfigError, match=r"mine\.py: config\.data\.num_train has no effect"):
        load_experiment(str(file))
    with pytest.raises(ConfigError, match=r"mine\.py: config\.data\.num_train has no effect"):
        load_experiment(str(file), ("seed=1",))


def test_every_rule_names_keys_that_exist():
    from fnmatch import fnmatch

    keys = list(flatten_config(ExperimentConfig()))
    configs = ("shapes_w4a4", "coco:r50,float", "coco_deformable:r50-single,w4a4")
    configs += ("custom:detr-pretrain", "custom:deformable-lsq", "bccd:teacher", "shapes_teacher")
    for name in configs:
        for pattern, reason in idle(load_experiment(name)):
            assert any(fnmatch(key, pattern) for key in keys), pattern
            assert reason
