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
        ("coco:r50,float", "quant.residual=4", "quant.policy is 'float'"),
        ("coco:r50,float", "optimizer.lr_steps=1e-3", "there are no step sizes"),
        ("coco:r50,float", "distill.teacher=runs/x", "no distillation weight is positive"),
        ("coco:r50,float", "distill.source=float_path", "no distillation weight is positive"),
        ("coco:r50,float", "quant.align_queries=true", "quant.policy is 'float'"),
        ("shapes_w4a4", "distill.weights.tau=0.5", "it is of distill.weights.foreground"),
        ("shapes_w4a4:qdetr", "distill.weights.kind=mse", "no weight of attention maps"),
        ("coco:r50,float", "auxiliary.repeats=2", "model.num_auxiliary is 0"),
        ("coco:r50,float", "model.deformable.points=8", "model.family is 'detr'"),
        ("coco:r50,float", "loss.focal_gamma=1.0", "the class loss is a softmax"),
        ("coco_deformable:r50,float", "loss.eos=0.2", "no class 'no object'"),
        ("coco_deformable:r50-single,float", "model.deformable.stages=2", "with one level"),
        ("coco:r50,w4a4", "distill.weights.locations=1.0", "only deformable attention"),
        ("coco:r50,w4a4", "quant.equalize=0.5", "quant.grid is 'symmetric'"),
        ("coco:r50,w4a4", "optimizer.final=0.1", "optimizer.schedule is 'step'"),
        ("coco:r50,w4a4", "optimizer.slow_factor=0.5", "optimizer.slow is ()"),
        ("shapes_teacher", "optimizer.drop_at=(0.5,)", "optimizer.schedule is 'cosine'"),
        ("shapes_teacher", "data.eval_max_size=64", "data.eval_short_side is None"),
        ("shapes_teacher", "auxiliary.noise=0.2", "auxiliary.start"),
        ("shapes_pretrain", "model.num_queries=5", "a dense pretraining trains"),
        ("shapes_pretrain", "loss.l1=5", "a dense pretraining trains"),
        ("custom:detr-teacher", "data.buckets=((64,64),)", "set data.fit=0 to give it"),
        ("custom:detr-teacher", "data.allow_truncation=true", "data.max_boxes is 0"),
        ("shapes_w4a4", "data.follow_links=true", "has no image files"),
        ("shapes_w4a4", "data.on_error=skip", "images can always be read"),
        ("custom:detr-aqdetr", "auxiliary.start=object", "init_from is ''"),
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
        ("shapes_w4a4", ("quant.residual=0",)),
        ("coco:r50,float", ("quant.policy=w4a4", "quant.renormalize=true")),
        ("coco:r50,float", ("--config.data.train_images=x", "data.train_annotations=y")),
    ],
)
def test_overrides_that_change_something_are_taken(config, overrides):
    load_experiment(config, overrides)


def test_steps_and_epochs_on_the_command_line_stand_in_place_of_the_files():
    def length(*overrides):
        train = load_experiment("custom:detr-teacher", overrides).train
        return train.steps, train.epochs

    assert length() == (6000, 165.0)
    assert length("train.steps=9000") == (9000, 0.0)
    assert length("train.epochs=500") == (0, 500.0)
    assert length("train.epochs=500", "train.steps=10") == (10, 500.0)  # what ends first


def test_a_pretraining_takes_what_is_given():
    def made(*overrides):
        return load_experiment("coco:r50,w4a4", overrides, pretrain=True)

    config = made()
    assert (config.task, config.model.backbone.norm) == ("pretrain", "batch")
    assert (config.optimizer.lr_backbone, config.optimizer.frozen) == (config.optimizer.lr, ())
    assert not config.quant.quantized
    given = made("optimizer.lr_backbone=5e-4", "optimizer.frozen=('encoder/',)")
    assert (given.optimizer.lr_backbone, given.optimizer.frozen) == (5e-4, ("encoder/",))
    with pytest.raises(ConfigError, match=r"backbone\.norm must be 'batch' in a pretraining"):
        made("model.backbone.norm=frozen")
    with pytest.raises(ConfigError, match=r"quant\.policy has no effect: a dense pretraining"):
        made("quant.policy=w3a3")


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


