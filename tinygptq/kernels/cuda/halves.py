"""A float32 number as two fp16 ones, so that tensor cores multiply what float32 holds: ``x = high + LOW * low``.

A product of two fp16 numbers has 22 significant bits and is exact in float32. ``high high' + LOW (high low' + low high')``
leaves out ``LOW^2 low low'``, 2^-22 of the whole, as float32's own rounding is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.runtime import cuda, cupy, multiprocessors

THREADS = 256
LOW = 2.0**-11  # an fp16 number's relative precision: what float32 numbers have below it is kept as a second fp16 number
ONCE_LOW = np.float32(1 / LOW)


def split(x: Any) -> tuple[Any, Any]:
    """Float32 -> high and low, float16 of its shape; infinite and NaN for numbers beyond fp16's 65504."""
    cp = cupy()
    x = cp.ascontiguousarray(x)
    high, low = cp.empty(x.shape, np.float16), cp.empty(x.shape, np.float16)
    blocks = max(1, min(-(-x.size // THREADS), 16 * multiprocessors()))
    SPLIT(blocks, THREADS, cp.cuda.get_current_stream(), x.ravel(), high.ravel(), low.ravel())
    return high, low


def split_numbers(x, high, low):
    """x float32 [n], high and low float16 [n]; grid-stride."""
    for i in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        near = np.float16(x[i])
        high[i] = near
        low[i] = np.float16((x[i] - np.float32(near)) * ONCE_LOW)


SPLIT = Kernel(split_numbers, THREADS)
