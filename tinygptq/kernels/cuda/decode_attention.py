"""Attention of one new token to all before it, for each sequence of a batch: RoPE, cache write and the mixing of values.

The definition is ops.apply_rope followed by ops.causal_attention, for one query. A *tile* is up to 8 query heads that share
a key-value head. Its tokens are taken in pieces of 16 (:mod:`.token_piece`), dealt to the warps of all its *splits*, one
block each, so that a long context keeps the whole card busy. A warp reads its next piece while it computes with the one in
hand, and its first one before the kernels in front of this one have ended: all older keys and values are there already. The
newest token's reach the warp that owns it through shared memory, and the cache from there.

In the end sums are joined, first those of a block's warps, then those of a tile's splits, always in the same order (Dao et
al. 2023, Flash-Decoding), by the last block to finish. Scores are kept in base 2.

The cache holds fp16, or 8-bit integers with one fp16 scale for each token and head (:mod:`.cache_codec`).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from tinygptq.kernels.cuda.cache_codec import token_encoder, token_storer
from tinygptq.kernels.cuda.intrinsics import arrive, load_float
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import cache_width
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.token_piece import LOWEST, TOKENS, piece_walker, words_of_eight
from tinygptq.kernels.cuda.warps import ALL

MOST_HEADS = 8  # of a tile: mma's columns
MOST_SPLITS = 32
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


def warps_of(dim: int) -> int:
    """Warps of a block: as many as the registers allow, since a warp holds 16 keys and 16 values."""
    return 8 if cache_width(dim) <= 128 else 4


def record_of(dim: int) -> int:
    """Numbers that describe one head's share of the tokens: a mixture of ``cache_width`` values, the maximum and the sum."""
    return cache_width(dim) + 2


