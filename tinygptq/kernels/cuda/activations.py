"""x on its way to a warp's tensor cores, in whole lines: a ring of chunks in shared memory, its own for each warp (8.0).

mma wants of a row 16 bytes in each of four lanes, and 64 bytes of eight rows with one load: half lines, each asked for
twice, which with 8 rows cost a third of a microsecond of six. So the lanes copy 128 bytes in a piece, and past the registers
(cp.async), so that x is under way while the words of weights, asked for before it, still are; mma's parts come out of
shared memory. A chunk is 256 bytes of each row. Copied by lane 8r + s, and then read by lane 4g + t of a warp::

    copied    16 bytes s and s + 8 of rows r, r + 4, ...           r = 0..3, s = 0..7
    read      16 bytes 4u + t of row g (and of row g + 8)          g = 0..7, t = 0..3, u = 0..3 (a unit of 32 k)

In odd rows the pieces of units 0 and 1 change places, and those of 2 and 3, for eight lanes that read at once have pieces of
two rows, which would lie in the same banks.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.ptx import copy_async_commit, copy_async_pair_if, load_shared
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function

ROW_WORDS = CHUNK // 2  # 32-bit words of a row in a chunk


def ring_bytes(warps: int, row_tiles: int, slots: int) -> int:
    """Shared memory of a block for 8 or 16 rows of x, in bytes."""
    return 4 * slots * _slot_words(row_tiles) * warps


def _slot_words(row_tiles):
    return 8 * row_tiles * ROW_WORDS


class Place(NamedTuple):
    """Where a lane copies to and from and where it reads, int32. Words are of 32 bits, of slot 0 and chunk 0.

    Attributes:
        to, source: words of its first 16 bytes in shared memory and in x.
        rows_left, inner: rows of x from the first that it copies on, and K.
        even, odd: the words of unit 0 (and, 32 further, of unit 2) in the row that it reads, and of unit 1 less 16.
    """

    to: Any
    source: Any
    rows_left: Any
    inner: Any
    even: Any
    odd: Any


@functools.cache
def ring(row_tiles: int, slots: int, padded: bool):
    """Device functions of a warp's ring, shared memory being uint32: ``locate``, ``copy`` and ``take``.

    Args: row_tiles: 1 for up to 8 rows of x, 2 for up to 16; slots: chunks in the ring; padded: x is 0 beyond K, and not
        undefined.

    A group of copies is closed by each call of ``copy``; whoever takes has to wait for it, and for the other lanes. Rows
    that x has not got are neither copied nor of use. Of the first eight they are read as the last, by which fewer banks are
    busy; of the others what is in their place.
    """
    slot_words = _slot_words(row_tiles)
    first, second, third, fourth = (copy_async_pair_if(16 * ROW_WORDS * i) for i in range(4))  # four rows further each

    @device_function
    def locate(rows, inner):
        """The lane's :class:`Place`, for x of this shape."""
        lane, warp = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        row, piece = np.int32(lane >> 3), np.int32(lane & 7)
        base = np.int32(slots * slot_words * warp)
        to = np.int32(base + ROW_WORDS * row + 4 * (piece ^ 4 * (row & 1)))
        source = np.int32(row * np.int32(inner >> 1) + 4 * piece)
        final, g = np.int32(rows - 1), np.int32(lane >> 2)
        g = g if g < final else final
        at, flip = np.int32(base + ROW_WORDS * g + 4 * (lane & 3)), np.int32(16 * (g & 1))
        return Place(to, source, np.int32(rows - row), inner, np.int32(at + flip), np.int32(at - flip))

    @device_function
    def copy(shared, place, x, chunk, chunks, slot):
        """Start copying one of x's ``chunks`` to a slot; x is an address, or float16 [rows, inner], C-contiguous."""
        to, source = np.int32(place.to + slot * slot_words), np.int32(place.source + ROW_WORDS * chunk)
        k = np.int32(CHUNK * chunk + 8 * (cuda.threadIdx.x & 7))
        near, far = not padded or k < place.inner, not padded or k < np.int32(place.inner - 64)
        there, step = padded or chunk < chunks, np.int32(2 * place.inner)  # words of four rows
        first(shared, to, x, source, there and place.rows_left > 0, near, far)
        second(shared, to, x, np.int32(source + step), there and place.rows_left > 4, near, far)
        if row_tiles == 2:
            third(shared, to, x, np.int32(source + 2 * step), there and place.rows_left > 8, near, far)
            fourth(shared, to, x, np.int32(source + 3 * step), there and place.rows_left > 12, near, far)
        copy_async_commit()

    @device_function
    def take_rows(shared, even, odd):
        first, second = load_shared(shared, even), load_shared(shared, odd + 16)
        return first + second + load_shared(shared, even + 32) + load_shared(shared, odd + 48)

    @device_function
    def take(shared, place, slot):
        """mma's B of the chunk in a slot: 16 uint32 for each 8 rows."""
        even, odd = np.int32(place.even + slot * slot_words), np.int32(place.odd + slot * slot_words)
        if row_tiles == 1:
            return take_rows(shared, even, odd)
        return take_rows(shared, even, odd) + take_rows(shared, even + 8 * ROW_WORDS, odd + 8 * ROW_WORDS)

    return locate, copy, take
