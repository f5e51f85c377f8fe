"""The one entry, ``linear``: the whole range of rows through whichever kernel it chooses."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import LAYER_NAMES, LAYERS, exact_product, fresh_generator, random_linear, random_rows, relative_error

from tinygptq.errors import TinyGPTQError


@pytest.mark.parametrize("layer", LAYERS, ids=LAYER_NAMES)
def test_every_number_of_rows_from_1_to_33(layer):
    from tinygptq.kernels.cuda.dispatch import linear
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, *layer, bias=True)
    device = to_device(packed)
    x = random_rows(rng, 33, packed.in_features)
    exact = exact_product(x, packed)
    for rows in range(1, 34):
        out = cupy().full((rows, packed.out_features), np.nan, np.float16)
        linear(cupy().asarray(x[:rows]), device, out)
        assert relative_error(out.get(), exact[:rows]) <= 2e-3, rows


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 300])
def test_a_recorded_graph_gives_what_the_call_gave(rows):
    from tinygptq.kernels.cuda.dispatch import linear
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    packed = random_linear(rng, 4, 128, True, False, 512, 264, bias=True)
    device, x = to_device(packed), cp.asarray(random_rows(rng, rows, 512))
    out = cp.empty((rows, 264), np.float16)
    stream = cp.cuda.Stream(non_blocking=True)
    linear(x, device, out, stream)
    stream.synchronize()
    with stream:
        stream.begin_capture()
        linear(x, device, out, stream)
        graph = stream.end_capture()
        x[:] = cp.asarray(random_rows(rng, rows, 512))
        out[:] = np.nan
        graph.launch(stream)
    stream.synchronize()
    assert relative_error(out.get(), exact_product(x.get(), packed)) <= 2e-3


def test_x_gathered_beforehand():
    from tinygptq.kernels.cuda.dispatch import linear
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, 4, 32, True, True, 160, 40)
    x = random_rows(rng, 20, 160)
    device = to_device(packed)
    found = linear(cupy().asarray(x[:, packed.perm].copy()), device, gathered=True).get()
    np.testing.assert_array_equal(found, linear(cupy().asarray(x), device).get())


def test_no_rows_is_an_empty_answer():
    from tinygptq.kernels.cuda.dispatch import linear
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    packed = random_linear(fresh_generator(), 4, 32, True, False, 64, 40)
    assert linear(cupy().empty((0, 64), np.float16), to_device(packed)).shape == (0, 40)


def test_wrong_shapes_and_dtypes_are_named():
    from tinygptq.kernels.cuda.dispatch import linear
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    cp = cupy()
    device = to_device(random_linear(fresh_generator(), 4, 32, True, False, 64, 40))
    for x in (cp.zeros((2, 32), np.float16), cp.zeros((2, 64), np.float32), cp.zeros((64, 2), np.float16).T):
        with pytest.raises(TinyGPTQError, match=r"this linear takes float16 \[rows, 64\]"):
            linear(x, device)
    with pytest.raises(TinyGPTQError, match="out is float64"):
        linear(cp.zeros((2, 64), np.float16), device, cp.zeros((2, 40)))
