"""The solver on the device against its definition in NumPy: the same codes, but where rounding decides otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import fresh_generator, relative_error

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import gptq_tensors, solution_of
from tinygptq.gptq import Hessian, prepare, solve
from tinygptq.gptq.solver import inverse_cholesky

CONFIGS = {
    "main": QuantizeConfig(4, 128),
    "32g act-order": QuantizeConfig(4, 32, desc_act=True),
    "64g act-order": QuantizeConfig(4, 64, desc_act=True),
    "128g act-order": QuantizeConfig(4, 128, desc_act=True),
    "8 bits, one group, act-order": QuantizeConfig(8, -1, desc_act=True),
    "8 bits, 128g": QuantizeConfig(8, 128),
    "plain": QuantizeConfig(4, 128, recipe=RECIPES["plain"]),
    "plain, groups within a block": QuantizeConfig(3, 32, recipe=RECIPES["plain"], sym=False),
    "plain, groups of 48": QuantizeConfig(4, 48, recipe=RECIPES["plain"]),
    "plain, groups of several blocks": QuantizeConfig(2, 200, recipe=RECIPES["plain"], sym=False),
    "static groups, act-order": QuantizeConfig(4, 32, desc_act=True, static_groups=True, sym=False),
    "asymmetric, v2": QuantizeConfig(3, 96, desc_act=True, sym=False, checkpoint_format="gptq_v2"),
    "2 bits, fast": QuantizeConfig(2, 64, sym=False),
}


def problem(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Hessian of correlated inputs of which two are dead."""
    mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns) + np.eye(columns)
    X = (rng.normal(size=(4, 2 * columns, columns)) @ mixing * rng.uniform(0.1, 3, columns)).astype(np.float32)
    X[..., [3, columns - 2]] = 0
    hessian = Hessian(columns)
    hessian.add(X)
    return rng.normal(size=(rows, columns)).astype(np.float32), hessian.H


@pytest.mark.parametrize("shape", [(70, 416), (257, 640)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_grids_of_the_definition(name, shape):
    """Given one factor; a code that rounding decides changes those after it in its row, which is why rows are counted."""
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, config = cupy(), CONFIGS[name]
    W, H = problem(fresh_generator(), *shape)
    factor = prepare(H, config, method="definition")
    expected = solve(W, factor, config, method="definition")
    there = type(factor)(*(value if value is None or isinstance(value, float) else cp.asarray(value)
                           for value in vars(factor).values()))  # fmt: skip
    found = solve(cp.asarray(W), there, config, method=solver)
    assert np.array_equal(found.g_idx.get(), expected.g_idx)
    same_rows = (found.codes.get() == expected.codes).all(axis=1)
    same_scales = found.scales.get() == expected.scales
    print(f"{name}: {100 * (~same_rows).mean():.2f} % of rows differ, {100 * (~same_scales).mean():.3f} % of scales")
    assert same_rows.mean() > 0.9
    assert same_scales.mean() > 0.98
    assert np.array_equal(found.zeros.get()[same_rows], expected.zeros[same_rows])
    assert (found.codes.get() == expected.codes).mean() > 0.98
    assert abs(found.loss / expected.loss - 1) < 2e-3


@pytest.mark.parametrize("name", ["main", "32g act-order", "asymmetric, v2"])
def test_prepare_and_solve_together(name):
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, config = cupy(), CONFIGS[name]
    W, H = problem(fresh_generator(), 96, 512)
    expected = solve(W, H, config, method="definition")
    found = solve(cp.asarray(W), cp.asarray(H), config, method=solver)
    assert (found.codes.get() == expected.codes).mean() > 0.98
    assert abs(found.loss / expected.loss - 1) < 2e-3


def test_the_factor_is_the_inverse_and_ill_conditioned_ones_are_made_in_float64():
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    Q = np.linalg.qr(rng.normal(size=(300, 300)))[0]
    made, original = [], solver._inverse_factor
    for condition, wide in ((1e2, False), (1e9, True)):
        H = (Q * np.geomspace(1, 1 / condition, 300)) @ Q.T
        H = (H + H.T) / 2
        solver._inverse_factor = lambda H, dtype: made.append(dtype) or original(H, dtype)
        try:
            Hinv = solver.inverse_cholesky(cp.asarray(H)).get()
        finally:
            solver._inverse_factor = original
        assert made[-1] is (np.float64 if wide else np.float32)
        assert Hinv.dtype == np.float32
        assert relative_error(Hinv, inverse_cholesky(H)) < (1e-6 if wide else 1e-4)
        assert not np.tril(Hinv, -1).any()
    assert solver.inverse_cholesky(cp.asarray(-np.eye(40, dtype=np.float32))) is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("columns", [96, 1100, 2304])
def test_half_hessian_is_the_hessian_of_the_same_numbers(columns, dtype):
    from tinygptq.kernels.cuda.hessian import HalfHessian
    from tinygptq.kernels.cuda.runtime import cupy

    cp = cupy()
    X = fresh_generator().normal(size=(5, 64, columns)).astype(dtype)
    exact = Hessian(columns, np.float64)
    exact.add(X)
    found = HalfHessian(columns)
    found.add(cp.asarray(X[:3]))
    found.add(cp.asarray(X[3:]))
    H = found.H.get()
    assert np.array_equal(H, H.T)
    assert np.linalg.norm(H - exact.H) / np.linalg.norm(exact.H) < 1e-6


def test_long_sums_are_not_cut_off():
    """16,384 tokens of positive products: one sum of them all on tensor cores would end 2e-5 too low."""
    from tinygptq.kernels.cuda.hessian import HalfHessian
    from tinygptq.kernels.cuda.runtime import cupy

    X = np.abs(fresh_generator().normal(size=(32, 512, 96))).astype(np.float32)
    exact, found = Hessian(96, np.float64), HalfHessian(96)
    exact.add(X)
    found.add(cupy().asarray(X))
    assert np.abs(found.H.get() / exact.H - 1).max() < 4e-6


def test_half_hessian_names_what_is_infinite():
    from tinygptq.kernels.cuda.hessian import HalfHessian
    from tinygptq.kernels.cuda.runtime import cupy

    X = np.ones((2, 10, 96), np.float16)
    X[0, 0, 7] = np.inf
    bad = HalfHessian(96)
    bad.add(cupy().asarray(X))
    with pytest.raises(TinyGPTQError, match="first at input 7 of 96"):
        _ = bad.H


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_on_the_device_and_back(bits):
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    config = QuantizeConfig(bits, 32, desc_act=True, sym=False, damp_percent=0.1)
    W, H = problem(rng, 64, 160)
    solution = solve(W, H, config)
    expected = gptq_tensors(solution, config)
    there = type(solution)(*(cp.asarray(value) if isinstance(value, np.ndarray) else value
                             for value in vars(solution).values()))  # fmt: skip
    found = gptq_tensors(there, config)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name].get(), tensor), name
    back = solution_of(found, config)
    assert np.array_equal(back.dequantize().get(), solution.dequantize())
