"""What a decoding step's products do with their sums: the small layers between the linears, computed where the sums are.

A LLaMA's RMSNorm needs the mean square of a whole row, which no block of a product knows. So the product before a norm
writes, beside the new residual stream h, the norm's input and the strip's part of the sum of squares; the product after it
multiplies its own sums by 1 / rms, which it can since a linear is linear::

    h = h + y                      x = h * weight * r_before          squares[strip] = sum of h^2 over the strip
    y' = (x @ W) * (r / r_before)  with r = 1 / sqrt(mean square + eps), r_before that of h before y was added

r_before keeps x within fp16's range, whatever the size of h; it divides out again. The definition is ops.rms_norm.

Each is an :class:`~.block_sums.Epilogue`. What it reads, it reads before the weights are multiplied, and squares as they
are: adding them up is left for the end, since a warp would have to wait for them.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.block_sums import Epilogue
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function, tuple_of
from tinygptq.kernels.cuda.warps import ALL, warp_sum

STRIP = 32
ZERO, NOWHERE = np.float32(0), np.int32(0)


@functools.cache
def inverse_rms(features: int, eps: float):
    """Device functions of 1 / sqrt(mean square + eps) of a row, squares float32 [R, strips] being its strips' sums.

    ``read(squares, row, lane)`` -> this lane's sums, ``inverse(sums)`` -> the number; and a tuple as ``read`` gives it.
    """
    strips, share, small = -(-features // STRIP), np.float32(1 / features), np.float32(eps)
    turns = -(-strips // STRIP)
    nothing = (ZERO,) * turns

    def reader(turn):
        """Device function that reads a lane's sum of one turn."""
        first = STRIP * turn

        @device_function
        def read(squares, row, lane):
            strip = first + lane
            return squares[np.uint32(row), np.uint32(strip)] if strip < strips else ZERO

        return read

    @device_function
    def inverse(sums):
        total = ZERO
        for turn in range(turns):
            total += sums[turn]
        return cuda.libdevice.rsqrtf(warp_sum(total) * share + small)

    return tuple_of(reader, turns), inverse, nothing


@functools.cache
def normed(features: int, eps: float, biased: bool) -> Epilogue:
    """``y = value * r / r_before + bias``: a linear that follows a norm of ``features`` numbers.

    y float32 [R, N]; extra: squares, squares_before [R, strips of the norm], bias float32 [N] (read if ``biased``).
    """
    read_squares, inverse, nothing = inverse_rms(features, eps)

    @device_function
    def read(row, strip, lane, y, extra):
        return read_squares(extra[0], row, lane), read_squares(extra[1], row, lane)

    @device_function
    def scale_by_norm(row, strip, lane, value, y, extra, known):
        factor = inverse(known[0]) / inverse(known[1])
        column = np.uint32(STRIP * strip + lane)
        if column < y.shape[1]:
            value *= factor
            if biased:
                value += extra[2][column]
            y[np.uint32(row), column] = value

    return Epilogue(read, (nothing, nothing), scale_by_norm)


@functools.cache
def swiglu(features: int, eps: float, biased: bool) -> Epilogue:
    """``z = silu(gate) * up``, gate in lanes 0-15 and up in lanes 16-31 of each strip, after a norm of ``features`` numbers.

    y is z, float16 [R, I]; extra: squares, squares_before, bias [2 I, columns as the product's].
    """
    read_squares, inverse, nothing = inverse_rms(features, eps)

    @device_function
    def read(row, strip, lane, y, extra):
        return read_squares(extra[0], row, lane), read_squares(extra[1], row, lane)

    @device_function
    def silu_times_up(row, strip, lane, value, y, extra, known):
        value *= inverse(known[0]) / inverse(known[1])
        if biased:
            value += extra[2][np.uint32(STRIP * strip + lane)]
        up, column = cuda.shfl_down_sync(ALL, value, 16), np.uint32(STRIP // 2 * strip + lane)
        if lane < 16 and column < y.shape[1]:
            y[np.uint32(row), column] = value / (np.float32(1) + cuda.libdevice.fast_expf(-value)) * up

    return Epilogue(read, (nothing, nothing), silu_times_up)


@functools.cache
def residual(features: int, eps: float, biased: bool) -> Epilogue:
    """``h += value``, and the input of the norm that follows: see the module.

    y is h, float32 [R, C]; extra: squares_before (of h as it was), bias float32 [C], weight float32 [C] (the norm's), order
    int32 [C] (where each element of x goes), x float16 [R, C], squares [R, strips] (of the new h).
    """
    read_squares, inverse, nothing = inverse_rms(features, eps)

    @device_function
    def read(row, strip, lane, y, extra):
        column = np.uint32(min(STRIP * strip + lane, y.shape[1] - 1))
        return read_squares(extra[0], row, lane), y[np.uint32(row), column], extra[2][column], extra[3][column]

    @device_function
    def add_to_stream(row, strip, lane, value, y, extra, known):
        sums, h, weight, place = known
        factor = inverse(sums)
        row, column = np.uint32(row), np.uint32(STRIP * strip + lane)
        h += value
        if biased:
            h += extra[1][np.uint32(min(column, y.shape[1] - 1))]
        if column < y.shape[1]:
            y[row, column] = h
            extra[4][row, np.uint32(place)] = h * weight * factor
        else:
            h = ZERO
        total = warp_sum(h * h)
        if lane == 0:
            extra[5][row, np.uint32(strip)] = total

    return Epilogue(read, (nothing, ZERO, ZERO, NOWHERE), add_to_stream)
