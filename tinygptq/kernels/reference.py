"""The definition of what the kernels compute."""

from __future__ import annotations

import numpy as np

from tinygptq.packing import PackedLinear
from tinygptq.weights import Linear


def matmul(x: np.ndarray, layer: Linear) -> np.ndarray:
    """``x @ W + bias`` with W written out.

    Shapes:
        x: float32 or float64 [..., K]; returns [..., N] in the same dtype. W is float32 [K, N] in either case.
    """
    y = x @ layer.dequantize().astype(x.dtype)
    return y if layer.bias is None else y + layer.bias.astype(x.dtype)


def matmul_16bit(x: np.ndarray, layer: PackedLinear, stretch: int = 256) -> np.ndarray:
    """The same with x rounded to 16-bit integers times a scale, one for each row and each group of its inputs (of which
    ``stretch`` at most): the definition of cpu_calibration.py."""
    order = np.arange(layer.in_features) if layer.perm is None else layer.perm
    rounded = np.empty_like(x)
    for first in range(0, len(order), layer.group_size):
        group = order[first : first + layer.group_size]
        for inputs in (group[i : i + stretch] for i in range(0, len(group), stretch)):
            step = np.maximum(np.abs(x[..., inputs]).max(axis=-1, keepdims=True), 1e-30) / 32767
            rounded[..., inputs] = np.rint(x[..., inputs] / step) * step
    return matmul(rounded, layer)
