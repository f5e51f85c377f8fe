"""The second pass over codes and scales on the device, against its definition in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_layers import fresh_generator, relative_error

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.gptq import Hessian, drift, prepare, solve
from tinygptq.gptq import refine as definition


def problem(rng: np.random.Generator, rows: int, columns: int, maxq: int):
    """What `refine.descend` takes, float32, far enough from the best that many codes move."""
    X = rng.normal(size=(2 * columns + 8, columns)) @ (np.eye(columns) + rng.normal(size=(columns, columns)) / columns**0.5)
    H = X.T @ X / len(X) + 0.01 * np.eye(columns)
    scale = rng.uniform(0.5, 2, (rows, columns))
    zero = rng.integers(0, maxq + 1, (rows, columns)).astype(float)
    codes = rng.integers(0, maxq + 1, (rows, columns)).astype(float)
    W = scale * (codes - zero + 0.7 * rng.standard_normal((rows, columns)))
    return tuple(array.astype(np.float32) for array in (W, H, codes, scale, zero))


def errors(W, H, Q) -> np.ndarray:
    """Each row's, float64 [rows]."""
    D = W.astype(np.float64) - Q
    return ((D @ H) * D).sum(axis=1)


@pytest.mark.parametrize("maxq", [3, 15, 255])
@pytest.mark.parametrize("passes", [0, 1, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (70, 64), (40, 577), (9, 1536)], ids=str)
def test_codes_of_the_definition(shape, passes, maxq):
    """A code that rounding decides changes those after it in its row, which is why rows are counted."""
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    W, H, codes, scale, zero = problem(rng, *shape, maxq)
    G, order = (W - scale * (codes - zero)) @ H, rng.permutation(shape[1])
    expected = definition.descend(G, H, codes, scale, zero, maxq, order, passes)
    there = [cp.asarray(array) for array in (G, H, codes, scale, zero)]
    found = solver.descend(*there, maxq, cp.asarray(order), passes)
    assert found.dtype == np.float32
    for array, kept in zip(there, (G, H, codes, scale, zero), strict=True):
        assert np.array_equal(array.get(), kept)
    found = found.get()
    assert ((found >= 0) & (found <= maxq) & (found == np.rint(found))).all()
    before, after, best = (errors(W, H, scale * (c - zero)) for c in (codes, found, expected))
    if passes == 0:
        assert np.array_equal(found, codes)
    else:
        assert (after <= before * (1 + 1e-5)).all()
        assert (found == expected).all(axis=1).mean() >= (0.7 if shape[1] > 64 else 0.9 if shape[0] > 9 else 0.5)
        assert abs(after.sum() / best.sum() - 1) < 5e-3


def test_a_row_beyond_the_usual_shared_memory():
    """12,800 columns take 51 KB, which a kernel has to ask for."""
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, columns = cupy(), 12800
    random = cp.random.default_rng(int(fresh_generator().integers(2**31)))
    factor = random.standard_normal((columns, 32), dtype=np.float32)
    H = factor @ factor.T / 64 + cp.eye(columns, dtype=np.float32)
    codes = random.integers(0, 16, (2, columns)).astype(np.float32)
    one, eight = cp.ones_like(codes), cp.full_like(codes, 8)
    W = codes - eight + 0.5 * random.standard_normal(codes.shape, dtype=np.float32)
    G, order = (W - (codes - eight)) @ H, cp.arange(columns)
    expected = definition.descend(G, H, codes, one, eight, 15, order, 1)
    found = solver.descend(G, H, codes, one, eight, 15, order, 1)
    assert float((found != codes).mean()) > 0.05
    assert float((found == expected).mean()) > 0.98


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(2, 64, True), (3, 96, False), (4, 128, True), (8, -1, True)])
def test_refine_as_a_whole(bits, group_size, sym, act_order):
    """From the same start: scales that mostly agree, codes too, and a loss as small as the definition's."""
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    config = QuantizeConfig(bits, group_size, act_order, sym, recipe=replace(RECIPES["fast"], refine=2))
    columns = 416
    X = (rng.normal(size=(4, 2 * columns, columns)) @ rng.normal(size=(columns, columns))).astype(np.float32)
    X[..., [3, columns - 2]] = 0
    hessian = Hessian(columns)
    hessian.add(X)
    W, H = rng.normal(size=(70, columns)).astype(np.float32), hessian.H
    factor = prepare(H, config, method="definition")
    start = solve(W, factor, config, method="definition")
    expected = definition.refine(W, H, start, factor, config, method="definition")

    def there(record):
        values = vars(record).values()
        return type(record)(*(cp.asarray(value) if isinstance(value, np.ndarray) else value for value in values))

    found = definition.refine(cp.asarray(W), cp.asarray(H), there(start), there(factor), config, method=solver)
    assert (found.codes.dtype, found.scales.dtype) == (np.uint8, np.float16)
    assert found.loss < 0.99 * start.loss
    assert abs(found.loss / expected.loss - 1) < 0.01
    # a step in a scale's last bit may send its row another way
    assert (found.codes.get() == expected.codes).mean() > 0.9
    assert relative_error(found.scales.get(), expected.scales.astype(np.float64)) < 0.02
    damped = H.astype(np.float64)
    np.fill_diagonal(damped, factor.importance)
    loss = errors(np.where(factor.dead, 0, W), damped, found.dequantize().get()).sum() / 2
    assert abs(found.loss / loss - 1) < 1e-3
    assert (found.dequantize().get()[:, [3, columns - 2]] == 0).all()


def test_scales_of_the_same_codes_are_the_definition_s():
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    W, H, codes, _, _ = problem(rng, 50, 400, 15)
    for g_idx in (np.arange(400) // 64, rng.permutation(np.arange(400) // 80)):
        scales = np.full((50, g_idx.max() + 1), 1, np.float32)
        W = (codes - 8) * rng.uniform(0.8, 1.2, scales.shape)[:, g_idx].astype(np.float32)
        arrays = W @ H, H, codes - 8, scales, g_idx
        expected = definition.refit_scales(*arrays)
        found = definition.refit_scales(*map(cp.asarray, arrays)).get()
        assert (expected != 1).mean() > 0.9
        assert np.abs(found / expected - 1).max() < 2**-9  # neighbours in fp16


def test_weights_that_make_up_for_drift():
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy
    from tinygptq.quantization.placement_cuda import Card

    cp, rng = cupy(), fresh_generator()
    X = (rng.normal(size=(3, 500, 200)) @ rng.normal(size=(200, 200))).astype(np.float32)
    E = (X @ rng.normal(size=(200, 96)) / 100 + rng.normal(size=(3, 500, 96))).astype(np.float32)
    W, hessian = rng.normal(size=(96, 200)).astype(np.float32), Hessian(200, np.float64)
    hessian.add(X)
    here, there = drift.Cross(), Card().cross()
    for x, e in zip(X, E, strict=True):
        here.add(e[None], x[None])
        there.add(cp.asarray(e[None]), cp.asarray(x[None]))
    expected = drift.target(W, here.C, drift.inverse(hessian.H)) - W
    R = drift.inverse(cp.asarray(hessian.H.astype(np.float32)), method=solver)
    found = drift.target(cp.asarray(W), there.C, R).get() - W
    assert relative_error(there.C.get(), here.C) < 1e-3
    assert relative_error(found, expected) < 1e-2
