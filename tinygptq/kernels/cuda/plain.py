"""The quantised product without tensor cores or inline PTX: where to start reading, and what older cards run.

It serves every bit width, group size and number of rows, from compute capability 7.5 on and in Numba's simulator. The
other kernels compute the same thing, faster, for some of the cases.
"""

import functools
import math

import numpy as np

from tinygptq.kernels.cuda.layout import COLUMNS, PAIRS, ROWS, groups_together
from tinygptq.kernels.cuda.runtime import SIMULATOR, cuda

PARTS = 8  # threads that share one column's K rows
ROWS_OF_X = 8  # that a thread serves with one pass over the weights; equal to PARTS
RUN = 32  # neighbouring k that a thread takes at a time


def kernel(function):
    """A kernel for the device, or for the simulator, which runs it as ``kernel[grid, block](...)``."""
    if SIMULATOR:
        return cuda.jit(function)
    from tinygptq.kernels.cuda.launch import Kernel

    return Kernel(function)


@functools.cache
def plain_kernel(bits: int, group_size: int, zero: int | None):
    """The kernel ``(x, codes, scales, zeros, y)`` that writes ``y = x @ W``.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`.

    Shapes: x float16 or float32 [M, K] with columns in the order of the sorted rows; codes uint32 [C, S, bits, 32, 4],
    scales and zeros [G / P, S, P, 32] those of a DeviceLinear (zeros is not read when ``zero`` is a number); y float16 or
    float32 [M, N]. Products and sums are float32. Grid (ceil(N / 32), ceil(M / 8)), block (32, 8): :func:`grid_of`.
    """
    together = groups_together(group_size)
    same_scale = math.gcd(group_size, RUN)  # neighbouring k that surely share a group

    def plain_matmul(x, codes, scales, zeros, y):
        partial = cuda.shared.array((PARTS, ROWS_OF_X, COLUMNS), np.float32)
        total = cuda.local.array(ROWS_OF_X, np.float32)
        lane, part, strip = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.x
        first_row = cuda.blockIdx.y * ROWS_OF_X
        rows = min(ROWS_OF_X, x.shape[0] - first_row)
        for r in range(ROWS_OF_X):
            total[r] = np.float32(0)

        for run in range(part, x.shape[1] // RUN, PARTS):
            for start in range(RUN * run, RUN * (run + 1), same_scale):
                groups, group = start // group_size // together, start // group_size % together
                scale = np.float32(scales[groups, strip, group, lane])
                offset = np.float32(zeros[groups, strip, group, lane] if zero is None else zero)
                for k in range(start, start + same_scale):
                    weight = scale * (np.float32(code_at(codes, bits, strip, lane, k)) - offset)
                    for r in range(rows):
                        total[r] += np.float32(x[first_row + r, k]) * weight

        for r in range(ROWS_OF_X):
            partial[part, r, lane] = total[r]
        cuda.syncthreads()
        column = strip * COLUMNS + lane
        if part < rows and column < y.shape[1]:  # thread (lane, r) now sums row r
            result = np.float32(0)
            for p in range(PARTS):
                result += partial[p, part, lane]
            y[first_row + part, column] = result

    return kernel(plain_matmul)


@cuda.jit(device=True, inline="always")
def code_at(codes, bits, strip, column, k):
    """The code of row k and a strip's column, from where :mod:`.layout` put it."""
    chunk, unit, t, pair, half = k // ROWS, k % ROWS // 32, k % 32 // 8, k % 8 // 2, k % 2
    lane, in_word = column // 4 * 4 + t, PAIRS // bits
    place = 4 * unit + pair % 2 * 2 + pair // 2  # a unit's four pairs stand in the order 0, 2, 1, 3
    word, place = place // in_word, place % in_word
    if bits == 3:  # word u holds unit u < 3, and one pair of unit 3
        word, place = (unit, pair % 2 * 2 + pair // 2) if unit < 3 else (pair, 4)
        if word == 3:  # unit 3's pair 3: bit b is the top bit of word b's half
            top = np.uint32(16 * half + 15)
            low = codes[chunk, strip, 0, lane, column % 4] >> top & np.uint32(1)
            middle = codes[chunk, strip, 1 % bits, lane, column % 4] >> top & np.uint32(1)
            high = codes[chunk, strip, 2 % bits, lane, column % 4] >> top & np.uint32(1)
            return low | middle << np.uint32(1) | high << np.uint32(2)
    shift = np.uint32(16 * half + bits * place)
    return codes[chunk, strip, word, lane, column % 4] >> shift & np.uint32((1 << bits) - 1)


@kernel
def gather_columns(x, perm, out):
    """``out = x[:, perm]`` for act-order: rows of W are sorted by group, so x has to follow. A block for a row at a time."""
    for row in range(cuda.blockIdx.x, x.shape[0], cuda.gridDim.x):
        for column in range(cuda.threadIdx.x, x.shape[1], cuda.blockDim.x):
            out[row, column] = x[row, perm[column]]


@kernel
def add_bias(y, bias):
    """``y += bias``: y [M, N], bias float32 [at least N]. Grid-stride over elements."""
    columns = y.shape[1]
    for i in range(cuda.grid(1), y.shape[0] * columns, cuda.gridsize(1)):
        row, column = i // columns, i % columns
        y[row, column] = np.float32(y[row, column]) + bias[column]


def grid_of(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(grid, block) of :func:`plain_kernel` for y [rows, columns]."""
    return (-(-columns // COLUMNS), -(-rows // ROWS_OF_X)), (COLUMNS, PARTS)
