"""Weights that make up for what quantising has changed before them, against the regression that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Hessian, drift
from tinygptq.gptq.hessian import shrink


def text(tokens: int = 300, columns: int = 20, out: int = 7):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3, tokens // 3, columns)) @ rng.standard_normal((columns, columns))
    E = X @ rng.standard_normal((columns, out)) * 0.1 + rng.standard_normal((3, tokens // 3, out))
    return rng.standard_normal((out, columns)).astype(np.float32), X.astype(np.float32), E.astype(np.float32)


def test_the_target_solves_the_ridge_regression() -> None:
    """``min_T ||T x - (W x + e)||^2 + sum_k ridge[k] * (T - W)[:, k]^2``, by numpy's least squares on stacked rows."""
    W, X, E = text()
    hessian, cross = Hessian(20), drift.Cross()
    for x, e in zip(X, E, strict=True):
        hessian.add(x[None])
        cross.add(e[None], x[None])
    H = hessian.H
    found = drift.target(W, cross.C, drift.inverse(H))
    ridge = drift.RIDGE * H.diagonal() + drift.DAMP * H.diagonal().mean()
    x, e = X.reshape(-1, 20).astype(np.float64), E.reshape(-1, 7)
    n = len(X)
    rows = np.concatenate([x * np.sqrt(2 / n), np.diag(np.sqrt(ridge))])
    wanted = np.concatenate([e * np.sqrt(2 / n), np.zeros((20, 7))])
    expected = W + np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-4)


def test_both_factorings_give_the_same_target() -> None:
    W, X, E = text()
    hessian, cross = Hessian(20), drift.Cross()
    hessian.add(X)
    cross.add(E, X)
    a, b = (drift.target(W, cross.C, drift.inverse(hessian.H, method=method)) for method in ("numba", "definition"))
    assert np.allclose(a, b, atol=1e-5)


def test_inputs_that_are_never_seen_keep_their_weights() -> None:
    W, X, E = text()
    X[..., 4] = 0
    hessian, cross = Hessian(20), drift.Cross()
    hessian.add(X)
    cross.add(E, X)
    found = drift.target(W, cross.C, drift.inverse(hessian.H))
    assert np.array_equal(found[:, 4], W[:, 4])
    assert not np.allclose(found, W)


def test_an_indefinite_hessian_is_refused() -> None:
    with pytest.raises(TinyGPTQError, match="not positive definite"):
        drift.inverse(np.array([[1.0, 5.0], [5.0, 1.0]], np.float32))


def test_shrinking_takes_from_all_entries_but_the_diagonal() -> None:
    H = np.arange(9, dtype=np.float32).reshape(3, 3)
    H = H + H.T
    found = shrink(H, 0.25)
    assert found.dtype == np.float32
    assert np.array_equal(found.diagonal(), H.diagonal())
    off = ~np.eye(3, dtype=bool)
    assert np.allclose(found[off], 0.75 * H[off])
    assert shrink(H, 0.0) is H
