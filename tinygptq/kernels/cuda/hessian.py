"""The Hessian gathered on the device: exact products of fp16 numbers, summed in float32 by the tensor cores."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Hessian
from tinygptq.kernels.cuda.cublas import Part, cublas
from tinygptq.kernels.cuda.halves import LOW, split
from tinygptq.kernels.cuda.runtime import cupy

PANEL = 1024  # rows of H that one product makes, right of the diagonal only: H is symmetric
# Tokens in one product, at least; of wide inputs half as many as there are inputs, for with every product H goes to and fro
# once more. Tensor cores cut off what they add to a float32 sum, where float32 rounds: with every 16 tokens it loses up to
# 2^-24 of itself, always downwards (measured: 1e-6 of diag(H) with 256 tokens, 2e-5 with 8,192, 1e-8 in float32). Sums of so
# few are added up with proper rounding.
TOKENS = 256


class HalfHessian(Hessian):
    """`gptq.Hessian` for CuPy activations in float16, or in float32, each then split in two (see halves.py).

    For fp16 activations this is the sum that float32 has for the same values, but for its order.

    The upper half is summed, panel by panel; the lower one is filled in when H is first asked for, and nothing may be added
    afterwards.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self._done = False

    def add(self, X: Any) -> None:
        """Add activations [B, T, in] or [T, in]. What is NaN or infinite shows when H is asked for."""
        assert not self._done
        cp, n = cupy(), self.in_features
        if X.ndim not in (2, 3) or X.shape[-1] != n or X.dtype.name not in ("float16", "float32"):
            raise TinyGPTQError(
                f"activations are {X.dtype.name} {X.shape}: expected halves or floats [B, T, {n}] or [T, same]"
            )
        x = cp.ascontiguousarray(X).reshape(-1, n)
        if x.shape[0] == 0:
            return
        if self._sum is None:
            self._sum = cp.zeros((n, n), np.float32)
        high, low = split(x) if x.dtype == np.float32 else (x, None)
        tokens = max(TOKENS, n // 2)
        for start in range(0, len(high), tokens):
            self._add_product(high[start : start + tokens], high[start : start + tokens], 1.0)
        if low is not None:
            self._add_product(high, low, LOW)
            self._add_product(low, high, LOW)
        self.n_samples += X.shape[0] if X.ndim == 3 else 1

    def _add_product(self, left: Any, right: Any, share: float) -> None:
        """``share * left^T right``, both float16 [tokens, in], to the sum's upper half."""
        (tokens, n), stream = left.shape, cupy().cuda.get_current_stream().ptr
        for i in range(0, n, PANEL):
            # H's rows i .. are columns to cuBLAS, and what is [tokens, in] is [in, tokens]
            a, b, c = Part(right, n, i), Part(left, n, i, transposed=True), Part(self._sum, n, i * n + i)
            cublas().gemm(a, b, c, (n - i, min(PANEL, n - i), tokens), stream, alpha=share, beta=1)

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
            for i in range(0, self.in_features, PANEL):
                j = i + PANEL
                H[i:j, i:j] = cp.triu(H[i:j, i:j]) + cp.triu(H[i:j, i:j], 1).T
                H[j:, i:j] = H[i:j, j:].T
            self._done = True
        return self._sum
