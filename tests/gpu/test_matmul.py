"""The tensor-core product and "dequantise, then cuBLAS", on the device."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import LAYER_NAMES, LAYERS, exact_product, fresh_generator, random_linear, random_rows, relative_error

ROWS = (1, 17, 24, 32, 33, 64, 65, 128, 129, 200, 300)


def skip_unless_it_runs(kernel):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.runtime import capability

    if kernel == "warpgroup" and capability() != dispatch.HOPPER:
        pytest.skip(f"wgmma is Hopper's alone; this card has compute capability {capability()}")


@pytest.mark.parametrize("kernel", ["matmul", "warpgroup", "dequantise"])
@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
def test_products_against_float64(layer, kernel):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    skip_unless_it_runs(kernel)
    rng = fresh_generator()
    packed = random_linear(rng, *layer)
    device = to_device(packed)
    for rows in ROWS:
        x = random_rows(rng, rows, packed.in_features)
        for dtype in (np.float16, np.float32) if rows == 33 else (np.float16,):
            out = cupy().full((rows, packed.out_features), np.nan, dtype)
            dispatch.linear(cupy().asarray(x), device, out, kernel=kernel)
            assert relative_error(out.get(), exact_product(x, packed)) <= 2e-3, (rows, dtype)


def test_splits_give_the_same_sum_every_time(monkeypatch):
    """K is divided among blocks that run in any order; the order of their sum is fixed all the same."""
    from tinygptq.kernels.cuda import dispatch, matmul
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy, multiprocessors

    rng = fresh_generator()
    packed = random_linear(rng, 4, 128, False, False, 4096, 136)
    device, x = to_device(packed), cupy().asarray(random_rows(rng, 40, 4096))
    exact, found = exact_product(x.get(), packed), matmul.plan(40, 136, 4096, multiprocessors())
    assert found.grid[2] > 1
    # 11, 7, 4 and 2 splits: all remainders of a division by four; with two teams 1, 2, 3 and 8
    for each, teams in ((found.chunks_each, 1), (3, 1), (5, 1), (9, 1), (16, 1), (16, 2), (9, 2), (6, 2), (2, 2)):
        plan = matmul.Plan(found.row_tiles, (*found.grid[:2], -(-32 // (each * teams))), each, teams)
        monkeypatch.setattr(matmul, "plan", lambda *args, plan=plan: plan)
        first = dispatch.linear(x, device, kernel="matmul").get()
        assert relative_error(first, exact) <= 2e-3, plan
        for _ in range(20):
            np.testing.assert_array_equal(dispatch.linear(x, device, kernel="matmul").get(), first)


@pytest.mark.parametrize("inner,columns", [(384, 264), (1408, 136)])
def test_a_product_in_pieces(inner, columns, monkeypatch):
    """Weights that are dequantised a few columns, or a few rows, at a time."""
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    monkeypatch.setattr(dispatch, "DEQUANTISED_BYTES", 80_000)
    assert len(dispatch.pieces(inner, columns)) > 2
    rng = fresh_generator()
    packed = random_linear(rng, 4, 64, False, True, inner, columns, bias=True)
    x = random_rows(rng, 70, inner)
    for dtype, bound in ((np.float16, 2e-3), (np.float32, 5e-4)):
        out = cupy().full((70, columns), np.nan, dtype)
        dispatch.linear(cupy().asarray(x), to_device(packed), out, kernel="dequantise")
        assert relative_error(out.get(), exact_product(x, packed)) <= bound


@pytest.mark.parametrize("kernel", ["matmul", "warpgroup"])
def test_infinity_stays_in_its_row(kernel):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    skip_unless_it_runs(kernel)
    rng = fresh_generator()
    packed = random_linear(rng, 4, 128, True, False, 160, 40)
    x = random_rows(rng, 20, 160)
    x[3, 5] = np.inf
    found = dispatch.linear(cupy().asarray(x), to_device(packed), kernel=kernel).get()
    assert np.isfinite(np.delete(found, 3, axis=0)).all()
    assert not np.isfinite(found[3]).any()


def test_splits_of_warpgroups(monkeypatch):
    from tinygptq.kernels.cuda import dispatch, warpgroup
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    skip_unless_it_runs("warpgroup")
    rng = fresh_generator()
    packed = random_linear(rng, 3, 96, False, True, 1440, 136)
    device, x = to_device(packed), cupy().asarray(random_rows(rng, 150, 1440))
    exact = exact_product(x.get(), packed)
    for each in (1, 2, 5, 11, 12):  # of 12 chunks, the last of them short
        monkeypatch.setattr(warpgroup, "split_of", lambda *sizes, each=each: each)
        for dtype in (np.float16, np.float32):
            out = cupy().full((150, 136), np.nan, dtype)
            assert relative_error(dispatch.linear(x, device, out, kernel="warpgroup").get(), exact) <= 2e-3, (each, dtype)


def test_many_tiles_at_once():
    """More tiles than the card holds, more stages than there are slots, and every run gives the same."""
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    skip_unless_it_runs("warpgroup")
    rng = fresh_generator()
    packed = random_linear(rng, 4, 128, False, True, 2080, 9000)
    device, x = to_device(packed), cupy().asarray(random_rows(rng, 700, 2080))
    first = dispatch.linear(x, device, kernel="warpgroup")
    assert relative_error(first.get(), exact_product(x.get(), packed)) <= 2e-3
    for _ in range(20):
        assert bool((dispatch.linear(x, device, kernel="warpgroup") == first).all())
