"""Attention of many new tokens to themselves and to all before them, in tiles: no T x S matrix is ever in memory.

The definition is ops.causal_attention. A block takes one head and 64 queries, 16 for each of its four warps, and goes over
the keys 64 at a time with an online softmax (Dao et al. 2022, FlashAttention). Both products run on tensor cores, sums in
float32:

    scores  = queries (A, in registers)  times keys (B, from shared memory: 8 neighbouring dimensions a lane)
    mixture = exp2(scores - maximum) (A: mma's sums have the places its A wants)  times values (B, through ldmatrix.trans)

While one of the two tiles in shared memory is used, the other is copied. Scores are kept in base 2.
"""

import functools
import math

import numpy as np

from tinygptq.kernels.cuda.intrinsics import load_transposed
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import (
    copy_async_commit,
    copy_async_or_zero,
    copy_async_wait,
    half2_from_floats,
    load_shared,
    mma,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL

WARPS = 4
THREADS = 32 * WARPS
QUERIES = 16 * WARPS  # of a block
KEYS = 64  # of a tile
LOG2_E = 1 / math.log(2)
LOWEST = np.float32(-1e30)


@functools.cache
def prefill_attention_kernel(heads: int, groups: int, dim: int, width: int) -> Kernel:
    """The kernel ``(qkv, keys, values, start, order, out)``.

    Args: heads, groups, dim: as in :mod:`.decode_attention`; width: dimensions of a head in the cache.

    Shapes: qkv float16 [T, (heads + 2 groups) * dim], queries rotated; keys, values float16 [groups, capacity, width], the
    new tokens' included, rotated; start: position of the first of the T tokens; order int32 [heads * dim]: where each
    element of out goes; out float16 [T, heads * dim]. Grid (ceil(T / 64), heads), block 128.
    """
    key_pitch, value_pitch = width + 32, width + 8  # fp16 numbers between rows in shared memory: other banks for each lane
    key_words, value_words = KEYS * key_pitch // 2, KEYS * value_pitch // 2
    steps, columns = width // 32, width // 8  # of 32 dimensions of scores; of 8 dimensions of the mixture
    copies = KEYS * width // 8 // THREADS  # of 16 bytes by each thread
    scale, key_tiles = np.float32(LOG2_E / math.sqrt(dim)), KEYS // 8
    query_words = QUERIES * key_pitch // 2
    shared_words = max(key_words, query_words) + value_words
    values_at = max(key_words, query_words)

    @device_function
    def copy_tile(shared, at, pitch, source, base, first, end):
        """Start copying 64 rows of keys or values; rows from ``end`` on become 0."""
        for i in range(copies):
            piece = i * THREADS + cuda.threadIdx.x
            row, part = piece // columns, piece % columns
            token = first + row
            there, here = base + min(token, end - 1) * width + 8 * part, at + row * (pitch // 2) + 4 * part
            copy_async_or_zero(shared, here, source, there, token < end)
        copy_async_commit()

    @device_function
    def load_queries(queries, shared, qkv, head, first):
        """16 rows of a warp's queries to mma's A, through shared memory, padded with zeros to the cache's width."""
        for i in range(cuda.threadIdx.x, QUERIES * (width // 2), THREADS):
            row, d = i // (width // 2), i % (width // 2) * 2
            word = np.uint32(0)
            if first + row < qkv.shape[0] and d < dim:
                a, b = np.float32(qkv[first + row, head * dim + d]), np.float32(qkv[first + row, head * dim + d + 1])
                word = half2_from_floats(a, b)
            shared[row * (key_pitch // 2) + d // 2] = word
        cuda.syncthreads()
        lane = cuda.threadIdx.x & 31
        row = 16 * (cuda.threadIdx.x >> 5) + (lane >> 2)
        for j in range(steps):
            low = load_shared(shared, row * (key_pitch // 2) + 16 * j + 4 * (lane & 3))
            high = load_shared(shared, (row + 8) * (key_pitch // 2) + 16 * j + 4 * (lane & 3))
            for i in range(4):
                queries[j, 2 * i] = low[i]
                queries[j, 2 * i + 1] = high[i]
        cuda.syncthreads()

    @device_function
    def multiply_keys(scores, queries, shared):
        lane = cuda.threadIdx.x & 31
        for n in range(KEYS // 8):
            c = (np.float32(0), np.float32(0), np.float32(0), np.float32(0))
            for j in range(steps):
                k = load_shared(shared, (8 * n + (lane >> 2)) * (key_pitch // 2) + 16 * j + 4 * (lane & 3))
                c = mma((queries[j, 0], queries[j, 1], queries[j, 2], queries[j, 3]), (k[0], k[1]), c)
                c = mma((queries[j, 4], queries[j, 5], queries[j, 6], queries[j, 7]), (k[2], k[3]), c)
            for e in range(4):
                scores[n, e] = c[e]

    @device_function
    def soften(scores, mixed, state, first_key, low_limit):
        """Scores to exp2(score - maximum); state: maximum and sum of this lane's two rows, low and low + 8."""
        lane = cuda.threadIdx.x & 31
        for half in range(2):
            largest = state[2 * half]
            for n in range(KEYS // 8):
                for e in range(2):
                    key = first_key + 8 * n + 2 * (lane & 3) + e
                    s = scores[n, 2 * half + e] * scale if key <= low_limit + 8 * half else LOWEST
                    scores[n, 2 * half + e] = s
                    largest = max(largest, s)
            largest = max(largest, cuda.shfl_xor_sync(ALL, largest, 1))
            largest = max(largest, cuda.shfl_xor_sync(ALL, largest, 2))
            factor = cuda.libdevice.exp2f(state[2 * half] - largest)
            total = np.float32(0)
            for n in range(KEYS // 8):
                for e in range(2):
                    p = cuda.libdevice.exp2f(scores[n, 2 * half + e] - largest)
                    scores[n, 2 * half + e] = p
                    total += p
            state[2 * half] = largest
            state[2 * half + 1] = state[2 * half + 1] * factor + total
            for n in range(columns):
                mixed[n, 2 * half] *= factor
                mixed[n, 2 * half + 1] *= factor

    @device_function
    def multiply_values(mixed, scores, shared):
        """mixed += p @ values; a lane names row ``lane % 16`` of 16 keys, the upper lanes that of the next 8 dimensions."""
        lane = cuda.threadIdx.x & 31
        place = values_at + (lane & 15) * (value_pitch // 2) + 4 * (lane >> 4)
        for k in range(KEYS // 16):
            a = (
                half2_from_floats(scores[2 * k, 0], scores[2 * k, 1]),
                half2_from_floats(scores[2 * k, 2], scores[2 * k, 3]),
                half2_from_floats(scores[2 * k + 1, 0], scores[2 * k + 1, 1]),
                half2_from_floats(scores[2 * k + 1, 2], scores[2 * k + 1, 3]),
            )
            for n in range(0, columns, 2):
                b = load_transposed(shared, place + 16 * k * (value_pitch // 2) + 4 * n)
                c = mma(a, (b[0], b[1]), (mixed[n, 0], mixed[n, 1], mixed[n, 2], mixed[n, 3]))
                d = mma(a, (b[2], b[3]), (mixed[n + 1, 0], mixed[n + 1, 1], mixed[n + 1, 2], mixed[n + 1, 3]))
                for e in range(4):
                    mixed[n, e] = c[e]
                    mixed[n + 1, e] = d[e]

    @device_function
    def store(mixed, state, order, out, head, first_row):
        lane = cuda.threadIdx.x & 31
        for half in range(2):
            row = first_row + 8 * half
            total = state[2 * half + 1]
            total += cuda.shfl_xor_sync(ALL, total, 1)
            total += cuda.shfl_xor_sync(ALL, total, 2)
            if row < out.shape[0]:
                for n in range(columns):
                    for e in range(2):
                        d = 8 * n + 2 * (lane & 3) + e
                        if d < dim:
                            out[row, order[head * dim + d]] = mixed[n, 2 * half + e] / total

    def prefill_attention(qkv, keys, values, start, order, out):
        shared = cuda.shared.array(shared_words, np.uint32, alignment=16)
        queries = cuda.local.array((steps, 8), np.uint32)
        scores = cuda.local.array((key_tiles, 4), np.float32)
        mixed = cuda.local.array((columns, 4), np.float32)
        state = cuda.local.array(4, np.float32)
        head, lane = cuda.blockIdx.y, cuda.threadIdx.x & 31
        first = (cuda.gridDim.x - 1 - cuda.blockIdx.x) * QUERIES  # the longest rows begin first
        base = np.int64(head // (heads // groups)) * keys.shape[1] * width
        my_row = first + 16 * (cuda.threadIdx.x >> 5) + (lane >> 2)
        end = start + min(first + QUERIES, qkv.shape[0])  # tokens that this block's last query sees
        for n in range(columns):
            for e in range(4):
                mixed[n, e] = np.float32(0)
        for half in range(2):
            state[2 * half], state[2 * half + 1] = LOWEST, np.float32(0)
        load_queries(queries, shared, qkv, head, first)
        copy_tile(shared, 0, key_pitch, keys, base, 0, end)
        copy_tile(shared, values_at, value_pitch, values, base, 0, end)
        for key in range(0, end, KEYS):
            copy_async_wait(1)
            cuda.syncthreads()  # the keys are there
            multiply_keys(scores, queries, shared)
            cuda.syncthreads()
            copy_tile(shared, 0, key_pitch, keys, base, key + KEYS, end)
            soften(scores, mixed, state, key, start + my_row)
            copy_async_wait(1)
            cuda.syncthreads()  # the values are there
            multiply_values(mixed, scores, shared)
            cuda.syncthreads()
            copy_tile(shared, values_at, value_pitch, values, base, key + KEYS, end)
        copy_async_wait(0)
        store(mixed, state, order, out, head, my_row)

    return Kernel(prefill_attention, THREADS)
