"""Convolution and its gradients against sums over the kernel's taps, and the form by platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import signal

from aqdetr_jax.ops import convolution
from aqdetr_jax.ops.convolution import (
    Window,
    convolve,
    input_gradient,
    kernel_gradient,
    same_padding,
)
from aqdetr_jax.quant.contractions import Conv


def taps(window, kernel, result):
    """(tap, index of the input cells that it reads) of the padded input."""
    spans = [s * (n - 1) + 1 for s, n in zip(window.strides, result, strict=True)]
    for i, j in np.ndindex(*kernel):
        top, left = i * window.dilation[0], j * window.dilation[1]
        yield (
            (i, j),
            np.s_[
                :,
                top : top + spans[0] : window.strides[0],
                left : left + spans[1] : window.strides[1],
            ],
        )


def padded(window, x):
    return np.pad(x, ((0, 0), *window.padding, (0, 0)))


def restated(window, x, kernel, cotangent):
    """Result and both gradients in float64, a product a tap, transposed by hand."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    around = padded(window, x)
    size = [
        (around.shape[1 + i] - window.dilation[i] * (kernel.shape[i] - 1) - 1) // window.strides[i]
        + 1
        for i in (0, 1)
    ]
    if cotangent is None:
        cotangent = np.random.default_rng(1).normal(size=(len(x), *size, kernel.shape[3]))
    g = np.asarray(cotangent, np.float32).astype(np.float64)
    result = np.zeros(g.shape)
    dx, dk = np.zeros(around.shape), np.zeros(kernel.shape)
    for (i, j), cells in taps(window, kernel.shape[:2], size):
        result += around[cells] @ kernel[i, j]
        dx[cells] += g @ kernel[i, j].T
        dk[i, j] = np.einsum("bhwc,bhwn->cn", around[cells], g)
    (top, _), (left, _) = window.padding
    return result, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dk, g.astype("f4")


def close(got, expected):
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6 * scale)


def all_directions(window, x, w, g):
    return (
        convolve(window, x, w, jnp.float32),
        input_gradient(window, g, w, x.shape, jnp.float32),
        kernel_gradient(window, x, g, w.shape[:2], jnp.float32),
    )


pairs = functools.partial(st.tuples)


@given(
    seed=st.integers(0, 2**31 - 1),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 5)]),
    strides=pairs(st.integers(1, 3), st.integers(1, 3)),
    dilation=pairs(st.integers(1, 2), st.integers(1, 2)),
    padding=pairs(*[pairs(st.integers(0, 2), st.integers(0, 2))] * 2),
    size=pairs(st.integers(1, 11), st.integers(1, 11)),
    channels=pairs(st.sampled_from([1, 3, 9]), st.sampled_from([1, 4, 7])),
    by_taps=st.booleans(),
)
@example(  # XLA exchanges this gradient's operands for ones that do not fit, and ends the process
    seed=0,
    kernel=(2, 3),
    strides=(2, 3),
    dilation=(1, 1),
    padding=((1, 2), (1, 1)),
    size=(4, 5),
    channels=(3, 4),
    by_taps=True,
)
@settings(max_examples=20)
def test_every_direction_against_sums_over_taps(
    seed, kernel, strides, dilation, padding, size, channels, by_taps
):
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(n, r) for n, r in zip(size, reach, strict=True)]
    window = Window(strides, padding, dilation)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *size, channels[0])).astype(np.float32)
    w = rng.normal(size=(*kernel, *channels)).astype(np.float32)
    y, dx, dw, g = restated(window, x, w, None)
    with pytest.MonkeyPatch.context() as patch:
        if by_taps:
            patch.setattr(convolution, "LARGE_COTANGENT", 0)
            patch.setattr(convolution, "FEW_CHANNELS", 0)
        got = jax.jit(functools.partial(all_directions, window))(x, w, g)
    for mine, expected in zip(got, (y, dx, dw), strict=True):
        close(mine, expected)


def spread(x, gaps):
    """A plane with ``gap - 1`` zeros between neighbours."""
    out = np.zeros([g * (n - 1) + 1 for g, n in zip(gaps, x.shape, strict=True)])
    out[:: gaps[0], :: gaps[1]] = x
    return out


def by_scipy(window, x, kernel, g):
    """Depthwise result and gradients, a plane at a time, of SciPy's two-dimensional filters."""
    y, dx, dk = np.zeros(g.shape), np.zeros(x.shape), np.zeros(kernel.shape)
    (top, _), (left, _) = window.padding
    for b, c in np.ndindex(len(x), x.shape[3]):
        plane = np.pad(x[b, :, :, c].astype(float), window.padding)
        weights = spread(kernel[:, :, 0, c], window.dilation)
        coarse = g[b, :, :, c].astype(float)
        y[b, :, :, c] = signal.correlate2d(plane, weights, "valid")[
            :: window.strides[0], :: window.strides[1]
        ]
        fine = np.zeros([n - r + 1 for n, r in zip(plane.shape, weights.shape, strict=True)])
        fine[:: window.strides[0], :: window.strides[1]] = coarse
        full = signal.convolve2d(fine, weights, "full")
        dx[b, :, :, c] = full[top : top + x.shape[1], left : left + x.shape[2]]
        dk[:, :, 0, c] += signal.correlate2d(plane, fine, "valid")[
            :: window.dilation[0], :: window.dilation[1]
        ]
    return y, dx, dk


