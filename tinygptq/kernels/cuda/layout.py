"""A packed linear on the device, its words in the order in which the tensor-core kernels read them.

The unit of the layout is a *chunk*: 128 rows (k) by 32 columns (n), ``bits`` * 512 bytes. One warp reads it with ``bits``
loads of 16 bytes per lane, each 512 bytes in one piece, and lane 4g + t (g = 0..7, t = 0..3) then holds exactly the codes
that mma wants of it (the fragments are drawn in ``ptx``)::

    columns   4g + c                      c = 0..3
    rows      32u + 8t + 2i, + 1          u = 0..3 (a unit of 32 rows), i = 0..3: pair i of two neighbouring rows

The 16 pairs of a column lie in ``bits`` words, ``16 // bits`` of them in each: a pair's first code in the lower half of the
word, its second code at the same place of the upper half, so that one ``and`` leaves a half2's two mantissas. A unit's
pairs stand in the order 0, 2, 1, 3: pairs 0 and 1 at even places, 2 and 3 at odd ones (:func:`place_of`)::

    4 bits     bit 31                         16 15                          0
               | p3.1 | p1.1 | p2.1 | p0.1 | p3.0 | p1.0 | p2.0 | p0.0 |      word u: unit u
    3 bits     word u, u < 3: the four pairs of unit u, then pair u of unit 3 in bits 12-14 of each half; bit 15 of word b's
               halves is bit b of unit 3's pair 3

A *strip* is 32 columns wide and as long as K. Chunks of the same rows follow each other, strip by strip, and a group's
scales likewise: blocks that go through their strips side by side read one stretch of memory together, which it gives faster
than as many stretches as there are blocks. Rows are padded to whole chunks and columns to whole strips; kernels multiply
padded rows by x = 0 and write no padded column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygptq.packing import PackedLinear

ROWS, COLUMNS = 128, 32  # of a chunk
PAIRS = 16  # of one column in one lane's part of a chunk
HALF_ONES = 0x00010001


@dataclass(frozen=True, eq=False)
class DeviceLinear:
    """A :class:`tinygptq.packing.PackedLinear` on the device; arrays are CuPy's (NumPy's in tests of the layout).

    Shapes (C chunks in a strip, S strips, G groups, the padded rows' too, P of them together: :func:`groups_together`;
    ``K = in_features``, ``N = out_features`` before padding):
        codes:  uint32 [C, S, bits, 32 lanes, 4 columns].
        scales: float16 or float32 [G / P, S, P, 32 columns].
        zeros:  uint8 (uint16 for 8 bits) [G / P, S, P, 32], or None when all are ``zero``.
        perm:   int32 [K] or None: row i multiplies input ``perm[i]``. Callers gather x first; kernels do not look at it.
        bias:   float32 [32 * S] or None.
    """

    codes: Any
    scales: Any
    zeros: Any
    zero: int | None
    perm: Any
    bias: Any
    bits: int
    group_size: int
    in_features: int
    out_features: int

    @property
    def chunks(self) -> int:
        """Of a strip."""
        return self.codes.shape[0]

    @property
    def strips(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes a product has to read."""
        return sum(int(array.nbytes) for array in (self.codes, self.scales, self.zeros) if array is not None)


def to_device(linear: PackedLinear, array: Any = None) -> DeviceLinear:
    """Lay ``linear`` out for the kernels. ``array`` brings a NumPy array to the device; by default ``cupy.asarray``."""
    if array is None:
        from tinygptq.kernels.cuda.runtime import cupy

        array = cupy().asarray
    zeros, bits = linear.zeros, linear.bits
    group_size = min(linear.group_size, linear.in_features)
    constant = int(zeros.flat[0]) if (zeros == zeros.flat[0]).all() else None
    narrow = zeros.astype(np.uint16 if bits == 8 else np.uint8)  # 8 bits: zeros run from 0 to 256
    return DeviceLinear(
        codes=tile(array(linear.qweight), bits, None if linear.sorted else array(linear.perm)),
        scales=tables(array(linear.scales), linear.in_features, group_size),
        zeros=None if constant is not None else tables(array(narrow), linear.in_features, group_size),
        zero=constant,
        perm=None if linear.perm is None else array(linear.perm),
        bias=None if linear.bias is None else array(np.pad(linear.bias, (0, -linear.out_features % COLUMNS))),
        bits=bits,
        group_size=group_size,
        in_features=linear.in_features,
        out_features=linear.out_features,
    )


