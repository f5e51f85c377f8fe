"""The small layers between the products for many rows at once: embedding, RMSNorm, RoPE with the cache write, SwiGLU.

Definitions: ops.rms_norm, ops.apply_rope, ops.swiglu. Each writes its result in the order in which the next linear wants
its rows (``order[i]``: where element i goes), so that act-order costs nothing.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.cache_codec import cache_writer
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import (
    bits_from_float,
    float_from_bits,
    half2_from_floats,
    half2_to_floats,
    load_16_bytes,
    store_16_bytes,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.tables import device_function
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

    eighths = features // 8

    def embed(table, ids, weight, order, h, x, squares):
        shared = cuda.shared.array(33, np.float32)
        row = cuda.blockIdx.x
        begin_dependents()
        wait_for_dependencies()
        start = np.int64(ids[row]) * features
        total = np.float32(0)
        for i in range(cuda.threadIdx.x, eighths, THREADS):  # 16 bytes at a time: the table may be in the host's memory
            words = load_16_bytes(table, start + 8 * i)
            for j in range(4):
                pair = half2_to_floats(words[j])
                h[row, 8 * i + 2 * j], h[row, 8 * i + 2 * j + 1] = pair[0], pair[1]
                total += pair[0] * pair[0] + pair[1] * pair[1]
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
def add_norm_kernel(features: int, eps: float, add: bool, in_order: bool) -> Kernel:
    """The kernel ``(h, y, weight, order, x)``: ``h += y`` if ``add``, then ``x = rms_norm(h)``.

    Args: features: a multiple of 8. in_order: ``order`` is 0, 1, 2 and so on.

    Shapes: h float32 [T, C]; y float16 [T, C]; weight float32 [C]; order int32 [C]; x float16 [T, C]. Grid (T), block 256.
    """
    share, small, eighths = np.float32(1 / features), np.float32(eps), features // 8
    put = _putter(in_order)

    def add_norm(h, y, weight, order, x):
        shared = cuda.shared.array(33, np.float32)
        start = np.int64(cuda.blockIdx.x) * features
        total = np.float32(0)
        for i in range(cuda.threadIdx.x, eighths, THREADS):
            at = start + 8 * i
            a, b = _floats(load_16_bytes(h, at)), _floats(load_16_bytes(h, at + 4))
            if add:
                words = load_16_bytes(y, at)
                a, b = _plus(a, words[0], words[1]), _plus(b, words[2], words[3])
                store_16_bytes(h, at, _bits(a))
                store_16_bytes(h, at + 4, _bits(b))
            total += a[0] * a[0] + a[1] * a[1] + a[2] * a[2] + a[3] * a[3]
            total += b[0] * b[0] + b[1] * b[1] + b[2] * b[2] + b[3] * b[3]
        factor = cuda.libdevice.rsqrtf(block_sum(total, shared) * share + small)
        for i in range(cuda.threadIdx.x, eighths, THREADS):
            at = start + 8 * i
            a, b = _floats(load_16_bytes(h, at)), _floats(load_16_bytes(h, at + 4))
            v, w = _floats(load_16_bytes(weight, 8 * i)), _floats(load_16_bytes(weight, 8 * i + 4))
            put(x, cuda.blockIdx.x, order, 8 * i,
                half2_from_floats(a[0] * v[0] * factor, a[1] * v[1] * factor),
                half2_from_floats(a[2] * v[2] * factor, a[3] * v[3] * factor),
                half2_from_floats(b[0] * w[0] * factor, b[1] * w[1] * factor),
                half2_from_floats(b[2] * w[2] * factor, b[3] * w[3] * factor))  # fmt: skip

    return Kernel(add_norm, THREADS)


@device_function
def _floats(words):
    return float_from_bits(words[0]), float_from_bits(words[1]), float_from_bits(words[2]), float_from_bits(words[3])


@device_function
def _bits(values):
    return bits_from_float(values[0]), bits_from_float(values[1]), bits_from_float(values[2]), bits_from_float(values[3])


@device_function
def _plus(values, low, high):
    """Four float32 and two half2."""
    p, q = half2_to_floats(low), half2_to_floats(high)
    return values[0] + p[0], values[1] + p[1], values[2] + q[0], values[3] + q[1]


def _putter(in_order: bool):
    """Device function that stores eight neighbouring numbers of a row, four half2."""

    @device_function
    def pair(x, row, order, column, word):
        values = half2_to_floats(word)
        x[row, order[column]], x[row, order[column + 1]] = values[0], values[1]

    @device_function
    def put(x, row, order, column, a, b, c, d):
        if in_order:
            store_16_bytes(x, np.int64(row) * x.shape[1] + column, (a, b, c, d))
        else:
            pair(x, row, order, column, a)
            pair(x, row, order, column + 2, b)
            pair(x, row, order, column + 4, c)
            pair(x, row, order, column + 6, d)

    return put


@functools.cache
def rotate_kernel(heads: int, groups: int, dim: int, cache_bits: int) -> Kernel:
    """The kernel ``(qkv, cos, sin, start, row, cache)``: rotates queries where they are, and fills the cache.

    Shapes: qkv float16 [T, (heads + 2 groups) * dim]; cos, sin float32 [at least start + T, dim / 2]; row: the sequence's
    place in the cache; cache: as in :mod:`.decode_attention`. Grid (T, groups), block 64: a warp for the key, one for the
    value, both for the group's queries.
    """
    half, each = dim // 2, heads // groups
    write_cache = cache_writer(cache_bits, dim)

    def rotate(qkv, cos, sin, start, row, cache):
        token, group = cuda.blockIdx.x, cuda.blockIdx.y
        position = start + token
        write_cache(qkv, token, cos, sin, cache, row, group, heads, groups, position)
        for i in range(cuda.threadIdx.x, each * half, 64):
            first, d = (group * each + i // half) * dim + i % half, i % half
            c, s = cos[position, d], sin[position, d]
            a, b = np.float32(qkv[token, first]), np.float32(qkv[token, first + half])
            qkv[token, first] = a * c - b * s
            qkv[token, first + half] = b * c + a * s

    return Kernel(rotate, 64)


@functools.cache
def swiglu_kernel(in_order: bool) -> Kernel:
    """The kernel ``(gate_up, order, z)``: ``z = silu(gate) * up``, eight columns a thread.

    Args: in_order: ``order`` is 0, 1, 2 and so on.

    Shapes: gate_up float16 [T, 2 I], 16 columns of gate and 16 of up in turn, I a multiple of 16; order int32 [I]; z float16
    [T, I]. Grid (ceil(I / 2048), T), block 256.
    """
    put = _putter(in_order)

    @device_function
    def of_pair(gate, up):
        g, u = half2_to_floats(gate), half2_to_floats(up)
        a = g[0] / (np.float32(1) + cuda.libdevice.fast_expf(-g[0])) * u[0]
        return half2_from_floats(a, g[1] / (np.float32(1) + cuda.libdevice.fast_expf(-g[1])) * u[1])

    def swiglu(gate_up, order, z):
        row = cuda.blockIdx.y
        column = 8 * (cuda.blockIdx.x * THREADS + cuda.threadIdx.x)
        if column < z.shape[1]:
            at = np.int64(row) * gate_up.shape[1] + column // 16 * 32 + column % 16
            g, u = load_16_bytes(gate_up, at), load_16_bytes(gate_up, at + 16)
            parts = of_pair(g[0], u[0]), of_pair(g[1], u[1]), of_pair(g[2], u[2]), of_pair(g[3], u[3])
            put(z, row, order, column, parts[0], parts[1], parts[2], parts[3])

    return Kernel(swiglu, THREADS)
