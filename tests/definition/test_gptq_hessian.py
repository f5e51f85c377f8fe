"""The streaming Hessian: the sum it promises, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Hessian
from tinygptq.gptq.hessian import columns_reordered, reordered


def activations(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streaming_gives_two_over_n_times_the_sum_of_outer_products(dtype: type) -> None:
    X = activations(6, 10, 24)  # 6 sequences of 10 tokens
    hessian = Hessian(24, dtype)
    hessian.add(X[:3])
    hessian.add(X[3])  # [T, in] is one sequence
    hessian.add(X[4:])
    hessian.add(X[:0])
    want = sum(2 / 6 * np.outer(x, x).astype(np.float64) for x in X.reshape(60, 24).astype(np.float64))
    assert hessian.n_samples == 6
    assert hessian.H.dtype == dtype
    assert np.allclose(hessian.H, want, rtol=0, atol=1e-5 if dtype is np.float32 else 1e-12)
    assert np.array_equal(hessian.H, hessian.H.T)


def test_adding_leaves_the_activations_alone() -> None:
    X = activations(2, 5, 8)
    before = X.copy()
    hessian = Hessian(8)
    hessian.add(X)
    first = hessian.H
    hessian.add(X)
    assert np.array_equal(X, before)
    assert np.allclose(hessian.H, first, rtol=1e-6)  # twice the sum over twice the sequences


def test_what_is_taken_is_not_kept() -> None:
    hessian, X = Hessian(8), activations(2, 5, 8)
    hessian.add(X)
    kept = hessian.H
    assert np.array_equal(hessian.take(), kept)
    with pytest.raises(TinyGPTQError, match="empty"):
        _ = hessian.H
    hessian.add(2 * X)
    assert np.allclose(hessian.H, 4 * kept, rtol=1e-6)  # nothing of what was


def test_dead_inputs_are_those_never_seen() -> None:
    X = activations(2, 5, 8)
    X[..., [1, 6]] = 0
    hessian = Hessian(8)
    hessian.add(X)
    assert hessian.dead.tolist() == [k in (1, 6) for k in range(8)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_activations_that_are_not_finite_are_refused_and_leave_no_trace(value: float) -> None:
    hessian = Hessian(8)
    hessian.add(activations(2, 5, 8))
    before = hessian.H
    X = activations(2, 5, 8)
    X[1, 2, 3] = value
    with pytest.raises(TinyGPTQError, match=r"NaN, infinity .*input 3 of 8"):
        hessian.add(X)
    assert hessian.n_samples == 2
    assert np.array_equal(hessian.H, before)


@pytest.mark.parametrize("shape", [(2, 5, 7), (8,), (1, 2, 5, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TinyGPTQError, match="expected"):
        Hessian(8).add(activations(*shape))


def test_an_empty_hessian_is_an_error() -> None:
    with pytest.raises(TinyGPTQError, match="no calibration activations"):
        _ = Hessian(8).H


@pytest.mark.parametrize("size", [1, 7, 600])  # the last one is shared among threads
def test_rows_and_columns_are_reordered_together(size: int) -> None:
    H, order = activations(size, size), np.random.default_rng(2).permutation(size)
    assert np.array_equal(reordered(H, order), H[np.ix_(order, order)])


@pytest.mark.parametrize("rows", [1, 7, 600])
def test_columns_are_reordered_alone(rows: int) -> None:
    W, order = activations(rows, 1024), np.random.default_rng(2).permutation(1024)
    reordered_W = columns_reordered(W, order)
    assert np.array_equal(reordered_W, W[:, order]) and reordered_W.flags.c_contiguous
