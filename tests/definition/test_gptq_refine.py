"""The second pass over codes and scales: what it may change, and that it finds the best it looks for."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.gptq import Factor, Solution, prepare, solve
from tinygptq.gptq.refine import descend, refine, refit_scales

CONFIG = QuantizeConfig(bits=3, group_size=16, recipe=replace(RECIPES["fast"], refine=2))


def problem(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights and the Hessian of correlated inputs, float32."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    return (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32), (X.T @ X / 4).astype(np.float32)


def solved(W: np.ndarray, H: np.ndarray, config: QuantizeConfig) -> tuple[Solution, Factor]:
    factor = prepare(H, config)
    return solve(W, factor, config), factor


def error(W: np.ndarray, H: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """Each row's ``(w - q) H (w - q)^T`` in float64."""
    D = W.astype(np.float64) - Q
    return ((D @ H) * D).sum(axis=1)


def damped(H: np.ndarray, factor: Factor) -> np.ndarray:
    H = H.astype(np.float64)
    np.fill_diagonal(H, factor.importance)
    return H


def one_step_away(codes: np.ndarray, maxq: int):
    """Every row of codes that differs from this one in a single place, by any amount."""
    for i, c in itertools.product(range(len(codes)), range(maxq + 1)):
        if c != codes[i]:
            other = codes.copy()
            other[i] = c
            yield other


@pytest.mark.parametrize("sym", [True, False])
def test_no_single_code_can_be_better(sym: bool) -> None:
    rng = np.random.default_rng(1)
    W, H = (array.astype(np.float64) for array in problem(4, 10))
    H += np.eye(10)
    scale = np.repeat(rng.uniform(0.008, 0.02, (4, 2)), 5, axis=1)
    zero = np.full((4, 10), 4.0) if sym else rng.integers(0, 8, (4, 1)) + np.zeros((4, 10))
    start = rng.integers(0, 8, (4, 10)).astype(np.float64)
    codes = descend((W - scale * (start - zero)) @ H, H, start, scale, zero, 7, np.arange(10), 100)
    assert codes.min() >= 0
    assert codes.max() <= 7
    for r in range(4):
        least = error(W[r : r + 1], H, scale[r] * (codes[r] - zero[r]))[0]
        others = [error(W[r : r + 1], H, scale[r] * (c - zero[r]))[0] for c in one_step_away(codes[r], 7)]
        assert min(others) >= least * (1 - 1e-9)
    assert (error(W, H, scale * (codes - zero)) <= error(W, H, scale * (start - zero))).all()


def test_scales_solve_the_least_squares_problem() -> None:
    """Against numpy's own least squares on the root of H, for scales that fp16 hardly rounds."""
    W, H = (array.astype(np.float64) for array in problem(6, 24))
    H += np.eye(24) * H.diagonal().mean()
    g_idx = np.random.default_rng(0).permutation(np.arange(24) // 8)
    C = np.random.default_rng(1).integers(-4, 4, (6, 24)).astype(np.float64)
    true = np.random.default_rng(2).uniform(0.01, 0.02, (6, 3))
    W = true[:, g_idx] * C + W / 100
    root = np.linalg.cholesky(H)  # H = root root^T
    found = refit_scales(W @ H, H, C, true * 1.1, g_idx)
    for r in range(6):
        design = np.stack([root.T @ np.where(g_idx == g, C[r], 0) for g in range(3)], axis=1)  # (in, G)
        expected = np.linalg.lstsq(design, root.T @ W[r], rcond=None)[0]
        assert np.allclose(found[r], expected, rtol=2**-10)
    assert np.array_equal(found, found.astype(np.float16))


def test_a_group_without_codes_and_hopeless_fits_keep_their_scales() -> None:
    W, H = problem(3, 16)
    H += np.eye(16, dtype=np.float32)
    scales = np.full((3, 2), 0.01, np.float16).astype(np.float32)
    C = np.ones((3, 16), np.float32)
    C[:, 8:] = 0
    g_idx = np.arange(16) // 8
    assert np.array_equal(refit_scales(W @ H, H, C, scales, g_idx)[:, 1], scales[:, 1])
    opposite = -np.ones((3, 16), np.float32)  # the best scales are negative
    assert np.array_equal(refit_scales(opposite @ H, H, np.ones((3, 16), np.float32), scales, g_idx), scales)


@pytest.mark.parametrize("method", ["definition", "numba"])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(2, 16, True), (3, 20, False), (4, -1, True), (8, 32, True)])
def test_no_row_gets_worse_and_the_layer_gets_better(
    method: str, desc_act: bool, bits: int, group_size: int, sym: bool
) -> None:
    W, H = problem(12, 72)
    config = QuantizeConfig(bits, group_size, desc_act, sym, recipe=CONFIG.recipe)
    before, factor = solved(W, H, config)
    kept = W.copy(), H.copy(), before.codes.copy(), before.scales.copy()
    after = refine(W, H, before, factor, config, method=method)
    Hd = damped(H, factor)
    worse = error(W, Hd, after.dequantize()) / error(W, Hd, before.dequantize())
    assert worse.max() < 1 + 1e-4
    assert worse.mean() < 0.97
    assert after.loss == pytest.approx(error(W, Hd, after.dequantize()).sum() / 2, rel=1e-3)
    assert (after.codes.dtype, after.scales.dtype) == (np.uint8, np.float16)
    assert after.codes.max() <= config.max_code
    assert np.array_equal(after.zeros, before.zeros)
    assert np.array_equal(after.g_idx, before.g_idx)
    for now, then in zip((W, H, before.codes, before.scales), kept, strict=True):
        assert np.array_equal(now, then)


def test_dead_inputs_stay_zero() -> None:
    W, H = problem(8, 48)
    H[:, 5] = H[5] = 0
    before, factor = solved(W, H, CONFIG)
    after = refine(W, H, before, factor, CONFIG)
    assert (after.dequantize()[:, 5] == 0).all()
    assert after.loss < before.loss


def test_large_systems_are_solved_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinygptq.gptq import refine as module

    W, H = problem(40, 64)
    before, factor = solved(W, H, CONFIG)
    whole = refine(W, H, before, factor, CONFIG)
    monkeypatch.setattr(module, "BYTES_AT_ONCE", 8 * 4 * 4 * 7)  # seven rows of four groups
    pieces = refine(W, H, before, factor, CONFIG)
    assert (pieces.codes == whole.codes).mean() > 0.99
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-3)
