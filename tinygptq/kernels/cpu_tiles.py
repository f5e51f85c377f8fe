"""One tile of ``x @ W`` at a time: the inner loops of the CPU kernels. Which tiles, and who computes them, is cpu.py's.

A linear is one row of int64 numbers (its fields are named below), most of them addresses. Its outputs are cut into tiles
of 16; a tile's codes lie in memory in the order in which they are read, so a thread reads one unbroken stream.

**Packed codes.** A tile goes through its input rows 32 at a time, in units of ``bits`` words for each of its 16 columns:

    unit:   word 0 of columns 0..15 (64 bytes), word 1 of columns 0..15, ... word bits-1 of columns 0..15

The instruction that does the work, ``dot_pairs``, multiplies two 16-bit numbers by two others and adds: so each half of a
word holds codes, and a *pair* is one code of the low half and, 16 bits above it, one of the high half. The 16 pairs of a
unit hold its 32 rows: pair p = 8 b + i is rows 16 b + i (low) and 16 b + i + 8 (high). With 4 bits, a word is four pairs,

    bit    31    28 27    24 23    20 19    16 15    12 11     8 7      4 3      0
           | pair 3 | pair 2 | pair 1 | pair 0 | pair 3 | pair 2 | pair 1 | pair 0 |      word 0: rows 0-3 and 8-11
                   the high half: rows 8 to 11          the low half: rows 0 to 3         word 1: rows 4-7 and 12-15

and ``word & 0x000f000f`` is a pair, ``word >> 4`` brings the next. 2 and 8 bits are the same with 8 and 2 pairs a word.
3 bits put five pairs in each of three words, bits 0..14 of both halves; bit 15 of the three words is the sixteenth pair:

    half of a word   15|14   12|11    9|8     6|5     3|2     0|
             word 0  a |pair 4 |pair 3 |pair 2 |pair 1 |pair 0 |          pair 15 = a + 2 b + 4 c
             word 1  b |pair 9 |pair 8 |pair 7 |pair 6 |pair 5 |
             word 2  c |pair 14|pair 13|pair 12|pair 11|pair 10|

**The input** must then be 16-bit integers too, but 16 bits would cost accuracy. So x becomes 31-bit fixed point, one scale
for the whole vector, split in two: ``x = unit * (32768 high + low)``. Both parts are multiplied by the same unpacked codes,
the sums are exact integers, and the result is as good as float32's or better. In memory, for each 16 rows: 8 high pairs,
8 low pairs (row i with row i + 8, as above).

**Scales and zeros**, ``[tile, group, 16]``, are applied once a group: y = scale * (sum of code * x - zero * sum of x).
"""

from __future__ import annotations

import numpy as np

from tinygptq.kernels import simd
from tinygptq.kernels.simd import LANES, fma, get, inner, load_f32, load_splat_i32, splat, splat_i32, store_f32, to_f32

COLUMNS = 16  # outputs in a tile: a row of words is one cache line
UNIT = 32  # input rows in a unit, the fewest whose codes fill whole words at every width
AHEAD = 1024  # bytes asked for in advance: about what one core reads in the time memory takes to answer
FLUSH = 256  # rows after which integer sums go to float: 255 * 32767 * 256 is just below 2^31

# Fields of a linear
KIND = 0  # a packed width (2, 3, 4, 8) or one of:
FLOAT16, BFLOAT16, FLOAT32 = 16, 17, 32
INPUTS = 1  # K, the length of x
OUTPUTS = 2  # N
CODES = 3  # address of the codes, or of a dense weight [N, K]
ROWS = 4  # rows of the packed codes: K, every group filled up to whole units
GROUP = 5  # rows of a group, in whole units; the last group may be shorter
SCALES = 6  # address, float16 or
WIDE = 7  # 1 if the scales are float32
ZEROS = 8  # address of uint16 zero points, or 0: all are 2^(bits-1)
GATHER = 9  # address of int32 [ROWS]: the input of each row, -1 for none; or 0: row k is input k
BIAS = 10  # address of float32 [tiles * 16], or 0
FIELDS = 11


# ------------------------------------------------------------------------------------------ the input, as integers


@inner
def gather(linear, x, out):
    """Copy ``x`` (address, float32 [INPUTS]) to ``out`` (address, [ROWS]) in the order of the packed rows."""
    for row in range(get(linear, ROWS)):
        source = simd.read_i32(get(linear, GATHER) + 4 * row)
        simd.write_f32(out + 4 * row, simd.read_f32(x + 4 * source) if source >= 0 else np.float32(0.0))


