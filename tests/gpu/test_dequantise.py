"""Dequantised weights are the definition's, rounded once to fp16."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import LAYER_NAMES, LAYERS, fresh_generator, random_linear


@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
def test_dequantise_equals_the_definition(layer):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    packed = random_linear(fresh_generator(), *layer)
    stream = cupy().cuda.get_current_stream()
    dispatch.dequantised(to_device(packed), stream)[:] = np.nan  # the same memory is handed out again
    found = dispatch.dequantised(to_device(packed), stream).get().T  # (K, N), rows sorted by group
    expected = packed.dequantize()
    if packed.perm is not None:
        expected = expected[packed.perm]
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_float32_scales():
    from dataclasses import replace

    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    packed = random_linear(fresh_generator(), 4, 64, False, False, 192, 40)
    packed = replace(packed, scales=packed.scales.astype(np.float32) * np.float32(1.0001))
    found = dispatch.dequantised(to_device(packed), cupy().cuda.get_current_stream()).get().T
    np.testing.assert_allclose(found, packed.dequantize(), rtol=1.1e-3)  # the scale is rounded to fp16, then the product
