"""The quantisation grid: what it spans, what is stored, and what odd rows become."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.grid import dequantize, find_grid, quantize

BITS = (2, 3, 4, 8)


def nearest(W: np.ndarray, bits: int, sym: bool, storage: str = "gptq") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale, zero = find_grid(W, bits, sym, storage)
    codes = quantize(W, scale[:, None], zero[:, None], 2**bits - 1)
    return dequantize(codes, scale[:, None], zero[:, None]), scale, zero


def random_rows(dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((50, 32)) * 0.05).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grid_spans_the_largest_magnitude(bits: int, dtype: type) -> None:
    W = random_rows(dtype)
    scale, zero = find_grid(W, bits, sym=True)
    assert scale.dtype == zero.dtype == dtype
    exact, stored = 2 * abs(W).max(axis=1) / (2**bits - 1), scale.astype(np.float16)
    assert np.array_equal(stored, scale)
    assert (scale <= exact).all()  # fp16, downwards
    assert (np.nextafter(stored, np.float16(np.inf)) > exact).all()
    assert (zero == 2 ** (bits - 1)).all()


def test_a_negative_peak_has_code_0_whatever_its_scale_is_rounded_to() -> None:
    W = -np.abs(random_rows()).max(axis=1, keepdims=True)
    scale, zero = find_grid(W, 4, sym=True)
    assert (quantize(W, scale[:, None], zero[:, None], 15) == 0).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_is_within_half_a_step(bits: int, sym: bool) -> None:
    W = random_rows()
    Q, scale, _ = nearest(W, bits, sym)
    # Rounding the scale to fp16 moves the ends of the grid by at most 2^-11 of their value; v1 storage widens the step.
    assert (abs(W - Q) <= scale[:, None] * (0.5 + 2.0**-10 * 2**bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_zero_point_is_the_code_of_zero(bits: int) -> None:
    W = random_rows() + np.float32(0.03)
    scale, zero = find_grid(W, bits, sym=False, storage="gptq_v2")
    assert np.array_equal(zero, np.rint(-W.min(axis=1) / scale))
    assert ((zero >= 0) & (zero <= 2**bits - 1)).all()
    assert (quantize(np.zeros(50, np.float32), scale, zero, 2**bits - 1) == zero).all()


@pytest.mark.parametrize("bits", BITS)
def test_zero_point_zero_exists_only_in_v2(bits: int) -> None:
    W = abs(random_rows())
    Q1, scale1, zero1 = nearest(W, bits, sym=False, storage="gptq")
    Q2, scale2, zero2 = nearest(W, bits, sym=False, storage="gptq_v2")
    assert (zero1 == 1).all()
    assert (zero2 == 0).all()
    assert (scale1 > scale2).all()
    for Q, scale in ((Q1, scale1), (Q2, scale2)):  # the largest weight has a code of its own in both
        assert (abs(W - Q).max(axis=1) <= scale * (0.5 + 2.0**-10 * 2**bits)).all()


def test_symmetric_grid_of_a_row_without_negative_weights_is_symmetric_too() -> None:
    W = abs(random_rows())
    assert np.array_equal(find_grid(W, 4, sym=True), find_grid(-W, 4, sym=True))


@pytest.mark.parametrize("sym", [True, False])
def test_zero_rows_stay_zero(sym: bool) -> None:
    Q, scale, _ = nearest(np.zeros((3, 8), np.float32), 4, sym)
    assert (Q == 0).all()
    assert (scale == np.float32(np.float16(2 / 15))).all()


@pytest.mark.parametrize("value", [0.7, -0.7])
def test_constant_rows(value: float) -> None:
    W = np.full((1, 8), value, np.float32)
    Q, scale, _ = nearest(W, 4, sym=True)
    assert (abs(Q - W) <= 0.51 * scale).all()
    Q, _, _ = nearest(W, 4, sym=False, storage="gptq_v2")
    assert np.allclose(Q, W, rtol=2**-10, atol=0)


def test_tiny_scales_are_subnormal_and_never_zero() -> None:
    W = np.array([[3e-5, -3e-5], [1e-9, -1e-9]], np.float32)
    scale, _ = find_grid(W, 4, sym=True)
    assert scale[0] == np.float32(np.float16(6e-5 / 15))
    assert 0 < scale[0] < 2.0**-14
    assert scale[1] == 2.0**-24
    assert (nearest(W, 4, sym=True)[0][1] == 0).all()


@pytest.mark.parametrize("sym", [True, False])
def test_scales_beyond_fp16_are_refused(sym: bool) -> None:
    W = np.array([[1e6, -1e6, 0.5]], np.float32)
    with pytest.raises(TinyGPTQError, match="65504"):
        find_grid(W, 2, sym)
    assert np.isfinite(find_grid(W, 8, sym)[0]).all()


def test_ties_go_to_the_even_multiple_and_codes_are_clipped() -> None:
    one, eight = np.float32(1), np.float32(8)
    w = np.array([-20, -8, -1.5, -0.5, 0.5, 1.5, 2.5, 7.4, 9], np.float32)
    codes = quantize(w, one, eight, 15)
    assert codes.tolist() == [0, 0, 6, 8, 8, 10, 10, 15, 15]
    assert dequantize(codes, one, eight).tolist() == [-8, -8, -2, 0, 0, 2, 2, 7, 7]