@inner
def to_fixed(linear, x, pairs, sums):
    """Turn ``x`` (float32 [ROWS], in row order) into high and low 16-bit pairs, and add it up within each group.

    Args: addresses; ``pairs`` has room for 4 * ROWS bytes, ``sums`` for a float32 a group.

    Returns:
        float32 ``unit``: the value of one step; NaN if an x is infinite or NaN, so that every output becomes NaN.
    """
    rows, group = get(linear, ROWS), get(linear, GROUP)
    top, check = splat(0.0), splat(0.0)
    for k in range(0, rows, LANES):
        v = load_f32(x + 4 * k)
        top = simd.larger(simd.magnitude(v), top)
        check = fma(v, splat(0.0), check)  # stays 0 unless a v is infinite or NaN
    peak = simd.largest(top)
    # 2^30 less the rounding of the high part, which must not exceed 32767
    steps = splat(np.float32(1073709056.0) / peak if peak > 1e-30 else np.float32(0.0))
    low_bits, half = splat_i32(0xFFFF), splat_i32(1 << 14)
    start = 0
    for g in range((rows + group - 1) // group):
        high_sum, low_sum = splat_i32(0), splat_i32(0)
        for k in range(start, min(start + group, rows), 16):
            a = simd.nearest(load_f32(x + 4 * k) * steps)
            b = simd.nearest(load_f32(x + 4 * k + 32) * steps)
            a_high, b_high = simd.shift_right(a + half, 15), simd.shift_right(b + half, 15)
            a_low, b_low = a - simd.shift_left(a_high, 15), b - simd.shift_left(b_high, 15)
            simd.store_i32(pairs + 4 * k, (a_high & low_bits) | simd.shift_left(b_high, 16))
            simd.store_i32(pairs + 4 * k + 32, (a_low & low_bits) | simd.shift_left(b_low, 16))
            high_sum, low_sum = high_sum + a_high + b_high, low_sum + a_low + b_low
        exact = np.int64(32768) * simd.total_i32(high_sum) + simd.total_i32(low_sum)
        simd.write_f32(sums + 4 * g, np.float32(exact))
        start += group
    unit = peak / np.float32(1073709056.0) if peak > 1e-30 else np.float32(0.0)
    return unit + simd.total(check)


@inner
def integer_input(linear, x, ordered, pairs, sums):
    """``x`` (address, float32 [INPUTS]) as the integers a packed linear reads; ``ordered`` is room for ROWS float32."""
    if get(linear, GATHER):
        gather(linear, x, ordered)
        return to_fixed(linear, ordered, pairs, sums)
    return to_fixed(linear, x, pairs, sums)


# ------------------------------------------------------------------------------------------ packed codes


def _even_width(bits: int):
    """The integer sums of a stretch of units, for widths that divide 16."""
    mask = 0x00010001 * (2**bits - 1)
    words, pairs_per_word = bits // 2, 16 // bits

    @inner(inline="always")
    def sums(codes, x, units):
        """Sums of code * x, high and low parts, of columns 0-7 and of columns 8-15."""
        high0 = low0 = high1 = low1 = splat_i32(0)
        keep = splat_i32(mask)
        for _ in range(2 * units):  # 16 rows: 8 pairs
            for word in range(words):
                w0, w1 = simd.load_i32(codes), simd.load_i32(codes + 32)
                simd.prefetch(codes + AHEAD)
                codes += 64
                for pair in range(pairs_per_word):
                    at = x + 4 * (word * pairs_per_word + pair)
                    x_high, x_low = load_splat_i32(at), load_splat_i32(at + 32)
                    c0, c1 = w0 & keep, w1 & keep
                    high0, low0 = high0 + simd.dot_pairs(c0, x_high), low0 + simd.dot_pairs(c0, x_low)
                    high1, low1 = high1 + simd.dot_pairs(c1, x_high), low1 + simd.dot_pairs(c1, x_low)
                    w0, w1 = simd.shift_halves(w0, bits), simd.shift_halves(w1, bits)
            x += 64
        return high0, low0, high1, low1

    return sums


def _three_bits():
    """The integer sums of a stretch of units, for 3 bits."""

    @inner(inline="always")
    def sums(codes, x, units):
        """Sums of code * x, high and low parts, of columns 0-7 and of columns 8-15."""
        high0 = low0 = high1 = low1 = splat_i32(0)
        keep = splat_i32(0x00070007)
        for _ in range(units):
            last0 = last1 = splat_i32(0)
            for word in range(3):
                w0, w1 = simd.load_i32(codes), simd.load_i32(codes + 32)
                simd.prefetch(codes + AHEAD)
                codes += 64
                for i in range(5):
                    pair = 5 * word + i
                    at = x + 64 * (pair // 8) + 4 * (pair % 8)
                    x_high, x_low = load_splat_i32(at), load_splat_i32(at + 32)
                    c0, c1 = w0 & keep, w1 & keep
                    high0, low0 = high0 + simd.dot_pairs(c0, x_high), low0 + simd.dot_pairs(c0, x_low)
                    high1, low1 = high1 + simd.dot_pairs(c1, x_high), low1 + simd.dot_pairs(c1, x_low)
                    w0, w1 = simd.shift_halves(w0, 3), simd.shift_halves(w1, 3)
                # one bit of the sixteenth pair is left
                last0, last1 = last0 | simd.shift_left(w0, word), last1 | simd.shift_left(w1, word)
            x_high, x_low = load_splat_i32(x + 64 + 28), load_splat_i32(x + 96 + 28)
            high0, low0 = high0 + simd.dot_pairs(last0, x_high), low0 + simd.dot_pairs(last0, x_low)
            high1, low1 = high1 + simd.dot_pairs(last1, x_high), low1 + simd.dot_pairs(last1, x_low)
            x += 128
        return high0, low0, high1, low1

    return sums


def _packed_tile(bits: int, sums):
    """The tile function of one width, around its integer sums."""

    @inner
    def tile(linear, index, pairs, group_sums, unit, out):
        """Outputs ``16 * index ...`` of x @ W + bias, to the address ``out``; the input as :func:`to_fixed` made it."""
        rows, group = get(linear, ROWS), get(linear, GROUP)
        groups = (rows + group - 1) // group
        codes = get(linear, CODES) + index * rows * (COLUMNS * bits // 8)
        y0 = y1 = splat(0.0)
        shift = splat(32768.0)
        row = 0
        for g in range(groups):
            end = min(row + group, rows)
            scale0, zero0, scale1, zero1 = scales_and_zeros(linear, index * groups + g, bits)
            minus = splat(-simd.read_f32(group_sums + 4 * g))
            dot0, dot1 = zero0 * minus, zero1 * minus
            while row < end:
                units = min(end - row, FLUSH) // UNIT
                high0, low0, high1, low1 = sums(codes, pairs, units)
                dot0 = dot0 + fma(to_f32(high0), shift, to_f32(low0))
                dot1 = dot1 + fma(to_f32(high1), shift, to_f32(low1))
                row += units * UNIT
                pairs += units * (4 * UNIT)
                codes += units * (COLUMNS * UNIT * bits // 8)
            y0, y1 = fma(scale0, dot0, y0), fma(scale1, dot1, y1)
        _finish(linear, index, y0 * splat(unit), y1 * splat(unit), out)

    return tile


@inner(inline="always")
def _finish(linear, index, y0, y1, out):
    """Add the bias, if there is one, and store a tile's 16 outputs."""
    if get(linear, BIAS):
        bias = get(linear, BIAS) + index * (4 * COLUMNS)
        y0, y1 = y0 + load_f32(bias), y1 + load_f32(bias + 32)
    store_f32(out, y0)
    store_f32(out + 32, y1)


_tile2 = _packed_tile(2, _even_width(2))
_tile3 = _packed_tile(3, _three_bits())
_tile4 = _packed_tile(4, _even_width(4))
_tile8 = _packed_tile(8, _even_width(8))


@inner(inline="always")
def scales_and_zeros(linear, at, bits):
    """Scale and zero of columns 0-7, then of columns 8-15, of record ``at`` (tile and group counted together)."""
    zero0 = zero1 = splat(np.float32(1 << (bits - 1)))
    if get(linear, ZEROS):
        zeros = get(linear, ZEROS) + 2 * COLUMNS * at
        zero0, zero1 = to_f32(simd.load_u16(zeros)), to_f32(simd.load_u16(zeros + 16))
    if get(linear, WIDE):
        scales = get(linear, SCALES) + 4 * COLUMNS * at
        return load_f32(scales), zero0, load_f32(scales + 32), zero1
    scales = get(linear, SCALES) + 2 * COLUMNS * at
    return simd.load_f16(scales), zero0, simd.load_f16(scales + 16), zero1


# ------------------------------------------------------------------------------------------ dense weights


def _dense_tile(load, read, size: int):
    """The tile function of a weight [N, K] kept as it came, in ``size`` bytes a number.

    One row after the other, so that memory is read in one stream: four rows at a time read a third slower.
    """

    @inner
    def tile(linear, index, x, out):
        """Outputs ``16 * index ...`` of x @ W.T + bias, in float32; past the last output it writes zeros."""
        inputs = get(linear, INPUTS)
        for i in range(COLUMNS):
            n = COLUMNS * index + i
            y = np.float32(0.0)
            if n < get(linear, OUTPUTS):
                y = row(get(linear, CODES) + n * inputs * size, x, inputs)
            simd.write_f32(out + 4 * i, y)
        if get(linear, BIAS):
            _finish(linear, index, load_f32(out), load_f32(out + 32), out)

    @inner(inline="always")
    def row(w, x, count):
        """The inner product of a row of W and x, in four partial sums a lane."""
        y0 = y1 = y2 = y3 = splat(0.0)
        k = 0
        while k + 4 * LANES <= count:
            simd.prefetch(w + AHEAD)
            y0, y1 = fma(load(w), load_f32(x), y0), fma(load(w + LANES * size), load_f32(x + 32), y1)
            y2 = fma(load(w + 2 * LANES * size), load_f32(x + 64), y2)
            y3 = fma(load(w + 3 * LANES * size), load_f32(x + 96), y3)
            k, w, x = k + 4 * LANES, w + 4 * LANES * size, x + 16 * LANES
        while k + LANES <= count:
            y0 = fma(load(w), load_f32(x), y0)
            k, w, x = k + LANES, w + LANES * size, x + 4 * LANES
        y = simd.total((y0 + y1) + (y2 + y3))
        while k < count:
            y += read(w) * simd.read_f32(x)
            k, w, x = k + 1, w + size, x + 4
        return y

    return tile


_tile_f16 = _dense_tile(simd.load_f16, simd.read_f16, 2)
_tile_bf16 = _dense_tile(simd.load_bf16, simd.read_bf16, 2)
_tile_f32 = _dense_tile(load_f32, simd.read_f32, 4)


# ------------------------------------------------------------------------------------------ any linear


@inner
def is_packed(linear):
    """Whether the input of a linear must go through :func:`to_fixed`."""
    return get(linear, KIND) < FLOAT16


@inner
def tile_count(linear):
    return (get(linear, OUTPUTS) + COLUMNS - 1) // COLUMNS


@inner
def tiles(linear, first, last, x, pairs, group_sums, unit, out):
    """Tiles ``first .. last-1`` of a linear, to ``out`` (address of output 0).

    A packed linear reads ``pairs, group_sums, unit`` (see :func:`to_fixed`), a dense one ``x`` (address, float32 [K]).
    """
    kind = get(linear, KIND)
    for index in range(first, last):
        at = out + index * (4 * COLUMNS)
        if kind == 4:
            _tile4(linear, index, pairs, group_sums, unit, at)
        elif kind == 3:
            _tile3(linear, index, pairs, group_sums, unit, at)
        elif kind == 2:
            _tile2(linear, index, pairs, group_sums, unit, at)
        elif kind == 8:
            _tile8(linear, index, pairs, group_sums, unit, at)
        elif kind == FLOAT16:
            _tile_f16(linear, index, x, at)
        elif kind == BFLOAT16:
            _tile_bf16(linear, index, x, at)
        else:
            _tile_f32(linear, index, x, at)


@inner
def widen(address, count, is_bfloat16, out):
    """``count`` 16-bit floats at an address to float32 at ``out``; both may end anywhere."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        at = address + 2 * i
        store_f32(out + 4 * i, simd.load_bf16(at) if is_bfloat16 else simd.load_f16(at))
    for i in range(whole, count):
        at = address + 2 * i
        simd.write_f32(out + 4 * i, simd.read_bf16(at) if is_bfloat16 else simd.read_f16(at))
