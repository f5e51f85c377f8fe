"""Attention of many new tokens to themselves and to all before them, in tiles: no T x S matrix is ever in memory.

The definition is ops.apply_rope on the queries, then ops.causal_attention. A block takes one head and 64 queries, 16 for
each of its four warps, and goes over the keys a tile at a time with an online softmax (Dao et al. 2022, FlashAttention).
Both products run on tensor cores, sums in float32:

    scores  = queries (A, in registers)  times keys (B, from shared memory)
    mixture = exp2(scores - maximum) (A: mma's sums have the places its A wants)  times values (B, transposed on the way)

While one tile's keys and values are used, the next one's are copied to shared memory. Scores are kept in base 2.
"""

import functools
import math

import numpy as np

from tinygptq.kernels.cuda.intrinsics import load_tiles, load_transposed
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import (
    copy_async_commit,
    copy_async_or_zero,
    copy_async_wait,
    half2_from_floats,
    half2_to_floats,
    load_words,
    mma,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL

WARPS = 4
THREADS = 32 * WARPS
QUERIES = 16 * WARPS  # of a block
LOG2_E = 1 / math.log(2)
LOWEST, ZERO = np.float32(-1e30), np.float32(0)
load_pair = load_words(1)


def keys_of(width: int) -> int:
    """Keys of a tile: two tiles of keys and of values fill 35 to 70 % of the 48 KB that every card gives a block."""
    return 32 if width <= 128 else 16


def pitch_of(width: int) -> int:
    """Words between rows in shared memory: eight rows of 16 bytes fall on different banks."""
    return width // 2 + 4


@functools.cache
def prefill_attention_kernel(heads: int, groups: int, dim: int, width: int) -> Kernel:
    """The kernel ``(qkv, cos, sin, keys, values, start, out)``.

    Args: heads, groups, dim: as in :mod:`.decode_attention`; width: dimensions of a head in the cache.

    Shapes: qkv float16 [T, at least heads * dim], queries as they come from the product; cos, sin float32 [at least start +
    T, dim / 2]; keys, values float16 [groups, capacity, width], the new tokens' included, keys rotated; start: position of
    the first of the T tokens; out float16 [T, heads * dim].
    Grid (heads, ceil(T / 64)), block 128.
    """
    size, tile_keys, per_group = 2 * keys_of(width) * pitch_of(width), keys_of(width), heads // groups  # words of a tile
    shared_words, steps, columns = max(2 * size, QUERIES * pitch_of(width)), width // 16, width // 8
    query_shape, score_shape, mixed_shape = (steps, 4), (tile_keys // 8, 4), (columns, 4)
    copy_tile, rotate, load_queries = _tile_copier(width), _query_rotator(dim, width), _query_loader(width)
    multiply_keys, multiply_values = _keys_product(width), _values_product(width)
    mask, soften, store = _mask(tile_keys), _softener(tile_keys, columns), _storer(dim, columns)

    def prefill_attention(qkv, cos, sin, keys, values, start, out):
        shared = cuda.shared.array(shared_words, np.uint32, alignment=16)
        queries, scores = cuda.local.array(query_shape, np.uint32), cuda.local.array(score_shape, np.float32)
        mixed, state = cuda.local.array(mixed_shape, np.float32), cuda.local.array(4, np.float32)
        head, first = cuda.blockIdx.x, (cuda.gridDim.y - 1 - cuda.blockIdx.y) * QUERIES  # the longest rows begin first
        base = np.int64(head // per_group) * keys.shape[1] * width
        end = start + min(first + QUERIES, qkv.shape[0])  # tokens that this block's last query sees
        row = first + 16 * (cuda.threadIdx.x >> 5)  # of the warp's first query
        rotate(shared, qkv, cos, sin, start, head, first)
        load_queries(queries, shared)
        copy_tile(shared, 0, keys, values, base, 0, end)
        for n in range(columns):
            for e in range(4):
                mixed[n, e] = ZERO
        state[0], state[1], state[2], state[3] = LOWEST, ZERO, LOWEST, ZERO
        now = 0  # where the tile in hand is
        for key in range(0, end, tile_keys):
            copy_async_wait(0)
            cuda.syncthreads()  # the tile is there, and nobody needs the one before it
            copy_tile(shared, size - now, keys, values, base, key + tile_keys, end)
            multiply_keys(scores, queries, shared, now)
            if key + tile_keys > start + row + 1:
                mask(scores, key, start + row)
            soften(scores, mixed, state)
            multiply_values(mixed, scores, shared, now + size // 2)
            now = size - now
        copy_async_wait(0)
        store(mixed, state, out, head, row)

    return Kernel(prefill_attention, (THREADS, 3) if width <= 128 else THREADS)


def _tile_copier(width):
    """Device function: start copying a tile's keys, then its values, to shared memory; rows from ``end`` on become 0."""
    columns, pitch, keys_in_tile = width // 8, pitch_of(width), keys_of(width)
    rows_at_once, values_at = THREADS // columns, keys_in_tile * pitch

    @device_function
    def copy_tile(shared, at, keys, values, base, first, end):
        row, part = cuda.threadIdx.x // columns, cuda.threadIdx.x % columns
        there, here = base + (first + row) * width + 8 * part, at + row * pitch + 4 * part
        for i in range(0, keys_in_tile, rows_at_once):
            wanted = first + row + i < end
            copy_async_or_zero(shared, here + i * pitch, keys, there + i * width, wanted)
            copy_async_or_zero(shared, here + i * pitch + values_at, values, there + i * width, wanted)
        copy_async_commit()

    return copy_tile


def _query_rotator(dim, width):
    """Device function: a block's queries, rotated and scaled, to shared memory, padded with zeros to the cache's width."""
    half, pitch, scale = dim // 2, pitch_of(width), np.float32(LOG2_E / math.sqrt(dim))
    pairs, padding = half // 2, (width - dim) // 2  # of a row; words

    @device_function
    def rotate(shared, qkv, cos, sin, start, head, first):
        for i in range(cuda.threadIdx.x, QUERIES * pairs, THREADS):
            row, d = i // pairs, 2 * (i % pairs)
            line = min(first + row, qkv.shape[0] - 1)  # queries that are not there are computed and not stored
            place, position = np.int64(line) * qkv.shape[1] + head * dim + d, start + line
            a, b = half2_to_floats(load_pair(qkv, place)[0]), half2_to_floats(load_pair(qkv, place + half)[0])
            c, s = cos[position, d] * scale, sin[position, d] * scale
            c1, s1 = cos[position, d + 1] * scale, sin[position, d + 1] * scale
            to = row * pitch + d // 2
            shared[to] = half2_from_floats(a[0] * c - b[0] * s, a[1] * c1 - b[1] * s1)
            shared[to + half // 2] = half2_from_floats(b[0] * c + a[0] * s, b[1] * c1 + a[1] * s1)
        if width != dim:
            for i in range(cuda.threadIdx.x, QUERIES * padding, THREADS):
                shared[i // padding * pitch + dim // 2 + i % padding] = np.uint32(0)
        cuda.syncthreads()

    return rotate


def _query_loader(width):
    """Device function: the 16 rows of a warp's queries to mma's A."""
    pitch, steps = pitch_of(width), width // 16

    @device_function
    def load_queries(queries, shared):
        lane = cuda.threadIdx.x & 31
        place = (16 * (cuda.threadIdx.x >> 5) + (lane & 15)) * pitch + 4 * (lane >> 4)
        for j in range(steps):
            a = load_tiles(shared, place + 8 * j)
            for i in range(4):
                queries[j, i] = a[i]
        cuda.syncthreads()  # tiles come to where the queries were

    return load_queries


def _keys_product(width):
    """Device function: ``scores = queries @ keys.T``; the sums of all keys grow side by side, and none waits for itself."""
    pitch, tiles = pitch_of(width), keys_of(width) // 8

    @device_function
    def multiply_keys(scores, queries, shared, at):
        lane = cuda.threadIdx.x & 31
        place = at + (lane & 7) * pitch + 4 * (lane >> 3)
        for n in range(tiles):
            for e in range(4):
                scores[n, e] = ZERO
        for j in range(0, width // 16, 2):
            for n in range(tiles):
                k = load_tiles(shared, place + 8 * n * pitch + 8 * j)
                c = scores[n, 0], scores[n, 1], scores[n, 2], scores[n, 3]
                c = mma((queries[j, 0], queries[j, 1], queries[j, 2], queries[j, 3]), (k[0], k[1]), c)
                a = queries[j + 1, 0], queries[j + 1, 1], queries[j + 1, 2], queries[j + 1, 3]
                c = mma(a, (k[2], k[3]), c)
                for e in range(4):
                    scores[n, e] = c[e]

    return multiply_keys


def _mask(tile_keys):
    """Device function: scores of keys that come after their query become LOWEST; ``row``: the warp's first position."""

    @device_function
    def mask(scores, first_key, row):
        lane = cuda.threadIdx.x & 31
        for n in range(tile_keys // 8):
            for e in range(4):
                if first_key + 8 * n + 2 * (lane & 3) + (e & 1) > row + (lane >> 2) + 8 * (e >> 1):
                    scores[n, e] = LOWEST

    return mask


def _softener(tile_keys, columns):
    """Device function: scores to exp2(score - maximum), and the mixture to that maximum; ``state``: maximum and sum of a
    lane's two rows, lane // 4 and 8 more."""

    @device_function
    def soften_row(scores, mixed, state, half):
        largest = state[2 * half]
        for n in range(tile_keys // 8):
            largest = max(largest, max(scores[n, 2 * half], scores[n, 2 * half + 1]))
        largest = max(largest, cuda.shfl_xor_sync(ALL, largest, 1))
        largest = max(largest, cuda.shfl_xor_sync(ALL, largest, 2))
        factor, total = cuda.libdevice.exp2f(state[2 * half] - largest), ZERO
        for n in range(tile_keys // 8):
            for e in range(2):
                p = cuda.libdevice.exp2f(scores[n, 2 * half + e] - largest)
                scores[n, 2 * half + e] = p
                total += p
        state[2 * half] = largest
        state[2 * half + 1] = state[2 * half + 1] * factor + total
        if cuda.any_sync(ALL, factor != np.float32(1)):
            for n in range(columns):
                mixed[n, 2 * half] *= factor
                mixed[n, 2 * half + 1] *= factor

    @device_function
    def soften(scores, mixed, state):
        soften_row(scores, mixed, state, 0)
        soften_row(scores, mixed, state, 1)

    return soften


def _values_product(width):
    """Device function: ``mixed += p @ values``; a lane names row ``lane % 16`` of 16 keys, the upper lanes that of the next
    8 dimensions."""
    pitch, columns, tile_keys = pitch_of(width), width // 8, keys_of(width)

    @device_function
    def multiply_values(mixed, scores, shared, at):
        lane = cuda.threadIdx.x & 31
        place = at + (lane & 15) * pitch + 4 * (lane >> 4)
        for k in range(tile_keys // 16):
            a = (
                half2_from_floats(scores[2 * k, 0], scores[2 * k, 1]),
                half2_from_floats(scores[2 * k, 2], scores[2 * k, 3]),
                half2_from_floats(scores[2 * k + 1, 0], scores[2 * k + 1, 1]),
                half2_from_floats(scores[2 * k + 1, 2], scores[2 * k + 1, 3]),
            )
            for n in range(0, columns, 2):
                b = load_transposed(shared, place + 16 * k * pitch + 4 * n)
                c = mma(a, (b[0], b[1]), (mixed[n, 0], mixed[n, 1], mixed[n, 2], mixed[n, 3]))
                d = mma(a, (b[2], b[3]), (mixed[n + 1, 0], mixed[n + 1, 1], mixed[n + 1, 2], mixed[n + 1, 3]))
                for e in range(4):
                    mixed[n, e] = c[e]
                    mixed[n + 1, e] = d[e]

    return multiply_values


def _storer(dim, columns):
    """Device function: store the mixture over its sum; ``row``: the warp's first."""

    @device_function
    def store(mixed, state, out, head, row):
        lane = cuda.threadIdx.x & 31
        for half in range(2):
            total, line = state[2 * half + 1], row + (lane >> 2) + 8 * half
            total += cuda.shfl_xor_sync(ALL, total, 1)
            total += cuda.shfl_xor_sync(ALL, total, 2)
            share = np.float32(1) / total
            if line < out.shape[0]:
                for n in range(columns):
                    d = 8 * n + 2 * (lane & 3)
                    if d < dim:
                        out[line, head * dim + d] = mixed[n, 2 * half] * share
                        out[line, head * dim + d + 1] = mixed[n, 2 * half + 1] * share

    return store
