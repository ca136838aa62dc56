"""Every carrier gives the sums that NumPy takes in int64, and is what the chip multiplies fast."""

import dataclasses
import functools
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqdetr_jax.deploy.carriers import (
    BF16,
    CHIPS,
    DEVICE_KINDS,
    F8,
    F32,
    S4,
    S8,
    carried,
    chip_of,
    choose,
    integer_product,
)
from aqdetr_jax.planning.chips import KINDS
from aqdetr_jax.quant.contractions import Conv, Dense, Mix, MixSamples, Scores

U4, U8, SIGNED4, SIGNED8 = (0, 15), (0, 255), (-8, 7), (-128, 127)
HEADS = (np.array([-3, -15]).reshape(2, 1, 1), np.array([12, 0]).reshape(2, 1, 1))
"""Two heads' grids of 4 bits, each with a zero point."""

# Long enough for 8-bit sums that no float32 holds.
PRODUCTS = {
    "dense": (Dense(), (3, 1101), (1101, 5)),
    "conv": (Conv(strides=(2, 1), padding=((1, 2), (0, 1))), (2, 5, 4, 201), (3, 2, 201, 3)),
    "dilated": (Conv(padding=((2, 2), (2, 2)), dilation=(2, 2)), (1, 6, 5, 7), (3, 3, 7, 4)),
    "pointwise": (Conv(strides=(2, 2)), (2, 5, 4, 603), (1, 1, 603, 3)),
    "depthwise": (
        Conv(strides=(2, 1), padding=((1, 2), (2, 2)), depthwise=True),
        (2, 8, 6, 9),
        (5, 5, 1, 9),
    ),
    "scores": (Scores(), (1, 2, 3, 1101), (1, 2, 4, 1101)),
    "mix": (Mix(), (1, 2, 3, 1101), (1, 2, 1101, 4)),
}

CASES = [
    *itertools.product(PRODUCTS, ((U4, SIGNED4), (U8, SIGNED8), (U8, SIGNED4))),
    ("scores", (HEADS, SIGNED4)),
    ("scores", (HEADS, HEADS)),
    ("mix", (U4, HEADS)),
    ("mix", (U8, U8)),
    ("dense", (U8, U8)),
]


