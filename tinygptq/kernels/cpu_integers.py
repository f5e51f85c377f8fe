"""Many rows of x through packed codes, as 16-bit integers: the vector code. Arguments are addresses, or jobs (see cpu.py).

The instruction behind ``dot_pairs`` multiplies twice as many 16-bit integers as there are float32 in a vector, and codes
are small integers to begin with. x becomes integers too: 16 bits, with a scale for each row and each *stretch*, the rows
of W that share a scale (FLUSH of them at most). Sums are exact; what is lost is the rounding of x, an error of some 3e-5
of the result. Pairs lie as in cpu_tiles.py: row i of 16 with row i + 8.
"""

from __future__ import annotations

import numpy as np

from tinygptq.kernels import cpu_tiles, simd
from tinygptq.kernels.cpu_layout import codes_of_pair
from tinygptq.kernels.cpu_tiles import COLUMNS, FLUSH, GATHER, GROUP, ROWS, UNIT
from tinygptq.kernels.simd import LANES, dot_pairs, get, inner, load_f32, load_i32, load_splat_i32, splat, splat_i32, to_f32

ROWS_AT_ONCE = 96  # rows whose integers a core's second-level cache holds; a multiple of HEIGHT
HEIGHT = 6  # rows of x whose sums with two vectors of columns fit in AVX2's 16 registers, beside what they are made of


