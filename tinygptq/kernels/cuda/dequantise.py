"""A packed linear back to fp16, at the speed of a copy: what a large product multiplies with.

One warp turns one chunk (128 k by 32 columns) around: it reads ``bits`` * 512 bytes and writes 8192. W comes out
transposed, [N, K], which is the form dense products like best, and each lane already holds 8 neighbouring k of a column: 16
bytes, written as they are.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.ptx import load_stream_pieces, mul_half2, store_16_bytes
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function, table_decoder, table_reader
from tinygptq.kernels.cuda.unpack import levels

WARPS = 4  # of a block, each with a chunk of its own


@functools.cache
def dequantise_kernel(bits: int, group_size: int, zero: int | None, wide_scales: bool = False):
    """The kernel ``(codes, scales, zeros, groups, first_strip, out)`` that writes W^T of some strips.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        wide_scales: the scales are float32.

    Shapes: codes, scales and zeros those of a DeviceLinear, flat, as uint32; ``groups`` the second axis of the scales; out
    float16 [columns, K], column 0 being the first of ``first_strip``. ``scale * (code - zero)`` is rounded once.
    Grid (ceil(chunks / 4), strips), block 128.
    """
    load_codes = load_stream_pieces(bits)
    fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    decode_scales, decode_zeros = table_decoder(bits, zero, wide_scales)
    unpack_0, unpack_1, unpack_2, unpack_3 = (levels(bits, unit) for unit in range(4))

    @device_function
    def store_column(out, column, k, a, b, c, d, scale):
        if column < out.shape[0]:
            values = mul_half2(a, scale), mul_half2(b, scale), mul_half2(c, scale), mul_half2(d, scale)
            store_16_bytes(out, np.int64(column) * out.shape[1] + k, values)

    @device_function
    def store_unit(out, column, k, v, scales):
        s = decode_scales(scales)
        if k < out.shape[1]:
            store_column(out, column, k, v[0], v[1], v[2], v[3], s[0])
            store_column(out, column + 1, k, v[4], v[5], v[6], v[7], s[1])
            store_column(out, column + 2, k, v[8], v[9], v[10], v[11], s[2])
            store_column(out, column + 3, k, v[12], v[13], v[14], v[15], s[3])

    def dequantise(codes, scales, zeros, groups, first_strip, out):
        lane = cuda.threadIdx.x % 32
        chunk = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
        chunks = (out.shape[1] + CHUNK - 1) // CHUNK
        strip = first_strip + cuda.blockIdx.y
        if chunk < chunks:
            words = load_codes(codes, (strip * chunks + chunk) * bits * 128 + 4 * lane)
            scale, offset = fetch_tables(scales, zeros, (strip * groups) * STRIP + 4 * (lane // 4), chunk)
            column, k = STRIP * cuda.blockIdx.y + 4 * (lane // 4), CHUNK * chunk + 8 * (lane % 4)
            low, up = decode_zeros(offset[0])
            store_unit(out, column, k, unpack_0(words, low, up), scale[0])
            low, up = decode_zeros(offset[1])
            store_unit(out, column, k + 32, unpack_1(words, low, up), scale[1])
            low, up = decode_zeros(offset[2])
            store_unit(out, column, k + 64, unpack_2(words, low, up), scale[2])
            low, up = decode_zeros(offset[3])
            store_unit(out, column, k + 96, unpack_3(words, low, up), scale[3])

    return Kernel(dequantise)


def grid_of(in_features: int, columns: int) -> tuple[tuple[int, int], int]:
    """(grid, block) of :func:`dequantise_kernel` for that many columns."""
    chunks = -(-in_features // CHUNK)
    return (-(-chunks // WARPS), -(-columns // STRIP)), 32 * WARPS
