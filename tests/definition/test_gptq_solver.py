"""GPTQ's definition: the paper's equations, and what follows from them."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Solution, prepare, round_to_nearest, solve, solver
from tinygptq.gptq.grid import dequantize, find_grid, quantize

METHODS = ("definition", "numba")
plain = functools.partial(QuantizeConfig, recipe=RECIPES["plain"])  # the paper's algorithm


def problem(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Random weights and the Hessian of correlated random inputs, float64."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((tokens or 4 * columns, columns)) @ rng.standard_normal((columns, columns))
    X *= np.exp(rng.standard_normal(columns) / 2)
    return rng.standard_normal((rows, columns)) * 0.02, 2 / 8 * X.T @ X


def define(W: np.ndarray, H: np.ndarray, config: QuantizeConfig) -> Solution:
    return solve(W, H, config, method="definition", dtype=np.float64)


def same(a: Solution, b: Solution) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "zeros", "g_idx"))


def damped(H: np.ndarray, damp: float) -> np.ndarray:
    return H + damp * H.diagonal().mean() * np.eye(len(H))


def test_it_solves_equation_2_of_the_paper_column_by_column() -> None:
    """Equations 2 and 3: the inverse Hessian of the columns left is computed anew at each step, with no Cholesky factor."""
    W, H = problem(5, 24)
    config = plain(bits=4, group_size=8)
    Hd, left, codes = damped(H, 0.01), W.copy(), np.empty(W.shape, np.uint8)
    for i in range(24):
        if i % 8 == 0:
            scale, zero = find_grid(left[:, i : i + 8], 4, True)
        inverse = np.linalg.inv(Hd[i:, i:])
        codes[:, i] = quantize(left[:, i], scale, zero, 15)
        error = left[:, i] - dequantize(codes[:, i].astype(float), scale, zero)
        left[:, i:] -= np.outer(error / inverse[0, 0], inverse[0])
    assert np.array_equal(define(W, H, config).codes, codes)


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
@pytest.mark.parametrize("group_size", [-1, 8, 20, 48])
def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch, block: int, group_size: int) -> None:
    W, H = problem(6, 100)
    config = plain(bits=3, group_size=group_size, sym=False, desc_act=True)
    whole = define(W, H, config)
    monkeypatch.setattr(solver, "B", block)
    assert same(define(W, H, config), whole)


@pytest.mark.parametrize("desc_act", [False, True])
def test_loss_is_half_the_trace_under_the_damped_hessian(desc_act: bool) -> None:
    """Err Hinv = W - Q row by row, and Hinv^T Hinv is the inverse of the damped H: summing Err^2 gives the trace exactly.

    With H = 2/n sum x x^T that is 1/n sum ||(W - Q) x||^2 plus damp * mean(diag(H)) / 2 * ||W - Q||^2.
    """
    W, H = problem(9, 60)
    solution = define(W, H, plain(group_size=16, desc_act=desc_act, damp_percent=0.05))
    scale, zero = solution.scales[:, solution.g_idx].astype(float), solution.zeros[:, solution.g_idx].astype(float)
    D = W - dequantize(solution.codes.astype(float), scale, zero)
    assert solution.loss == pytest.approx(np.trace(D @ damped(H, 0.05) @ D.T) / 2, rel=1e-9)


def test_rounding_reports_the_same_loss() -> None:
    W, H = problem(9, 60)
    rounded = round_to_nearest(W, plain(group_size=16), H)
    D = W - rounded.dequantize()
    assert rounded.loss == pytest.approx(np.trace(D @ damped(H, 0.01) @ D.T) / 2, rel=1e-4)
    assert np.isnan(round_to_nearest(W, plain(group_size=16)).loss)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sym", [True, False])
def test_uncorrelated_inputs_leave_nothing_to_correct(method: str, sym: bool) -> None:
    """A diagonal H has a diagonal factor: GPTQ is rounding to nearest then, code for code."""
    W, _ = problem(9, 100)
    config = plain(group_size=48, sym=sym)
    assert same(solve(W, np.eye(100), config, method=method), round_to_nearest(W, config))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_it_beats_rounding_on_correlated_inputs(method: str, bits: int, group_size: int) -> None:
    for seed in range(3):
        W, H = problem(32, 128, seed)
        for desc_act in (False, True):
            config = plain(bits=bits, group_size=group_size, desc_act=desc_act)
            assert solve(W, H, config, method=method).loss < 0.9 * round_to_nearest(W, config, H).loss


def test_eight_bits_lose_next_to_nothing() -> None:
    W, H = problem(16, 128)
    Q = solve(W, H, plain(bits=8, group_size=32)).dequantize()
    D = W - Q
    assert np.trace(D @ H @ D.T) < 1e-4 * np.trace(W @ H @ W.T)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_independent(method: str) -> None:
    W, H = problem(70, 40)
    config = plain(group_size=16, sym=False)
    order = np.random.default_rng(3).permutation(70)
    whole = solve(W, H, config, method=method, dtype=np.float64)
    shuffled = solve(W[order], H, config, method=method, dtype=np.float64)
    assert np.array_equal(shuffled.codes, whole.codes[order])
    assert np.array_equal(shuffled.scales, whole.scales[order])
    assert np.array_equal(solve(W[5:6], H, config, method=method, dtype=np.float64).codes, whole.codes[5:6])


@pytest.mark.parametrize("method", METHODS)
def test_act_order_does_not_depend_on_the_order_of_the_inputs(method: str) -> None:
    W, H = problem(8, 40)
    order = np.random.default_rng(4).permutation(40)
    config = plain(group_size=16, desc_act=True)
    a = solve(W, H, config, method=method, dtype=np.float64)
    b = solve(W[:, order], H[np.ix_(order, order)], config, method=method, dtype=np.float64)
    assert np.array_equal(b.codes, a.codes[:, order])
    assert np.array_equal(b.g_idx, a.g_idx[order])
    assert np.array_equal(b.scales, a.scales)


def test_act_order_keeps_the_order_of_equals() -> None:
    W, H = problem(8, 40)
    H /= np.sqrt(np.outer(H.diagonal(), H.diagonal()))
    np.fill_diagonal(H, 1)
    assert np.array_equal(prepare(H, plain(desc_act=True)).perm, np.arange(40))
    assert same(define(W, H, plain(desc_act=True)), define(W, H, plain()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [-1, 16, 1000])
def test_g_idx(method: str, group_size: int) -> None:
    W, H = problem(3, 40)
    k = np.arange(40)
    size = 16 if group_size == 16 else 40
    order = np.argsort(-H.diagonal())
    rank = np.empty(40, int)
    rank[order] = k
    for desc_act, static, want in ((0, 0, k // size), (0, 1, k // size), (1, 0, rank // size), (1, 1, k // size)):
        config = plain(group_size=group_size, desc_act=bool(desc_act), static_groups=bool(static))
        solution = solve(W, H, config, method=method)
        assert solution.g_idx.dtype == np.int32
        assert np.array_equal(solution.g_idx, want)
        assert solution.scales.shape == solution.zeros.shape == (3, -(-40 // size))
        assert (solution.codes.dtype, solution.scales.dtype, solution.zeros.dtype) == (np.uint8, np.float16, np.uint16)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("desc_act", [False, True])
def test_static_groups_take_their_grids_from_the_weights_as_they_are(method: str, desc_act: bool) -> None:
    W, H = problem(6, 40)
    config = plain(group_size=16, sym=False, static_groups=True, desc_act=desc_act)
    solution, rounded = solve(W, H, config, method=method), round_to_nearest(W, config)
    assert np.array_equal(solution.scales, rounded.scales)
    assert np.array_equal(solution.zeros, rounded.zeros)
    assert not np.array_equal(solution.codes, rounded.codes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("desc_act", [False, True])
def test_dead_inputs_become_zero_and_disturb_nothing(method: str, desc_act: bool) -> None:
    W, H = problem(6, 40)
    W[:, 7] = 5.0  # would spoil its group's grid
    dead = [7, 30]
    live = np.setdiff1d(np.arange(40), dead)
    H[dead], H[:, dead] = 0, 0
    config = plain(group_size=-1, desc_act=desc_act)
    solution = solve(W, H, config, method=method, dtype=np.float64)
    assert (solution.dequantize()[:, dead] == 0).all()
    assert (solution.codes[:, dead] == solution.zeros).all()
    alone = solve(W[:, live], H[np.ix_(live, live)], config, method=method, dtype=np.float64)
    assert np.array_equal(solution.codes[:, live], alone.codes)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_dead_inputs(method: str) -> None:
    W, _ = problem(6, 40)
    solution = solve(W, np.zeros((40, 40)), plain(), method=method)
    assert (solution.dequantize() == 0).all()
    assert solution.loss == 0


@pytest.mark.parametrize("method", METHODS)
def test_damping_grows_for_a_hessian_of_too_few_tokens(method: str, caplog: pytest.LogCaptureFixture) -> None:
    W, H = problem(6, 40, tokens=10)  # rank 10: singular without damping
    with caplog.at_level(logging.WARNING, "tinygptq"):
        solution = solve(W, H, plain(damp_percent=0.0), method=method, name="layers.0.mlp.up_proj")
    assert solution.damp == 1e-4
    assert [record.getMessage() for record in caplog.records] == [
        "layers.0.mlp.up_proj: H is not positive definite with damping 0, trying 0.0001"
    ]
    assert np.isfinite(solution.loss)
    assert solve(W, H, plain(damp_percent=0.01), method=method).damp == 0.01


@pytest.mark.parametrize("method", METHODS)
def test_damping_grows_tenfold_and_then_gives_up(method: str) -> None:
    W, H = problem(6, 40)
    smallest = np.linalg.eigvalsh(H)[0]

    def shifted(share: float) -> np.ndarray:  # least eigenvalue: -share * mean(diag)
        shift = (smallest + share * H.diagonal().mean()) / (1 + share)
        return H - shift * np.eye(40)

    assert solve(W, shifted(0.05), plain(), method=method).damp == pytest.approx(0.1)
    assert solve(W, shifted(0.2), plain(), method=method).damp == pytest.approx(1.0)
    with pytest.raises(TinyGPTQError, match=r"up_proj: H is not positive definite, not even with damping 1 .*0\.01"):
        solve(W, shifted(3.0), plain(), method=method, name="up_proj")


@pytest.mark.parametrize("method", METHODS)
def test_one_factor_serves_every_linear_of_an_input(method: str) -> None:
    (W, H), (W2, _) = problem(6, 40), problem(9, 40, seed=1)
    config = plain(group_size=16, desc_act=True)
    before = H.copy()
    factor = prepare(H, config, method=method)
    assert np.array_equal(H, before)
    for weights in (W, W2):
        given, direct = (solve(weights, h, config, method=method) for h in (factor, H))
        assert same(given, direct)
        assert (given.loss, given.damp) == (direct.loss, direct.damp)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused(method: str) -> None:
    W, H = problem(6, 40)
    bad_W, bad_H = W.copy(), H.copy()
    bad_W[2, 3], bad_H[4, 5] = np.nan, np.inf
    config = plain()
    for weights, hessian, message in (
        (bad_W, H, "q_proj: the weights hold NaN"),
        (W, bad_H, "q_proj: H holds NaN"),
        (W[:, :30], H, r"q_proj: W is \(6, 30\), so H should be \[30, same\], found 40"),
        (W, H[:30], "q_proj: H should be square"),
        (W[0], H, r"q_proj: weights should be \[out, in\]"),
        (W * 1e8, H, "q_proj: the weights need a scale beyond fp16"),
    ):
        with pytest.raises(TinyGPTQError, match=message):
            solve(weights, hessian, config, method=method, name="q_proj")
    with pytest.raises(TinyGPTQError, match="NaN"):
        round_to_nearest(bad_W, config)
    with pytest.raises(TinyGPTQError, match="method is 'fast'"):
        solve(W, H, config, method="fast")


@pytest.mark.parametrize("method", METHODS)
def test_the_fast_recipe_keeps_groups_in_place_and_loses_less(method: str) -> None:
    W, H = problem(40, 96)
    config = QuantizeConfig(group_size=32)
    fast, slow = (solve(W, H, c, method=method) for c in (config, plain(group_size=32)))
    assert np.array_equal(fast.g_idx, np.arange(96) // 32)
    assert fast.loss < slow.loss
    error = W - fast.dequantize()
    Hd = damped(H, 0.01)
    assert fast.loss == pytest.approx(float(((error @ Hd) * error).sum()) / 2, rel=1e-4)
    narrower = fast.scales < round_to_nearest(W, config).scales  # what GPTQ begins from without a search
    assert narrower.mean() > 0.5
