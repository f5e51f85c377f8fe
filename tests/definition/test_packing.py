"""Packing against its one-sentence definition, evaluated with Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygptq.errors import TinyGPTQError
from tinygptq.packing import PackedLinear, pack, unpack

WIDTHS = (2, 3, 4, 8)


def words_of(codes: list[int], bits: int) -> list[int]:
    """Code i occupies bits [i*bits, (i+1)*bits) of one long number, which is cut into 32-bit words, lowest first."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]


@st.composite
def code_matrices(draw, widths=WIDTHS):
    bits = draw(st.sampled_from(widths))
    turns, columns = draw(st.integers(0, 5)), draw(st.integers(1, 6))
    count = turns * 32 // np.gcd(bits, 32)
    seed = draw(st.integers(0, 2**32 - 1))
    return bits, np.random.default_rng(seed).integers(0, 2**bits, (count, columns))


@given(code_matrices())
def test_pack_follows_the_definition(case):
    bits, codes = case
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (codes.shape[0] * bits // 32, codes.shape[1])
    for column in range(codes.shape[1]):
        assert words[:, column].tolist() == words_of(codes[:, column].tolist(), bits)


@given(code_matrices(widths=tuple(range(1, 17))))
def test_unpack_undoes_pack_at_any_width(case):
    bits, codes = case
    back = unpack(pack(codes, bits), bits, len(codes))
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert np.array_equal(back, codes)


@given(code_matrices(), st.data())
def test_unpack_stops_at_count_and_takes_signed_words(case, data):
    bits, codes = case
    count = data.draw(st.integers(0, len(codes)))
    assert np.array_equal(unpack(pack(codes, bits).view(np.int32), bits, count), codes[:count])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(96,), (96, 2), (96, 2, 3)])
def test_any_trailing_shape(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape)
    words = pack(codes, bits)
    assert words.shape == (96 * bits // 32, *shape[1:])
    assert np.array_equal(unpack(words, bits, 96), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_input_is_as_good_as_contiguous(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 64)).T  # (64, 5), Fortran order
    assert not codes.flags.c_contiguous
    words = pack(codes, bits)
    assert np.array_equal(words, pack(codes.copy(), bits))
    assert np.array_equal(unpack(np.asfortranarray(words), bits, 64), codes)


def test_three_bits_by_hand():
    codes = np.zeros(32, np.uint8)
    codes[[0, 10, 21]] = 7  # code 10 straddles words 0 and 1 at bit 30, code 21 words 1 and 2 at bit 63
    assert pack(codes, 3).tolist() == [0b111 | 0b11 << 30, 0b1 | 0b1 << 31, 0b11]


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (np.zeros(5, np.uint8), 4, "5 codes of 4 bits do not fill whole 32-bit words"),
        (np.full(8, 16), 4, "codes from 16 to 16 do not fit in 4 bits"),
        (np.full(8, -1), 4, "codes from -1 to -1 do not fit in 4 bits"),
        (np.arange(32), 3, "codes from 0 to 31 do not fit in 3 bits"),
    ],
)
def test_pack_refuses(codes, bits, message):
    with pytest.raises(TinyGPTQError) as error:
        pack(codes, bits)
    assert str(error.value) == message


def test_unpack_refuses_part_of_a_turn():
    with pytest.raises(TinyGPTQError, match=r"^4 words.* 3-word turns of 3 bits$"):
        unpack(np.zeros(4, np.uint32), 3, 32)


@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from([8, 32, 40, 96]),
    permuted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_linear_dequantizes_by_its_formula(bits, group, permuted, seed):
    rng = np.random.default_rng(seed)
    in_features, out_features = 96, 4
    groups = -(-in_features // group)
    codes = rng.integers(0, 2**bits, (in_features, out_features))  # rows sorted by group
    scales = rng.uniform(0.01, 1, (groups, out_features)).astype(np.float16)
    zeros = rng.integers(0, 2**bits + 1, (groups, out_features)).astype(np.uint16)
    perm = rng.permutation(in_features).astype(np.int32) if permuted else None
    layer = PackedLinear(pack(codes, bits), scales, zeros, bits, group, perm)
    assert (layer.in_features, layer.out_features) == (in_features, out_features)
    assert layer.nbytes == in_features * out_features * bits // 8 + scales.nbytes + groups * out_features * bits // 8
    weight = layer.dequantize()
    assert weight.dtype == np.float32
    for i in range(in_features):
        k = i if perm is None else perm[i]
        for n in range(out_features):
            scale, zero = float(scales[i // group, n]), int(zeros[i // group, n])
            assert weight[k, n] == np.float32(scale * (int(codes[i, n]) - zero))
