"""Many rows of x at once, a row (or a stretch of one) at a time. Arguments are jobs: addresses of int64, see cpu.py."""

from __future__ import annotations

import numpy as np

from tinygptq.kernels import cpu_tiles, simd
from tinygptq.kernels.cpu_attention import dot, rotate
from tinygptq.kernels.simd import LANES, get, inner, load_f32, splat, store_f32

STRETCH = 4096  # numbers of a long vector in one part, a multiple of LANES
TILES_AT_ONCE = 4  # tiles a part of a product computes: some microseconds of work


@inner
def integers_of_row(job, m):
    """Row m of x as integers.

    Job: op, linear, x, its stride, ordered, pairs, their stride, sums, their stride, units; strides in bytes a row.
    """
    linear = get(job, 1)
    x, room, sums = get(job, 2) + m * get(job, 3), m * get(job, 6), get(job, 7) + m * get(job, 8)
    unit = cpu_tiles.integer_input(linear, x, get(job, 4) + room, get(job, 5) + room, sums)
    simd.write_f32(get(job, 9) + 4 * m, unit)


@inner
def tiles_of_rows(job, part):
    """A few tiles of every row of x @ W. Job: as for :func:`integers_of_row`, then rows, out, its stride in bytes."""
    linear, rows = get(job, 1), get(job, 10)
    last = min((part + 1) * TILES_AT_ONCE, cpu_tiles.tile_count(linear))
    for tile in range(part * TILES_AT_ONCE, last):
        for m in range(rows):  # the tile stays in the first-level cache
            x, pairs, sums = get(job, 2) + m * get(job, 3), get(job, 5) + m * get(job, 6), get(job, 7) + m * get(job, 8)
            unit, out = simd.read_f32(get(job, 9) + 4 * m), get(job, 11) + m * get(job, 12)
            cpu_tiles.tiles(linear, tile, tile + 1, x, pairs, sums, unit, out)


@inner
def widen_row(job, n):
    """Row n of a 16-bit weight to float32. Job: op, linear, out."""
    linear, inputs = get(job, 1), get(get(job, 1), cpu_tiles.INPUTS)
    is_bfloat16 = get(linear, cpu_tiles.KIND) == cpu_tiles.BFLOAT16
    cpu_tiles.widen(get(linear, cpu_tiles.CODES) + 2 * inputs * n, inputs, is_bfloat16, get(job, 2) + 4 * inputs * n)


@inner
def rms_norm_row(job, row, eps):
    """ops.rms_norm of one row. Job: op, x, weight, width, out."""
    weight, width = get(job, 2), get(job, 3)
    x, out = get(job, 1) + 4 * width * row, get(job, 4) + 4 * width * row
    scale = np.float32(1.0) / np.sqrt(dot(x, x, width) / np.float32(width) + eps)
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        store_f32(out + 4 * i, load_f32(x + 4 * i) * splat(scale) * load_f32(weight + 4 * i))
    for i in range(whole, width):
        simd.write_f32(out + 4 * i, simd.read_f32(x + 4 * i) * scale * simd.read_f32(weight + 4 * i))


@inner
def swiglu_part(job, part):
    """``up *= silu(gate)`` on a stretch. Job: op, gate, up, count."""
    gate, up = get(job, 1), get(job, 2)
    start, end = part * STRETCH, min((part + 1) * STRETCH, get(job, 3))
    whole = start + (end - start) // LANES * LANES
    for i in range(start, whole, LANES):
        g = load_f32(gate + 4 * i)
        store_f32(up + 4 * i, simd.divide(g, splat(1.0) + simd.exp(splat(0.0) - g)) * load_f32(up + 4 * i))
    for i in range(whole, end):
        g = simd.read_f32(gate + 4 * i)
        silu = g / (np.float32(1.0) + simd.total(simd.exp(splat(-g))) * np.float32(0.125))
        simd.write_f32(up + 4 * i, silu * simd.read_f32(up + 4 * i))


@inner
def rotate_row(job, row):
    """RoPE in place on all heads of one token. Job: op, x [B, T, H, D], T, H, D, cos and sin [T, D/2]."""
    tokens, heads, dim = get(job, 2), get(job, 3), get(job, 4)
    place = 2 * dim * (row % tokens)  # bytes: D/2 float32 a token
    for head in range(heads):
        x = get(job, 1) + 4 * dim * (row * heads + head)
        rotate(x, get(job, 5) + place, get(job, 6) + place, dim // 2, np.float32(1.0))
