"""The same step on 1, 8 and 4 x 2 devices, in 4 bits on 1 and 4 x 2; a matcher without talk."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("quick_compile")

PROGRAM = """
    import sys

    sys.path.insert(0, "tests")
    import dataclasses
    import re

    import jax
    import numpy as np
    import tiny
    from flax.traverse_util import flatten_dict
    from jax.sharding import AxisType

    from aqdetr_jax.losses.distillation import DistillationWeights
    from aqdetr_jax.models.detector import example_input
    from aqdetr_jax.training import initial, setup
    from aqdetr_jax.training import optimizer as optim
    from aqdetr_jax.training.config import DistillConfig
    from aqdetr_jax.training.assemble import TRAINED_KEYS, jit_train_step
    from aqdetr_jax.checkpoint.model_folder import load_model
    from aqdetr_jax.parallel.mesh import AXES, batch_sharding, make_mesh, put_batch, replicated
    from aqdetr_jax.parallel.placement import MODEL_PARALLEL, parameter_shardings
    from aqdetr_jax.training.state import TrainState
    from aqdetr_jax.training.step import detection_loss_fn, make_train_step

    # Float, because a rounding boundary turns the last bit of a sum into a whole step; learning
    # norms, because their statistics run over the global batch.
    student = tiny.student("TEACHER")
    config = tiny.resolved(student)
    config = dataclasses.replace(
        config,
        quant=tiny.FLOAT.quant,
        model=dataclasses.replace(
            config.model,
            backbone=dataclasses.replace(config.model.backbone, norm="batch"),
        ),
        train=dataclasses.replace(config.train, batch_size=8),
    )
    module = setup.build_module(config)
    teacher = setup.load_teacher(config)
    batch, other = tiny.batches(config, 2)
    images, mask = example_input((64, 64))
    # One example has no objects, so that the devices' shares differ.
    batch = {k: batch[k].copy() for k in TRAINED_KEYS}
    batch["valid"][3] = False
    variables = jax.device_get(jax.jit(module.init)(jax.random.key(0), images, mask))
    loss_fn = detection_loss_fn(config, module, teacher.module())


    def run(mesh, rules=()):
        whole = replicated(mesh)
        split = parameter_shardings(variables["params"], mesh, rules)
        with jax.set_mesh(mesh):
            f = jax.jit(
                jax.value_and_grad(loss_fn, has_aux=True),
                in_shardings=(split, whole, whole, batch_sharding(mesh), whole),
                out_shardings=whole,
            )
            arguments = (
                jax.device_put(variables["params"], split),
                *jax.device_put((variables["batch_stats"], teacher.variables), whole),
                put_batch(batch, mesh),
                jax.device_put(np.int32(3), whole),
            )
            compiled = f.lower(*arguments).compile()
            return jax.device_get(compiled(*arguments)), compiled.as_text()


    one = jax.make_mesh(
        (1, 1), AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=jax.devices()[:1]
    )
    ((loss_1, (terms_1, stats_1)), gradients_1), _ = run(one)
    ((loss_8, (terms_8, stats_8)), gradients_8), text = run(make_mesh())
    assert jax.device_count() == 8

    gradients_1, stats_1 = (flatten_dict(g, sep="/") for g in (gradients_1, stats_1))
    # The gradient of a key bias is zero but for rounding (softmax does not see it), so that a
    # parameter's own size alone is no scale.
    largest = max(float(np.abs(g).max()) for g in gradients_1.values())


    def compare(terms, stats, gradients):
        assert terms_1.keys() == terms.keys()
        for name in terms_1:
            np.testing.assert_allclose(terms[name], terms_1[name], rtol=1e-5, err_msg=name)
        gradients, stats = (flatten_dict(g, sep="/") for g in (gradients, stats))
        for path, wanted in gradients_1.items():
            scale = max(float(np.abs(wanted).max()), 1e-3 * largest)
            np.testing.assert_allclose(
                gradients[path] / scale, wanted / scale, rtol=1e-5, atol=1e-5, err_msg=path
            )
        for path, wanted in stats_1.items():
            np.testing.assert_allclose(stats[path], wanted, rtol=1e-5, atol=1e-6, err_msg=path)


    compare(terms_8, stats_8, gradients_8)
    # Kernels of the transformer split over two devices each.
    ((loss, (terms, stats)), gradients), _ = run(make_mesh(model=2), MODEL_PARALLEL)
    compare(terms, stats, gradients)

    # --- four bits ----------------------------------------------------------------------------
    # One decoder layer compiles faster; its teacher has two, so the encoder alone is distilled.
    low = dataclasses.replace(
        config,
        quant=student.quant,
        model=dataclasses.replace(config.model, backbone=tiny.BACKBONE, decoder_layers=1),
        distill=DistillConfig(weights=DistillationWeights(encoder=1.0)),
    )
    module = setup.build_module(low)
    first, _ = initial.initial_variables(low, module, load_model("TEACHER"), [other])
    optimizer = optim.make_optimizer(
        first["params"], low.optimizer, low.train.steps, frozen_norms=True, rules=MODEL_PARALLEL
    )
    state = TrainState.create(first["params"], first["batch_stats"], optimizer, ema=True)
    state = jax.device_get(state)
    step = make_train_step(low, detection_loss_fn(low, module, teacher.module()), optimizer)
    batches = [batch, {k: other[k] for k in TRAINED_KEYS}]


    def train(mesh, rules=(), between=None):
        # Losses and gradient norms of two steps, how far each parameter went in them, and the state
        # between them. A second step that starts from another mesh's `between` is compared alone:
        # Adam's first step is a sign, which a gradient near zero owes to the order of its sum.
        split = parameter_shardings(state, mesh, rules)
        losses, norms = [], []
        with jax.set_mesh(mesh):
            known = jax.device_put(teacher.variables, replicated(mesh))
            placed = jax.device_put(state, split)
            compiled = jit_train_step(step, placed, mesh)
            for number, values in enumerate(batches):
                if number == 1:
                    own = jax.device_get(placed)
                    placed = jax.device_put(own if between is None else between, split)
                placed, metrics = compiled(placed, known, put_batch(values, mesh))
                losses.append(float(metrics["loss"]))
                norms.append(float(metrics["gradient_norm"]))
        for leaf, wanted in zip(jax.tree.leaves(placed), jax.tree.leaves(split), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)
        moved = {}
        steps = ((state, own), (own if between is None else between, placed))
        for number, pair in enumerate(steps):
            before, after = (flatten_dict(x.params, sep="/") for x in pair)
            for path, x in before.items():
                y = np.asarray(after[path])
                assert np.isfinite(y).all(), path
                moved[number, path] = (y - np.asarray(x)).ravel()
        return losses, norms, moved, own


    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


    # A value at the edge of a grid may fall on the other side: close, then, but not equal.
    # Four parts of the batch, and kernels in two.
    rows_1, norms_1, moved_1, between = train(one)
    rows, norms, moved, _ = train(make_mesh(model=2), MODEL_PARALLEL, between)
    np.testing.assert_allclose(rows, rows_1, rtol=1e-3)
    np.testing.assert_allclose(norms, norms_1, rtol=1e-2)
    for number in (0, 1):
        both = [[x for key, x in m.items() if key[0] == number] for m in (moved, moved_1)]
        assert cosine(*map(np.concatenate, both)) > 0.99, number
    for key, wanted in moved_1.items():
        assert wanted.any() == moved[key].any(), key
        if key[1].endswith(("/kernel", "/kernel_step")) and wanted.any():
            assert cosine(moved[key], wanted) > 0.9, key

    # --- collectives --------------------------------------------------------------------------
    computations = {}
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\\w.\\-]+) (?:\\(.*)?.*\\{$", line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head.group(1), [])
        elif line.startswith(" "):
            current.append(line)
    called = re.compile(
        r"(?:body|condition|calls|to_apply)=%?([\\w.\\-]+)|branch_computations=\\{([^}]*)\\}"
    )
    COLLECTIVES = r"\\b(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


    def reachable(name, seen):
        if name in computations and name not in seen:
            seen.add(name)
            for line in computations[name]:
                for match in called.finditer(line):
                    for callee in re.findall(r"[\\w.\\-]+", match.group(1) or match.group(2)):
                        reachable(callee, seen)
        return seen


    # Dropout's random numbers are loops as well; the matcher is the one of the shard_map.
    loops = [line for lines in computations.values() for line in lines if " while(" in line]
    name = r'op_name="[^"]*shard_map/cond/branch_\\d+_fun/while"'
    matchers = [line for line in loops if re.search(name, line)]
    assert len(matchers) == 1, matchers
    # Its first state has a row for each problem of this device's share of the images.
    rows = int(re.search(r" = \\(\\w+\\[(\\d+)", matchers[0]).group(1))
    problems = len(config.model.query_sets) * config.model.decoder_layers * len(batch["images"])
    assert rows * 8 == problems, matchers
    for line in loops:
        for part in ("body", "condition"):
            start = re.search(part + r"=%?([\\w.\\-]+)", line).group(1)
            assert computations[start], line
            for name in reachable(start, set()):
                for inner in computations[name]:
                    assert not re.search(COLLECTIVES + r"(?:-start)?\\(", inner), (line, inner)
    # The parser must be able to find one: gradients are summed over devices somewhere.
    everything = [line for lines in computations.values() for line in lines]
    found = [line for line in everything if re.search(COLLECTIVES, line)]
    assert found, "no collective at all in a program on eight devices"
    print("loops", len(loops), "collectives", len(found))
"""


DEFORMABLE = """
    import sys

    sys.path[:0] = ["tests", "tests/models"]
    import dataclasses

    import jax
    import numpy as np
    import tiny
    from jax.sharding import AxisType
    from tiny_models import BUCKET, CONFIGS

    from aqdetr_jax.losses.criterion import LossWeights
    from aqdetr_jax.models.detector import build_detector
    from aqdetr_jax.training.config import AuxiliaryConfig, ExperimentConfig
    from aqdetr_jax.parallel.mesh import AXES, batch_sharding, make_mesh, put_batch, replicated
    from aqdetr_jax.parallel.placement import MODEL_PARALLEL, parameter_shardings
    from aqdetr_jax.training.step import detection_loss_fn

    model = dataclasses.replace(CONFIGS["two_stage"], dropout=0.0, decoder_layers=1)
    config = ExperimentConfig(
        model=model, loss=LossWeights(cls=2.0, kind="focal"), auxiliary=AuxiliaryConfig(repeats=2)
    )
    module = build_detector(model)
    rng = np.random.default_rng(0)
    mask = np.zeros((4, *BUCKET), bool)
    for i, (height, width) in enumerate([(24, 20), (16, 32), (24, 32), (20, 24)]):
        mask[i, :height, :width] = True
    valid = np.arange(3) < np.array([[2], [0], [1], [3]])
    boxes = rng.uniform(0.2, 0.6, (4, 3, 4)).astype("f4") * valid[..., None]
    labels = (rng.integers(0, 3, (4, 3)) * valid).astype("i4")
    images = (rng.integers(0, 256, (4, *BUCKET, 3)) * mask[..., None]).astype("u1")
    batch = dict(images=images, mask=mask, boxes=boxes, labels=labels, valid=valid)
    variables = tiny.random_variables(module, images, mask)
    loss_fn = detection_loss_fn(config, module, None)


    def run(mesh, rules=()):
        whole = replicated(mesh)
        split = parameter_shardings(variables["params"], mesh, rules)
        with jax.set_mesh(mesh):
            f = jax.jit(
                jax.value_and_grad(lambda p, s, b: loss_fn(p, s, None, b, 0), has_aux=True),
                in_shardings=(split, whole, batch_sharding(mesh)),
                out_shardings=whole,
            )
            params = jax.device_put(variables["params"], split)
            stats = jax.device_put(variables["batch_stats"], whole)
            (_, (terms, _)), gradients = jax.device_get(f(params, stats, put_batch(batch, mesh)))
        return terms, tiny.flat({"params": gradients})


    one = jax.make_mesh((1, 1), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    terms_1, gradients_1 = run(one)
    assert terms_1["num_boxes"] == 6 and terms_1["proposals/loss_giou"] > 0.1
    largest = max(float(np.abs(g).max()) for g in gradients_1.values())
    # Two parts of the batch, and kernels in two.
    terms, gradients = run(make_mesh(model=2), MODEL_PARALLEL)
    assert terms.keys() == terms_1.keys()
    for name, wanted in terms_1.items():
        np.testing.assert_allclose(terms[name], wanted, rtol=1e-5, err_msg=name)
    for path, wanted in gradients_1.items():
        scale = max(float(np.abs(wanted).max()), 1e-3 * largest)
        np.testing.assert_allclose(
            gradients[path] / scale, wanted / scale, rtol=1e-5, atol=1e-5, err_msg=path
        )
    print("agree")
"""


def test_two_stage_deformable_on_meshes(run_python):
    """Proposals, auxiliary queries and split heads: the same losses and gradients."""
    assert "agree" in run_python(DEFORMABLE, devices=4)


def test_meshes_agree_and_the_matcher_stays_local(run_python, tiny_teacher):
    output = run_python(PROGRAM.replace("TEACHER", str(tiny_teacher)), devices=8)
    assert "loops" in output