def oracle(contraction, a, b):
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    if isinstance(contraction, Dense):
        return a @ b
    if isinstance(contraction, Scores):
        return np.einsum("bhqd,bhkd->bhqk", a, b)
    if isinstance(contraction, Mix):
        return np.einsum("bhqk,bhkd->bhqd", a, b)
    (sh, sw), (dh, dw) = contraction.strides, contraction.dilation
    a = np.pad(a, ((0, 0), *contraction.padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        a, (dh * (b.shape[0] - 1) + 1, dw * (b.shape[1] - 1) + 1), (1, 2)
    )[:, ::sh, ::sw, :, ::dh, ::dw]
    if contraction.depthwise:
        return np.einsum("bijcuv,uvc->bijc", windows, b[:, :, 0])
    return np.einsum("bijcuv,uvcn->bijn", windows, b)


def widening(contraction):
    """The same product for a CPU, which cannot multiply int4."""
    kind = type(contraction)

    class Widening(kind):
        def contract(self, a, b, out_dtype):
            a, b = (x.astype(jnp.int8) if x.dtype == jnp.int4 else x for x in (a, b))
            return kind.contract(self, a, b, out_dtype)

    return Widening(**{f.name: getattr(contraction, f.name) for f in dataclasses.fields(kind)})


@functools.cache
def on_all_chips(name, index):
    """A jitted function of codes -> {chip: sums}, with every kind of carrier."""
    contraction, a_shape, b_shape = PRODUCTS[name]
    ranges = CASES[index][1]

    def products(a, b):
        found = {"here": integer_product(contraction, a, b, *ranges)}
        for chip in ("gpu", "v4", "v5e", "tpu7x"):
            choice = choose(chip, contraction, a_shape, b_shape, *ranges)
            found[chip] = carried(widening(contraction), choice, a, b, taps=chip == "gpu")
        return found

    return jax.jit(products)


def check(index, a, b):
    name = CASES[index][0]
    want = oracle(PRODUCTS[name][0], a, b)
    for chip, sums in on_all_chips(name, index)(a, b).items():
        assert sums.dtype == jnp.int32
        np.testing.assert_array_equal(sums, want, err_msg=chip)


def ids(case):
    def text(codes):
        return "heads" if codes is HEADS else f"{codes[0]}..{codes[1]}"

    return " ".join([case[0], *map(text, case[1])])


every_case = pytest.mark.parametrize("index", range(len(CASES)), ids=map(ids, CASES))


@every_case
def test_codes_at_their_ends(index):
    name, ranges = CASES[index]
    _, *shapes = PRODUCTS[name]
    for ends in itertools.product((0, 1), repeat=2):
        a, b = (
            np.broadcast_to(codes[end], shape).astype(np.int16)
            for codes, end, shape in zip(ranges, ends, shapes, strict=True)
        )
        check(index, a, b)


@every_case
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_codes(index, seed):
    name, ranges = CASES[index]
    _, *shapes = PRODUCTS[name]
    rng = np.random.default_rng(seed)
    a, b = (
        rng.integers(*np.broadcast_arrays(codes[0], codes[1] + 1), size=shape).astype(np.int16)
        for codes, shape in zip(ranges, shapes, strict=True)
    )
    check(index, a, b)


def test_a_float_sum_in_one_part_would_be_wrong():
    """What the parts are for: the largest codes of 8 bits, an odd number of odd products."""
    a, b = np.full((1, 1101), 255), np.full((1101, 1), 127)
    assert np.float32(oracle(Dense(), a, b)) != oracle(Dense(), a, b)
    ranges = (0, 255), (-127, 127)
    choice = choose("v4", Dense(), a.shape, b.shape, *ranges)
    np.testing.assert_array_equal(carried(Dense(), choice, a, b), oracle(Dense(), a, b))
    whole = choice._replace(part=1101)
    assert (np.asarray(carried(Dense(), whole, a, b)) != oracle(Dense(), a, b)).any()


# What is in the program that a chip's compiler is given: no operand wider than the carrier.
LOWERED = [
    ("v4", U4, SIGNED4, "bf16"),
    ("v5e", U4, SIGNED4, "i4"),
    ("v5p", U4, SIGNED4, "i4"),
    ("v6e", U4, SIGNED4, "i4"),
    ("v6e", U8, SIGNED4, "i8"),
    ("v5e", U8, SIGNED8, "i8"),
    ("tpu7x", U4, SIGNED4, "f8E4M3FN"),
    ("tpu7x", U8, SIGNED4, "bf16"),
    ("tpu", U4, SIGNED4, "bf16"),
    ("gpu", U4, SIGNED4, "i8"),
]


@pytest.mark.parametrize("name", ["dense", "conv", "scores", "mix"])
@pytest.mark.parametrize(("chip", "a_range", "b_range", "dtype"), LOWERED)
def test_what_a_compiler_is_given(name, chip, a_range, b_range, dtype):
    contraction, *shapes = PRODUCTS[name]
    a, b = (jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes)

    def product(a, b):
        return integer_product(
            contraction, a, b, a_range, b_range, "tpu" if chip == "gpu" else chip
        )

    platform = "cuda" if chip == "gpu" else "tpu"
    text = jax.jit(product).trace(a, b).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo\.(?:dot_general|convolution).*?: \((.*?)\) ->", text)
    assert found
    for operands in found:
        kinds = re.findall(r"tensor<[\dx]*x(\w+)>", operands)
        assert kinds == [dtype, dtype]


def test_choices():
    shapes = (850, 256), (256, 2048)
    heads = (1, 2, 3, 32), (1, 2, 4, 32)
    for chip in ("v5e", "v5p", "v6e"):
        assert choose(chip, Dense(), *shapes, U4, SIGNED4) == (S4, 8, 0, 256)
        assert choose(chip, Dense(), *shapes, SIGNED4, SIGNED4) == (S4, 0, 0, 256)
        assert choose(chip, Dense(), *shapes, U8, SIGNED4) == (S8, 128, 0, 256)
        assert choose(chip, Dense(), *shapes, (0, 7), (-4, 3)) == (S4, 0, 0, 256)
        found = choose(chip, Scores(), *heads, HEADS, SIGNED8)
        assert found[:2] == (S8, 0)  # -15 to 12, as they are
        found = choose(chip, Scores(), *heads, HEADS, SIGNED4)
        assert found.carrier == S4
        np.testing.assert_array_equal(found.a_shift, [[[5]], [[-7]]])
    assert choose("tpu7x", Dense(), *shapes, U4, SIGNED4) == (F8, 0, 0, 256)
    assert choose("tpu7x", Scores(), *heads, HEADS, HEADS) == (F8, 0, 0, 32)
    assert choose("tpu7x", Dense(), *shapes, U8, SIGNED4) == (BF16, 0, 0, 256)
    # 515 products of 255 and 128 may be no float32: parts of a channel's sum.
    assert choose("v4", Dense(), (1, 514), (514, 1), U8, SIGNED8) == (BF16, 0, 0, 514)
    assert choose("v4", Dense(), (1, 515), (515, 1), U8, SIGNED8) == (BF16, 0, 0, 258)
    assert choose("gpu", Dense(), *shapes, U4, SIGNED4) == (S8, 0, 0, 256)
    # A CPU's convolutions are floats, its other products bytes.
    kernel = (1, 8, 8, 64), (3, 3, 64, 64)
    assert choose("cpu", Conv(), *kernel, U4, SIGNED4) == (F32, 0, 0, 64)
    assert choose("cpu", Conv(), *kernel, U8, SIGNED8) == (F32, 0, 0, 32)
    assert choose("cpu", Conv(), (1, 8, 8, 64), (1, 1, 64, 64), U4, SIGNED4) == (S8, 0, 0, 64)
    assert choose("cpu", Dense(), *shapes, U8, SIGNED8) == (S8, 128, 0, 256)
    assert choose("v5e", MixSamples(), (1, 1, 1, 16), (1, 1, 1, 64), U8, SIGNED8).carrier == F32


def test_the_sums_of_constant_weights_are_constants():
    """On a TPU nothing sums weights: what a grid's move adds is part of the program."""
    weights = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)

    def lowered(function, *arguments):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()

    def product(a, b):
        return integer_product(Dense(), a, b, U4, SIGNED4, "v5e")

    a, b = jax.ShapeDtypeStruct((2, 4), jnp.uint8), jax.ShapeDtypeStruct((4, 4), jnp.int8)
    assert "stablehlo.reduce" in lowered(product, a, b)
    text = lowered(lambda a: product(a, weights), a)
    assert "stablehlo.reduce" not in text
    assert f"dense<{(8 * weights.sum(0)).tolist()}>" in text


