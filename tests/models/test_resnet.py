"""Backbones: torchvision's layout, output strides, and the two batch norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from aqdetr_jax.models.layers import BatchNorm
from aqdetr_jax.models.resnet import BackboneConfig, BasicBlock, Bottleneck, ResNet, resnet_config


def convolutions(jaxpr):
    """(kernel size, stride, dilation) of every convolution in a jaxpr, in order."""
    found = []
    for equation in tiny.equations(jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"].rhs_spec
            shape = equation.invars[1].aval.shape
            kernel = shape[numbers[2]]
            options = equation.params
            found.append((kernel, options["window_strides"][0], options["rhs_dilation"][0]))
    return found


def traced(config, size=64):
    """(3x3 and shortcut-free layout, stage shapes) without running anything."""
    module = ResNet(config)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    jaxpr, shapes = jax.make_jaxpr(module.apply, return_shape=True)(variables, image)
    return convolutions(jaxpr.jaxpr), [s.shape for s in shapes], variables


@pytest.mark.parametrize(
    ("stride", "strides", "dilations"),
    [
        # torchvision, replace_stride_with_dilation: the first block keeps the dilation before it.
        (32, [2, 2, 2], {2: [1] * 4, 3: [1] * 6, 4: [1, 1, 1]}),
        (16, [2, 2, 1], {2: [1] * 4, 3: [1] * 6, 4: [1, 2, 2]}),
        (8, [2, 1, 1], {2: [1] * 4, 3: [1] + [2] * 5, 4: [2, 4, 4]}),
    ],
)
def test_layout_of_resnet50(stride, strides, dilations):
    config = resnet_config("resnet50", output_stride=stride)
    found, shapes, _ = traced(config)
    assert config.output_stride == stride
    assert shapes[-1] == (1, 64 // stride, 64 // stride, 2048) == (*shapes[-1][:3], 2048)
    assert config.output_channels == 2048
    assert found[0] == (7, 2, 1)
    middle = [(s, d) for k, s, d in found if k == 3]
    assert [d for _, d in middle] == [1] * 3 + dilations[2] + dilations[3] + dilations[4]
    firsts = [middle[3][0], middle[7][0], middle[13][0]]
    assert firsts == strides
    assert sum(s for s, _ in middle) == len(middle) + strides.count(2)
    assert len(found) == 53


def test_dc5_is_output_stride_16():
    assert resnet_config("resnet101", dc5=True) == resnet_config("resnet101", output_stride=16)


@pytest.mark.parametrize(
    ("name", "convolutions_weights"),
    # 11 689 512 and 21 797 672 parameters in torchvision, less the classifier and the norms.
    [
        ("resnet18", 11_689_512 - 513_000 - 9_600),
        ("resnet34", 21_797_672 - 513_000 - 17_024),
        ("resnet50", 23_454_912),
        ("resnet101", 42_394_816),
    ],
)
def test_convolution_weights(name, convolutions_weights):
    _, _, variables = traced(resnet_config(name), 32)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    kernels = sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")
    assert kernels == convolutions_weights


def test_bad_configurations_are_refused():
    with pytest.raises(ValueError, match="unknown backbone 'resnet5'"):
        resnet_config("resnet5")
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        resnet_config("resnet50", output_stride=4)
    with pytest.raises(ValueError, match="one entry per stage"):
        BackboneConfig(depths=(1, 2))


RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, (2, 3, 4, 5)).astype(np.float32)
VARIABLES = {
    "params": {
        "scale": RNG.normal(1, 0.3, 5).astype(np.float32),
        "bias": RNG.normal(size=5).astype(np.float32),
    },
    "batch_stats": {
        "mean": RNG.normal(size=5).astype(np.float32),
        "var": RNG.uniform(0.5, 2, 5).astype(np.float32),
    },
}


def affine(x, mean, var):
    scale, bias = VARIABLES["params"]["scale"], VARIABLES["params"]["bias"]
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize("train", [False, True])
def test_frozen_norm_is_an_affine_map_of_its_statistics(train):
    stats = VARIABLES["batch_stats"]
    out, updates = BatchNorm(True).apply(VARIABLES, X, train=train, mutable=["batch_stats"])
    np.testing.assert_allclose(out, affine(X, stats["mean"], stats["var"]), rtol=2e-5, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], stats)
    learning = BatchNorm(False).apply(VARIABLES, X, train=False)
    np.testing.assert_array_equal(BatchNorm(True).apply(VARIABLES, X), learning)


def test_learning_norm_uses_and_updates_statistics():
    out, updates = BatchNorm(False, momentum=0.8).apply(
        VARIABLES, X, train=True, mutable=["batch_stats"]
    )
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    np.testing.assert_allclose(out, affine(X, mean, var), rtol=2e-5, atol=2e-5)
    for name, new in (("mean", mean), ("var", var)):
        expected = 0.8 * VARIABLES["batch_stats"][name] + 0.2 * new
        np.testing.assert_allclose(updates["batch_stats"][name], expected, rtol=1e-5)


def test_only_the_learning_norm_has_gradients():
    def loss(params, frozen):
        variables = {**VARIABLES, "params": params}
        out, _ = BatchNorm(frozen).apply(variables, X, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(out))

    frozen = jax.grad(loss)(VARIABLES["params"], True)
    learning = jax.grad(loss)(VARIABLES["params"], False)
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(frozen[name], 0)
        assert np.all(np.asarray(learning[name]) != 0)


def test_residual_branches_start_at_zero_when_learning():
    x = jnp.zeros((1, 2, 2, 4))
    block = BasicBlock(8, frozen=False)

    @jax.jit
    def norms(key):
        params = block.init(key, x)["params"]
        return {name: value for name, value in params.items() if "norm" in name}

    params = norms(jax.random.key(0))
    np.testing.assert_array_equal(params["norm2"]["scale"], 0)
    np.testing.assert_array_equal(params["norm1"]["scale"], 1)
    np.testing.assert_array_equal(params["shortcut_norm"]["scale"], 1)


# --- the same numbers from NumPy: loops over output cells, float64 ---


def randomized(module, x):
    """All variables random, norm statistics too: a zero bias or unit scale would hide a swap."""
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def one(path, leaf):
        name = path[-1].key
        if name == "kernel":
            spread = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return rng.normal(0, spread, leaf.shape).astype(np.float32)
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.5, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, variables)


def np_windows(x, size, stride, dilation, padding, fill=0.0):
    """[B, H', W', size, size, C]: what each output cell sees."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = np.pad(x, pads, constant_values=fill)
    reach = dilation * (size - 1) + 1
    height, width = ((n - reach) // stride + 1 for n in x.shape[1:3])
    out = np.empty((x.shape[0], height, width, size, size, x.shape[3]))
    for i, j in np.ndindex(height, width):
        top, left = i * stride, j * stride
        out[:, i, j] = x[:, top : top + reach : dilation, left : left + reach : dilation]
    return out


def relu(x):
    return np.maximum(x, 0)


def np_conv(variables, name, x, stride=1, dilation=1):
    """torchvision's convolution without bias and the norm after it."""
    kernel = np.float64(variables["params"][name]["kernel"])
    size = kernel.shape[0]
    windows = np_windows(x, size, stride, dilation, dilation if size == 3 else size // 2)
    x = np.einsum("bhwijc,ijcn->bhwn", windows, kernel)
    name = {"shortcut": "shortcut_norm", "stem": "stem_norm"}.get(name, f"norm{name[4:]}")
    affine, stats = variables["params"][name], variables["batch_stats"][name]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return x * affine["scale"] + affine["bias"]


def np_basic(variables, x, stride=1, dilation=1):
    """torchvision's BasicBlock; the dilation is ours."""
    y = relu(np_conv(variables, "conv1", x, stride, dilation))
    y = np_conv(variables, "conv2", y, 1, dilation)
    return relu(y + np_shortcut(variables, x, stride))


def np_bottleneck(variables, x, stride=1, dilation=1):
    """torchvision's Bottleneck, "V1.5": the 3x3 convolution has the stride."""
    y = relu(np_conv(variables, "conv1", x))
    y = relu(np_conv(variables, "conv2", y, stride, dilation))
    y = np_conv(variables, "conv3", y)
    return relu(y + np_shortcut(variables, x, stride))


def np_shortcut(variables, x, stride):
    return np_conv(variables, "shortcut", x, stride) if "shortcut" in variables["params"] else x


BLOCKS = {"basic": (BasicBlock, np_basic, 1), "bottleneck": (Bottleneck, np_bottleneck, 4)}


def close_to(got, expected):
    assert got.shape == expected.shape
    assert (np.asarray(got) > 0).mean() > 0.2  # not a dead picture
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 2), (1, 2)])
def test_block_agrees_with_numpy(kind, stride, dilation):
    module, restated, growth = BLOCKS[kind]
    # Stride 1 keeps the input as the shortcut, stride 2 has a convolution there.
    channels = 3 * growth if stride == 1 else 5
    x = np.random.default_rng(2).normal(size=(2, 7, 8, channels)).astype(np.float32)
    block = module(3, stride, dilation)
    variables = randomized(block, x)
    assert ("shortcut" in variables["params"]) == (stride == 2)
    close_to(jax.jit(block.apply)(variables, x), restated(variables, x, stride, dilation))


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_backbone_agrees_with_numpy(kind, pool):
    config = BackboneConfig(
        kind,
        depths=(1, 2),
        widths=(3, 6),
        strides=(1, 2),
        dilations=(1, 2),
        stem_width=3,
        stem_kernel=7 if pool else 3,
        stem_pool=pool,
    )
    module = ResNet(config)
    x = np.random.default_rng(3).normal(size=(1, 27, 22, 3)).astype(np.float32)
    variables = randomized(module, x)

    def part(name):
        return {collection: tree[name] for collection, tree in variables.items()}

    y = relu(np_conv(variables, "stem", x, 2))
    if pool:
        y = np_windows(y, 3, 2, 1, 1, -np.inf).max((3, 4))
    block = BLOCKS[kind][1]
    first = block(part("layer1_0"), y)
    second = block(part("layer2_0"), first, 2, 1)
    second = block(part("layer2_1"), second, 1, 2)
    for got, expected in zip(jax.jit(module.apply)(variables, x), (first, second), strict=True):
        close_to(got, expected)
