"""Micro-batches: the step of the whole batch, whatever it is cut into."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from aqdetr_jax.losses.criterion import LossWeights
from aqdetr_jax.losses.distillation import DistillationWeights
from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.detector import build_detector, memory_valid
from aqdetr_jax.models.resnet import resnet_config
from aqdetr_jax.training.config import AuxiliaryConfig, DistillConfig, ExperimentConfig, TrainConfig
from aqdetr_jax.training.step import accumulated_gradient, detection_loss_fn

pytestmark = pytest.mark.usefixtures("quick_compile")

BUCKET = (24, 40)
SIZES = ((24, 20), (16, 40), (24, 40), (20, 24), (9, 40), (24, 33), (24, 8), (17, 16))


def batch_of(classes, seed=0):
    """Eight images of unequal size and numbers of boxes, some without any."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((8, *BUCKET), bool)
    for i, (height, width) in enumerate(SIZES):
        mask[i, :height, :width] = True
    valid = np.arange(4) < np.array([2, 0, 1, 4, 3, 0, 0, 1])[:, None]
    boxes = rng.uniform(0.2, 0.6, (8, 4, 4)).astype("f4") * valid[..., None]
    labels = (rng.integers(0, classes, (8, 4)) * valid).astype("i4")
    images = (rng.integers(0, 256, (8, *BUCKET, 3)) * mask[..., None]).astype("u1")
    return {"images": images, "mask": mask, "boxes": boxes, "labels": labels, "valid": valid}


def experiment(family, micro):
    """A float student with everything in it: its last bit decides no rounding."""
    two_stage = family == "deformable"
    model = dataclasses.replace(
        tiny.MODEL,
        num_classes=3,
        num_auxiliary=8,
        auxiliary_groups=2,
        dropout=0.2,
        decoder_layers=1,
        num_queries=5,
        family=family,
        deformable=DeformableConfig(
            levels=2, stages=1, norm_groups=4, box_refine=two_stage, two_stage=two_stage
        ),
    )
    cross = 0.0 if two_stage else 0.5
    return ExperimentConfig(
        model=model,
        loss=LossWeights(cls=2.0, kind="focal") if two_stage else LossWeights(),
        auxiliary=AuxiliaryConfig(repeats=2),
        distill=DistillConfig(weights=DistillationWeights(encoder=1.0, decoder_cross=cross)),
        train=TrainConfig(steps=1, batch_size=8, accumulate=micro),
    )


@pytest.mark.parametrize("family", ["detr", "deformable"])
def test_micro_batches_add_up_to_the_whole_batch(family):
    """Loss, terms and gradients; with a teacher, auxiliary queries, dropout and two stages."""
    whole, cut = experiment(family, 1), experiment(family, 4)
    module = build_detector(whole.model)
    plain = dataclasses.replace(whole.model, num_auxiliary=0, auxiliary_groups=1)
    batch = batch_of(3)
    given = batch["images"], batch["mask"]
    variables = tiny.random_variables(module, *given)
    teacher_module = build_detector(plain)
    teacher = jax.tree.map(lambda x: x * 1.01, tiny.random_variables(teacher_module, *given))
    loss_fn = detection_loss_fn(whole, module, teacher_module)
    arguments = variables["params"], variables["batch_stats"], teacher, batch, np.int32(5)
    found = jax.jit(accumulated_gradient(cut, loss_fn))(*arguments)
    wanted = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(*arguments)
    (loss, (terms, stats)), gradients = jax.device_get(found)
    (loss_whole, (terms_whole, stats_whole)), gradients_whole = jax.device_get(wanted)
    np.testing.assert_allclose(loss, loss_whole, rtol=2e-6)
    assert terms.keys() == terms_whole.keys()
    assert {"loss_distill_encoder", "auxiliary_queries/loss_giou", "class_error"} < terms.keys()
    for name, value in terms_whole.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, stats, stats_whole)
    gradients, gradients_whole = (flatten_dict(g, sep="/") for g in (gradients, gradients_whole))
    # The gradient of a key bias is zero but for rounding: a parameter's own size is no scale.
    largest = max(float(np.abs(g).max()) for g in gradients_whole.values())
    for path, value in gradients_whole.items():
        scale = max(float(np.abs(value).max()), 1e-2 * largest)
        np.testing.assert_allclose(
            gradients[path] / scale, value / scale, rtol=1e-5, atol=1e-5, err_msg=path
        )


