"""The Hessian of fp16 activations, gathered on the device: exact products, summed in float32 by the tensor cores."""

from __future__ import annotations

from typing import Any

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Hessian
from tinygptq.kernels.cuda.cublas import Part, cublas
from tinygptq.kernels.cuda.runtime import cupy

PANEL = 1024  # rows of H that one product makes, right of the diagonal only: H is symmetric


class HalfHessian(Hessian):
    """`gptq.Hessian` for CuPy float16 activations.

    A product of two fp16 numbers has 22 significant bits and is exact in float32, so this is the sum that float32
    activations of the same values give, but for its order. The upper half is summed, panel by panel; the lower one is
    filled in when H is first asked for, and nothing may be added afterwards.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self._done = False

    def add(self, X: Any) -> None:
        """Add activations float16 [B, T, in] or [T, in]. What is NaN or infinite shows when H is asked for."""
        assert not self._done
        cp, n = cupy(), self.in_features
        if X.ndim not in (2, 3) or X.shape[-1] != n or X.dtype.name != "float16":
            raise TinyGPTQError(f"activations are {X.dtype.name} {X.shape}: expected float16 [B, T, {n}] or [T, same]")
        x = cp.ascontiguousarray(X).reshape(-1, n)
        if x.shape[0] == 0:
            return
        beta = 0 if self._sum is None else 1
        if self._sum is None:
            self._sum = cp.empty((n, n), "float32")
        stream = cp.cuda.get_current_stream().ptr
        for i in range(0, n, PANEL):
            # H's rows i .. are columns to cuBLAS, and x is [in, tokens]
            rows, columns = min(PANEL, n - i), n - i
            right, left = Part(x, n, i), Part(x, n, i, transposed=True)
            cublas().gemm(right, left, Part(self._sum, n, i * n + i), (columns, rows, x.shape[0]), stream, beta=beta)
        self.n_samples += X.shape[0] if X.ndim == 3 else 1

    @property
    def H(self) -> Any:
        """The Hessian, float32 [in, in]; the array itself, which is not to be changed.

        Raises:
            TinyGPTQError: nothing was added, or a NaN, an infinity or too large an activation was.
        """
        if not self.n_samples:
            raise TinyGPTQError("the Hessian is empty: no calibration activations were added")
        if not self._done:
            cp, H = cupy(), self._sum
            bad = ~cp.isfinite(H.diagonal())
            if bool(bad.any()):
                found = f"first at input {int(bad.argmax())} of {self.in_features}"
                raise TinyGPTQError(f"activations hold NaN or infinity, or exceed fp16's 65504 ({found})")
            H *= cp.float32(2 / self.n_samples)
            for i in range(PANEL, self.in_features, PANEL):
                H[i:, i - PANEL : i] = H[i - PANEL : i, i:].T
            self._done = True
        return self._sum