def place_of(bits: int, unit: int, pair: int) -> tuple[int, int] | None:
    """(word, bit of each half) where a unit's pair stands; None for unit 3's pair 3 of 3 bits, which is spread."""
    place = (0, 2, 1, 3)[pair]
    if bits == 3:
        return (unit, 3 * place) if unit < 3 else (pair, 12) if pair < 3 else None
    word, place = divmod(4 * unit + place, 16 // bits)
    return word, bits * place


def finished_words(bits: int, unit: int) -> tuple[int, ...]:
    """The words of a column of which this is the last unit that needs them."""
    places = [[place_of(bits, u, pair) for pair in range(4)] for u in range(4)]
    needed = [set(range(bits)) if None in found else {place[0] for place in found} for found in places]
    return tuple(sorted(needed[unit].difference(*needed[unit + 1 :])))


def groups_together(group_size: int) -> int:
    """Neighbouring groups whose scales of a strip follow each other: those of a chunk, when they are several whole ones."""
    return ROWS // group_size if ROWS % group_size == 0 else 1


def tables(table: Any, inner: int, group_size: int) -> Any:
    """Scales or zeros [groups, N] of ``inner`` rows -> [G / P, S, P, 32], padded with 0: padded rows look one up too."""
    groups, together = -(-(inner + -inner % ROWS) // group_size), groups_together(group_size)
    padded = np.pad(table, ((0, groups - table.shape[0]), (0, -table.shape[1] % COLUMNS)))
    return padded.reshape(groups // together, together, -1, COLUMNS).transpose(0, 2, 1, 3).copy()


def tile(qweight: Any, bits: int, perm: Any = None) -> Any:
    """GPTQ's words, uint32 [K * bits / 32, N] -> uint32 [C, S, bits, 32, 4]; see the module for the order. NumPy or CuPy.

    Args: perm: int [K], the order in which rows are taken; None is as they are.
    """
    codes = _codes(qweight, bits)  # (K, N)
    codes = codes if perm is None else codes[perm]
    codes = np.pad(codes, ((0, -codes.shape[0] % ROWS), (0, -codes.shape[1] % COLUMNS)))
    # k = (chunk, unit u, t, pair i // 2, i % 2, which of the pair); n = (strip, g, c)
    chunks, column_strips = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    codes = codes.reshape(chunks, 4, 4, 2, 2, 2, column_strips, 8, 4)
    codes = codes.transpose(1, 3, 4, 5, 0, 6, 7, 2, 8).reshape(PAIRS, 2, -1)  # (pair, which, chunk strip g t c)
    halves = codes[:, 0].astype(np.uint32) | codes[:, 1].astype(np.uint32) << np.uint32(16)  # (16, C * S * 128)
    words = np.zeros_like(halves, shape=(bits, halves.shape[1]))
    for i in range(PAIRS):
        if place := place_of(bits, i // 4, i % 4):
            words[place[0]] |= halves[i] << np.uint32(place[1])
        else:
            for bit in range(3):
                words[bit] |= (halves[i] >> np.uint32(bit) & np.uint32(HALF_ONES)) << np.uint32(15)
    words = words.reshape(bits, chunks, -1, 32, 4)
    return words.transpose(1, 2, 0, 3, 4).copy()  # (C, S, bits, 32, 4)


def _codes(words: Any, bits: int) -> Any:
    """:func:`tinygptq.packing.unpack` for CuPy's arrays too: uint32 [K * bits / 32, N] -> uint8 [K, N]."""
    words = words.reshape(-1, bits, words.shape[1])  # (turns of 32 codes, words, N)
    codes = np.empty_like(words, shape=(words.shape[0], 32, words.shape[2]), dtype=np.uint8)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> np.uint32(shift)
        if shift + bits > 32:  # the code's upper bits open the next word
            code = code | words[:, word + 1] << np.uint32(32 - shift)
        codes[:, i] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, words.shape[2])  # (K, N)


def cache_width(dim: int) -> int:
    """Dimensions of a head in the key-value cache: padded with zeros to 64, 128 or 256, so that lanes divide them evenly."""
    return max(64, 1 << (dim - 1).bit_length())
