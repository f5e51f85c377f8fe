"""x @ W on the CPU against the definition in float64: every width, group size, order, zero point, bias and row count."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from random_models import ACCURACY, assert_close, inputs, packed

from tinygptq.errors import TinyGPTQError
from tinygptq.kernels import cpu, cpu_layout, reference
from tinygptq.packing import PackedLinear, pack
from tinygptq.weights import DenseLinear


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("K", "N", "group"),
    [
        (576, 192, 64),
        (576, 48, 128),  # the last group is shorter
        (160, 40, -1),
        (1536, 8, 32),
        (96, 24, 48),  # groups that do not fill whole units
        (64, 16, 1000),  # a group larger than the layer
        (64, 56, 1),
    ],
)
@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_packed_product_matches_the_definition(bits, K, N, group, perm, sym):
    layer = packed(K, N, bits, group, sym=sym, perm=perm, bias=perm, wide=not sym)
    for rows in (1, 2, 5, 9, 33):
        x = inputs(rows, K)
        assert_close(cpu.linear(x, layer), x, layer)


@pytest.mark.parametrize("rows", range(1, 10))
def test_every_small_number_of_rows(rows):
    layer = packed(64, 24, 4, 32, sym=False)
    assert_close(cpu.linear(inputs(rows, 64), layer), inputs(rows, 64), layer)


@pytest.mark.parametrize("K", [8, 24, 40])
def test_input_sizes_that_fill_no_unit(K):
    layer = packed(K, 8, 4, -1)
    for rows in (1, 40):
        assert_close(cpu.linear(inputs(rows, K), layer), inputs(rows, K), layer)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("K", "N"), [(576, 192), (70, 37), (3, 1), (33, 17)])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_product_matches_the_definition(dtype, K, N, bias):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((N, K)).astype(dtype)
    layer = DenseLinear(weight, rng.standard_normal(N).astype(np.float32) if bias else None)
    for rows in (1, 4, 33):
        x = np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float32)
        y, expected = cpu.linear(x, layer), reference.matmul(x.astype(np.float64), layer)
        # a lone output can cancel to nearly nothing: measured against what was added up
        scale = np.abs(x.astype(np.float64)) @ np.abs(layer.dequantize()) + 1.0
        assert np.max(np.abs(y - expected) / scale) < ACCURACY


def test_leading_axes_and_strides_of_x_are_kept():
    layer = packed(64, 24, 4, 32)
    x = np.asfortranarray(inputs(6, 64).reshape(2, 3, 64))
    x.flags.writeable = False
    assert np.array_equal(cpu.linear(x, layer).reshape(6, 24), cpu.linear(inputs(6, 64), layer))


def test_outputs_do_not_depend_on_the_other_rows():
    layer, x = packed(576, 64, 4, 64), inputs(7, 576)
    together = cpu.linear(x, layer)
    assert all(np.array_equal(cpu.linear(x[i], layer), together[i]) for i in range(7))


def test_extreme_inputs():
    layer = packed(64, 24, 4, 32)
    zero, tiny, huge = np.zeros((1, 64), np.float32), inputs(1, 64) * 1e-20, inputs(1, 64) * 1e25
    assert not cpu.linear(zero, layer).any()
    for x in (tiny, huge):
        assert_close(cpu.linear(x.astype(np.float32), layer), x.astype(np.float32), layer)
    one_large = np.full((1, 64), 1e-3, np.float32)
    one_large[0, 5] = 1e3
    assert_close(cpu.linear(one_large, layer), one_large, layer)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_inputs_are_seen_in_the_outputs(bad):
    layer, x = packed(64, 24, 4, 32), inputs(2, 64)
    x[1, 3] = bad
    y = cpu.linear(x, layer)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


def test_all_codes_at_both_ends_do_not_overflow():
    for bits in (2, 3, 4, 8):
        K = 2048
        codes = np.full((K, 8), 2**bits - 1)
        ones, scales = np.zeros((1, 8), np.uint16), np.ones((1, 8), np.float16)
        layer = PackedLinear(pack(codes, bits), scales, ones, bits, K)
        x = np.ones((1, K), np.float32)
        assert np.allclose(cpu.linear(x, layer), K * (2**bits - 1), rtol=1e-6)
        assert np.allclose(cpu.linear(-x, layer), -K * (2**bits - 1), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_row_of_a_unit_has_its_own_place(bits):
    word, shift = cpu_layout.place_of_rows(bits)
    taken = [(w, s + b) for w, s in zip(word, shift, strict=True) if w >= 0 for b in range(bits)]
    spread = [(w, s) for s in shift[word < 0] for w in range(bits)]
    assert sorted(taken + spread) == [(w, b) for w in range(bits) for b in range(32)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_prepared_codes_take_no_more_room(bits):
    layer = packed(576, 64, bits, 64)
    prepared = cpu.prepare(layer)
    assert prepared.arrays[0].nbytes == layer.qweight.nbytes
    assert prepared.nbytes == layer.qweight.nbytes + layer.scales.nbytes


def test_wrong_input_size_is_one_line():
    with pytest.raises(TinyGPTQError, match="an input has 32 features, the linear expects 64"):
        cpu.linear(np.zeros((1, 32), np.float32), packed(64, 8, 4, 32))


def test_unknown_weight_type_is_one_line():
    with pytest.raises(TinyGPTQError, match="float64"):
        cpu.linear(np.zeros((1, 4), np.float32), DenseLinear(np.zeros((2, 4))))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(192, 576), (3, 37)])
def test_a_dense_weight_is_widened_exactly(dtype, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    wide = cpu.widened(DenseLinear(weight))
    assert wide.dtype == np.float32
    assert np.array_equal(wide, weight.astype(np.float32))