ON_DEVICES = """
    import sys

    sys.path[:0] = ["tests", "tests/training"]
    import dataclasses
    import re

    import jax
    import numpy as np
    import tiny
    from flax.traverse_util import flatten_dict
    from test_accumulate import batch_of, experiment

    from aqdetr_jax.models.detector import build_detector
    from aqdetr_jax.parallel.mesh import make_mesh, put_batch
    from aqdetr_jax.parallel.placement import MODEL_PARALLEL, parameter_shardings
    from aqdetr_jax.training import optimizer as optim
    from aqdetr_jax.training.assemble import jit_train_step
    from aqdetr_jax.training.state import TrainState
    from aqdetr_jax.training.step import detection_loss_fn, make_train_step

    batch = batch_of(3)
    config = experiment("detr", 2)
    config = dataclasses.replace(config, distill=type(config.distill)())
    module = build_detector(config.model)
    variables = tiny.random_variables(module, batch["images"], batch["mask"])
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = optim.make_optimizer(
        params, config.optimizer, 10, frozen_norms=True, rules=MODEL_PARALLEL
    )
    state = jax.device_get(TrainState.create(params, stats, optimizer, ema=False))


    def run(micro, mesh, rules=()):
        train = dataclasses.replace(config.train, accumulate=micro)
        of = dataclasses.replace(config, train=train)
        step = make_train_step(of, detection_loss_fn(of, module, None), optimizer)
        with jax.set_mesh(mesh):
            placed = jax.device_put(state, parameter_shardings(state, mesh, rules))
            given = placed, {}, put_batch(batch, mesh)
            compiled = jit_train_step(step, placed, mesh).lower(*given).compile()
            new, metrics = jax.device_get(compiled(*given))
        moved = jax.tree.map(lambda a, b: a - b, new.params, state.params)
        return metrics, flatten_dict(moved, sep="/"), compiled.as_text()


    metrics, moved, _ = run(1, make_mesh(data=1))
    for mesh, rules in ((make_mesh(data=2), ()), (make_mesh(model=2), MODEL_PARALLEL)):
        again, moved_again, text = run(2, mesh, rules)
        assert metrics.keys() == again.keys()
        for name, value in metrics.items():
            now = again[name]
            if name == "gradient_squares":  # whose parts depend on what is split
                value, now = np.sum(value), np.sum(now)
            np.testing.assert_allclose(now, value, rtol=1e-5, err_msg=name)
        for path, wanted in moved.items():
            # Adam's first step is a sign, which a gradient near zero owes to the order of its sum.
            a, b = wanted.ravel(), moved_again[path].ravel()
            assert wanted.any() == b.any(), path
            if path.endswith("kernel"):
                assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999, path
        if rules:
            continue
        # --- nothing is said between devices inside of a loop ---------------------------------
        computations = {}
        for line in text.splitlines():
            head = re.match(r"(?:ENTRY )?%?([\\w.\\-]+) (?:\\(.*)?.*\\{$", line)
            if head and not line.startswith(" "):
                current = computations.setdefault(head.group(1), [])
            elif line.startswith(" "):
                current.append(line)
        said = [n for n, lines in computations.items() for x in lines if " all-reduce(" in x]
        assert said and set(said) == {n for n in said if n.startswith("main")}, said
        loops = [x for lines in computations.values() for x in lines if " while(" in x]
        assert any("shard_map/while" in x for x in loops)
    print("agree")
"""


def test_on_devices_the_whole_batchs_step_and_no_talk_in_the_loop(run_python):
    assert "agree" in run_python(ON_DEVICES, devices=4)


@pytest.mark.parametrize("family", ["detr", "deformable"])
def test_valid_tokens_without_a_model(family):
    """Sides that no stride divides; a dilated bottleneck-free ResNet with its pooling."""
    model = dataclasses.replace(
        tiny.MODEL,
        family=family,
        num_classes=2,
        encoder_layers=0,
        decoder_layers=1,
        backbone=resnet_config("resnet18", dc5=True),
        deformable=DeformableConfig(levels=4, stages=2, norm_groups=4),
    )
    mask = np.zeros((2, 33, 47), bool)
    mask[0, :, :17] = mask[1, :20] = True
    images = np.zeros((*mask.shape, 3), "u1")
    module = build_detector(model)
    variables = tiny.random_variables(module, images, mask)
    # Compiled, nothing but masks is computed.
    found = jax.jit(lambda m: module.apply(variables, images, m).memory_valid)
    np.testing.assert_array_equal(memory_valid(model, mask), found(mask))


def test_what_cannot_be_accumulated():
    config = experiment("detr", 2)
    learning = dataclasses.replace(config.model.backbone, norm="batch")
    with pytest.raises(ValueError, match="norms that learn need the whole batch at once"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=learning))
    output = DistillConfig(weights=DistillationWeights(encoder=1.0, kind="output"))
    with pytest.raises(ValueError, match=r"distill\.weights\.kind='output'"):
        dataclasses.replace(config, distill=output)
    with pytest.raises(ValueError, match=r"train\.accumulate must be at least 1"):
        dataclasses.replace(config, train=TrainConfig(accumulate=0))
