from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from aqdetr_jax.training import optimizer as optim
from aqdetr_jax.training.config import OptimizerConfig

PARAMS = {
    "backbone": {
        "stem": {"kernel": jnp.full((3, 2), 0.5), "kernel_step": jnp.array([0.1, 0.2])},
        "stem_norm": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
    },
    "encoder": {
        "layer_0": {
            "norm1": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
            "self_attention": {
                "q_step": jnp.full((2, 1, 1), 0.3),
                "q_zero": jnp.float32(4.0),
                "query": {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.zeros(2)},
            },
        }
    },
    "query_embed": jnp.full((4, 2), 0.5),
}


@pytest.mark.parametrize(
    ("path", "frozen_norms", "group"),
    [
        ("backbone/stem/kernel", True, "backbone"),
        ("backbone/stem_norm/scale", True, "frozen"),
        ("backbone/stem_norm/bias", True, "frozen"),
        ("backbone/stem_norm/scale", False, "backbone"),
        ("backbone/stem/kernel_step", True, "steps"),
        ("backbone/layer1_0/conv1/input_step", False, "steps"),
        ("backbone/layer1_0/conv1/input_zero", False, "frozen"),
        ("encoder/layer_0/self_attention/q_proj/input_shift", True, "frozen"),
        ("encoder/layer_0/self_attention/q_proj/input_scale", True, "frozen"),
        ("encoder/layer_0/norm1/scale", True, "rest"),
        ("encoder/layer_0/self_attention/q_step", True, "steps"),
        ("encoder/layer_0/self_attention/q_zero", True, "frozen"),
        ("encoder/layer_0/self_attention/core/q_offset", True, "offsets"),
        ("backbone/stem/input_offset", True, "offsets"),
        ("decoder/layer_0/cross_attention/sampling_offsets/bias", True, "rest"),
        ("decoder/layer_0/cross_attention/alignment/scale", True, "rest"),
        ("input_proj/kernel", True, "rest"),
        ("query_embed", True, "rest"),
        ("auxiliary_queries", True, "rest"),
        ("class_head/bias", True, "rest"),
    ],
)
def test_group_of_typical_paths(path, frozen_norms, group):
    assert optim.group_of(path, OptimizerConfig(), frozen_norms=frozen_norms) == group


def test_frozen_patterns_cover_weights_and_their_steps():
    config = OptimizerConfig(frozen=("backbone/stem", r"query_embed$"))
    for path in ("backbone/stem/kernel", "backbone/stem/kernel_step", "query_embed"):
        assert optim.group_of(path, config, frozen_norms=False) == "frozen"
    assert optim.group_of("backbone/layer1_0/conv1/kernel", config, frozen_norms=False) != "frozen"


def test_count_trainable_leaves_out_what_is_frozen():
    total = sum(p.size for p in jax.tree.leaves(PARAMS))
    # Two backbone norm vectors and one zero point.
    assert optim.count_trainable(PARAMS, OptimizerConfig(), frozen_norms=True) == total - 5


def _update(config, gradients, *, params=PARAMS, count=1):
    """What some updates by the same gradients add to the parameters, the last of them."""
    optimizer = optim.make_optimizer(params, config, 100, frozen_norms=True)
    packing, state = optimizer.packing, optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.transformation.update(
            packing.pack(gradients), state, packing.pack(params)
        )
    return packing.unpack(updates, jax.tree.map(jnp.zeros_like, params))


