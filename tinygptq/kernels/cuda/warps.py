"""Sums and maxima over the lanes of a warp; every lane gets the result, always added up in the same order."""

import numpy as np

from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function

ALL = 0xFFFFFFFF  # every lane takes part


@device_function
def warp_sum(value):
    """The sum of a float32 over the warp."""
    value += cuda.shfl_xor_sync(ALL, value, 16)
    value += cuda.shfl_xor_sync(ALL, value, 8)
    value += cuda.shfl_xor_sync(ALL, value, 4)
    value += cuda.shfl_xor_sync(ALL, value, 2)
    return value + cuda.shfl_xor_sync(ALL, value, 1)


@device_function
def warp_max(value):
    """The largest of a float32 over the warp."""
    value = max(value, cuda.shfl_xor_sync(ALL, value, 16))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 8))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 4))
    value = max(value, cuda.shfl_xor_sync(ALL, value, 2))
    return max(value, cuda.shfl_xor_sync(ALL, value, 1))


@device_function
def block_sum(value, shared):
    """The sum over a block of whole warps; ``shared`` float32 [33] may not be in use, and is free again afterwards."""
    value = warp_sum(value)
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    if lane == 0:
        shared[warp] = value
    cuda.syncthreads()
    if warp == 0:
        part = shared[lane] if lane < (cuda.blockDim.x >> 5) else np.float32(0)
        part = warp_sum(part)
        if lane == 0:
            shared[32] = part
    cuda.syncthreads()
    total = shared[32]
    cuda.syncthreads()
    return total
