import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aqdetr_jax.deploy.bits import Codes, pack, packed_size, unpack


def test_bytes_by_hand():
    four = Codes(np.array([[-8, 7], [0, -1]], np.int8), 4)  # as distances from -8: 0 15 8 7
    assert pack(four).tolist() == [0xF0, 0x78]
    two = Codes(np.array([-2, -1, 0, 1, 1], np.int8), 2)  # 0 1 2 3 | 3
    assert pack(two).tolist() == [0b11_10_01_00, 0b11]
    three = Codes(np.arange(8, dtype=np.uint8), 3)  # 0..7, eight codes in three bytes
    stream = sum(code << 3 * place for place, code in enumerate(range(8)))
    assert pack(three).tolist() == list(stream.to_bytes(3, "little"))


@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    shape=hnp.array_shapes(max_dims=4, max_side=5, min_side=0, min_dims=0),
    seed=st.integers(0, 2**16),
)
def test_every_code_comes_back(bits, signed, shape, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.random.default_rng(seed).integers(low, low + 2**bits, shape)
    codes = Codes(np.asarray(values, np.int8 if signed else np.uint8), bits)
    data = pack(codes)
    assert data.nbytes == packed_size(codes.values.size, bits) == -(-codes.values.size * bits // 8)
    back = unpack(data, shape, bits, signed=signed)
    assert back.values.dtype == codes.values.dtype
    np.testing.assert_array_equal(back.values, codes.values)


@pytest.mark.parametrize(("values", "bits"), [([8], 4), ([-9], 4), ([2], 2), ([-5, 0], 3)])
def test_a_code_outside_its_grid_is_refused(values, bits):
    with pytest.raises(ValueError, match=f"outside the grid of {bits} bits"):
        pack(Codes(np.array(values, np.int8), bits))


def test_types_and_word_lengths_that_are_none_of_ours():
    with pytest.raises(ValueError, match="int16"):
        pack(Codes(np.zeros(3, np.int16), 4))
    with pytest.raises(ValueError, match="of 9 bits"):
        pack(Codes(np.zeros(3, np.int8), 9))


def test_other_bytes_than_those_of_the_codes():
    data = pack(Codes(np.zeros((3, 3), np.int8), 3))
    with pytest.raises(ValueError, match="not the bytes of 20 codes"):
        unpack(data, (10, 2), 3, signed=True)
    with pytest.raises(ValueError, match=r"not the bytes of 3 codes"):
        unpack(data, (3,), 3, signed=True)
    data = data.copy()
    data[-1] |= 0x80
    with pytest.raises(ValueError, match="after the last code"):
        unpack(data, (3, 3), 3, signed=True)
