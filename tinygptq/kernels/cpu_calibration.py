"""The forward pass of calibration text on the CPU: cpu.py's functions, but for packed linears, which take 16-bit integers.

Half of the time it takes to quantise a model goes into products of many rows with linears that are quantised already. What
they are used for, calibrating the next linears, needs no float32 products: on GPUs it is done in fp16, whose rounding is ten
times as coarse as the one here. See cpu_integers.py; reference.matmul_16bit is the definition.
"""

from __future__ import annotations

import numpy as np

from tinygptq import threads
from tinygptq.kernels import cpu, cpu_launch
from tinygptq.kernels.cpu import CpuLinear, apply_rope, causal_attention, rms_norm, swiglu
from tinygptq.kernels.cpu_integers import HEIGHT, ROWS_AT_ONCE
from tinygptq.kernels.cpu_tiles import COLUMNS, FLUSH, GROUP
from tinygptq.weights import Linear

__all__ = ["apply_rope", "causal_attention", "linear", "rms_norm", "swiglu"]

SLICES = 16  # of the rows, for each thread: W is unpacked once for all
MANY_ROWS = 256  # from here on, unpacking W is soon made up for


def linear(x: np.ndarray, layer: Linear) -> np.ndarray:
    """``x float32 [..., K] -> x @ W + bias float32 [..., N]``; a NaN or infinity makes its row NaN."""
    weights, rows = cpu.prepared(layer), x.size // max(1, x.shape[-1])
    if not weights.is_packed or rows < MANY_ROWS or x.shape[-1] != weights.in_features:
        return cpu.linear(x, layer)
    y = _product(np.ascontiguousarray(x, np.float32).reshape(rows, -1), weights)
    if layer.bias is not None:
        y += layer.bias
    return y.reshape(*x.shape[:-1], weights.out_features)


def _product(x: np.ndarray, weights: CpuLinear) -> np.ndarray:
    """[M, K] -> [M, N] without bias."""
    tiles, table = -(-weights.out_features // COLUMNS), weights.table
    stretches = weights.groups * -(-int(table[GROUP]) // FLUSH)
    pairs = np.empty((tiles, weights.padded_rows // 2, COLUMNS), np.int32)
    cpu_launch.run(cpu_launch.UNPACK, tiles, table, pairs)
    y = np.empty((len(x) + HEIGHT - 1, tiles * COLUMNS), np.float32)
    parts = -(-len(x) // ROWS_AT_ONCE)

    def some(of_them: slice) -> None:
        integers = np.empty((ROWS_AT_ONCE, weights.padded_rows), np.int16)
        scales, ordered = np.empty((ROWS_AT_ONCE, stretches), np.float32), np.empty(weights.padded_rows, np.float32)
        job = (table, x, x.strides[0], len(x), pairs, y, y.strides[0], integers, scales, stretches, ordered)
        cpu_launch.run_here(cpu_launch.INTEGER_PRODUCT, of_them, *job)

    threads.share(parts, x.size * y.shape[1] // 2, some, slices=SLICES)
    return y[: len(x), : weights.out_features]
