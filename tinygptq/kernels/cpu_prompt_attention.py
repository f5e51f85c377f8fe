"""Attention of many queries on the CPU: the vector code. Arguments are jobs of int64 (see cpu.py), strides in bytes.

HEIGHT queries of a head go through together: their scores, softmax and mixture of values stay in a core's first-level
cache, the keys and values that the heads of a group share in the second, and of the keys those that a query may not see are
not looked at. Keys and values are laid out anew first, so that 16 numbers that are multiplied by the same one lie side by
side.
"""

from __future__ import annotations

import numpy as np

from tinygptq.kernels.cpu_attention import exponentials
from tinygptq.kernels.cpu_products import HEIGHT, tile
from tinygptq.kernels.cpu_tiles import COLUMNS
from tinygptq.kernels.simd import LANES, get, inner, load_f32, read_f32, splat, store_f32, write_f32


@inner
def lay_out(job, part, scale):
    """Keys, times ``scale``, and values of one group, missing ones as zeros.

    Job: op, k [B, G, S, D], v alike, strides of B, G, S in k, the same in v, G, S, D; keys out, float32
    [B * G, S / 16, D, 16], values out, float32 [B * G, D / 16, S, 16], both rounded up.
    """
    groups, seen, dim = get(job, 9), get(job, 10), get(job, 11)
    b, g = part // groups, part % groups
    k = get(job, 1) + b * get(job, 3) + g * get(job, 4)
    v = get(job, 2) + b * get(job, 6) + g * get(job, 7)
    keys = get(job, 12) + part * 4 * _padded(seen) * dim
    values = get(job, 13) + part * 4 * _padded(dim) * seen
    for first in range(0, seen, COLUMNS):
        for d in range(dim):
            for i in range(COLUMNS):
                s = first + i
                write_f32(keys + 4 * i, read_f32(k + s * get(job, 5) + 4 * d) * scale if s < seen else np.float32(0.0))
            keys += 4 * COLUMNS
    for first in range(0, dim, COLUMNS):
        for s in range(seen):
            row = v + s * get(job, 8) + 4 * first
            if first + COLUMNS <= dim:
                store_f32(values, load_f32(row))
                store_f32(values + 32, load_f32(row + 32))
            else:
                for i in range(COLUMNS):
                    write_f32(values + 4 * i, read_f32(row + 4 * i) if first + i < dim else np.float32(0.0))
            values += 4 * COLUMNS


@inner
def _padded(count):
    """The next multiple of COLUMNS."""
    return (count + COLUMNS - 1) // COLUMNS * COLUMNS


@inner
def attend_part(job, part):
    """HEIGHT queries of one head. A group's last queries, whose work is the most, come first; its heads follow one another.

    Job: op, q [B, H, T, D], strides of B, H, T, out float32 [B, T, H, D], G, heads a group, T, S, D, keys, values
    (:func:`lay_out`); room for float32 [HEIGHT, D + S + 16 + D], the last D and S rounded up, for one caller.
    """
    groups, share, tokens, seen, dim = get(job, 6), get(job, 7), get(job, 8), get(job, 9), get(job, 10)
    blocks = (tokens + HEIGHT - 1) // HEIGHT
    pair, rest = part // (blocks * share), part % (blocks * share)
    b, head, first = pair // groups, pair % groups * share + rest % share, HEIGHT * (blocks - 1 - rest // share)
    count, q_stride = min(HEIGHT, tokens - first), get(job, 4)
    keys = get(job, 11) + pair * 4 * _padded(seen) * dim
    values = get(job, 12) + pair * 4 * _padded(dim) * seen
    queries, stride = get(job, 13), 4 * (_padded(seen) + COLUMNS)  # of scores: rows in different sets of a cache
    scores, visible = queries + 4 * HEIGHT * dim, seen - tokens + first + count
    mixed, wide = scores + HEIGHT * stride, _padded(visible)
    row = get(job, 1) + b * get(job, 2) + head * get(job, 3) + first * q_stride
    for i in range(HEIGHT):
        _scaled(row + min(i, count - 1) * q_stride, dim, np.float32(1.0), queries + 4 * dim * i)
    for s in range(0, wide, COLUMNS):
        tile(queries, 4 * dim, 4, keys + 4 * dim * s, dim, scores + 4 * s, stride, 0, False)
    for i in range(count):  # what a query may not see
        for s in range(visible - count + i + 1, wide):
            write_f32(scores + stride * i + 4 * s, np.float32(-np.inf))
    out, step = get(job, 5) + 4 * dim * ((b * tokens + first) * groups * share + head), 4 * dim * groups * share
    for i in range(count):  # the sums, by which D numbers are divided later and not S now, where the queries were
        write_f32(queries + 4 * i, exponentials(scores + stride * i, wide))
    for d in range(0, dim, COLUMNS):
        tile(scores, stride, 4, values + 4 * seen * d, visible, mixed + 4 * d, 4 * _padded(dim), 0, False)
    for i in range(count):
        _scaled(mixed + 4 * _padded(dim) * i, dim, np.float32(1.0) / read_f32(queries + 4 * i), out + step * i)


@inner
def _scaled(x, count, scale, out):
    """``out = x * scale`` for ``count`` float32."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store_f32(out + 4 * i, load_f32(x + 4 * i) * splat(scale))
    for i in range(whole, count):
        write_f32(out + 4 * i, read_f32(x + 4 * i) * scale)
