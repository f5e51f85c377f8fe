"""The vector instructions against NumPy, lane by lane."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numba import njit

from tinygptq.kernels import simd


@njit
def run_exp(x, y):
    for i in range(0, x.size, 8):
        simd.store_f32(np.int64(y.ctypes.data) + 4 * i, simd.exp(simd.load_f32(np.int64(x.ctypes.data) + 4 * i)))


def exp(x):
    y = np.empty_like(x)
    run_exp(x, y)
    return y


def test_exp_within_two_units_in_the_last_place():
    x = np.linspace(-87.2, 88.3, 1 << 16, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exp(x) - exact) / exact) < 2 * np.finfo(np.float32).eps


def test_exp_at_the_ends():
    x = np.array([-np.inf, -1e30, -200.0, 0.0, 100.0, 1e30, np.inf, np.nan], np.float32)
    y = exp(x)
    assert y[:3].tolist() == [0, 0, 0] and y[3] == 1 and np.isinf(y[4:7]).all() and np.isnan(y[7])


@njit
def run_dot_pairs(a, b, y):
    pairs = simd.dot_pairs(simd.load_i32(np.int64(a.ctypes.data)), simd.load_i32(np.int64(b.ctypes.data)))
    simd.store_i32(np.int64(y.ctypes.data), pairs)


def test_dot_pairs_of_signed_halves():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-32768, 32768, (2, 16)).astype(np.int16)
    a[:2], b[:2] = 32767, -32768
    y = np.empty(8, np.int32)
    run_dot_pairs(a, b, y)
    assert np.array_equal(y, (a.astype(np.int32) * b).reshape(8, 2).sum(1))


@njit
def run_shift_halves(a, count, y):
    simd.store_i32(np.int64(y.ctypes.data), simd.shift_halves(simd.load_i32(np.int64(a.ctypes.data)), count))


def test_shift_halves_brings_zeros():
    a, y = np.arange(16, dtype=np.uint16) * 4369, np.empty(16, np.uint16)
    for count in (0, 3, 15):
        run_shift_halves(a, count, y)
        assert np.array_equal(y, a >> count)


@njit
def run_widen(x, half, brain):
    at = np.int64(x.ctypes.data)
    simd.store_f32(np.int64(half.ctypes.data), simd.load_f16(at))
    simd.store_f32(np.int64(brain.ctypes.data), simd.load_bf16(at))


def test_sixteen_bit_floats_widen_exactly():
    half, brain = np.empty(8, np.float32), np.empty(8, np.float32)
    for start in range(0, 1 << 16, 8):
        bits = np.arange(start, start + 8, dtype=np.uint16)
        run_widen(bits, half, brain)
        np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
        np.testing.assert_array_equal(brain, bits.view(ml_dtypes.bfloat16).astype(np.float32))


@njit
def run_totals(x, k):
    floats, integers = simd.load_f32(np.int64(x.ctypes.data)), simd.load_i32(np.int64(k.ctypes.data))
    return simd.total(floats), simd.largest(floats), simd.total_i32(integers)


@pytest.mark.parametrize("lane", range(8))
def test_reductions_reach_every_lane(lane):
    x, k = np.zeros(8, np.float32), np.zeros(8, np.int32)
    x[lane], k[lane] = 5.0, -7
    assert run_totals(x, k) == (5.0, 5.0, -7)