def depthwise_case(seed, kernel, window, size, channels, draw):
    rng = np.random.default_rng(seed)
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilation, kernel, strict=True)]
    size = [max(n, r) for n, r in zip(size, reach, strict=True)]
    x, w = (draw(rng, s).astype("f4") for s in ((2, *size, channels), (*kernel, 1, channels)))
    shape = jax.eval_shape(lambda x, w: convolve(window, x, w, jnp.float32), x, w).shape
    return x, w, draw(rng, shape).astype("f4")


@given(
    seed=st.integers(0, 2**31 - 1),
    kernel=st.sampled_from([(3, 3), (5, 5), (2, 3), (1, 1)]),
    strides=pairs(st.integers(1, 3), st.integers(1, 3)),
    dilation=pairs(st.integers(1, 2), st.integers(1, 2)),
    padding=pairs(*[pairs(st.integers(0, 2), st.integers(0, 2))] * 2),
    size=pairs(st.integers(1, 11), st.integers(1, 11)),
    channels=st.sampled_from([1, 3, 8]),
)
@settings(max_examples=15)
def test_depthwise_in_every_direction_against_scipy(
    seed, kernel, strides, dilation, padding, size, channels
):
    window = Window(strides, padding, dilation, depthwise=True)
    x, w, g = depthwise_case(seed, kernel, window, size, channels, lambda r, s: r.normal(size=s))
    got = jax.jit(functools.partial(all_directions, window))(x, w, g)
    for mine, expected in zip(got, by_scipy(window, x, w, g), strict=True):
        assert mine.dtype == jnp.float32
        close(mine, expected)


DEPTHWISE = Window((2, 2), ((1, 2), (1, 2)), depthwise=True)


@pytest.mark.accelerator
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_depthwise_sums_of_integers_are_exact(dtype):
    given = depthwise_case(3, (5, 5), DEPTHWISE, (8, 12), 4, lambda rng, s: rng.integers(-8, 8, s))
    low = [jnp.asarray(a, dtype) for a in given]
    got = jax.jit(functools.partial(all_directions, DEPTHWISE))(*low)
    for mine, exact in zip(got, by_scipy(DEPTHWISE, *given), strict=True):
        np.testing.assert_array_equal(mine, exact)


def test_whole_depthwise_numbers_stay_whole():
    x, w, g = depthwise_case(
        3, (5, 5), DEPTHWISE, (8, 12), 4, lambda rng, s: rng.integers(-128, 128, s)
    )
    got = jax.jit(
        lambda x, w: Conv(depthwise=True, strides=(2, 2), padding=DEPTHWISE.padding).integers(x, w)
    )(x.astype(np.int32), w.astype(np.int32))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, by_scipy(DEPTHWISE, x, w, g)[0])


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_depthwise_forms_by_platform(platform):
    """A CPU has no convolution of single channels; accelerators are left XLA's."""
    given = depthwise_case(3, (3, 3), DEPTHWISE, (8, 12), 4, lambda rng, s: rng.normal(size=s))
    traced = jax.jit(functools.partial(all_directions, DEPTHWISE)).trace(*given)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == (0 if platform == "cpu" else 3)
    assert "stablehlo.dot_general" not in text
    assert ("stablehlo.while" in text) == (platform == "cpu")


def test_derivatives_of_a_depthwise_convolution():
    x, w, g = depthwise_case(4, (3, 3), DEPTHWISE, (8, 12), 4, lambda rng, s: rng.normal(size=s))
    _, pullback = jax.vjp(lambda x, w: convolve(DEPTHWISE, x, w, jnp.float32), x, w)
    for mine, expected in zip(pullback(g), by_scipy(DEPTHWISE, x, w, g)[1:], strict=True):
        close(mine, expected)