@functools.cache
def decode_attention_kernel(heads: int, groups: int, dim: int, cache_bits: int, splits: int) -> Kernel:
    """The kernel ``(qkv, cos, sin, positions, cache, order, sums, arrived, out)``.

    Args:
        heads, groups, dim: query heads, key-value heads, and dimensions of a head, a multiple of 4 up to 256.
        cache_bits: 16 or 8.
        splits: blocks that share a tile's tokens, up to 32.

    Shapes: qkv float32 [R, (heads + 2 groups) * dim]; cos, sin float32 [capacity, dim / 2]; positions int32 [R], of the
    newest token; cache: as in :mod:`.cache_codec`; order int32 [heads * dim], where each element of out goes; sums float32
    [R * heads * splits * record_of(dim)] and arrived int32 [R * tiles], 0 between calls; out float16 [R, heads * dim].
    Grid (splits, tiles, R), block 32 * warps_of(dim).
    """
    tiling, width, warps = Heads.of(heads, groups), cache_width(dim), warps_of(dim)
    each, per_group, record = tiling.each, tiling.per_group, record_of(dim)
    key_shape, value_shape = (2, width // 32, words_of_eight(cache_bits)), (4, width // 64, words_of_eight(cache_bits))
    mixed_shape, pitch = (width // 16, 4), query_pitch(dim)
    newest_type, newest_size, query_size = np.float16 if cache_bits == 16 else np.int8, 2 * width, each * pitch
    partial_size, threads = warps * each * record, 32 * warps
    begin, attend = piece_walker(cache_bits, width, warps * splits)
    make_newest, rotate = _newest_maker(heads, groups, dim, cache_bits), _query_rotator(each, dim, threads)
    leave, finish = _leaver(each, dim), _finisher(each, dim, warps, splits)

    def decode_attention(qkv, cos, sin, positions, cache, order, sums, arrived, out):
        query = cuda.shared.array(query_size, np.float16, alignment=16)
        newest = cuda.shared.array(newest_size, newest_type, alignment=16)
        newest_scales, partial = cuda.shared.array(2, np.float32), cuda.shared.array(partial_size, np.float32)
        k, v = cuda.local.array(key_shape, np.uint32), cuda.local.array(value_shape, np.uint32)
        s, mixed = cuda.local.array(8, np.float32), cuda.local.array(mixed_shape, np.float32)
        split, tile, row, warp = cuda.blockIdx.x, cuda.blockIdx.y, cuda.blockIdx.z, cuda.threadIdx.x >> 5
        begin_dependents()
        position = positions[row]  # the draw wrote it, which had ended before this step began
        base = np.int64(row * groups + tile // per_group) * cache[0].shape[2]
        before, pieces, piece = max(position - 1, 0), position // TOKENS + 1, warp * splits + split
        begin(k, v, s, cache, base, piece, pieces, before)
        wait_for_dependencies()
        if (pieces - 1) % splits == split:
            make_newest(qkv, row, cos, sin, position, tile // per_group, newest, newest_scales, cache, base + position)
        rotate(query, qkv, row, cos, sin, position, tile)
        for n in range(mixed_shape[0]):
            for e in range(4):
                mixed[n, e] = np.float32(0)
        cuda.syncthreads()  # the queries and the newest token are there
        # beyond the tile's heads its last one again, whose results nobody stores
        mine = min((cuda.threadIdx.x & 31) >> 2, each - 1) * pitch
        found = attend(k, v, s, mixed, query, mine, newest, newest_scales, cache, base, piece, pieces, before, position)
        leave(partial, warp * each * record, mixed, found[0], found[1])
        cuda.syncthreads()
        finish(partial, sums, arrived, order, out, row, tile, split)

    return Kernel(decode_attention, (threads, 2) if width <= 128 else threads)


def query_pitch(dim: int) -> int:
    """fp16 numbers between queries in shared memory: the lanes of two heads that are read together fall on other banks."""
    return cache_width(dim) + 32


def _query_rotator(each, dim, threads):
    """Device function: the tile's queries, rotated and scaled, to shared memory, padded with zeros to the cache's width."""
    half, width, pitch, scale = dim // 2, cache_width(dim), query_pitch(dim), np.float32(LOG2_E / math.sqrt(dim))

    @device_function
    def rotate(query, qkv, row, cos, sin, position, tile):
        for i in range(threads - 1 - cuda.threadIdx.x, each * half, threads):  # the first warps may have the newest token
            head, d = i // half, i % half
            c, s, first = cos[position, d] * scale, sin[position, d] * scale, (tile * each + head) * dim + d
            a, b = qkv[row, first], qkv[row, first + half]
            query[head * pitch + d], query[head * pitch + d + half] = a * c - b * s, b * c + a * s
        if width != dim:
            for i in range(cuda.threadIdx.x, each * (width - dim), threads):
                query[i // (width - dim) * pitch + dim + i % (width - dim)] = 0

    return rotate


def _newest_maker(heads, groups, dim, bits):
    """Device function: the newest token's key (warp 0) and value (warp 1) to shared memory and to the cache."""
    encode, store, width = token_encoder(bits, dim), token_storer(bits, cache_width(dim)), cache_width(dim)

    @device_function
    def make_newest(qkv, row, cos, sin, position, group, newest, newest_scales, cache, token):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        if warp < 2:
            first = (heads + group + warp * groups) * dim
            scale = encode(qkv, row, first, cos, sin, position, warp == 0, newest, warp * width)
            if lane == 0:
                newest_scales[warp] = scale
            cuda.syncwarp()
            if warp == 0:
                store(newest, 0, lane, cache[0], token)
            else:
                store(newest, width, lane, cache[1], token)
            if bits == 8 and lane == 0:
                if warp == 0:
                    cache[2][token] = scale
                else:
                    cache[3][token] = scale

    return make_newest


def _leaver(each, dim):
    """Device function: a warp's sums to shared memory, one record a head."""
    width, record = cache_width(dim), record_of(dim)

    @device_function
    def leave(partial, at, mixed, largest, total):
        g, t = (cuda.threadIdx.x & 31) >> 2, cuda.threadIdx.x & 3
        for n in range(width // 16):
            d = 64 * (n // 4) + 8 * g + 2 * (n % 4)
            for h in range(2):
                if 2 * t + h < each:
                    partial[at + (2 * t + h) * record + d] = mixed[n, h]
                    partial[at + (2 * t + h) * record + d + 1] = mixed[n, 2 + h]
        total += cuda.shfl_xor_sync(ALL, total, 1)
        total += cuda.shfl_xor_sync(ALL, total, 2)
        if t == 0 and g < each:
            partial[at + g * record + width] = largest
            partial[at + g * record + width + 1] = total

    return leave


def _joiner(count, record, width, read):
    """Device function ``(array, at, step, head, d)`` -> (mixture at dimension d, maximum, sum) of one head over ``count``
    parts, which lie ``step`` apart. ``read``: device function ``(array, index)`` -> a number."""
    shape = count, 3

    @device_function
    def join(array, at, step, head, d):
        found, at = cuda.local.array(shape, np.float32), at + head * record
        for part in range(count):
            found[part, 0], found[part, 1] = read(array, at + d + step * part), read(array, at + width + step * part)
            found[part, 2] = read(array, at + width + 1 + step * part)
        largest, value, total = LOWEST, np.float32(0), np.float32(0)
        for part in range(count):
            largest = max(largest, found[part, 1])
        for part in range(count):
            share = cuda.libdevice.exp2f(found[part, 1] - largest)
            value += share * found[part, 0]
            total += share * found[part, 2]
        return value, largest, total

    return join


@device_function
def _read_shared(array, index):
    return array[index]


def _finisher(each, dim, warps, splits):
    """Device function: the records of a block's warps, in shared memory, then those of a tile's splits, to the result."""
    width, record, threads = cache_width(dim), record_of(dim), 32 * warps
    size = each * record
    join_warps = _joiner(warps, record, width, _read_shared)
    join_splits = _joiner(splits, record, width, load_float)

    @device_function
    def put_records(partial, sums, at):
        """The block's joint records; the thread of a head's dimension 0 leaves maximum and sum too."""
        for i in range(cuda.threadIdx.x, each * dim, threads):
            head, d = i // dim, i % dim
            value, largest, total = join_warps(partial, 0, size, head, d)
            sums[at + head * record + d] = value
            if d == 0:
                sums[at + head * record + width], sums[at + head * record + width + 1] = largest, total

    @device_function
    def finish_last(partial, sums, arrived, order, out, row, tile, split):
        """The last block of a tile to come here joins what all have left."""
        last, place = cuda.shared.array(1, np.int32), row * cuda.gridDim.y + tile
        put_records(partial, sums, (place * splits + split) * size)
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            last[0] = arrive(arrived, place)
        cuda.syncthreads()
        if last[0] == splits - 1:
            for i in range(cuda.threadIdx.x, each * dim, threads):
                to = order[tile * each * dim + i]
                value, _, total = join_splits(sums, place * splits * size, size, i // dim, i % dim)
                out[row, to] = value / total
            if cuda.threadIdx.x == 0:
                arrived[place] = 0

    @device_function
    def finish(partial, sums, arrived, order, out, row, tile, split):
        if splits > 1:
            finish_last(partial, sums, arrived, order, out, row, tile, split)
        else:
            for i in range(cuda.threadIdx.x, each * dim, threads):
                value, _, total = join_warps(partial, 0, size, i // dim, i % dim)
                out[row, order[tile * each * dim + i]] = value / total

    return finish
