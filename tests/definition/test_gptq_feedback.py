"""Row feedback: against the formula written out, and for what it is there to make small."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq.config import QuantizeConfig, Recipe
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Factor, prepare, solve
from tinygptq.gptq.feedback import factor_outputs, solve_in_parts

CONFIG = QuantizeConfig(bits=3, group_size=16, recipe=Recipe(clip=True, act_order=True))


def gram(size: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """``sum x x^T`` of vectors whose entries go together, some of them much larger than others."""
    mixing = rng.normal(size=(size, size)) * rng.uniform(0.2, 2, (size, 1)) + 2 * rng.normal(size=(size, 1))
    x = rng.normal(size=(tokens, size)) @ mixing.T
    return (x.T @ x).astype(np.float32)


def case(seed: int, out: int = 24, columns: int = 32):
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(out, columns)).astype(np.float32)
    return W, gram(columns, 200, rng), gram(out, 200, rng)


def solver(H: np.ndarray):
    factor = prepared(H)
    return lambda W: solve(W, factor, CONFIG, method="definition")


def prepared(H: np.ndarray) -> Factor:
    return prepare(H, CONFIG, method="definition")


def objective(A: np.ndarray, E: np.ndarray, H: np.ndarray) -> float:
    return float(np.trace(A.astype(np.float64) @ E @ H @ E.T))


@pytest.mark.parametrize("method", ["definition", "numba"])
def test_each_part_starts_where_the_formula_says(method):
    W, H, A = case(0)
    outputs, quantise, seen = factor_outputs(A, 0.7, method=method), solver(H), []

    def recorded(rows):
        seen.append(rows.copy())
        return quantise(rows)

    solution = solve_in_parts(W, H, prepared(H), [outputs], recorded, rows=7)
    assert sorted(outputs.order) == list(range(len(W)))
    assert (np.diff(A.diagonal()[outputs.order]) <= 0).all()
    A = 0.7 * A.astype(np.float64) + np.diag(0.3 * A.diagonal() + 1e-3 * A.diagonal().mean())
    A, E = A[np.ix_(outputs.order, outputs.order)], (W - solution.dequantize())[outputs.order]
    assert [len(rows) for rows in seen] == [7, 7, 7, 3]
    for part, start in enumerate(range(0, 24, 7)):
        # the rows from here on, free to take any value, at their best given the errors so far
        best = -np.linalg.solve(A[start:, start:], A[start:, :start] @ E[:start]) if start else 0 * E
        np.testing.assert_allclose(seen[part], W[outputs.order][start : start + 7] - best[:7], atol=2e-4)


def test_the_loss_is_that_of_the_whole_linear():
    W, H, A = case(1)
    solution = solve_in_parts(W, H, prepared(H), [factor_outputs(A, 0.5)], solver(H), rows=8)
    E = W.astype(np.float64) - solution.dequantize()
    H = H.astype(np.float64) + CONFIG.damp_percent * H.diagonal().mean() * np.eye(len(H))
    assert solution.loss == pytest.approx(np.trace(E @ H @ E.T) / 2, rel=1e-4)


def test_it_makes_the_objective_smaller():
    ratios = []
    for seed in range(8):
        W, H, A = case(seed)
        quantise = solver(H)
        plain = objective(A, W - quantise(W).dequantize(), H)
        solution = solve_in_parts(W, H, prepared(H), [factor_outputs(A, 1.0)], quantise, rows=4)
        ratios.append(objective(A, W - solution.dequantize(), H) / plain)
    assert max(ratios) < 0.8, ratios


def test_outputs_without_a_part_in_each_other_are_solved_as_before():
    W, H, A = case(2)
    alone, quantise = np.diag(A.diagonal()), solver(H)
    for outputs in (factor_outputs(alone, 1.0), factor_outputs(A, 0.0)):
        solution, plain = solve_in_parts(W, H, prepared(H), [outputs], quantise, rows=5), quantise(W)
        for field in ("codes", "scales", "zeros", "g_idx"):
            np.testing.assert_array_equal(getattr(solution, field), getattr(plain, field), err_msg=field)


def test_blocks_do_not_know_of_each_other():
    W, H, A = case(4)
    quantise, blocks = solver(H), [slice(0, 10), slice(10, 24)]
    solution = solve_in_parts(W, H, prepared(H), [factor_outputs(A[b, b], 0.8) for b in blocks], quantise, rows=4)
    for b in blocks:
        alone = solve_in_parts(W[b], H, prepared(H), [factor_outputs(A[b, b], 0.8)], quantise, rows=4)
        for field in ("codes", "scales", "zeros"):
            np.testing.assert_array_equal(getattr(solution, field)[b], getattr(alone, field), err_msg=field)


def test_an_output_that_nothing_depends_on_is_no_trouble():
    W, H, A = case(3)
    A[5] = A[:, 5] = 0
    assert np.isfinite(solve_in_parts(W, H, prepared(H), [factor_outputs(A, 1.0)], solver(H), rows=6).loss)
    assert np.isfinite(solve_in_parts(W, H, prepared(H), [factor_outputs(0 * A, 1.0)], solver(H), rows=6).loss)


def test_what_is_no_sum_of_products_is_refused():
    with pytest.raises(TinyGPTQError, match=r"^v: .* NaN or infinity"):
        factor_outputs(np.full((3, 3), np.nan, np.float32), 0.5, name="v")
    with pytest.raises(TinyGPTQError, match=r"^v: .* positive definite"):
        factor_outputs(np.array([[1, 2], [2, 1]], np.float32), 1.0, name="v")
