"""How an evaluation prepares its images: as the model was saved, unless the command line says."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.cli import main
from aqdetr_jax.config_types import ConfigError
from aqdetr_jax.evaluation.models import input_rule
from aqdetr_jax.training.effects import check_evaluation_keys

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_models_own_rule_is_used_and_said(tiny_teacher, capsys):
    bundle = load_model(tiny_teacher)
    data = dataclasses.replace(tiny.FLOAT.data, buckets=((96, 96),), eval_short_side=80)
    assert input_rule(bundle, data, ("data.num_eval",)) == bundle.input
    assert "image rule, the model's own: " in capsys.readouterr().out
    rule = input_rule(bundle, data, ("data.eval_short_side",))
    assert rule == dataclasses.replace(bundle.input, short_side=80)
    said = capsys.readouterr().out
    assert said == (
        "image rule, the model's own but for data.eval_short_side: short side 80, padded to 64x64 "
        "(height x width)\n"
    )


def test_sizes_that_follow_from_the_data(tiny_teacher):
    """64-pixel images, enlarged to 14 strides of 8 pixels, in whole units of 32."""
    data = dataclasses.replace(tiny.FLOAT.data, fit=320)
    rule = input_rule(load_model(tiny_teacher), data, ("data.fit",))
    assert (rule.buckets, rule.short_side) == (((96, 96),), 96)


@pytest.mark.parametrize(
    "key", ["quant.policy", "model.num_queries", "optimizer.lr", "init_from", "data.max_boxes"]
)
def test_what_an_evaluation_cannot_change_is_refused(key, tiny_teacher, capsys):
    with pytest.raises(ConfigError, match=f"config.{key} has no effect: a saved model is"):
        check_evaluation_keys(("data.num_eval=3", f"{key}=1"))
    command = ["eval", "--config=shapes_teacher", f"--model={tiny_teacher}", f"{key}=1"]
    assert main(command) == 1
    assert f"config.{key} has no effect" in capsys.readouterr().err
