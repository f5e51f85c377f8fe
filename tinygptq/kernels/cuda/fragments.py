"""What a warp's lanes hold of y^T = W^T x^T: weights as the tensor cores' A (fragments: :mod:`.ptx`), and sums to store.

Lane 4g + t has columns 4g .. 4g+3 of the warp's strip of 32.
"""

import numpy as np

from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.ptx import (
    bits_from_float,
    float_from_bits,
    half2_from_floats,
    mul_half2,
    store_8_bytes,
    store_16_bytes,
)
from tinygptq.kernels.cuda.tables import device_function, table_decoder
from tinygptq.kernels.cuda.unpack import levels

NO_SUMS = (np.float32(0),) * 4


def weight_fragments(bits, zero, unit, wide_scales):
    """Device function ``(words, scale, offset)``: a unit (32 k) of a lane's columns as four of A.

    The first two are columns 4g and 4g+1, the others 4g+2 and 4g+3, one after the other for two steps of 16 k. In each, the
    first and third half2 are pairs of the first column, the second and fourth of the second.
    """
    decode_scales, decode_zeros = table_decoder(bits, zero, wide_scales)
    unpack = levels(bits, unit)

    @device_function
    def scaled(a, b, c, d, scale, next_scale):
        return mul_half2(a, scale), mul_half2(b, next_scale), mul_half2(c, scale), mul_half2(d, next_scale)

    @device_function
    def fragments(words, scale, offset):
        v, s = unpack(words, decode_zeros(offset)), decode_scales(scale)
        return (
            scaled(v[0], v[4], v[1], v[5], s[0], s[1]),
            scaled(v[2], v[6], v[3], v[7], s[0], s[1]),
            scaled(v[8], v[12], v[9], v[13], s[2], s[3]),
            scaled(v[10], v[14], v[11], v[15], s[2], s[3]),
        )

    return fragments


@device_function
def store_row(y, wide, row, strip, lane, a, b, c, d):
    """A lane's four columns of one row of y, float32 (``wide``) or float16; nothing beyond y."""
    column = STRIP * strip + 4 * (lane // 4)
    if row < y.shape[0] and column < y.shape[1]:  # N is a multiple of 8
        store_four(y, np.int64(row) * y.shape[1] + column, wide, a, b, c, d)


@device_function
def store_four(y, index, wide, a, b, c, d):
    """Four neighbouring numbers of y."""
    if wide:
        store_16_bytes(y, index, bits_of(a, b, c, d))
    else:
        store_8_bytes(y, index, (half2_from_floats(a, b), half2_from_floats(c, d)))


@device_function
def bits_of(a, b, c, d):
    """Four float32 as words."""
    return bits_from_float(a), bits_from_float(b), bits_from_float(c), bits_from_float(d)


@device_function
def add_bits(a, b):
    """Four float32 a, and four more as words."""
    return (a[0] + float_from_bits(b[0]), a[1] + float_from_bits(b[1]),
            a[2] + float_from_bits(b[2]), a[3] + float_from_bits(b[3]))  # fmt: skip
