"""The Numba twin against the definition, over the whole grid of options."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptq.config import RECIPES, QuantizeConfig, Recipe
from tinygptq.gptq import Solution, grid, prepare, solve, solver, solver_numba
from tinygptq.gptq.grid import find_grid, search_clip

configs = st.builds(
    QuantizeConfig,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 1, 5, 8, 16, 20, 32, 48, 128, 192, 1000]),
    desc_act=st.booleans(),
    sym=st.booleans(),
    damp_percent=st.sampled_from([0.0, 0.001, 0.01, 0.1]),
    static_groups=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    recipe=st.builds(Recipe, clip=st.booleans(), act_order=st.booleans()),
)


def problem(rows: int, columns: int, seed: int, dead: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Weights of which some rows are one-sided, constant or zero, and the Hessian of correlated inputs, some dead."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((rows, columns)) * 0.02
    W[1::7] = abs(W[1::7])
    W[2::11] = 0.013
    W[3::13] = 0
    tokens = int(rng.choice([columns // 2 + 1, 3 * columns]))  # with too few, H is singular and damping may have to grow
    X = rng.standard_normal((tokens, columns)) @ rng.standard_normal((columns, columns))
    X *= np.exp(rng.standard_normal(columns) / 2) * (rng.random(columns) >= dead)
    return W, X.T @ X / 8


def layer(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 weights and Hessian such as real layers have: enough tokens, moderate correlation, uneven inputs."""
    rng = np.random.default_rng(seed)
    mix = np.eye(columns) + rng.standard_normal((columns, columns)) / np.sqrt(columns)
    X = rng.standard_normal((4 * columns, columns)) @ mix * np.exp(rng.standard_normal(columns) / 2)
    W = rng.standard_normal((rows, columns)) * 0.02
    return W.astype(np.float32), (X.T @ X / 8).astype(np.float32)


def solve_both(W: np.ndarray, H: np.ndarray, config: QuantizeConfig, dtype: type) -> tuple[Solution, Solution]:
    return tuple(solve(W, H, config, method=method, dtype=dtype) for method in ("definition", "numba"))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=configs,
    rows=st.sampled_from([1, 3, 64, 70]),
    columns=st.integers(1, 300),
    dead=st.sampled_from([0.0, 0.0, 0.2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_are_equal_in_float64(config: QuantizeConfig, rows: int, columns: int, dead: float, seed: int) -> None:
    """No exception is made for ties: corrected weights are sums of random reals, and the two differ by about 1e-13 of a
    step, so that a weight this close to the middle of two codes is not met. (Exact ties have a test of their own.)"""
    W, H = problem(rows, columns, seed, dead)
    definition, twin = solve_both(W, H, config, np.float64)
    for name in ("scales", "zeros", "g_idx", "codes"):
        a, b = getattr(definition, name), getattr(twin, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), name
    assert twin.damp == definition.damp
    assert twin.loss == pytest.approx(definition.loss, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 128), (4, 48), (4, -1), (8, 64)])
def test_losses_are_equal_in_float32(bits: int, group_size: int, desc_act: bool, seed: int) -> None:
    """Sums differ in the seventh digit, so that a few weights near the middle of two codes, and at 8 bits a few scales
    near the middle of two fp16 values, fall to the other side and take the rest of their row along."""
    W, H = layer(256, 288, seed)
    config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=desc_act)
    definition, twin = solve_both(W, H, config, np.float32)
    assert twin.loss == pytest.approx(definition.loss, rel=1e-3)
    assert (twin.codes != definition.codes).mean() < 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_ties_go_the_same_way(dtype: type) -> None:
    """Weights half-way between two codes, with nothing to correct: both round to the even multiple of the scale."""
    W = np.random.default_rng(0).integers(-15, 16, (70, 64)) / 2
    W[:, 0] = 7.5  # the scale is 1
    definition, twin = solve_both(W, np.eye(64), QuantizeConfig(group_size=-1, recipe=RECIPES["plain"]), dtype)
    assert (definition.scales == 1).all()
    assert np.array_equal(definition.codes, twin.codes)
    assert ((W % 1 != 0) & (definition.codes % 2 == 0)).sum() > 1000


@pytest.mark.parametrize("n", [1, 2, 47, 48, 49, 100, 144, 145, 200, 601])  # factored directly; split; in strips
def test_both_factors_of_the_inverse_are_equal(n: int) -> None:
    _, H = problem(1, n, seed=n)
    H += 0.01 * H.diagonal().mean() * np.eye(n)
    before = H.copy()
    definition, twin = solver.inverse_cholesky(H), solver_numba.inverse_cholesky(H)
    assert np.array_equal(H, before)
    assert np.allclose(twin, definition, rtol=0, atol=1e-9 * abs(definition).max())
    assert np.array_equal(twin, np.triu(twin))
    assert np.allclose(twin.T @ twin @ H, np.eye(n), atol=1e-8)


