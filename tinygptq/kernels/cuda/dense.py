"""A product with fp16 weights for 1 to 16 rows of x, at the speed at which the weights can be read (8.0 and up).

For what is not quantised: the head, and the linears of an fp16 model. A block of eight warps computes 32 columns of y, two
mma tiles of 16 rows of W (W is A, as in :mod:`.matvec`), and its warps share out K. A lane loads 16 bytes, 8 neighbouring
k, of each of its rows: mma's sum over k may run in any order, if x is read in the same.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.block_sums import PITCH, Epilogue, finisher
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import load_16_bytes, mma
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.streams import load_stream_pieces
from tinygptq.kernels.cuda.tables import device_function

WARPS = 8
STRIP = 32  # columns of y that a block computes
STEP = 32  # k of one turn of a warp: 8 in each of four lanes
NO_SUM = (np.float32(0),) * 4


@functools.cache
def dense_kernel(row_tiles: int, epilogue: Epilogue) -> Kernel:
    """The kernel ``(x, weight, y, extra)`` that hands ``x @ weight.T`` to an epilogue.

    Args: row_tiles: 1 for up to 8 rows of x, 2 for up to 16.

    Shapes: x float16 [M, K], K a multiple of 32; weight float16 [N, K]; y and extra are the epilogue's.
    Grid (ceil(N / 32)), block 256.
    """
    rows = 8 * row_tiles
    partial_size = WARPS * rows * PITCH
    load = load_stream_pieces(1)
    finish, read, nothing = finisher(rows, WARPS, 1, epilogue), epilogue.read, epilogue.nothing

    @device_function
    def fetch(weight, first, second, third, fourth, k):
        return load(weight, first + k), load(weight, second + k), load(weight, third + k), load(weight, fourth + k)

    @device_function
    def multiply(p, q, w, x):
        p = mma((w[0][0], w[1][0], w[0][1], w[1][1]), (x[0], x[1]), p)
        q = mma((w[2][0], w[3][0], w[2][1], w[3][1]), (x[0], x[1]), q)
        p = mma((w[0][2], w[1][2], w[0][3], w[1][3]), (x[2], x[3]), p)
        q = mma((w[2][2], w[3][2], w[2][3], w[3][3]), (x[2], x[3]), q)
        return p, q

    @device_function
    def leave(partial, warp, lane, tile, p, q):
        """c[0], c[1] are column g of rows 2t and 2t+1 of x, c[2], c[3] column g + 8."""
        for i in range(2):
            at = np.uint32((warp * rows + 8 * tile + 2 * (lane & 3) + i) * PITCH + (lane >> 2))
            partial[at] = p[i]
            partial[at + np.uint32(8)] = p[2 + i]
            partial[at + np.uint32(16)] = q[i]
            partial[at + np.uint32(24)] = q[2 + i]

    def dense_matvec(x, weight, y, extra):
        partial = cuda.shared.array(partial_size, np.float32)
        lane, warp, strip = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockIdx.x
        inner, last = x.shape[1], weight.shape[0] - 1  # a row of W beyond the last is computed as the last, and not stored
        g, part, turn = lane >> 2, 8 * (lane & 3), STEP * WARPS
        first, second = min(STRIP * strip + g, last) * inner + part, min(STRIP * strip + g + 8, last) * inner + part
        third, fourth = min(STRIP * strip + g + 16, last) * inner + part, min(STRIP * strip + g + 24, last) * inner + part
        low_row, high_row = min(g, x.shape[0] - 1) * inner + part, min(g + 8, x.shape[0] - 1) * inner + part
        p, q, r, s = NO_SUM, NO_SUM, NO_SUM, NO_SUM
        start = min(STEP * warp, inner - STEP)
        ahead = fetch(weight, first, second, third, fourth, start)
        begin_dependents()
        wait_for_dependencies()
        known = read(warp, strip, lane, y, extra) if warp < x.shape[0] else nothing
        for k in range(STEP * warp, inner, turn):
            w = ahead
            ahead = fetch(weight, first, second, third, fourth, min(k + turn, inner - STEP))
            p, q = multiply(p, q, w, load_16_bytes(x, low_row + k))
            if row_tiles == 2:
                r, s = multiply(r, s, w, load_16_bytes(x, high_row + k))
        leave(partial, warp, lane, 0, p, q)
        if row_tiles == 2:
            leave(partial, warp, lane, 1, r, s)
        finish(partial, np.int32(0), np.int32(strip), np.int32(0), np.int32(x.shape[0]), y, extra, known)

    return Kernel(dense_matvec, (32 * WARPS, 3))
