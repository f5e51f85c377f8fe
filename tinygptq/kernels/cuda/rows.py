"""The small layers between the products for many rows at once: embedding, RMSNorm, SwiGLU.

Definitions: ops.rms_norm, ops.swiglu. The first two write their result in the order in which the next linear wants its
rows (``order[i]``: where element i goes); SwiGLU's comes in that order (see cuda/weights.py). So act-order costs little.
"""

import functools

import numpy as np

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

THREADS, EMBED_THREADS = 256, 512


@functools.cache
def embed_kernel(features: int, eps: float) -> Kernel:
    """The kernel ``(table, ids, weight, order, h, x, squares)`` that begins the residual stream, and norms it.

    Shapes: table float16 [vocab, C], C a multiple of 8; ids int32 [R]; weight float32 [C] of the first norm; order int32
    [C]; h float32 [R, C]; x float16 [R, C], normed; squares float32 [2, R, strips]: the sum of squares as :mod:`.epilogues`
    want it, of both norms. Grid (R), block 512.
    """
    share, small, eighths = np.float32(1 / features), np.float32(eps), features // 8
    turns = -(-eighths // EMBED_THREADS)
    held_shape = turns, 8

    def embed(table, ids, weight, order, h, x, squares):
        shared, held = cuda.shared.array(33, np.float32), cuda.local.array(held_shape, np.float32)
        row, total = cuda.blockIdx.x, np.float32(0)
        begin_dependents()
        wait_for_dependencies()
        start = np.int64(ids[row]) * features
        for n in range(turns):  # 16 bytes at a time: the table may be in the host's memory
            i = n * EMBED_THREADS + cuda.threadIdx.x
            words = load_16_bytes(table, start + 8 * min(i, eighths - 1))
            for j in range(4):
                pair = half2_to_floats(words[j])
                held[n, 2 * j], held[n, 2 * j + 1] = pair[0], pair[1]
                if i < eighths:
                    total += pair[0] * pair[0] + pair[1] * pair[1]
        total = block_sum(total, shared)
        factor = cuda.libdevice.rsqrtf(total * share + small)
        for n in range(turns):
            i = n * EMBED_THREADS + cuda.threadIdx.x
            if i < eighths:
                for j in range(8):
                    h[row, 8 * i + j] = held[n, j]
                    x[row, order[8 * i + j]] = held[n, j] * weight[8 * i + j] * factor
        for i in range(cuda.threadIdx.x, squares.shape[2], EMBED_THREADS):
            part = total if i == 0 else np.float32(0)
            squares[0, row, i] = part
            squares[1, row, i] = part

    return Kernel(embed, EMBED_THREADS)


@functools.cache
def add_norm_kernel(features: int, eps: float, add: bool, in_order: bool) -> Kernel:
    """The kernel ``(h, y, weight, order, x)``: ``h += y`` if ``add``, then ``x = rms_norm(h)``.

    Args: features: a multiple of 8. in_order: ``order`` is 0, 1, 2 and so on.

    Shapes: h float32 [T, C]; y float16 [T, C]; weight float32 [C]; order int32 [C]; x float16 [T, C]. Grid (T), block 256.
    """
    share, small, eighths = np.float32(1 / features), np.float32(eps), features // 8
    turns, put = -(-eighths // THREADS), _putter(in_order)
    held_shape = turns, 8  # what a thread holds of a row from the sum to the norm
    sorted_size = 1 if in_order else features  # written to memory from there, 16 bytes at a time

    @device_function
    def read(h, y, at):
        """Eight numbers of the residual stream; with ``add``, after adding y."""
        a, b = _floats(load_16_bytes(h, at)), _floats(load_16_bytes(h, at + 4))
        if add:
            words = load_16_bytes(y, at)
            a, b = _plus(a, words[0], words[1]), _plus(b, words[2], words[3])
        return a, b

    def add_norm(h, y, weight, order, x):
        shared, held = cuda.shared.array(33, np.float32), cuda.local.array(held_shape, np.float32)
        ordered = cuda.shared.array(sorted_size, np.float16, alignment=16)
        start, total = np.int64(cuda.blockIdx.x) * features, np.float32(0)
        for n in range(turns):
            i = n * THREADS + cuda.threadIdx.x
            a, b = read(h, y, start + 8 * min(i, eighths - 1))
            if add and i < eighths:
                store_16_bytes(h, start + 8 * i, _bits(a))
                store_16_bytes(h, start + 8 * i + 4, _bits(b))
            for j in range(4):
                held[n, j], held[n, j + 4] = a[j], b[j]
                if i < eighths:
                    total += a[j] * a[j] + b[j] * b[j]
        factor = cuda.libdevice.rsqrtf(block_sum(total, shared) * share + small)
        for n in range(turns):
            i = n * THREADS + cuda.threadIdx.x
            if i < eighths:
                a = held[n, 0], held[n, 1], held[n, 2], held[n, 3]
                b = held[n, 4], held[n, 5], held[n, 6], held[n, 7]
                v, w = _floats(load_16_bytes(weight, 8 * i)), _floats(load_16_bytes(weight, 8 * i + 4))
                put(x, start, ordered, order, 8 * i,
                    half2_from_floats(a[0] * v[0] * factor, a[1] * v[1] * factor),
                    half2_from_floats(a[2] * v[2] * factor, a[3] * v[3] * factor),
                    half2_from_floats(b[0] * w[0] * factor, b[1] * w[1] * factor),
                    half2_from_floats(b[2] * w[2] * factor, b[3] * w[3] * factor))  # fmt: skip
        if not in_order:
            cuda.syncthreads()
            for i in range(cuda.threadIdx.x, eighths, THREADS):
                store_16_bytes(x, start + 8 * i, _eight(ordered, 8 * i))

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
    """Device function that stores eight neighbouring numbers, four half2, of the row of x that begins at ``start``, or puts
    them where they belong in shared memory."""

    @device_function
    def pair(ordered, order, column, word):
        values = half2_to_floats(word)
        ordered[order[column]], ordered[order[column + 1]] = values[0], values[1]

    @device_function
    def put(x, start, ordered, order, column, a, b, c, d):
        if in_order:
            store_16_bytes(x, start + column, (a, b, c, d))
        else:
            pair(ordered, order, column, a)
            pair(ordered, order, column + 2, b)
            pair(ordered, order, column + 4, c)
            pair(ordered, order, column + 6, d)

    return put


@device_function
def _eight(halves, at):
    """Eight neighbouring float16 as four half2."""
    return _two(halves, at), _two(halves, at + 2), _two(halves, at + 4), _two(halves, at + 6)


@device_function
def _two(halves, at):
    return half2_from_floats(halves[at], halves[at + 1])


@device_function
def _swiglu_pair(gate, up):
    g, u = half2_to_floats(gate), half2_to_floats(up)
    a = g[0] / (np.float32(1) + cuda.libdevice.fast_expf(-g[0])) * u[0]
    return half2_from_floats(a, g[1] / (np.float32(1) + cuda.libdevice.fast_expf(-g[1])) * u[1])


def _swiglu(gate_up, z):
    """``z = silu(gate) * up``, eight columns a thread.

    Shapes: gate_up float16 [T, 2 I], 16 columns of gate and 16 of up in turn, I a multiple of 16; z float16 [T, I]. Grid
    (ceil(I / 2048), T), block 256.
    """
    row = np.int64(cuda.blockIdx.y)
    column = 8 * (cuda.blockIdx.x * THREADS + cuda.threadIdx.x)
    if column < z.shape[1]:
        at = row * gate_up.shape[1] + column // 16 * 32 + column % 16
        g, u = load_16_bytes(gate_up, at), load_16_bytes(gate_up, at + 16)
        parts = _swiglu_pair(g[0], u[0]), _swiglu_pair(g[1], u[1]), _swiglu_pair(g[2], u[2]), _swiglu_pair(g[3], u[3])
        store_16_bytes(z, row * z.shape[1] + column, parts)


swiglu = Kernel(_swiglu, THREADS)