@pytest.mark.parametrize(
    ("length", "size", "stride", "padding"),
    # TensorFlow: ceil(n / stride) results; of an odd number of zeros one more after the end.
    [
        (8, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (8, 5, 2, (1, 2)),
        (7, 5, 2, (2, 2)),
        (8, 5, 1, (2, 2)),
        (1, 3, 2, (1, 1)),
        (6, 1, 2, (0, 0)),
    ],
)
def test_same_padding(length, size, stride, padding):
    assert same_padding((length, 8), size, stride)[0] == padding
    assert same_padding((8, length), size, stride)[1] == padding


SHAPES = {
    "pointwise": ((1, 1), Window(), (2, 6, 5, 8), 4),
    "pointwise_wide": ((1, 1), Window(), (2, 6, 5, 4), 8),
    "pointwise_strided": ((1, 1), Window((2, 2)), (2, 7, 6, 4), 4),
    "square": ((3, 3), Window((2, 2), ((1, 1), (1, 1))), (2, 7, 6, 4), 4),
}


def case(name, integers=False):
    kernel, window, shape, features = SHAPES[name]
    rng = np.random.default_rng(3)
    draw = (lambda s: rng.integers(-8, 8, s)) if integers else (lambda s: rng.normal(size=s))
    x, w = draw(shape).astype(np.float32), draw((*kernel, shape[3], features)).astype(np.float32)
    shape = jax.eval_shape(lambda x, w: convolve(window, x, w, jnp.float32), x, w).shape
    return window, x, w, draw(shape).astype(np.float32)


@pytest.mark.accelerator
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_sums_of_integers_are_exact(name, dtype):
    window, x, w, g = case(name, integers=True)
    expected = restated(window, x, w, g)
    low = [jnp.asarray(a, dtype) for a in (x, w, g)]
    got = jax.jit(functools.partial(all_directions, window))(*low)
    for mine, exact in zip(got, expected[:3], strict=True):
        np.testing.assert_array_equal(mine, exact)


@pytest.mark.parametrize("name", SHAPES)
def test_its_derivatives_are_the_two_functions(name):
    window, x, w, g = case(name)
    _, dx, dw, _ = restated(window, x, w, g)
    y, pullback = jax.vjp(lambda x, w: convolve(window, x, w, jnp.float32), x, w)
    got = pullback(jnp.asarray(g))
    assert y.dtype == jnp.float32
    for mine, expected in zip(got, (dx, dw), strict=True):
        close(mine, expected)


FORMS = ("convolution", "dot_general")


@pytest.mark.parametrize(
    ("platform", "forms"),
    [("cpu", {"pointwise": "dot_general", "square": "convolution"}), ("tpu", {}), ("cuda", {})],
)
def test_the_form_is_that_of_the_platform_compiled_for(platform, forms):
    """Lowered on this host: what is compiled ahead for a TPU is XLA's convolution throughout."""
    for name in SHAPES:
        window, x, w, g = case(name)
        traced = jax.jit(functools.partial(all_directions, window)).trace(x, w, g)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = {form: text.count(f"stablehlo.{form}") for form in FORMS}
        form = forms.get(name.split("_")[0], "convolution")
        assert found == {other: 3 if other == form else 0 for other in FORMS}, name


def test_a_large_cotangent_is_taken_tap_by_tap_on_a_cpu_only():
    window = Window(padding=((1, 1), (1, 1)))
    few, many = (jax.ShapeDtypeStruct((1, 64, 64, n), jnp.float32) for n in (16, 64))
    for x, rows, platform, products in (
        (many, 8, "cpu", 9),
        (many, 4, "cpu", 0),
        (few, 8, "cpu", 0),
        (many, 8, "tpu", 0),
    ):
        x, g = (jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for a in (x, many))
        gradient = jax.jit(lambda x, g: kernel_gradient(window, x, g, (3, 3), jnp.float32))
        text = gradient.trace(x, g).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general") == products
        assert text.count("stablehlo.convolution") == (0 if products else 1)


@pytest.mark.parametrize(("platform", "dtype"), [("tpu", "f32"), ("cpu", "f32"), ("cuda", "bf16")])
def test_dtype_of_a_bfloat16_kernel_gradient_by_platform(platform, dtype):
    """Nothing is computed: what would be compiled asks for float32 where the platform gives it."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.bfloat16)
    window = Window(padding=((1, 1), (1, 1)))
    gradient = jax.jit(lambda x, y: kernel_gradient(window, x, y, (3, 3), jnp.float32))
    text = gradient.trace(x, x).lower(lowering_platforms=(platform,)).as_text()
    (line,) = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert line.endswith(f"-> tensor<3x3x4x4x{dtype}>")
    assert jax.eval_shape(gradient, x, x).dtype == jnp.float32


def test_a_batch_of_several_devices_stays_where_it_is(run_python):
    """The loop over rows sums no images, so that only the finished gradient is added up."""
    run_python(
        """
        import re

        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from aqdetr_jax.ops.convolution import Window, convolve
        from aqdetr_jax.parallel.mesh import make_mesh

        mesh, window = make_mesh(data=2), Window((2, 2), ((1, 2), (1, 2)), depthwise=True)

        def total(x, kernel):
            return jnp.sum(jnp.sin(convolve(window, x, kernel, jnp.float32)))

        x, kernel = (
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in (
                ((4, 16, 24, 8), PartitionSpec("data")),
                ((5, 5, 1, 8), PartitionSpec()),
            )
        )
        with jax.set_mesh(mesh):
            text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, kernel).compile().as_text()
        collective = r"= (\\S+) (?:all-|collective-|reduce-scatter)[a-z-]*\\("
        found = re.findall(collective, text)
        assert len(found) == 1 and found[0].startswith("f32[25,8]"), found
        """,
        devices=2,
    )