# fmt: off
ALWAYS = (
    "name", "task", "seed", "init_from", "data.kind", "data.train_split", "data.eval_split",
    "data.fit", "data.max_boxes", "data.max_pixels", "data.num_threads",
    "data.workers",
    "data.augment.flip_probability", "data.augment.scales", "data.augment.crop_probability",
    "data.augment.colour_jitter", "data.buckets", "data.eval_buckets", "data.eval_short_side",
    "model.backbone.*", "model.num_classes", "model.dim", "model.heads", "model.encoder_layers",
    "model.ffn", "model.dropout", "model.pre_norm", "model.remat", "model.dtype",
    "model.pixel_mean", "model.pixel_std", "model.family", "model.num_queries",
    "model.num_auxiliary", "model.decoder_layers", "quant.policy", "quant.rules",
    "distill.weights.encoder", "distill.weights.decoder_self", "distill.weights.decoder_cross",
    "distill.weights.foreground",
    "loss.cls", "loss.l1", "loss.giou", "loss.kind", "optimizer.lr", "optimizer.weight_decay",
    "optimizer.clip_norm", "optimizer.warmup", "optimizer.schedule", "optimizer.slow",
    "optimizer.frozen", "optimizer.ema", "optimizer.reference_batch", "train.steps",
    "train.epochs", "train.batch_size", "train.batch_per_chip", "train.accumulate",
    "train.eval_batch_size", "train.eval_batch_per_chip", "train.eval_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.on_save_error", "train.log_every",
    "train.abort_after", "train.watchdog", "train.pictures", "train.profile",
    "train.phases",
    "mesh.data", "mesh.model",
)
# fmt: on
"""What a detector's training reads whatever else is set (patterns)."""


def test_every_key_has_a_verdict():
    """A new key is either read always, or a rule says when it is not."""
    from fnmatch import fnmatch

    idle_somewhere = set()
    for name in (
        "shapes_w4a4",
        "shapes_teacher",
        "bccd:lsq",
        "bccd:deformable-aqdetr",
        "coco:r50,float",
        "coco:r50,w4a4",
        "coco_deformable:r50-single,float",
        "custom:detr-lsq",
    ):
        idle_somewhere |= {pattern for pattern, _ in idle(load_experiment(name))}
    idle_somewhere |= {"data.prefetch", "optimizer.lr_backbone", "quant.equalize"}  # tested below
    for key in flatten_config(ExperimentConfig()):
        known = any(fnmatch(key, pattern) for pattern in (*ALWAYS, *idle_somewhere))
        assert known, f"{key}: is it read whatever else is set?"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("data.num_threads=0", "data.prefetch=2"), "nothing is read ahead"),
        (("optimizer.frozen=('backbone/',)", "optimizer.lr_backbone=1e-4"), "holds the backbone"),
        (("quant.grid=symmetric", "quant.equalize=0.5"), "quant.grid is 'symmetric'"),
        (
            (
                "quant.policy=float",
                "quant.rules=({'pattern': 'encoder', 'weight': 4, 'activation': 4, "
                "'attention': 4},)",
                "quant.residual=4",
            ),
            "quant.rules say all there is",
        ),
        (("distill.source=float_path", "distill.teacher=runs/x"), "which is no other network"),
        (("train.batch_per_chip=4", "train.batch_size=8"), "train.batch_per_chip=4"),
        (("train.eval_batch_per_chip=4", "train.eval_batch_size=8"), "eval_batch_per_chip=4"),
        (("optimizer.batch_rule=linear",), "optimizer.reference_batch is 0"),
    ],
)
def test_one_override_may_make_another_idle(overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        load_experiment("shapes_w4a4", overrides)
