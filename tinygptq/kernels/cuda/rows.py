"""The small layers between the products for many rows at once: embedding, RMSNorm, RoPE with the cache write, SwiGLU.

Definitions: ops.rms_norm, ops.apply_rope, ops.swiglu. Each writes its result in the order in which the next linear wants
its rows (``order[i]``: where element i goes), so that act-order costs nothing.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.cache_codec import cache_writer
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.warps import block_sum

THREADS = 256


@functools.cache
def embed_kernel(features: int, eps: float) -> Kernel:
    """The kernel ``(table, ids, weight, order, h, x, squares)`` that begins the residual stream, and norms it.

    Shapes: table float16 [vocab, C], ids int32 [R], weight float32 [C] of the first norm, order int32 [C]; h float32 [R, C];
    x float16 [R, C], normed; squares float32 [2, R, strips]: the sum of squares as :mod:`.epilogues` want it, of both norms.
    Grid (R), block 256.
    """
    share, small = np.float32(1 / features), np.float32(eps)

    def embed(table, ids, weight, order, h, x, squares):
        shared = cuda.shared.array(33, np.float32)
        row = cuda.blockIdx.x
        wait_for_dependencies()
        begin_dependents()
        token = ids[row]
        total = np.float32(0)
        for i in range(cuda.threadIdx.x, features, THREADS):
            value = np.float32(table[token, i])
            h[row, i] = value
            total += value * value
        total = block_sum(total, shared)
        factor = cuda.libdevice.rsqrtf(total * share + small)
        for i in range(cuda.threadIdx.x, features, THREADS):
            x[row, order[i]] = h[row, i] * weight[i] * factor
        for i in range(cuda.threadIdx.x, squares.shape[2], THREADS):
            part = total if i == 0 else np.float32(0)
            squares[0, row, i] = part
            squares[1, row, i] = part

    return Kernel(embed, THREADS)


@functools.cache
def add_norm_kernel(features: int, eps: float, add: bool) -> Kernel:
    """The kernel ``(h, y, weight, order, x)``: ``h += y`` if ``add``, then ``x = rms_norm(h)``.

    Shapes: h float32 [T, C]; y float16 [T, C]; weight float32 [C]; order int32 [C]; x float16 [T, C]. Grid (T), block 256.
    """
    share, small = np.float32(1 / features), np.float32(eps)

    def add_norm(h, y, weight, order, x):
        shared = cuda.shared.array(33, np.float32)
        row = cuda.blockIdx.x
        total = np.float32(0)
        for i in range(cuda.threadIdx.x, features, THREADS):
            value = h[row, i]
            if add:
                value += np.float32(y[row, i])
                h[row, i] = value
            total += value * value
        factor = cuda.libdevice.rsqrtf(block_sum(total, shared) * share + small)
        for i in range(cuda.threadIdx.x, features, THREADS):
            x[row, order[i]] = h[row, i] * weight[i] * factor

    return Kernel(add_norm, THREADS)


@functools.cache
def rotate_kernel(heads: int, groups: int, dim: int, cache_bits: int) -> Kernel:
    """The kernel ``(qkv, cos, sin, start, row, cache)``: rotates queries where they are, and fills the cache.

    Shapes: qkv float16 [T, (heads + 2 groups) * dim]; cos, sin float32 [at least start + T, dim / 2]; row: the sequence's
    place in the cache; cache: as in :mod:`.decode_attention`. Grid (T), block 64: a warp for keys, one for values.
    """
    half = dim // 2
    write_cache = cache_writer(cache_bits, dim)

    def rotate(qkv, cos, sin, start, row, cache):
        token = cuda.blockIdx.x
        position = start + token
        for group in range(groups):
            write_cache(qkv, token, cos, sin, cache, row, group, heads, groups, position)
        for i in range(cuda.threadIdx.x, heads * half, 64):
            first, d = i // half * dim + i % half, i % half
            c, s = cos[position, d], sin[position, d]
            a, b = np.float32(qkv[token, first]), np.float32(qkv[token, first + half])
            qkv[token, first] = a * c - b * s
            qkv[token, first + half] = b * c + a * s

    return Kernel(rotate, 64)


def _swiglu(gate_up, order, z):
    row = cuda.blockIdx.y
    column = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if column < z.shape[1]:
        place = column // 16 * 32 + column % 16
        gate, up = np.float32(gate_up[row, place]), np.float32(gate_up[row, place + 16])
        z[row, order[column]] = gate / (np.float32(1) + cuda.libdevice.fast_expf(-gate)) * up


swiglu = Kernel(_swiglu, THREADS)
"""``(gate_up, order, z)``: ``z = silu(gate) * up``; gate_up float16 [T, 2 I], 16 columns of gate and 16 of up in turn; order
int32 [I]; z float16 [T, I]. Grid (ceil(I / 256), T), block 256."""
