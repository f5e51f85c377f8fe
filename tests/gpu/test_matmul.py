"""The tensor-core product and "dequantise, then cuBLAS", on the device."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import LAYER_NAMES, LAYERS, exact_product, fresh_generator, random_linear, random_rows, relative_error

ROWS = (1, 17, 24, 32, 33, 64, 65, 200)


@pytest.mark.parametrize("kernel", ["matmul", "dequantise"])
@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
def test_products_against_float64(layer, kernel):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, *layer)
    device = to_device(packed)
    for rows in ROWS:
        x = random_rows(rng, rows, packed.in_features)
        for dtype in (np.float16, np.float32) if rows == 33 else (np.float16,):
            out = cupy().full((rows, packed.out_features), np.nan, dtype)
            dispatch.linear(cupy().asarray(x), device, out, kernel=kernel)
            assert relative_error(out.get(), exact_product(x, packed)) <= 2e-3, (rows, dtype)


def test_splits_give_the_same_sum_every_time():
    """K is divided among blocks that run in any order; the order of their sum is fixed all the same."""
    from tinygptq.kernels.cuda import dispatch, matmul
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy, multiprocessors

    rng = fresh_generator()
    packed = random_linear(rng, 4, 128, False, False, 4096, 136)
    assert matmul.plan(40, 136, 4096, multiprocessors()).grid[2] > 1
    device, x = to_device(packed), cupy().asarray(random_rows(rng, 40, 4096))
    first = dispatch.linear(x, device, kernel="matmul").get()
    assert relative_error(first, exact_product(x.get(), packed)) <= 2e-3
    for _ in range(20):
        np.testing.assert_array_equal(dispatch.linear(x, device, kernel="matmul").get(), first)


def test_infinity_stays_in_its_row():
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, 4, 128, True, False, 160, 40)
    x = random_rows(rng, 20, 160)
    x[3, 5] = np.inf
    found = dispatch.linear(cupy().asarray(x), to_device(packed), kernel="matmul").get()
    assert np.isfinite(np.delete(found, 3, axis=0)).all()
    assert not np.isfinite(found[3]).any()