def test_first_update_of_each_group():
    config = OptimizerConfig(
        lr=1e-2, lr_backbone=1e-3, lr_steps=1e-4, weight_decay=0.1, clip_norm=0.0, drop_at=()
    )
    updates = _update(config, jax.tree.map(jnp.ones_like, PARAMS))
    attention = updates["encoder"]["layer_0"]["self_attention"]
    # Adam's first step is the sign of the gradient; decay adds 0.1 * 0.5 to matrices only.
    np.testing.assert_allclose(attention["query"]["kernel"], -1e-2 * 1.05, rtol=1e-5)
    np.testing.assert_allclose(updates["query_embed"], -1e-2 * 1.05, rtol=1e-5)
    np.testing.assert_allclose(attention["query"]["bias"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["encoder"]["layer_0"]["norm1"]["scale"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["backbone"]["stem"]["kernel"], -1e-3 * 1.05, rtol=1e-5)
    # Step sizes move by a fraction of themselves, without decay.
    steps = updates["backbone"]["stem"]["kernel_step"]
    np.testing.assert_allclose(steps, [-1e-4 * 0.1, -1e-4 * 0.2], rtol=1e-5)
    np.testing.assert_allclose(attention["q_step"], -1e-4 * 0.3, rtol=1e-5)
    # Frozen: exactly nothing, whatever the gradient.
    assert float(attention["q_zero"]) == 0.0
    for leaf in updates["backbone"]["stem_norm"].values():
        np.testing.assert_array_equal(leaf, 0.0)


def test_offsets_move_by_steps_at_eight_times_the_rate_of_steps():
    params = {"v_offset": jnp.full((2, 1, 1), -3.0), "v_step": jnp.full((2, 1, 1), 0.25)}
    config = OptimizerConfig(lr_steps=1e-4, weight_decay=0.1, clip_norm=0.0, drop_at=())
    updates = _update(config, jax.tree.map(jnp.ones_like, params), params=params)
    np.testing.assert_allclose(updates["v_offset"], -8e-4, rtol=1e-5)  # whatever it is, no decay
    np.testing.assert_allclose(updates["v_step"], -1e-4 * 0.25, rtol=1e-5)
    after = {"v_offset": jnp.full(2, -3.0)}  # of either sign: no floor
    kept = optim.keep_steps_positive(after, {"v_offset": "offsets"})
    np.testing.assert_array_equal(kept["v_offset"], -3)


def test_clipping_ignores_frozen_parameters():
    """A huge gradient of a frozen parameter must not shrink the others' share of the norm."""
    config = OptimizerConfig(clip_norm=1.0, weight_decay=0.0, drop_at=())
    small = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), PARAMS)
    huge = jax.tree.map(lambda g: g, small)
    huge["backbone"]["stem_norm"]["scale"] = jnp.full(2, 1e6)
    jax.tree.map(np.testing.assert_array_equal, _update(config, small), _update(config, huge))


def test_clipping_limits_the_global_norm():
    config = OptimizerConfig(clip_norm=0.5, weight_decay=0.0, drop_at=())
    optimizer = optim.make_optimizer(PARAMS, config, 100, frozen_norms=True)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    pack = optimizer.packing.pack
    _, state = optimizer.transformation.update(
        pack(gradients), optimizer.init(PARAMS), pack(PARAMS)
    )
    mu = [s.mu for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
    total = sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(mu))
    # First moments are 0.1 of the clipped gradients, of which frozen ones are none.
    assert math.isclose(math.sqrt(total), 0.1 * 0.5, rel_tol=1e-5)


def _is_adam(node) -> bool:
    return type(node).__name__ == "ScaleByAdamState"


def test_step_sizes_are_projected_and_nothing_else():
    broken = {"steps": jnp.array([-1.0, 0.0, 2.0]), "rest": jnp.array([-1.0, 0.0])}
    fixed = optim.keep_steps_positive(broken, {"steps": "steps", "rest": "rest"})
    np.testing.assert_array_equal(
        fixed["steps"], np.float32([optim.STEP_FLOOR, optim.STEP_FLOOR, 2.0])
    )
    np.testing.assert_array_equal(fixed["rest"], [-1.0, 0.0])


# --- packing -------------------------------------------------------------------------------------


def test_packed_parameters():
    """Vectors and steps side by side by group, in the order of their names; nothing frozen."""
    packing = optim.make_optimizer(PARAMS, OptimizerConfig(), 1, frozen_norms=True).packing
    numbered = jax.tree.map(lambda p: jnp.zeros_like(p), PARAMS)
    numbered["encoder"]["layer_0"]["norm1"]["scale"] = jnp.array([3.0, 4.0])
    numbered["encoder"]["layer_0"]["self_attention"]["q_step"] = jnp.array([1.0, 2.0])[
        :, None, None
    ]
    packed = packing.pack(numbered)
    # norm1/bias, norm1/scale, query/bias; stem/kernel_step, q_step.
    np.testing.assert_array_equal(packed["packed"]["rest"], [0, 0, 3, 4, 0, 0])
    np.testing.assert_array_equal(packed["packed"]["steps"], [0, 0, 1, 2])
    assert set(packed["packed"]) == {"rest", "steps"}
    assert tiny.digest(packed["alone"]) == tiny.digest(
        {
            "backbone": {"stem": {"kernel": numbered["backbone"]["stem"]["kernel"]}},
            "encoder": {"layer_0": {"self_attention": {"query": {"kernel": jnp.zeros((2, 2))}}}},
            "query_embed": numbered["query_embed"],
        }
    )
    back = packing.unpack(packed, PARAMS)
    frozen = PARAMS["backbone"]["stem_norm"]
    wanted = {**numbered, "backbone": {**numbered["backbone"], "stem_norm": frozen}}
    wanted["encoder"]["layer_0"]["self_attention"]["q_zero"] = jnp.float32(4.0)
    assert tiny.digest(back) == tiny.digest(wanted)


