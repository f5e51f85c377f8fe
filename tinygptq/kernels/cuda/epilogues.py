"""What a decoding step's products do with their sums: the small layers between the linears, computed where the sums are.

A LLaMA's RMSNorm needs the mean square of a whole row, which no block of a product knows. So the product before a norm
writes, beside the new residual stream h, the norm's input and the strip's part of the sum of squares; the product after it
multiplies its own sums by 1 / rms, which it can since a linear is linear::

    h = h + y                      x = h * weight * r_before          squares[strip] = sum of h^2 over the strip
    y' = (x @ W) * (r / r_before)  with r = 1 / sqrt(mean square + eps), r_before that of h before y was added

r_before keeps x within fp16's range, whatever the size of h; it divides out again. The definition is ops.rms_norm.

An epilogue is called by a whole warp, ``epilogue(row, strip, lane, value, y, extra)``, lane i with the sum of column
``32 * strip + i``; ``y`` and the tuple ``extra`` are the arrays given to the product.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL, warp_sum

STRIP = 32


@functools.cache
def inverse_rms(features: int, eps: float):
    """Device function ``(squares, row, lane)`` -> 1 / sqrt(mean square + eps) of a row; squares [R, strips]: strips' sums."""
    share, small = np.float32(1 / features), np.float32(eps)

    @device_function
    def inverse(squares, row, lane):
        total = np.float32(0)
        for strip in range(lane, squares.shape[1], STRIP):
            total += squares[row, strip]
        return cuda.libdevice.rsqrtf(warp_sum(total) * share + small)

    return inverse


@functools.cache
def normed(features: int, eps: float, biased: bool):
    """``y = value * r / r_before + bias``: a linear that follows a norm of ``features`` numbers.

    y float32 [R, N]; extra: squares, squares_before [R, strips of the norm], bias float32 [N] (read if ``biased``).
    """
    inverse = inverse_rms(features, eps)

    @device_function
    def scale_by_norm(row, strip, lane, value, y, extra):
        squares, squares_before, bias = extra
        factor = inverse(squares, row, lane) / inverse(squares_before, row, lane)
        column = STRIP * strip + lane
        if column < y.shape[1]:
            value *= factor
            if biased:
                value += bias[column]
            y[row, column] = value

    return scale_by_norm


@functools.cache
def swiglu(features: int, eps: float, biased: bool):
    """``z = silu(gate) * up``, gate in lanes 0-15 and up in lanes 16-31 of each strip, after a norm of ``features`` numbers.

    y is z, float16 [R, I]; extra: squares, squares_before, bias [2 I, columns as the product's], order int32 [I]: where
    each element of z goes, so that the next linear finds it in the order of its rows.
    """
    inverse = inverse_rms(features, eps)

    @device_function
    def silu_times_up(row, strip, lane, value, y, extra):
        squares, squares_before, bias, order = extra
        value *= inverse(squares, row, lane) / inverse(squares_before, row, lane)
        if biased:
            value += bias[STRIP * strip + lane]
        up = cuda.shfl_down_sync(ALL, value, 16)
        column = 16 * strip + lane
        if lane < 16 and column < y.shape[1]:
            y[row, order[column]] = value / (np.float32(1) + cuda.libdevice.fast_expf(-value)) * up

    return silu_times_up


@functools.cache
def residual(features: int, eps: float, biased: bool):
    """``h += value``, and the input of the norm that follows: see the module.

    y is h, float32 [R, C]; extra: squares_before (of h as it was), bias float32 [C], weight float32 [C] (the norm's), order
    int32 [C] (where each element of x goes), x float16 [R, C], squares [R, strips] (of the new h).
    """
    inverse = inverse_rms(features, eps)

    @device_function
    def add_to_stream(row, strip, lane, value, y, extra):
        squares_before, bias, weight, order, x, squares = extra
        factor = inverse(squares_before, row, lane)
        column = STRIP * strip + lane
        h = np.float32(0)
        if column < y.shape[1]:
            h = y[row, column] + value
            if biased:
                h += bias[column]
            y[row, column] = h
            x[row, order[column]] = h * weight[column] * factor
        total = warp_sum(h * h)
        if lane == 0:
            squares[row, strip] = total

    return add_to_stream
