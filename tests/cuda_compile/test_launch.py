"""Kernels are compiled once and found again: what names them on disk, and what is in the file. No GPU is needed."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra [cuda])", allow_module_level=True)

import numpy as np
from numba.cuda import types

from tinygptq.kernels.cuda import launch, matvec
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.runtime import cuda

FLOATS = types.Array(types.float32, 1, "C")


def scale_kernel(factor, bounds=None):
    number = np.float32(factor)

    def scale(x, more):
        i = cuda.grid(1)
        if i < x.size:
            x[i] = number * x[i] + more[0][i]

    return Kernel(scale, bounds)


SIGNATURE = (FLOATS, types.Tuple.from_types((FLOATS,)))


def test_the_cubin_holds_the_kernel_under_its_own_name():
    kernel = scale_kernel(2, (128, 4))
    ptx = kernel.ptx(SIGNATURE, (8, 0))
    assert ".maxntid 128" in ptx
    assert ".minnctapersm 4" in ptx
    code = launch.assemble(ptx, (8, 0))
    assert code.startswith(b"\x7fELF")
    assert f".entry {kernel._entry(code)}(" in ptx


def test_whatever_changes_the_code_changes_the_name():
    names = {
        scale_kernel(2)._name(SIGNATURE, (8, 0)),
        scale_kernel(3)._name(SIGNATURE, (8, 0)),
        scale_kernel(2, 128)._name(SIGNATURE, (8, 0)),
        scale_kernel(2)._name(SIGNATURE, (9, 0)),
        scale_kernel(2)._name((types.Array(types.float64, 1, "C"), SIGNATURE[1]), (8, 0)),
    }
    assert len(names) == 5
    assert scale_kernel(2)._name(SIGNATURE, (8, 0)) in names


def test_device_functions_count_with_what_they_close_over():
    make = functools.partial(matvec._chunk_product, group_size=128, zero=8, row_tiles=1, wide_scales=False)
    one, same, other = make(bits=4), make(bits=4), make(bits=2)
    assert launch._describe(one, {}) == launch._describe(same, {})
    assert launch._describe(one, {}) != launch._describe(other, {})


def test_another_process_finds_the_same_name():
    script = (
        "from test_launch import SIGNATURE, scale_kernel\nfrom tinygptq.kernels.cuda import launch, matvec\n"
        "product = matvec._chunk_product(4, 128, 8, 1, False)\n"
        "print(scale_kernel(2)._name(SIGNATURE, (8, 0)), hash(repr(launch._describe(product, {}))))"
    )
    folder = __file__.rpartition("/")[0]

    def ask() -> str:
        paths = ":".join([folder, *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", script], env={"PYTHONPATH": paths, "PYTHONHASHSEED": "0"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ask() == ask()


@pytest.mark.parametrize(
    "argument,flat",
    [(7, [7]), ((1, (2,)), [1, 2])],
)
def test_arguments_as_numba_takes_them(argument, flat):
    found: list = []
    launch._flatten(argument, found)
    assert found == flat


def test_scalars_keep_their_type():
    found: list = []
    for number in (np.float32(1.5), np.int32(-3), np.float16(2)):
        launch._flatten(number, found)
    assert [value.value for value in found] == [1.5, -3, int(np.float16(2).view(np.uint16))]
    with pytest.raises(TypeError, match="not float"):
        launch._kind(1.5)
