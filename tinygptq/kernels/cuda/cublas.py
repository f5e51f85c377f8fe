"""Dense products through cuBLAS: fp16 or float32 in, float32 sums, fp16 or float32 out.

CuPy's own call cannot be recorded in a CUDA graph, has no float32 result for fp16 inputs and does not add to what is there;
this one can, has and does.
"""

import ctypes
import functools
from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda.runtime import cupy

WORKSPACE = 32 << 20  # bytes: what cuBLAS asks for on Hopper
TRANSPOSED, PLAIN = 1, 0  # cublasOperation_t
TYPES = {"float16": 2, "float32": 0}  # cudaDataType
COMPUTE_32F, COMPUTE_32F_FAST_TF32, DEFAULT_ALGORITHM = 68, 77, -1


class Part:
    """A matrix within a CuPy array, as cuBLAS sees it: its columns lie one after another, ``leading`` elements apart.

    Args:
        start: the matrix's first element, counted from the array's. step: elements to the next matrix of a batch.
        transposed: it is the transpose of this matrix that is multiplied.
    """

    def __init__(self, array: Any, leading: int, start: int = 0, step: int = 0, transposed: bool = False) -> None:
        address = ctypes.c_void_p(array.data.ptr + start * array.itemsize)
        self.arguments, self.step = (address, TYPES[array.dtype.name], leading), ctypes.c_longlong(step)
        self.operation = TRANSPOSED if transposed else PLAIN


class Cublas:
    """A handle with its own workspace, so that calls allocate nothing; for one stream at a time."""

    def __init__(self) -> None:
        from cuda import pathfinder

        self.library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
        self.handle = ctypes.c_void_p()
        self._check(self.library.cublasCreate_v2(ctypes.byref(self.handle)))
        self.workspace = cupy().empty(WORKSPACE, "uint8")
        self._stream: int | None = None  # what the handle is set to

    def multiply_transposed(self, x: Any, weight: Any, out: Any, stream: int) -> None:
        """``out = x @ weight.T``.

        Shapes: x float16 [M, K], weight float16 [N, K], out float16 or float32 [M, N], all C-contiguous CuPy arrays.
        ``stream`` is a cudaStream_t as an integer.
        """
        (rows, inner), columns = x.shape, weight.shape[0]
        # cuBLAS counts columns first: to it the arrays are weight [K, N], x [K, M] and out [N, M]
        self.gemm(Part(weight, inner, transposed=True), Part(x, inner), Part(out, columns), (columns, rows, inner), stream)

    def gemm(
        self, a: "Part", b: "Part", c: "Part", sizes: tuple[int, int, int], stream: int, *,
        alpha: float = 1, beta: float = 0, batch: int = 1, tf32: bool = False,
    ) -> None:  # fmt: skip
        """``c = alpha * a @ b + beta * c`` for matrices in cuBLAS's order, which counts down columns: a [M, K], b [K, N], c
        [M, N] with sizes (M, N, K). A C-contiguous array is its own transpose there.

        Args:
            batch: so many products, each matrix a ``step`` further on than in the one before.
            tf32: round float32 factors to TF32's 11 bits and multiply on tensor cores.
        """
        if stream != self._stream:
            self._check(self.library.cublasSetStream_v2(self.handle, ctypes.c_void_p(stream)))
            # setting a stream takes the workspace away again, so it comes second
            pointer = ctypes.c_void_p(self.workspace.data.ptr)
            self._check(self.library.cublasSetWorkspace_v2(self.handle, pointer, ctypes.c_size_t(WORKSPACE)))
            self._stream = stream
        head = (self.handle, a.operation, b.operation, *sizes, ctypes.byref(ctypes.c_float(alpha)))
        other, how = ctypes.byref(ctypes.c_float(beta)), (COMPUTE_32F_FAST_TF32 if tf32 else COMPUTE_32F, DEFAULT_ALGORITHM)
        if batch == 1:
            status = self.library.cublasGemmEx(*head, *a.arguments, *b.arguments, other, *c.arguments, *how)
        else:
            status = self.library.cublasGemmStridedBatchedEx(
                *head, *a.arguments, a.step, *b.arguments, b.step, other, *c.arguments, c.step, batch, *how
            )
        self._check(status)

    def subtract_product(self, W: Any, Err: Any, Hinv: Any, first: int, end: int, stream: int) -> None:
        """``W[:, end:] -= Err[:, : end - first] @ Hinv[first:end, end:]``; float32, C-contiguous."""
        (rows, columns), width = W.shape, Err.shape[1]
        sizes = (columns - end, rows, end - first)
        factor, out = Part(Hinv, columns, first * columns + end), Part(W, columns, end)
        self.gemm(factor, Part(Err, width), out, sizes, stream, alpha=-1, beta=1)

    def _check(self, status: int) -> None:
        if status:
            raise TinyGPTQError(f"cuBLAS refused a call (status {status}); is CUDA's cuBLAS of this driver installed?")


@functools.cache
def cublas() -> Cublas:
    """The one handle of this process."""
    return Cublas()
