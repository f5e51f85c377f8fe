"""1 to 16 rows of x, on the device: float32's accuracy, and float32's order of sums every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_layers import LAYER_NAMES, LAYERS, exact_product, fresh_generator, random_linear, random_rows, relative_error


@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
def test_matvec_against_float64(layer):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, *layer)
    device = to_device(packed)
    for rows in (1, 2, 7, 8, 9, 16):
        x = random_rows(rng, rows, packed.in_features)
        for dtype, bound in ((np.float32, 1e-5), (np.float16, 2e-3)):
            out = cupy().full((rows, packed.out_features), np.nan, dtype)
            dispatch.linear(cupy().asarray(x), device, out, kernel="matvec")
            assert relative_error(out.get(), exact_product(x, packed)) <= bound, (rows, dtype)


@pytest.mark.parametrize("columns", [264, 8192])  # blocks of 16 warps, and of 8
def test_long_and_wide_layers(columns):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, 4, 128, False, False, 4096, columns)
    packed = replace(packed, scales=packed.scales.astype(np.float32) * np.float32(1.0001))
    x = random_rows(rng, 3, 4096)
    out = cupy().full((3, columns), np.nan, np.float32)
    device, x_device = to_device(packed), cupy().asarray(x)
    first = dispatch.linear(x_device, device, out, kernel="matvec").get()
    assert relative_error(first, exact_product(x, packed)) <= 1e-5
    for _ in range(5):
        np.testing.assert_array_equal(dispatch.linear(x_device, device, out, kernel="matvec").get(), first)
