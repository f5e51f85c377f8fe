"""Into the tiles of cpu_tiles.py and back: codes are packed once, when a model is loaded, and unpacked to write W out."""

from __future__ import annotations

import numpy as np

from tinygptq.kernels import simd
from tinygptq.kernels.cpu_tiles import CODES, COLUMNS, GATHER, GROUP, INPUTS, KIND, ROWS, UNIT, scales_and_zeros
from tinygptq.kernels.simd import get, inner, read_u32, splat_i32, store_f32, to_f32, write_u32


def place_of_rows(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the 32 rows of a unit lie: (word, shift), int64 [32] each; word -1 marks the two that 3 bits spread out."""
    row = np.arange(UNIT)
    pair, half = row // 16 * 8 + row % 8, row // 8 % 2
    pairs_per_word = 16 // bits
    word, shift = pair // pairs_per_word, pair % pairs_per_word * bits + 16 * half
    return np.where(word < bits, word, -1), np.where(word < bits, shift, 16 * half + 15)


@inner
def repack_tile(job, tile):
    """Codes of one tile from the bit stream of packing.py.

    Job: op, qweight uint32 [K * bits / 32, N], N, bits, source int64 [rows] (which row each packed row is, -1 for none),
    rows, word and shift of a unit's rows (:func:`place_of_rows`), out.
    """
    qweight, outputs, bits, source = get(job, 1), get(job, 2), get(job, 3), get(job, 4)
    mask = (1 << bits) - 1
    for unit in range(get(job, 5) // UNIT):
        out = get(job, 8) + (tile * (get(job, 5) // UNIT) + unit) * bits * (4 * COLUMNS)
        for i in range(bits * COLUMNS):
            write_u32(out + 4 * i, 0)
        for r in range(UNIT):
            row = get(source, unit * UNIT + r)
            if row < 0:
                continue
            word, shift = row * bits // 32, row * bits % 32
            for c in range(min(COLUMNS, outputs - tile * COLUMNS)):
                at = qweight + 4 * (word * outputs + tile * COLUMNS + c)
                code = read_u32(at) >> shift
                if shift + bits > 32:
                    code |= read_u32(at + 4 * outputs) << (32 - shift)
                _place(out + 4 * c, get(get(job, 6), r), get(get(job, 7), r), code & mask)


@inner
def _place(column, word, shift, code):
    """Put a code into its place in a column of a unit."""
    if word >= 0:
        at = column + 4 * COLUMNS * word
        write_u32(at, read_u32(at) | code << shift)
    else:  # 3 bits, the sixteenth pair: one bit in each word
        for bit in range(3):
            at = column + 4 * COLUMNS * bit
            write_u32(at, read_u32(at) | (code >> bit & 1) << shift)


def _codes_of_pair(bits: int):
    """The codes of one pair of a unit, low and high still side by side: columns 0-7 and 8-15."""
    pairs_per_word, mask = 16 // bits, 0x00010001 * (2**bits - 1)

    @inner(inline="always")
    def codes(unit, pair):
        if bits == 3 and pair == 15:
            one = splat_i32(0x00010001)
            last0 = last1 = splat_i32(0)
            for word in range(3):
                w0, w1 = simd.load_i32(unit + 64 * word), simd.load_i32(unit + 64 * word + 32)
                last0 = last0 | simd.shift_left(simd.shift_halves(w0, 15) & one, word)
                last1 = last1 | simd.shift_left(simd.shift_halves(w1, 15) & one, word)
            return last0, last1
        at, shift = unit + pair // pairs_per_word * 64, pair % pairs_per_word * bits
        keep = splat_i32(mask)
        c0, c1 = simd.shift_halves(simd.load_i32(at), shift), simd.shift_halves(simd.load_i32(at + 32), shift)
        return c0 & keep, c1 & keep

    return codes


def _dequantized_tile(bits: int):
    """The function that writes a tile of W itself, for products with many rows of x."""
    codes_of_pair = _codes_of_pair(bits)

    @inner
    def tile(linear, index, out, stride):
        """Sixteen columns of W to ``out`` (address of W[0, 16 * index]), in the order of x; rows ``stride`` bytes apart."""
        rows, group, inputs = get(linear, ROWS), get(linear, GROUP), get(linear, INPUTS)
        groups = (rows + group - 1) // group
        unit = get(linear, CODES) + index * rows * (COLUMNS * bits // 8)
        low_bits = splat_i32(0xFFFF)
        for first in range(0, rows, UNIT):
            at = index * groups + first // group
            scale0, zero0, scale1, zero1 = scales_and_zeros(linear, at, bits)
            for pair in range(16):
                c0, c1 = codes_of_pair(unit, pair)
                for half in range(2):
                    row = first + pair // 8 * 16 + pair % 8 + 8 * half
                    source = simd.read_i32(get(linear, GATHER) + 4 * row) if get(linear, GATHER) else row
                    if 0 <= source < inputs:
                        w = out + source * stride
                        store_f32(w, scale0 * (to_f32(c0 & low_bits) - zero0))
                        store_f32(w + 32, scale1 * (to_f32(c1 & low_bits) - zero1))
                    c0, c1 = simd.shift_right(c0, 16), simd.shift_right(c1, 16)
            unit += COLUMNS * UNIT * bits // 8

    return tile


_dequantized2, _dequantized3 = _dequantized_tile(2), _dequantized_tile(3)
_dequantized4, _dequantized8 = _dequantized_tile(4), _dequantized_tile(8)


@inner
def dequantized_tile(linear, index, out, stride):
    """Sixteen columns of a packed linear's W to ``out``, the address of the first, float32; rows ``stride`` bytes apart."""
    kind = get(linear, KIND)
    if kind == 4:
        _dequantized4(linear, index, out, stride)
    elif kind == 3:
        _dequantized3(linear, index, out, stride)
    elif kind == 2:
        _dequantized2(linear, index, out, stride)
    else:
        _dequantized8(linear, index, out, stride)
