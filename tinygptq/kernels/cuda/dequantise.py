"""A packed linear back to fp16, at the speed of a copy: what a large product multiplies with.

One warp turns one chunk (128 k by 32 columns) around: it reads ``bits`` * 512 bytes and writes 8192. W comes out
transposed, [N, K], which is the form dense products like best, and each lane already holds 8 neighbouring k of a column: 16
bytes, written as they are, column after column, so that the 256 bytes of one are written in one go.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.ptx import mul_half2, store_16_bytes
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.streams import load_stream_pieces
from tinygptq.kernels.cuda.tables import device_function, table_decoder, table_reader
from tinygptq.kernels.cuda.unpack import levels

WARPS = 4  # of a block, each with a chunk of its own


@functools.cache
def dequantise_kernel(bits: int, group_size: int, zero: int | None, wide_scales: bool = False):
    """The kernel ``(codes, scales, zeros, strips, first_strip, first_chunk, out)`` that writes a part of W^T.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        wide_scales: the scales are float32.

    Of codes, scales and zeros (those of a DeviceLinear, of so many ``strips``) the kernel has the addresses; out float16
    [columns, k], column 0 being the first of ``first_strip``, k = 0 the first of ``first_chunk``. ``scale * (code - zero)``
    is rounded once.
    Grid (ceil(chunks / 4), strips), block 128.
    """
    load_codes = load_stream_pieces(bits)
    locate, fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    decode_scales, decode_zeros = table_decoder(bits, zero, wide_scales)
    unpack_0, unpack_1, unpack_2, unpack_3 = (levels(bits, unit) for unit in range(4))

    @device_function
    def store_piece(out, column, k, v, scale):
        if column < out.shape[0] and k < out.shape[1]:
            values = mul_half2(v[0], scale), mul_half2(v[1], scale), mul_half2(v[2], scale), mul_half2(v[3], scale)
            store_16_bytes(out, np.int64(column) * out.shape[1] + k, values)

    @device_function
    def store_column(out, column, k, v, scale):
        store_piece(out, column, k, v[0], scale[0])
        store_piece(out, column, k + 32, v[1], scale[1])
        store_piece(out, column, k + 64, v[2], scale[2])
        store_piece(out, column, k + 96, v[3], scale[3])

    def dequantise(codes, scales, zeros, strips, first_strip, first_chunk, out):
        lane = cuda.threadIdx.x % 32
        chunk = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32
        strip = first_strip + cuda.blockIdx.y
        if CHUNK * chunk < out.shape[1]:
            words = load_codes(codes, ((first_chunk + chunk) * strips + strip) * bits * 128 + 4 * lane)
            scale, offset = fetch_tables(scales, zeros, locate(strip, strips, lane), first_chunk + chunk)
            column, k = STRIP * cuda.blockIdx.y + 4 * (lane // 4), CHUNK * chunk + 8 * (lane % 4)
            a, s = unpack_0(words, decode_zeros(offset[0])), decode_scales(scale[0])
            b, t = unpack_1(words, decode_zeros(offset[1])), decode_scales(scale[1])
            c, u = unpack_2(words, decode_zeros(offset[2])), decode_scales(scale[2])
            d, v = unpack_3(words, decode_zeros(offset[3])), decode_scales(scale[3])
            store_column(out, column, k, (a[:4], b[:4], c[:4], d[:4]), (s[0], t[0], u[0], v[0]))
            store_column(out, column + 1, k, (a[4:8], b[4:8], c[4:8], d[4:8]), (s[1], t[1], u[1], v[1]))
            store_column(out, column + 2, k, (a[8:12], b[8:12], c[8:12], d[8:12]), (s[2], t[2], u[2], v[2]))
            store_column(out, column + 3, k, (a[12:], b[12:], c[12:], d[12:]), (s[3], t[3], u[3], v[3]))

    return Kernel(dequantise)


def grid_of(in_features: int, columns: int) -> tuple[tuple[int, int], int]:
    """(grid, block) of :func:`dequantise_kernel` for that many columns."""
    chunks = -(-in_features // CHUNK)
    return (-(-chunks // WARPS), -(-columns // STRIP)), 32 * WARPS
