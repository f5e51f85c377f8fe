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


def ring_bytes(warps: int, rows: int, slots: int) -> int:
    """Shared memory of a block for so many rows of x, in bytes."""
    return 4 * slots * ROW_WORDS * rows * warps


class Place(NamedTuple):
    """Where a lane copies to and from and where it reads, int32. Words are of 32 bits, of slot 0 and chunk 0.

    Attributes:
        to, source: words of its first 16 bytes in shared memory and in x.
        row, rows, inner: the first row of x that it copies, and x's shape.
        at, flip: the word of its first unit in the row that it reads, if that is even, and 16 if it is odd, else 0.
        upper: words from there to the row 8 further.
        slot: words of a slot.
    """

    to: Any
    source: Any
    row: Any
    rows: Any
    inner: Any
    at: Any
    flip: Any
    upper: Any
    slot: Any


@functools.cache
def ring(row_tiles: int, slots: int, padded: bool):
    """Device functions of a warp's ring, shared memory being uint32: ``locate``, ``copy`` and ``take``.

    Args: row_tiles: 1 for up to 8 rows of x, 2 for up to 16; slots: chunks in the ring; padded: x is 0 beyond K, and not
        undefined.

    A group of copies is closed by each call of ``copy``; whoever takes has to wait for it, and for the other lanes. Rows
    that x has not got are neither copied nor of use: they are read as the last.
    """

    @device_function
    def locate(rows, inner):
        """The lane's :class:`Place`, for x of this shape."""
        lane, warp = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        row, piece = np.int32(lane >> 3), np.int32(lane & 7)
        slot = np.int32(ROW_WORDS * rows)
        base = np.int32(slots * slot * warp)
        to = np.int32(base + ROW_WORDS * row + 4 * (piece ^ 4 * (row & 1)))
        source = np.int32(row * np.int32(inner >> 1) + 4 * piece)
        final, g, h = np.int32(rows - 1), np.int32(lane >> 2), np.int32((lane >> 2) + 8)
        g, h = g if g < final else final, h if h < final else final
        at, flip = np.int32(base + ROW_WORDS * g + 4 * (lane & 3)), np.int32(16 * (g & 1))
        return Place(to, source, row, rows, inner, at, flip, np.int32(ROW_WORDS * (h - g)), slot)

    @device_function
    def copy(shared, place, x, chunk, chunks, slot):
        """Start copying one of x's ``chunks`` to a slot; x is an address, or float16 [rows, inner], C-contiguous."""
        to, source = np.int32(place.to + slot * place.slot), np.int32(place.source + ROW_WORDS * chunk)
        k = np.int32(CHUNK * chunk + 8 * (cuda.threadIdx.x & 7))
        near, far = not padded or k < place.inner, not padded or k < np.int32(place.inner - 64)
        for i in range(2 * row_tiles):
            there = place.row < np.int32(place.rows - 4 * i) and (padded or chunk < chunks)
            from_row = np.int32(source + 2 * place.inner * i)
            copy_async_pair_if(shared, to + 4 * ROW_WORDS * i, x, from_row, there, near, far)
        copy_async_commit()

    @device_function
    def take_rows(shared, at, flip):
        first, second = load_shared(shared, at + flip), load_shared(shared, at + 16 - flip)
        return first + second + load_shared(shared, at + 32 + flip) + load_shared(shared, at + 48 - flip)

    @device_function
    def take(shared, place, slot):
        """mma's B of the chunk in a slot: 16 uint32 for each 8 rows."""
        at = np.int32(place.at + slot * place.slot)
        if row_tiles == 1:
            return take_rows(shared, at, place.flip)
        upper = np.int32(at + place.upper)
        return take_rows(shared, at, place.flip) + take_rows(shared, upper, place.flip)

    return locate, copy, take