@pytest.mark.parametrize("n", [10, 100])
def test_both_factorings_refuse_the_same_hessians(n: int) -> None:
    _, H = problem(1, n, seed=1)
    X = np.random.default_rng(0).standard_normal((n // 2, n))
    for bad in (X.T @ X, np.zeros((n, n)), H - 0.5 * H.diagonal().mean() * np.eye(n)):
        assert solver.inverse_cholesky(bad) is None
        assert solver_numba.inverse_cholesky(bad) is None


@pytest.mark.parametrize("n", [100, 601])
def test_the_factor_needs_the_upper_triangle_alone(n: int) -> None:
    X = np.random.default_rng(n).standard_normal((2 * n, n))
    H = X.T @ X
    Hinv = solver_numba.inverse_cholesky(H)
    H[np.tril_indices(n, -1)] = np.nan
    assert Hinv is not None
    assert not np.tril(Hinv, -1).any()
    assert np.array_equal(solver_numba.inverse_cholesky(H), Hinv)


def test_a_factor_of_one_serves_the_other() -> None:
    W, H = problem(70, 100, seed=2)
    config = QuantizeConfig(group_size=32, desc_act=True)
    factor = prepare(H, config, method="definition", dtype=np.float64)
    a, b = (solve(W, factor, config, method=method, dtype=np.float64) for method in ("definition", "numba"))
    assert np.array_equal(a.codes, b.codes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(exponent=st.floats(-30, 17), seed=st.integers(0, 2**32 - 1), wide=st.booleans())
def test_scales_are_rounded_to_fp16_as_numpy_does(exponent: float, seed: int, wide: bool) -> None:
    scale = 2.0**exponent * np.random.default_rng(seed).random()
    scale = np.float64(scale) if wide else np.float32(scale)
    for down in (False, True):
        assert solver_numba._as_stored(scale, down) == grid.as_stored(scale, down)
    with np.errstate(over="ignore"):
        assert grid.as_stored(scale) == max(float(np.float16(scale)), 2.0**-24)
    assert grid.as_stored(scale, True) <= max(scale, 2.0**-24) or scale >= 65520  # beyond fp16: inf


@pytest.mark.parametrize("value", [65504.0, 65519.99, 65520.0, 2.0**-14, 2.0**-24 * 1.5, 2.0**-24 * 2.5, 1 + 2.0**-11])
def test_scales_at_the_edges_of_fp16(value: float) -> None:
    with np.errstate(over="ignore"):
        assert solver_numba._as_stored(value, False) == float(np.float16(value))
    assert solver_numba._as_stored(value, True) == grid.as_stored(np.float64(value), True)


@pytest.mark.parametrize("storage", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("clip", [False, True])
def test_grids_are_equal(bits: int, sym: bool, storage: str, dtype: type, clip: bool) -> None:
    W, _ = problem(500, 40, seed=bits)
    W = (W * np.exp2(np.random.default_rng(0).integers(-20, 8, (500, 1)))).astype(dtype)
    want = find_grid(W, bits, sym, storage)
    importance, clips = solver_numba._search(np.random.default_rng(1).random(40) if clip else None, np.dtype(dtype))
    importance = importance.astype(dtype)
    scale, zero = np.empty(500, dtype), np.empty(500, dtype)
    rounding = sym, dtype(2**bits - 1), dtype(storage == "gptq")
    for r in range(0, 500, 5):  # so few at once that most searches end before the last column
        rows = slice(r, r + 5)
        solver_numba._find_grid(np.ascontiguousarray(W[rows].T), importance, clips, scale[rows], zero[rows], *rounding)
    assert np.array_equal(zero, want[1])
    if clip:
        maxq = 2**bits - 1
        narrowed = search_clip(W, *want, maxq, importance)
        assert (narrowed <= want[0]).all()
        error = weighted_error(W, scale, zero, maxq, importance)
        assert np.allclose(error, weighted_error(W, narrowed, zero, maxq, importance), rtol=1e-5, atol=0)  # ties may differ
        assert (narrowed != want[0]).any() or bits == 8
        want = narrowed, zero
    assert (scale != want[0]).mean() < (0.01 if dtype == np.float32 and clip else 1e-9)


def weighted_error(W: np.ndarray, scale: np.ndarray, zero: np.ndarray, maxq: int, importance: np.ndarray) -> np.ndarray:
    """What `search_clip` makes small, [rows], in float64."""
    W, scale, zero = W.astype(np.float64), scale.astype(np.float64)[:, None], zero[:, None]
    return (W - grid.dequantize(grid.quantize(W, scale, zero, maxq), scale, zero)) ** 2 @ importance