def test_what_is_split_over_devices_is_not_packed():
    rules = ((r"query/(kernel|bias)$", PartitionSpec("model")),)
    packing = optim.make_optimizer(
        PARAMS, OptimizerConfig(), 1, frozen_norms=True, rules=rules
    ).packing
    packed = packing.pack(PARAMS)
    assert packed["packed"]["rest"].shape == (4,)
    alone = packed["alone"]["encoder"]["layer_0"]["self_attention"]["query"]
    assert set(alone) == {"kernel", "bias"}


def test_updates_are_those_of_plain_optax():
    """AdamW leaf by leaf, as optax does it to each parameter on its own, over several steps."""
    config = OptimizerConfig(
        lr=1e-2, lr_backbone=1e-3, lr_steps=1e-2, weight_decay=0.1, clip_norm=0.5, warmup=2
    )
    rng = np.random.default_rng(0)
    groups = optim.parameter_groups(PARAMS, config, frozen_norms=True)
    rates = {"rest": 1e-2, "backbone": 1e-3}
    factor = optim.learning_rate(config, 100)

    def adamw(rate):
        return optax.adamw(
            lambda t: rate * factor(t),
            weight_decay=0.1,
            mask=lambda tree: jax.tree.map(lambda p: getattr(p, "ndim", 0) > 1, tree),
        )

    relative = optax.chain(
        optax.scale_by_adam(),
        optim.relative_to_parameter(),
        optax.scale_by_schedule(lambda t: -1e-2 * factor(t)),
    )
    plain = optax.partition(
        {
            **{k: adamw(v) for k, v in rates.items()},
            "steps": relative,
            "frozen": optax.set_to_zero(),
        },
        groups,
    )
    optimizer = optim.make_optimizer(PARAMS, config, 100, frozen_norms=True)
    packing, state = optimizer.packing, optimizer.init(PARAMS)
    ours, theirs, plain_state = PARAMS, PARAMS, plain.init(PARAMS)
    for _ in range(5):
        gradients = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), PARAMS)
        norm = optax.tree.norm(
            jax.tree.map(lambda g, group: g * (group != "frozen"), gradients, groups)
        )
        clipped = jax.tree.map(lambda g, n=norm: g * jnp.minimum(1.0, 0.5 / n), gradients)
        updates, plain_state = plain.update(clipped, plain_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        packed = packing.pack(ours)
        updates, state = optimizer.transformation.update(packing.pack(gradients), state, packed)
        ours = packing.unpack(optax.apply_updates(packed, updates), ours)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), ours, theirs)


@pytest.mark.parametrize(
    ("config", "points"),
    [
        (
            OptimizerConfig(schedule="step", drop_at=(0.5, 0.8)),
            {0: 1.0, 49: 1.0, 50: 0.1, 79: 0.1, 80: 0.01, 99: 0.01},
        ),
        (
            OptimizerConfig(schedule="cosine", warmup=10, final=0.2),
            # 0.2 + 0.8 * (1 + cos(pi (t - 10) / 90)) / 2 after the warm-up.
            {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.6, 100: 0.2, 250: 0.2},
        ),
        (OptimizerConfig(schedule="constant", warmup=4), {0: 0.25, 3: 1.0, 99: 1.0}),
        (OptimizerConfig(schedule="constant"), {0: 1.0, 99: 1.0}),
    ],
)
def test_schedules_at_hand_computed_points(config, points):
    factor = optim.learning_rate(config, 100)
    for step, expected in points.items():
        assert float(factor(step)) == pytest.approx(expected, rel=1e-5), step
