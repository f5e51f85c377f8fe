"""Coordinate descent on codes, on the device: the twin of `gptq.refine.descend` for CuPy arrays.

Rows are independent, so a block of threads takes one row through all passes, its G in shared memory. Few codes move: what
costs time is to look at each, and to read a row of H for every move. Every warp looks at the same 32 columns at once, so
that all come to know the first that moves without waiting for each other; the threads then share out the change of G. The
columns after it among those 32 are looked at again, with the new G: codes are visited one by one, as the definition does.

The expressions are the definition's, but for products that are not rounded before an addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq.gptq import refine
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.runtime import cuda, cupy
from tinygptq.kernels.cuda.warps import ALL

THREADS, LANES = 256, 32
ZERO = np.float32(0)

rint = cuda.libdevice.rintf


def walk_rows(G, H, diagonal, codes, scale, zero, order, maxq, passes):
    """A block for each row; codes float32 [R * C] are changed in place.

    Shapes (arrays flat; R rows, C columns): G, scale, zero float32 [R * C]; H float32 [C * C], diagonal float32 [C]; order
    int32 [C]. Grid R, block 256, dynamic shared memory 4 C bytes.
    """
    g = cuda.shared.array(0, np.float32)
    thread, columns = np.uint32(cuda.threadIdx.x), np.uint32(order.size)
    lane, row = thread % np.uint32(LANES), np.uint32(cuda.blockIdx.x) * columns
    for k in range(thread, columns, np.uint32(THREADS)):
        g[k] = G[row + k]
    cuda.syncthreads()
    for _ in range(passes):
        moves, position = 0, np.uint32(0)  # in ``order``: the columns before it have had their turn in this pass
        while position < columns:
            column, code, best, s = np.uint32(0), ZERO, ZERO, ZERO
            if position + lane < columns:
                column = np.uint32(order[position + lane])
                s, z, code = scale[row + column], zero[row + column], codes[row + column]
                best = rint((s * (code - z) + g[column] / diagonal[column]) / s) + z
                best = min(max(best, ZERO), maxq)
            movers = cuda.ballot_sync(ALL, best != code)
            if movers == 0:
                position += np.uint32(LANES)
            else:
                first = np.uint32(cuda.ffs(movers) - 1)
                step = cuda.shfl_sync(ALL, s * (best - code), first)
                below = np.uint32(order[position + first]) * columns
                cuda.syncthreads()  # all have looked before codes and g change
                if thread == first:
                    codes[row + column] = best
                for k in range(thread, columns, np.uint32(THREADS)):
                    g[k] -= step * H[below + k]
                cuda.syncthreads()
                moves += 1
                position += first + np.uint32(1)
        if moves == 0:
            break


WALK = Kernel(walk_rows, THREADS)


def descend(G: Any, H: Any, codes: Any, scale: Any, zero: Any, maxq: int, order: Any, passes: int) -> Any:
    """Coordinate descent; arguments and result as for `gptq.refine.descend`, arrays CuPy's, float32.

    A row too long for a block's shared memory (on an RTX 4090 25,000 columns) is left to the definition.
    """
    cp, (rows, columns) = cupy(), G.shape
    bytes_of_row = columns * np.dtype(np.float32).itemsize
    if bytes_of_row > cp.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]:
        return refine.descend(G, H, codes, scale, zero, maxq, order, passes)
    flat = [cp.ascontiguousarray(array).ravel() for array in (G, H, H.diagonal())]
    moved = cp.array(codes, order="C")
    grids = [cp.ascontiguousarray(array).ravel() for array in (scale, zero)]
    WALK(
        rows, THREADS, cp.cuda.get_current_stream(), *flat, moved.ravel(), *grids, order.astype(np.int32),
        np.float32(maxq), passes, shared_bytes=bytes_of_row,
    )  # fmt: skip
    return moved