def _unpacked_tile(bits: int):
    """The function that unpacks a tile of one width."""
    pair_of = codes_of_pair(bits)

    @inner
    def tile(linear, index, out):
        rows, group = get(linear, ROWS), get(linear, GROUP)
        groups = (rows + group - 1) // group
        unit = get(linear, cpu_tiles.CODES) + index * rows * (COLUMNS * bits // 8)
        for first in range(0, rows, UNIT):
            _, z0, _, z1 = cpu_tiles.scales_and_zeros(linear, index * groups + first // group, bits)
            zero0, zero1 = simd.nearest(z0), simd.nearest(z1)
            for pair in range(16):
                c0, c1 = pair_of(unit, pair)
                simd.store_i32(out, _less(c0, zero0))
                simd.store_i32(out + 32, _less(c1, zero1))
                out += 4 * COLUMNS
            unit += COLUMNS * UNIT * bits // 8

    return tile


@inner(inline="always")
def _less(codes, zero):
    """``code - zero`` in both halves of each lane."""
    low = ((codes & splat_i32(0xFFFF)) - zero) & splat_i32(0xFFFF)
    return low | simd.shift_left(simd.shift_right(codes, 16) - zero, 16)


_unpacked2, _unpacked3 = _unpacked_tile(2), _unpacked_tile(3)
_unpacked4, _unpacked8 = _unpacked_tile(4), _unpacked_tile(8)


@inner
def unpack_tile(job, tile):
    """Pairs of code - zero of a tile's 16 columns. Job: op, linear, out int32 [tiles, ROWS / 2, 16]."""
    linear = get(job, 1)
    kind, out = get(linear, cpu_tiles.KIND), get(job, 2) + tile * get(linear, ROWS) * (2 * COLUMNS)
    if kind == 4:
        _unpacked4(linear, tile, out)
    elif kind == 3:
        _unpacked3(linear, tile, out)
    elif kind == 2:
        _unpacked2(linear, tile, out)
    else:
        _unpacked8(linear, tile, out)


@inner
def product_part(job, part):
    """ROWS_AT_ONCE rows of ``x @ W``: their integers first, then tile by tile.

    Job: op, linear, x, its stride, rows, pairs of W (:func:`unpack_tile`), out, its stride; room for a part's integers,
    int16 [ROWS_AT_ONCE, ROWS], and scales, float32 [ROWS_AT_ONCE, stretches]; stretches; room for a row, float32 [ROWS].
    Strides are in bytes; ``out`` has room for rows up to a multiple of HEIGHT.
    """
    linear, first = get(job, 1), part * ROWS_AT_ONCE
    count = min(get(job, 4) - first, ROWS_AT_ONCE)
    x, out = get(job, 2) + first * get(job, 3), get(job, 6) + first * get(job, 7)
    integers, steps, step_stride = get(job, 8), get(job, 9), 4 * get(job, 10)
    for m in range(count):
        row = x + m * get(job, 3)
        if get(linear, GATHER):
            cpu_tiles.gather(linear, row, get(job, 11))
            row = get(job, 11)
        _integers_of_row(linear, row, integers + 2 * get(linear, ROWS) * m, steps + step_stride * m)
    for tile in range(cpu_tiles.tile_count(linear)):
        w, at = get(job, 5) + tile * get(linear, ROWS) * (2 * COLUMNS), out + tile * (4 * COLUMNS)
        _tile_of_rows(linear, tile, w, count, integers, steps, step_stride, at, get(job, 7))


@inner
def _integers_of_row(linear, x, integers, scales):
    """A row of x, float32 [ROWS], stretch by stretch."""
    rows, group = get(linear, ROWS), get(linear, GROUP)
    row = 0
    for start in range(0, rows, group):
        end = min(start + group, rows)
        while row < end:
            count = min(end - row, FLUSH)
            simd.write_f32(scales, to_pairs(x + 4 * row, count, integers + 2 * row))
            row, scales = row + count, scales + 4


@inner
def to_pairs(x, count, pairs):
    """``count`` float32 (a multiple of 16) as pairs of 16-bit integers; returns the value of one step, NaN for a NaN or
    infinity among them."""
    top, check = splat(0.0), splat(0.0)
    for k in range(0, count, LANES):
        v = load_f32(x + 4 * k)
        top = simd.larger(simd.magnitude(v), top)
        check = simd.fma(v, splat(0.0), check)  # stays 0 unless a v is infinite or NaN
    peak = simd.largest(top)
    steps = splat(np.float32(32767.0) / peak if peak > 1e-30 else np.float32(0.0))
    for k in range(0, count, 16):
        a, b = simd.nearest(load_f32(x + 4 * k) * steps), simd.nearest(load_f32(x + 4 * k + 32) * steps)
        simd.store_i32(pairs + 2 * k, (a & splat_i32(0xFFFF)) | simd.shift_left(b, 16))
    return peak / np.float32(32767.0) + simd.total(check)


@inner
def _tile_of_rows(linear, tile, w, count, x, steps, step_stride, out, stride):
    """Sixteen columns of ``count`` rows: stretch by stretch an exact sum, times the scales of both."""
    rows, group, bits = get(linear, ROWS), get(linear, GROUP), get(linear, cpu_tiles.KIND)
    groups = (rows + group - 1) // group
    row = 0
    for g in range(groups):
        end = min((g + 1) * group, rows)
        scale0, _, scale1, _ = cpu_tiles.scales_and_zeros(linear, tile * groups + g, bits)
        while row < end:
            pairs = min(end - row, FLUSH) // 2
            at = w + row * (2 * COLUMNS)
            for m in range(0, count, HEIGHT):
                xm, ym = x + 2 * (rows * m + row), out + stride * m
                _stretch(xm, 2 * rows, at, pairs, steps + step_stride * m, step_stride, scale0, scale1, ym, stride, row == 0)
            row, steps = row + 2 * pairs, steps + 4


@inner
def _stretch(x, x_stride, w, pairs, steps, step_stride, scale0, scale1, out, stride, is_first):
    """``pairs`` pairs of HEIGHT rows of x by two vectors of columns; added to ``out`` unless these are the first."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = e0 = e1 = f0 = f1 = splat_i32(0)
    x2, x4 = x + 2 * x_stride, x + 4 * x_stride
    for _ in range(pairs):
        w0, w1 = load_i32(w), load_i32(w + 32)
        a, b = load_splat_i32(x), load_splat_i32(x + x_stride)
        a0, a1, b0, b1 = a0 + dot_pairs(a, w0), a1 + dot_pairs(a, w1), b0 + dot_pairs(b, w0), b1 + dot_pairs(b, w1)
        a, b = load_splat_i32(x2), load_splat_i32(x2 + x_stride)
        c0, c1, d0, d1 = c0 + dot_pairs(a, w0), c1 + dot_pairs(a, w1), d0 + dot_pairs(b, w0), d1 + dot_pairs(b, w1)
        a, b = load_splat_i32(x4), load_splat_i32(x4 + x_stride)
        e0, e1, f0, f1 = e0 + dot_pairs(a, w0), e1 + dot_pairs(a, w1), f0 + dot_pairs(b, w0), f1 + dot_pairs(b, w1)
        x, x2, x4, w = x + 4, x2 + 4, x4 + 4, w + 4 * COLUMNS
    for s0, s1 in ((a0, a1), (b0, b1), (c0, c1), (d0, d1), (e0, e1), (f0, f1)):
        step = splat(simd.read_f32(steps))
        y0, y1 = to_f32(s0) * (scale0 * step), to_f32(s1) * (scale1 * step)
        if not is_first:
            y0, y1 = y0 + load_f32(out), y1 + load_f32(out + 32)
        simd.store_f32(out, y0)
        simd.store_f32(out + 32, y1)
        out, steps = out + stride, steps + step_stride
