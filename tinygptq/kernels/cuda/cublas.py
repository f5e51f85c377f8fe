"""One dense product through cuBLAS: fp16 in, float32 sums, fp16 or float32 out.

CuPy's own call cannot be recorded in a CUDA graph and has no float32 result for fp16 inputs; this one can, and has.
"""

import ctypes
import functools
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda.runtime import cupy

WORKSPACE = 32 << 20  # bytes: what cuBLAS asks for on Hopper
TRANSPOSED, PLAIN = 1, 0  # cublasOperation_t
TYPES = {"float16": 2, "float32": 0}  # cudaDataType
COMPUTE_32F, DEFAULT_ALGORITHM = 68, -1


class Cublas:
    """A handle with its own workspace, so that calls allocate nothing; for one stream at a time."""

    def __init__(self) -> None:
        from cuda import pathfinder

        self.library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
        self.handle = ctypes.c_void_p()
        self._check(self.library.cublasCreate_v2(ctypes.byref(self.handle)))
        self.workspace = cupy().empty(WORKSPACE, "uint8")

    def multiply_transposed(self, x: Any, weight: Any, out: Any, stream: int) -> None:
        """``out = x @ weight.T``.

        Shapes: x float16 [M, K], weight float16 [N, K], out float16 or float32 [M, N], all C-contiguous CuPy arrays.
        ``stream`` is a cudaStream_t as an integer.
        """
        rows, inner = x.shape
        columns = weight.shape[0]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        half, output = TYPES["float16"], TYPES[out.dtype.name]
        self._check(self.library.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)))
        # setting a stream takes the workspace away again, so it comes second
        pointer = ctypes.c_void_p(self.workspace.data.ptr)
        self._check(self.library.cublasSetWorkspace_v2(self.handle, pointer, ctypes.c_size_t(WORKSPACE)))
        # cuBLAS counts columns first: to it the arrays are weight [K, N], x [K, M] and out [N, M]
        self._check(
            self.library.cublasGemmEx(
                self.handle, TRANSPOSED, PLAIN, columns, rows, inner,
                ctypes.byref(one), ctypes.c_void_p(weight.data.ptr), half, inner,
                ctypes.c_void_p(x.data.ptr), half, inner,
                ctypes.byref(zero), ctypes.c_void_p(out.data.ptr), output, columns,
                COMPUTE_32F, DEFAULT_ALGORITHM,
            )
        )  # fmt: skip

    def _check(self, status: int) -> None:
        if status:
            raise TinyGPTQError(f"cuBLAS refused a call (status {status}); is CUDA's cuBLAS of this driver installed?")


@functools.cache
def cublas() -> Cublas:
    """The one handle of this process."""
    return Cublas()