def test_samples_are_summed_exactly():
    a = np.array([255, 254, 253, 1]).reshape(1, 1, 1, 4)
    b = np.arange(-128, 128, 32).reshape(1, 1, 1, 8)
    found = integer_product(MixSamples(), jnp.asarray(a), jnp.asarray(b), U8, SIGNED8)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found[0, 0, 0], a[0, 0, 0] @ b.reshape(4, 2))


def test_products_that_cannot_be_carried():
    with pytest.raises(ValueError, match=r"66000 products of codes in \(0, 255\).* exceed int32"):
        choose("v5e", Dense(), (1, 66000), (66000, 1), U8, SIGNED8)
    with pytest.raises(ValueError, match="unknown chip 'v5'; known ones are cpu, gpu, v4, v5e"):
        choose("v5", Dense(), (1, 2), (2, 1), U8, SIGNED8)
    with pytest.raises(ValueError, match=r"v5e has no carrier for 2 products of codes in \(0, 511"):
        choose("v5e", Dense(), (1, 2), (2, 1), (0, 511), SIGNED8)
    with pytest.raises(ValueError, match="v5e has no carrier"):  # kernels are signed
        choose("v5e", Conv(), (1, 2, 2, 1), (1, 1, 1, 1), U8, U8)
    with pytest.raises(ValueError, match="no carrier"):
        choose("cpu", MixSamples(), (1, 1, 1, 600), (1, 1, 1, 600), U8, SIGNED8)


def test_chips_by_whole_names(caplog):
    def found(kind, platform="tpu"):
        return chip_of(SimpleNamespace(platform=platform, device_kind=kind))

    assert {found(kind) for kind in DEVICE_KINDS} <= CHIPS.keys()
    assert found("TPU v5 lite") == "v5e"
    assert found("TPU v5") == "v5p"
    assert found("TPU7x") == "tpu7x"
    assert found("", "gpu") == "gpu"
    assert not caplog.text
    assert found("TPU v5 lite pod") == "tpu"
    assert "'TPU v5 lite pod' is no TPU whose integer products are known" in caplog.text
    assert chip_of(jax.devices("cpu")[0]) == "cpu"
    with pytest.raises(ValueError, match="'metal'"):
        found("", "metal")
    assert KINDS.keys() <= CHIPS.keys()  # what `plan` knows by name is known here
