"""The end of a product's block: what its warps leave in shared memory is added up and handed to an epilogue.

A warp leaves float32 [rows of x, PITCH] for each strip of the block: [strips, warps, rows, PITCH] in all. Each row is then
added up by one warp, always in the same order.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.ptx import SHARED, _address, _assembly, _unpack, intrinsic, types
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function

PITCH = STRIP + 4  # floats between rows: lanes of a warp fall on different banks


class Epilogue(NamedTuple):
    """What is done with the sums of one row and strip, by a whole warp: lane i has column ``32 * strip + i``, beyond N too.

    Attributes:
        read: device function ``(row, strip, lane, y, extra)`` -> what the end needs to know, a tuple of numbers; called
            before the weights are multiplied, so that nobody waits for it then.
        nothing: a tuple of the same types.
        finish: device function ``(row, strip, lane, value, y, extra, known)``.
    y and the tuple extra are arrays that the kernel was given for it.
    """

    read: Any
    nothing: tuple
    finish: Any


@device_function
def _read_nothing(row, strip, lane, y, extra):
    return (np.float32(0),)


@device_function
def _store(row, strip, lane, value, y, extra, known):
    column = np.int32(STRIP * strip + lane)
    if column < y.shape[1]:
        y[np.uint32(row), np.uint32(column)] = value


store = Epilogue(_read_nothing, (np.float32(0),), _store)
"""The plain one: ``y[row, 32 * strip + lane] = value``."""


@functools.cache
def leave_sums(row_tiles: int):
    """The device function ``(shared, index, total)`` that writes a lane's sums to shared memory, four columns at a time.

    ``shared`` is float32 [rows of x, PITCH] from ``index`` on, which is row 2t, column 4g for lane 4g + t; ``total`` is C of
    two column tiles for each 8 rows.
    """

    def generate(context, builder, signature, args):
        shared, index, total = args
        address, total = _address(context, builder, signature.args[0], shared, index, SHARED), _unpack(builder, total)
        for tile, row in itertools.product(range(row_tiles), range(2)):
            text = f"st.shared.v4.f32 [$0 + {4 * (8 * tile + row) * PITCH}], {{$1, $2, $3, $4}};"
            columns = total[8 * tile + row : 8 * (tile + 1) : 2]
            _assembly(builder, ir.VoidType(), text, "r,f,f,f,f", [address, *columns], True)
        return context.get_dummy_value()

    @intrinsic
    def leave(typingctx, shared, index, total):
        return types.void(shared, types.int64, types.UniTuple(types.float32, 8 * row_tiles)), generate

    return leave


def finisher(rows_left: int, warps: int, unit: float, epilogue: Epilogue, strips: int = 1):
    """Device function ``(partial, first, strip, skipped, rows, y, extra, known)`` that adds up what the warps left and hands
    it to the epilogue.

    Args: rows_left: that each warp left, 8 or 16; unit: what sums are multiplied by; strips: of the block.

    Args of the device function:
        partial, first: float32 shared memory, and where in it the sums begin.
        strip, skipped: the block's first strip, and how many of its strips are another block's to finish.
        rows: of x; fewer or as many as were left.
        y, extra: the epilogue's.
        known: what the epilogue has read for this warp's first row of the first strip.
    """
    read, end, unit, add_up = epilogue.read, epilogue.finish, np.float32(unit), _adder(rows_left, warps, strips)

    @device_function
    def finish(partial, first, strip, skipped, rows, y, extra, known):
        lane, row = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        step, first_row = np.int32(cuda.blockDim.x >> 5), row  # not the constant, for which the loop would be written out
        cuda.syncthreads()
        while row < rows:
            values = add_up(partial, np.int32(first + row * PITCH + lane))
            for i in range(strips):
                if i > 0 or row != first_row:
                    known = read(row, np.int32(strip + i), lane, y, extra)
                if i >= skipped:
                    end(row, np.int32(strip + i), lane, values[i] * unit, y, extra, known)
            row = np.int32(row + step)

    return finish


def _adder(rows_left, warps, strips):
    """Device function: one number's sum over the warps, for each strip; a tuple, so that no strip waits for another."""
    before = _adder(rows_left, warps, strips - 1) if strips > 1 else None

    @device_function
    def add_up(partial, at):
        even, odd = np.float32(0), np.float32(0)  # two chains, which do not wait for each other
        for w in range(warps):
            value = partial[np.uint32(at + ((strips - 1) * warps + w) * rows_left * PITCH)]
            if w % 2:
                odd += value
            else:
                even += value
        if strips > 1:
            return before(partial, at) + (even + odd,)  # noqa: RUF005 (Numba has no *)
        return (even + odd,)

    return add_up
