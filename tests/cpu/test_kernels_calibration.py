"""Products of the calibration text against their definition in float64: x in 16-bit integers, and no more lost than that."""

from __future__ import annotations

import numpy as np
import pytest
from random_models import packed

from tinygptq.errors import TinyGPTQError
from tinygptq.kernels import cpu, cpu_calibration, reference
from tinygptq.kernels.cpu_calibration import MANY_ROWS
from tinygptq.kernels.cpu_integers import HEIGHT, ROWS_AT_ONCE
from tinygptq.weights import DenseLinear

ACCURACY = 5e-6  # of the output's norm: float32 sums, and a few inputs in thousands whose rounding is a tie but for noise
ROUNDING = 2e-4  # what rounding x to 16 bits may cost, where its sizes differ by four orders of magnitude


def inputs(rows: int, K: int, seed: int = 1) -> np.ndarray:
    """float32 [rows, K] whose sizes differ by orders of magnitude, as activations do."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, K)) * 10.0 ** rng.uniform(-3, 1, K)).astype(np.float32)


def apart(y: np.ndarray, expected: np.ndarray) -> float:
    assert y.dtype == np.float32 and y.shape == expected.shape
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("K", "N", "group"),
    [
        (576, 192, 64),
        (576, 48, 128),  # the last group is shorter
        (1536, 40, -1),  # several stretches in a group, and outputs that fill no tile
        (640, 24, 300),  # stretches and groups that fill no unit
        (96, 24, 48),
        (64, 56, 1),
    ],
)
@pytest.mark.parametrize("perm", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_the_product_is_that_of_rounded_inputs(bits, K, N, group, perm, sym):
    layer = packed(K, N, bits, group, sym=sym, perm=perm, bias=perm, wide=not sym)
    x = inputs(MANY_ROWS + 7, K)
    y, exact = cpu_calibration.linear(x, layer), x.astype(np.float64)
    assert apart(y, reference.matmul_16bit(exact, layer)) < ACCURACY
    assert apart(y, reference.matmul(exact, layer)) < ROUNDING


@pytest.mark.parametrize("rows", [MANY_ROWS, *range(4 * ROWS_AT_ONCE - HEIGHT, 4 * ROWS_AT_ONCE + HEIGHT + 1)])
def test_every_remainder_of_rows(rows):
    layer, x = packed(64, 24, 4, 32, sym=False), inputs(rows, 64)
    assert apart(cpu_calibration.linear(x, layer), reference.matmul_16bit(x.astype(np.float64), layer)) < ACCURACY


def test_batches_keep_their_shape():
    layer, x = packed(64, 24, 4, 32), inputs(2 * MANY_ROWS, 64).reshape(2, MANY_ROWS, 64)
    y = cpu_calibration.linear(x, layer)
    assert y.shape == (2, MANY_ROWS, 24)
    assert np.array_equal(y[1], cpu_calibration.linear(x[1], layer))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_nan_or_infinity_becomes_nan_and_no_other(bad):
    layer, x = packed(64, 24, 4, 32), inputs(MANY_ROWS, 64)
    x[5, 3] = bad
    y = cpu_calibration.linear(x, layer)
    assert np.isnan(y[5]).all()
    assert np.isfinite(np.delete(y, 5, axis=0)).all()


def test_zeros_stay_zeros():
    assert not cpu_calibration.linear(np.zeros((MANY_ROWS, 64), np.float32), packed(64, 24, 4, 32)).any()


def test_few_rows_and_dense_linears_are_cpu_s():
    layer, dense = packed(64, 24, 4, 32), DenseLinear(np.ones((24, 64), np.float32))
    few, many = inputs(MANY_ROWS - 1, 64), inputs(MANY_ROWS, 64)
    assert np.array_equal(cpu_calibration.linear(few, layer), cpu.linear(few, layer))
    assert np.array_equal(cpu_calibration.linear(many, dense), cpu.linear(many, dense))


def test_another_width_is_refused():
    with pytest.raises(TinyGPTQError, match="32 features, the linear expects 64"):
        cpu_calibration.linear(inputs(MANY_ROWS, 32), packed(64, 24, 4, 32))
