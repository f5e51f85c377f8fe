"""Scales and zero points of a lane's four columns: read as they lie in memory, decoded when they are needed."""

import numpy as np

from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.layout import groups_together
from tinygptq.kernels.cuda.ptx import (
    and_or,
    float_from_bits,
    half2_from_floats,
    half2_to_floats,
    load_words,
    pick_bytes,
    sub_half2,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.unpack import base, constant_offsets, half2, places


def device_function(function):
    """A device function that becomes part of each kernel that calls it."""
    return cuda.jit(device=True, inline="always")(function)


def tuple_of(make, count: int):
    """Device function ``(a, b, c)`` that gives these to ``count`` device functions, ``make(0)``, ``make(1)`` ...

    It returns what they return: a tuple, whose length Numba has to know and could not in a loop.
    """
    several, before, last = count > 1, tuple_of(make, count - 1) if count > 1 else None, make(count - 1)

    @device_function
    def call(a, b, c):
        if several:
            return before(a, b, c) + (last(a, b, c),)  # noqa: RUF005 (Numba has no * in a tuple)
        return (last(a, b, c),)

    return call


def table_reader(bits, group_size, read_zeros, wide_scales):
    """Device functions: where scales and zeros of a lane's four columns are, and what is there.

    ``locate(strip, strips, lane)`` -> (index of those of group 0, how far the next ones are).
    ``fetch(scales, zeros, place, chunk)`` -> those of the chunk, as they are in memory; once for each unit.
    """
    load_scales, load_zeros = load_words(4 if wide_scales else 2), load_words(2 if bits == 8 else 1)
    scale_shift, zero_shift = 0 if wide_scales else 1, 1 if bits == 8 else 2  # numbers in a word, as a power of 2
    together = groups_together(group_size)
    one_group, whole_groups = group_size % CHUNK == 0, CHUNK % group_size == 0  # in a chunk

    @device_function
    def locate(strip, strips, lane):
        return np.int32(STRIP * together * strip + 4 * (lane >> 2)), np.int32(STRIP * together * strips)

    @device_function
    def fetch_unit(scales, zeros, place, chunk, unit):
        if whole_groups:  # a step that is known, so that it becomes part of the load
            first, step = np.int32(place[0] + place[1] * chunk), STRIP * (32 * unit // group_size)
        else:
            group = np.int32(np.uint32(CHUNK * chunk + 32 * unit) // np.uint32(group_size))
            first, step = np.int32(place[0] + place[1] * group), 0
        scale = load_scales(scales, np.int64(first >> scale_shift) + (step >> scale_shift))
        if read_zeros:
            return scale, load_zeros(zeros, np.int64(first >> zero_shift) + (step >> zero_shift))
        return scale, (np.uint32(0),)

    @device_function
    def fetch(scales, zeros, place, chunk):
        s0, z0 = fetch_unit(scales, zeros, place, chunk, 0)
        if one_group:
            return (s0, s0, s0, s0), (z0, z0, z0, z0)
        s1, z1 = fetch_unit(scales, zeros, place, chunk, 1)
        s2, z2 = fetch_unit(scales, zeros, place, chunk, 2)
        s3, z3 = fetch_unit(scales, zeros, place, chunk, 3)
        return (s0, s1, s2, s3), (z0, z1, z2, z3)

    return locate, fetch


def table_decoder(bits, zero, wide_scales):
    """Device functions that make four half2 of scales, and of zero points the offsets that ``unpack.levels`` takes."""
    constants = tuple((np.uint32(value),) * 4 for value in constant_offsets(bits, zero or 0))
    first, second, third = (np.uint32(half2(1024 - base(bits, place))) for place in (1, 2, 3))
    under_1024, of_window = np.uint32(0x64006400), places(bits)

    @device_function
    def less(number, low):
        return (sub_half2(number, low[0]), sub_half2(number, low[1]), sub_half2(number, low[2]), sub_half2(number, low[3]))

    @device_function
    def decode_scales(s):
        if wide_scales:
            a, b, c, d = float_from_bits(s[0]), float_from_bits(s[1]), float_from_bits(s[2]), float_from_bits(s[3])
            return half2_from_floats(a, a), half2_from_floats(b, b), half2_from_floats(c, c), half2_from_floats(d, d)
        return (pick_bytes(s[0], 0, 0x1010), pick_bytes(s[0], 0, 0x3232),
                pick_bytes(s[1], 0, 0x1010), pick_bytes(s[1], 0, 0x3232))  # fmt: skip

    @device_function
    def decode_zeros(z):
        if zero is not None:
            return constants
        if bits == 8:  # 16 bits each, up to 256
            low = (and_or(pick_bytes(z[0], 0, 0x1010), 0x01FF01FF, under_1024),
                   and_or(pick_bytes(z[0], 0, 0x3232), 0x01FF01FF, under_1024),
                   and_or(pick_bytes(z[1], 0, 0x1010), 0x01FF01FF, under_1024),
                   and_or(pick_bytes(z[1], 0, 0x3232), 0x01FF01FF, under_1024))  # fmt: skip
            return (low,)
        low = (pick_bytes(z[0], 0x64, 0x4040), pick_bytes(z[0], 0x64, 0x4141),
               pick_bytes(z[0], 0x64, 0x4242), pick_bytes(z[0], 0x64, 0x4343))  # fmt: skip
        if of_window == 2:
            return low, less(first, low)
        if of_window == 3:
            return low, less(first, low), less(second, low)
        return low, less(first, low), less(second, low), less(third, low)

    return decode_scales, decode_zeros


def scale_floats(wide_scales):
    """Device function that makes four float32 of scales as they are in memory."""

    @device_function
    def decode(s):
        if wide_scales:
            return float_from_bits(s[0]), float_from_bits(s[1]), float_from_bits(s[2]), float_from_bits(s[3])
        low, high = half2_to_floats(s[0]), half2_to_floats(s[1])
        return low[0], low[1], high[0], high[1]

    return decode


def zero_floats(bits, zero, unit):
    """Device function that makes four float32, in units of ``unit`` (a power of 2), of zero points as they are in memory.

    The bytes of 2^23 + z are 4B, 0, 0 and z (or 4B, 0 and two of z).
    """
    constant, base, exponent = (np.float32((zero or 0) * unit),) * 4, np.float32(2**23 * unit), np.uint32(0x4B000000)
    factor = np.float32(unit)

    @device_function
    def number(word, selector):
        return float_from_bits(pick_bytes(word, exponent, selector)) * factor - base

    @device_function
    def decode(z):
        if zero is not None:
            return constant
        if bits == 8:
            return number(z[0], 0x7410), number(z[0], 0x7432), number(z[1], 0x7410), number(z[1], 0x7432)
        return number(z[0], 0x7440), number(z[0], 0x7441), number(z[0], 0x7442), number(z[0], 0x7443)

    return decode
