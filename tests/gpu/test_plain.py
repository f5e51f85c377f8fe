"""The plain kernel, and the two small ones beside it, on the device."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import LAYER_NAMES, LAYERS, exact_product, fresh_generator, random_linear, random_rows, relative_error

ROWS = (1, 2, 8, 9, 16, 33)


@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
def test_plain_kernel_against_float64(layer):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, *layer)
    device = to_device(packed)
    for rows in ROWS:
        x = random_rows(rng, rows, packed.in_features)
        for dtype, bound in ((np.float32, 1e-5), (np.float16, 2e-3)):
            out = cupy().full((rows, packed.out_features), np.nan, dtype)
            dispatch.linear(cupy().asarray(x), device, out, kernel="plain")
            assert relative_error(out.get(), exact_product(x, packed)) <= bound, (rows, dtype)


@pytest.mark.parametrize("group_size", [20, 8, 33])
def test_group_sizes_that_fit_no_tile(group_size):
    """Dispatch sends these to the plain kernel; a last group may be shorter than the others."""
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, 4, group_size, False, True, 160, 24, bias=True)
    x = random_rows(rng, 5, 160)
    found = dispatch.linear(cupy().asarray(x), to_device(packed)).get()
    assert relative_error(found, exact_product(x, packed)) <= 2e-3
