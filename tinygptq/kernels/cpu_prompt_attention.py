"""Attention of many queries on the CPU: the vector code. Arguments are jobs of int64 (see cpu.py), strides in bytes.

HEIGHT queries of each head that shares a group's keys go through together: their scores, softmax and mixture of values stay
in a core's cache, and of the keys those that a query may not see are not looked at. Keys and values are laid out anew
first, so that 16 numbers that are multiplied by the same one lie side by side.
"""

from __future__ import annotations

import numpy as np

from tinygptq.kernels.cpu_attention import softmax_row
from tinygptq.kernels.cpu_products import HEIGHT, tile
from tinygptq.kernels.cpu_tiles import COLUMNS
from tinygptq.kernels.simd import get, inner, read_f32, write_f32


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
            for i in range(COLUMNS):
                d = first + i
                write_f32(values + 4 * i, read_f32(v + s * get(job, 8) + 4 * d) if d < dim else np.float32(0.0))
            values += 4 * COLUMNS


@inner
def _padded(count):
    """The next multiple of COLUMNS."""
    return (count + COLUMNS - 1) // COLUMNS * COLUMNS


@inner
def attend_part(job, part):
    """HEIGHT queries of the heads of one group; a group's last queries, whose work is the most, come first.

    Job: op, q [B, H, T, D], strides of B, H, T, out float32 [B, T, H, D], G, heads a group, T, S, D, keys, values
    (:func:`lay_out`); room for float32 [heads a group * HEIGHT, D + S + D, the last two rounded up], for one caller.
    """
    groups, share, tokens, seen, dim = get(job, 6), get(job, 7), get(job, 8), get(job, 9), get(job, 10)
    blocks, rows = (tokens + HEIGHT - 1) // HEIGHT, share * HEIGHT
    pair, first = part // blocks, HEIGHT * (blocks - 1 - part % blocks)
    b, g, count = pair // groups, pair % groups, min(HEIGHT, tokens - first)
    keys = get(job, 11) + pair * 4 * _padded(seen) * dim
    values = get(job, 12) + pair * 4 * _padded(dim) * seen
    queries, scores = get(job, 13), get(job, 13) + 4 * rows * dim
    mixed, visible = scores + 4 * rows * _padded(seen), seen - tokens + first + count
    for i in range(rows):
        row = get(job, 1) + b * get(job, 2) + (g * share + i // HEIGHT) * get(job, 3) + (first + i % HEIGHT) * get(job, 4)
        for d in range(dim):
            write_f32(queries + 4 * (i * dim + d), read_f32(row + 4 * d) if i % HEIGHT < count else np.float32(0.0))
    stride = 4 * _padded(seen)
    for s in range(0, visible, COLUMNS):
        for i in range(0, rows, HEIGHT):
            at = scores + stride * i + 4 * s
            tile(queries + 4 * dim * i, 4 * dim, 4, keys + 4 * dim * s, dim, at, stride, 0, False)
    for i in range(rows):
        sees = min(seen - tokens + first + i % HEIGHT + 1, visible)
        softmax_row(scores + stride * i, sees)
        for s in range(sees, visible):
            write_f32(scores + stride * i + 4 * s, np.float32(0.0))
    for d in range(0, dim, COLUMNS):
        for i in range(0, rows, HEIGHT):
            at = mixed + 4 * (_padded(dim) * i + d)
            tile(scores + stride * i, stride, 4, values + 4 * seen * d, visible, at, 4 * _padded(dim), 0, False)
    for i in range(rows):
        if i % HEIGHT < count:
            out = get(job, 5) + 4 * dim * ((b * tokens + first + i % HEIGHT) * groups * share + g * share + i // HEIGHT)
            for d in range(dim):
                write_f32(out + 4 * d, read_f32(mixed + 4 * (_padded(dim) * i + d)))
