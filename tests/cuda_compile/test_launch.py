"""Kernels are compiled once and found again: what names them on disk, and what is in the file. No GPU is needed."""

from __future__ import annotations

import collections
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


Pointer = collections.namedtuple("Pointer", "ptr")


class Array:
    """As much of a CuPy array as a launch looks at."""

    __cuda_array_interface__ = property(lambda self: pytest.fail("too slow to be asked at every launch"))

    def __init__(self, array: np.ndarray) -> None:
        self.dtype, self.shape, self.strides, self.size, self.flags = (
            array.dtype, array.shape, array.strides, array.size, array.flags,
        )  # fmt: skip
        self.data = Pointer(ptr=4096)


@pytest.mark.parametrize(
    "argument,flat,kind",
    [
        (7, [7], int),
        ((1, (2,)), [1, 2], (int, (int,))),
        (Array(np.zeros((3, 5), np.float16)), [0, 0, 15, 2, 4096, 3, 5, 10, 2], ("e", 2)),
        ((), [], ()),
    ],
)
def test_arguments_as_numba_takes_them(argument, flat, kind):
    found: list = []
    assert launch._read(argument, found) == kind
    assert found == flat


def test_an_array_with_gaps_is_refused():
    with pytest.raises(ValueError, match="C-contiguous"):
        launch._read(Array(np.zeros((4, 4), np.float32)[:, ::2]), [])


def test_scalars_keep_their_type():
    found: list = []
    kinds = launch._read((np.float32(1.5), np.int32(-3), np.float16(2)), found)
    assert kinds == (np.float32, np.int32, np.float16)
    assert [value.value for value in found] == [1.5, -3, int(np.float16(2).view(np.uint16))]
    with pytest.raises(TypeError, match="not float"):
        launch._read(1.5, [])
