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


# on a card of 132 multiprocessors blocks of 16 warps and of 8, and of three strips, one and two to a multiprocessor
@pytest.mark.parametrize(("bits", "columns", "rows"), [(4, 264, 3), (4, 8192, 3), (2, 11008, 16), (2, 22016, 9)])
def test_long_and_wide_layers(bits, columns, rows):
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, bits, 128, False, False, 4096, columns)
    packed = replace(packed, scales=packed.scales.astype(np.float32) * np.float32(1.0001))
    x = random_rows(rng, rows, 4096)
    out = cupy().full((rows, columns), np.nan, np.float32)
    device, x_device = to_device(packed), cupy().asarray(x)
    first = dispatch.linear(x_device, device, out, kernel="matvec").get()
    assert relative_error(first, exact_product(x, packed)) <= 1e-5
    for _ in range(5):
        np.testing.assert_array_equal(dispatch.linear(x_device, device, out, kernel="matvec").get(), first)


@pytest.mark.parametrize("rows", [3, 16])
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[6]], ids=[LAYER_NAMES[0], LAYER_NAMES[6]])
def test_every_plan_gives_the_product(layer, rows, monkeypatch):
    from tinygptq.kernels.cuda import dispatch, matvec_plan
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cupy

    rng = fresh_generator()
    packed = random_linear(rng, *layer[:4], 1440, 256)
    device, x = to_device(packed), cupy().asarray(random_rows(rng, rows, 1440))
    exact = exact_product(x.get(), packed)
    # 12 chunks, the last one not whole: warps with one, two, two or three, and all of them
    shapes = (12, 1), (8, 1), (5, 3), (2, 6), (1, 6)
    plans = [matvec_plan.Plan(warps, resident, sets) for warps, resident in shapes for sets in (1, 2)]
    plans += [matvec_plan.Plan(warps, slots=2) for warps in (8, 5)]
    plans += [matvec_plan.Plan(warps, short=True, slots=2) for warps in (12, 8, 6)]
    plans += [matvec_plan.Plan(4, sets=1, strips=strips) for strips in (2, 3)]  # of 8: the last block shares none, or one
    for plan in plans:
        monkeypatch.setattr(matvec_plan, "plan", lambda *args, plan=plan: plan)
        out = cupy().full((rows, 256), np.nan, np.float32)
        dispatch.linear(x, device, out, kernel="matvec")
        assert relative_error(out.get(), exact) <= 1e-5, plan


@pytest.mark.parametrize("rows", [1, 16])
def test_products_that_begin_early_wait_for_their_input(rows):
    """Each product's x is what the one before it wrote; weights are there all along."""
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import capability, cupy

    if capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    cp, rng = cupy(), fresh_generator()
    layers = [to_device(random_linear(rng, 4, 128, True, False, 4096, 4096)) for _ in range(4)]
    states = [cp.asarray(random_rows(rng, rows, 4096) / 64)] + [cp.empty((rows, 4096), np.float16) for _ in layers]
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()

    def run(dependent):
        for y in states[1:]:
            y[...] = np.nan
        cp.cuda.Device().synchronize()
        for layer, x, y in zip(layers, states, states[1:], strict=False):
            dispatch.linear(x, layer, y, stream, dependent=dependent)
        stream.synchronize()
        return [y.get() for y in states[1:]]

    expected = run(dependent=False)
    assert np.isfinite(expected[0]).all()
    for _ in range(20):
        for found, right in zip(run(dependent=True), expected, strict=True):
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize(("rows", "columns", "strips"), [(5, 264, 1), (11, 328, 2), (11, 296, 3)])
def test_an_epilogue_sees_each_sum_once(rows, columns, strips, monkeypatch):
    """Strips that two blocks compute, because there are too few for the last one, too."""
    from tinygptq.kernels.cuda import block_sums, dispatch, matvec_plan
    from tinygptq.kernels.cuda.layout import to_device
    from tinygptq.kernels.cuda.runtime import cuda, cupy
    from tinygptq.kernels.cuda.tables import device_function

    @device_function
    def read(row, strip, lane, y, extra):
        column = 32 * strip + lane
        return (extra[0][column] if column < y.shape[1] else np.float32(0),)

    @device_function
    def count_and_scale(row, strip, lane, value, y, extra, known):
        column = 32 * strip + lane
        if column < y.shape[1]:
            y[row, column] = value * known[0]
            cuda.atomic.add(extra[1], row * y.shape[1] + column, 1)

    cp, rng = cupy(), fresh_generator()
    packed = random_linear(rng, 4, 128, False, False, 640, columns)
    factors, x = rng.normal(size=columns).astype(np.float32), random_rows(rng, rows, 640)
    y, calls = cp.full((rows, columns), np.nan, np.float32), cp.zeros(rows * columns, np.int32)
    monkeypatch.setattr(matvec_plan, "plan", lambda *args: matvec_plan.Plan(3, sets=1, strips=strips))
    arguments = cp.asarray(x), to_device(packed), y, cp.cuda.get_current_stream()
    epilogue = block_sums.Epilogue(read, (np.float32(0),), count_and_scale)
    dispatch.multiply_rows(*arguments, epilogue=epilogue, extra=(cp.asarray(factors), calls))
    assert relative_error(y.get(), exact_product(x, packed) * factors) <= 1e-5
    assert (calls.get() == 1).all()
