"""Attention of one new token to all before it, for each sequence of a batch: RoPE, cache write and the mixing of values.

The definition is ops.apply_rope followed by ops.causal_attention, for one query. A *tile* is up to 8 query heads that share
a key-value head; the tokens of a sequence are divided among *splits*, one block each, so that a long context keeps the
whole card busy. A block takes its tokens in pieces of 256:

1. scores: keys (A, 16 tokens by 16 dimensions) times queries (B, 16 dimensions by 8 heads) on tensor cores;
2. softmax, one warp a head, with the running maximum and sum of the online softmax (Milakov & Gimelshein 2018);
3. values: each lane owns 8 dimensions and adds up ``p * v`` over its tokens.

The block that owns the newest token rotates its key and writes key and value to the cache first. The last block of a tile
to finish joins the splits, always in the same order (Dao et al. 2023, Flash-Decoding). Scores are kept in base 2.

The cache holds fp16, or 8-bit integers with one fp16 scale for each token and head (``value = scale * integer``).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from tinygptq.kernels.cuda.cache_codec import cache_reader, cache_writer, query_step
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import cache_width
from tinygptq.kernels.cuda.ptx import (
    float_from_bits,
    half2_from_floats,
    half2_to_floats,
    load_16_bytes,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import warp_max, warp_sum

WARPS = 4
THREADS = 32 * WARPS
PIECE = 256  # tokens whose scores are in shared memory at once
PITCH = PIECE + 4  # floats between heads' scores: the lanes of a warp fall on different banks
MOST_HEADS = 8  # of a tile: mma's columns
MOST_SPLITS = 32  # one for each lane of the warp that joins them
NO_SUM = (np.float32(0),) * 4
LOWEST = np.float32(-1e30)  # where no token has been seen; its exp2 against any score is 0
LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Heads:
    """How query heads are divided: ``tiles`` blocks of ``each`` heads; ``per_group`` tiles share a key-value head."""

    each: int
    per_group: int
    tiles: int

    @classmethod
    def of(cls, heads: int, groups: int) -> "Heads":
        shared = heads // groups
        each = max(size for size in range(1, MOST_HEADS + 1) if shared % size == 0)
        return cls(each, shared // each, heads // each)


@functools.cache
def decode_attention_kernel(heads: int, groups: int, dim: int, cache_bits: int) -> Kernel:
    """The kernel ``(qkv, cos, sin, positions, cache, order, sums, arrived, out)``.

    Args:
        heads, groups, dim: query heads, key-value heads, and dimensions of a head, a multiple of 4 up to 256.
        cache_bits: 16 or 8.

    Shapes (W: ``layout.cache_width(dim)``): qkv float32 [R, (heads + 2 groups) * dim]; cos, sin float32 [capacity, dim / 2];
    positions int32 [R], of the newest token; cache: keys, values float16 or int8 [R, groups, capacity, W], and their
    scales float16 [R * groups * capacity] (unused with 16 bits); order int32 [heads * dim], where each element of out goes;
    sums float32 [R * tiles, splits, each, W + 4] and arrived int32 [R * tiles], 0 between calls; out float16 [R, heads *
    dim].
    Grid (tiles, splits, R), block 128.
    """
    tiling, width = Heads.of(heads, groups), cache_width(dim)
    each, per_group, half = tiling.each, tiling.per_group, dim // 2
    lanes, at_once = width // 8, 256 // width  # lanes of one token, tokens a warp reads at once
    scale = np.float32(LOG2_E / math.sqrt(dim))
    partial_size = WARPS * at_once * each * width
    query_words, score_size, running_size = MOST_HEADS * width // 2, each * PITCH, 3 * each
    share_size = each * MOST_SPLITS
    load_values, scale_of = cache_reader(cache_bits)
    write_cache = cache_writer(cache_bits, dim)
    multiply_step, step = query_step(cache_bits)

    @device_function
    def rotate_queries(query, qkv, cos, sin, row, tile, position):
        """The tile's queries, rotated and scaled, as fp16 pairs: word d/2 of head h holds dimensions d and d + 1."""
        if width != dim:  # what pads a query meets the cache's zeros, and must be a number; other columns never meet
            for i in range(cuda.threadIdx.x, query_words, THREADS):
                query[i] = np.uint32(0)
            cuda.syncthreads()
        for i in range(cuda.threadIdx.x, each * (half // 2), THREADS):
            head, d = i // (half // 2), i % (half // 2) * 2
            first = (tile * each + head) * dim + d
            c, s = cos[position, d] * scale, sin[position, d] * scale
            c1, s1 = cos[position, d + 1] * scale, sin[position, d + 1] * scale
            a, a1, b, b1 = qkv[row, first], qkv[row, first + 1], qkv[row, first + half], qkv[row, first + half + 1]
            query[head * (width // 2) + d // 2] = half2_from_floats(a * c - b * s, a1 * c1 - b1 * s1)
            query[head * (width // 2) + (d + half) // 2] = half2_from_floats(b * c + a * s, b1 * c1 + a1 * s1)

    @device_function
    def score_piece(scores, query, keys, key_scales, base, scale_base, first, end):
        """scores[head, token - first] of tokens first .. end - 1, 16 at a time for each warp."""
        lane = cuda.threadIdx.x & 31
        g, t = lane >> 2, lane & 3
        for start in range(first + 16 * (cuda.threadIdx.x >> 5), end, 16 * WARPS):
            low, high = min(start + g, end - 1), min(start + g + 8, end - 1)
            total = NO_SUM
            for d in range(0, width, step):
                low_at, high_at = base + low * width + d, base + high * width + d
                total = multiply_step(keys, low_at, high_at, query, g * (width // 2), d, t, total)
            low_scale, high_scale = scale_of(key_scales, scale_base + low), scale_of(key_scales, scale_base + high)
            at = start - first + g
            if 2 * t < each:
                scores[2 * t * PITCH + at] = total[0] * low_scale
                scores[2 * t * PITCH + at + 8] = total[2] * high_scale
            if 2 * t + 1 < each:
                scores[(2 * t + 1) * PITCH + at] = total[1] * low_scale
                scores[(2 * t + 1) * PITCH + at + 8] = total[3] * high_scale

    @device_function
    def soften(scores, running, count, value_scales, scale_base):
        """Scores to exp2(score - maximum), times the value's scale; running[head] is (maximum, sum, factor for the past)."""
        lane = cuda.threadIdx.x & 31
        for head in range(cuda.threadIdx.x >> 5, each, WARPS):
            largest = LOWEST
            for i in range(lane, count, 32):
                largest = max(largest, scores[head * PITCH + i])
            before = running[3 * head]
            largest = max(warp_max(largest), before)
            total = np.float32(0)
            for i in range(lane, count, 32):
                p = cuda.libdevice.exp2f(scores[head * PITCH + i] - largest)
                total += p
                scores[head * PITCH + i] = p * scale_of(value_scales, scale_base + i)
            total = warp_sum(total)
            if lane == 0:
                factor = cuda.libdevice.exp2f(before - largest)
                running[3 * head] = largest
                running[3 * head + 1] = running[3 * head + 1] * factor + total
                running[3 * head + 2] = factor

    @device_function
    def weigh(mixed, scores, at, v):
        for head in range(each):
            p = scores[head * PITCH + at]
            for i in range(4):
                pair = half2_to_floats(v[i])
                mixed[head, 2 * i] += p * pair[0]
                mixed[head, 2 * i + 1] += p * pair[1]

    @device_function
    def mix_values(mixed, scores, running, values, base, first, end):
        """Add p * v of the piece's tokens to this lane's 8 dimensions, four tokens in flight."""
        lane = cuda.threadIdx.x & 31
        part, mine = 8 * (lane % lanes), (cuda.threadIdx.x >> 5) * at_once + lane // lanes
        stride = WARPS * at_once
        for head in range(each):
            factor = running[3 * head + 2]
            for i in range(8):
                mixed[head, i] *= factor
        token = first + mine
        while token + 3 * stride < end:
            v0 = load_values(values, base + token * width + part)
            v1 = load_values(values, base + (token + stride) * width + part)
            v2 = load_values(values, base + (token + 2 * stride) * width + part)
            v3 = load_values(values, base + (token + 3 * stride) * width + part)
            weigh(mixed, scores, token - first, v0)
            weigh(mixed, scores, token + stride - first, v1)
            weigh(mixed, scores, token + 2 * stride - first, v2)
            weigh(mixed, scores, token + 3 * stride - first, v3)
            token += 4 * stride
        while token < end:
            weigh(mixed, scores, token - first, load_values(values, base + token * width + part))
            token += stride

    @device_function
    def leave(mixed, running, partial, sums, place):
        """This split's sums to global memory: a head's W values, its maximum and its sum."""
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        mine, part = warp * at_once + lane // lanes, 8 * (lane % lanes)
        for head in range(each):
            for i in range(8):
                partial[(mine * each + head) * width + part + i] = mixed[head, i]
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, each * width, THREADS):
            total = np.float32(0)
            for j in range(WARPS * at_once):
                total += partial[j * each * width + i]
            sums[place, cuda.blockIdx.y, i // width, i % width] = total
        if cuda.threadIdx.x < each:
            sums[place, cuda.blockIdx.y, cuda.threadIdx.x, width] = running[3 * cuda.threadIdx.x]
            sums[place, cuda.blockIdx.y, cuda.threadIdx.x, width + 1] = running[3 * cuda.threadIdx.x + 1]

    @device_function
    def join(sums, place, order, out, row, tile, shares, partial):
        """All splits of the tile together: their shares, one warp a head; their sums, every fourth split a warp's."""
        lane, warp, splits, pitch = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.gridDim.y, width + 4
        for head in range(warp, each, WARPS):
            largest, total = LOWEST, np.float32(0)
            if lane < splits:
                facts = load_16_bytes(sums, ((place * splits + lane) * each + head) * pitch + width)
                largest, total = float_from_bits(facts[0]), float_from_bits(facts[1])
            share = cuda.libdevice.exp2f(largest - warp_max(largest))
            whole = warp_sum(share * total)
            shares[head * MOST_SPLITS + lane] = share / whole
        cuda.syncthreads()
        for i in range(lane, each * (dim // 4), 32):
            head, d = i // (dim // 4), i % (dim // 4) * 4
            a, b, c, e = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for split in range(warp, splits, WARPS):
                v = load_16_bytes(sums, ((place * splits + split) * each + head) * pitch + d)
                share = shares[head * MOST_SPLITS + split]
                a += share * float_from_bits(v[0])
                b += share * float_from_bits(v[1])
                c += share * float_from_bits(v[2])
                e += share * float_from_bits(v[3])
            at = (warp * each + head) * dim + d
            partial[at], partial[at + 1], partial[at + 2], partial[at + 3] = a, b, c, e
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, each * dim, THREADS):
            total = partial[i] + partial[each * dim + i] + partial[2 * each * dim + i] + partial[3 * each * dim + i]
            out[row, order[tile * each * dim + i]] = total

    def decode_attention(qkv, cos, sin, positions, cache, order, sums, arrived, out):
        keys, values, key_scales, value_scales = cache
        query = cuda.shared.array(query_words, np.uint32, alignment=16)
        scores = cuda.shared.array(score_size, np.float32)
        running = cuda.shared.array(running_size, np.float32)
        partial = cuda.shared.array(partial_size, np.float32)
        shares = cuda.shared.array(share_size, np.float32)
        last = cuda.shared.array(1, np.int32)
        mixed = cuda.local.array((each, 8), np.float32)
        tile, row = cuda.blockIdx.x, cuda.blockIdx.z
        group = tile // per_group
        begin_dependents()
        wait_for_dependencies()
        position = positions[row]
        share = (position + cuda.gridDim.y) // cuda.gridDim.y  # tokens of a split: position + 1 of them, rounded up
        share = (share + 15) // 16 * 16
        begin, end = share * cuda.blockIdx.y, min(share * (cuda.blockIdx.y + 1), position + 1)
        base = np.int64(row * groups + group) * keys.shape[2] * width
        scale_base = (row * groups + group) * keys.shape[2]
        if begin <= position < end:
            write_cache(qkv, row, cos, sin, cache, row, group, heads, groups, position)
        rotate_queries(query, qkv, cos, sin, row, tile, position)
        for head in range(each):
            for i in range(8):
                mixed[head, i] = np.float32(0)
        if cuda.threadIdx.x < each:
            running[3 * cuda.threadIdx.x] = LOWEST
            running[3 * cuda.threadIdx.x + 1] = np.float32(0)
        cuda.syncthreads()  # the queries, and the newest token in the cache
        for first in range(begin, end, PIECE):
            upto = min(first + PIECE, end)
            score_piece(scores, query, keys, key_scales, base, scale_base, first, upto)
            cuda.syncthreads()
            soften(scores, running, upto - first, value_scales, scale_base + first)
            cuda.syncthreads()
            mix_values(mixed, scores, running, values, base, first, upto)
            cuda.syncthreads()
        place = row * cuda.gridDim.x + tile
        leave(mixed, running, partial, sums, place)
        cuda.threadfence()
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            last[0] = cuda.atomic.add(arrived, place, 1)
        cuda.syncthreads()
        if last[0] == cuda.gridDim.y - 1:
            cuda.threadfence()
            join(sums, place, order, out, row, tile, shares, partial)
            if cuda.threadIdx.x == 0:
                arrived[place] = 0

    return Kernel(decode_attention, THREADS)
