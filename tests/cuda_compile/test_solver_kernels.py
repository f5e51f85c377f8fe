"""The solver's and the calibration pass's kernels compile without a GPU, and keep their numbers in registers."""

from __future__ import annotations

import importlib.util
import re

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra [cuda])", allow_module_level=True)

from numba.cuda import types

from tinygptq.kernels.cuda import calibration, halves, refine, solver

INT, FLOAT = types.int64, types.float32
FLOATS, TABLE, HALVES = types.Array(FLOAT, 1, "C"), types.Array(FLOAT, 2, "C"), types.Array(types.float16, 2, "C")
WORDS, ROW, HEADS = (types.Array(t, n, "C") for t, n in ((types.uint32, 1), (types.float16, 1), (types.float16, 3)))
ROUNDING = (INT, FLOAT, FLOAT)
KERNELS = {
    "grids": (solver.grids_kernel, (TABLE, FLOATS, FLOATS, TABLE, TABLE, INT, INT, *ROUNDING), (8, 0)),
    "block": (
        solver.block_kernel,
        (FLOATS, FLOATS, types.Array(types.uint8, 1, "C"), FLOATS, types.Array(types.float64, 1, "C"), FLOATS, FLOATS,
         types.Array(types.int32, 1, "C"), FLOATS, FLOATS, INT, INT, INT, INT, INT, *ROUNDING),
        (9, 0),
    ),
    "norm": (lambda: calibration.NORM, (HALVES, FLOATS, FLOAT, TABLE), (8, 0)),
    "rotate": (lambda: calibration.ROTATE, (HEADS, TABLE, TABLE), (8, 6)),
    "rotate float32": (lambda: calibration.ROTATE, (types.Array(FLOAT, 3, "C"), TABLE, TABLE), (9, 0)),
    "gate": (lambda: calibration.GATE, (WORDS, WORDS), (8, 9)),
    "split": (lambda: halves.SPLIT, (FLOATS, ROW, ROW), (8, 0)),
    "walk": (lambda: refine.WALK, (*[FLOATS] * 6, types.Array(types.int32, 1, "C"), FLOAT, INT), (9, 0)),
    "softmax": (lambda: calibration.SOFTMAX, (TABLE, HALVES, INT, INT, FLOAT), (9, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_and_uses_no_local_memory(name):
    kernel, signature, capability = KERNELS[name]
    ptx = kernel().ptx(signature, capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert "__local_depot" not in ptx
    assert "call.uni" not in ptx


@pytest.mark.parametrize("name", ["block", "walk"])
def test_codes_are_made_by_true_division(name):
    """A product with the reciprocal would round other weights to other codes than the definition does."""
    kernel, signature, _ = KERNELS[name]
    ptx = kernel().ptx(signature, (9, 0))
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(approx|full)|rcp", ptx)
    assert "cvt.rni.f32.f32" in ptx  # to nearest, ties to even


def test_blocks_cover_all_columns_and_cross_no_group():
    for columns in (8, 96, 128, 576, 1000, 4096):
        for group_size in (8, 20, 32, 48, 96, 128, 200, 256, columns):
            bounds = solver.block_bounds(columns, group_size)
            assert [k for first, end in bounds for k in range(first, end)] == list(range(columns))
            assert all(0 < end - first <= solver.B for first, end in bounds)
            for first, end in bounds:
                whole = first % group_size == 0 and (end % group_size == 0 or end == columns)
                part = first // group_size == (end - 1) // group_size
                assert whole or part, (columns, group_size, first, end)
