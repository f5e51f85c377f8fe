"""The definition of what the kernels compute."""

from __future__ import annotations

import numpy as np

from tinygptq.weights import Linear


def matmul(x: np.ndarray, layer: Linear) -> np.ndarray:
    """``x @ W + bias`` with W written out.

    Shapes:
        x: float32 or float64 [..., K]; returns [..., N] in the same dtype. W is float32 [K, N] in either case.
    """
    y = x @ layer.dequantize().astype(x.dtype)
    return y if layer.bias is None else y + layer.bias.astype(x.dtype)
