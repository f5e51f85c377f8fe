"""Coordinate descent's Numba twin against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptq.gptq import refine, refine_numba


def problem(rows: int, columns: int, maxq: int, seed: int, dtype: type):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((2 * columns, columns)) @ (np.eye(columns) + rng.standard_normal((columns, columns)) / 4)
    H = X.T @ X + np.eye(columns)
    scale = rng.uniform(0.5, 2, (rows, columns))
    zero = rng.integers(0, maxq + 1, (rows, columns)).astype(float)
    codes = rng.integers(0, maxq + 1, (rows, columns)).astype(float)
    W = scale * (codes - zero + rng.standard_normal((rows, columns)))
    G = (W - scale * (codes - zero)) @ H
    return tuple(array.astype(dtype) for array in (G, H, codes, scale, zero))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 5, 40]),
    columns=st.integers(1, 60),
    maxq=st.sampled_from([3, 7, 15, 255]),
    passes=st.sampled_from([0, 1, 3, 50]),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_are_equal_in_float64(rows: int, columns: int, maxq: int, passes: int, seed: int) -> None:
    G, H, codes, scale, zero = problem(rows, columns, maxq, seed, np.float64)
    order = np.random.default_rng(seed).permutation(columns)
    kept = [array.copy() for array in (G, H, codes)]
    expected = refine.descend(G, H, codes, scale, zero, maxq, order, passes)
    found = refine_numba.descend(G, H, codes, scale, zero, maxq, order, passes)
    assert found.dtype == expected.dtype == np.float64
    assert np.array_equal(found, expected)
    for now, then in zip((G, H, codes), kept, strict=True):
        assert np.array_equal(now, then)


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_equal_in_float32(seed: int) -> None:
    G, H, codes, scale, zero = problem(100, 200, 15, seed, np.float32)
    W = scale * (codes - zero) + np.linalg.solve(H.astype(np.float64), G.T.astype(np.float64)).T
    errors = []
    for walk in (refine.descend, refine_numba.descend):
        D = W - scale * (walk(G, H, codes, scale, zero, 15, np.arange(200), 8) - zero)
        errors.append(((D @ H) * D).sum())
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    start = W - scale * (codes - zero)
    assert errors[1] < 0.9 * ((start @ H) * start).sum()
