"""1 to 16 rows of x: one decoded token, or a small batch, at the speed at which the weights can be read (8.0 and up).

A block computes one strip of 32 columns; its warps share out the chunks (128 k) of K and add up their sums at the end, in
shared memory and always in the same order. A lane gets the words of its codes with ``bits`` loads of 16 bytes
(:mod:`.layout`) and its part of x, which all blocks read and the caches hold, straight as mma's B. As in :mod:`.matmul`
the product is computed transposed: W is A, so that 1 to 8 rows of x cost the same, and 9 to 16 one mma more for each.
Codes minus zero points are exact in fp16, sums are float32, and so is the scaling of a group's sum.

What limits it is how many bytes are on their way at once. With few strips, one block of 16 warps fills a multiprocessor and
each warp asks for its next chunk before it multiplies the one in hand; with many, smaller blocks take turns.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.ptx import load_stream_pieces, load_words, mma
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function, scale_floats, table_decoder, table_reader
from tinygptq.kernels.cuda.unpack import levels

RESIDENT = {4: 4, 8: 3, 16: 1}  # warps of a block: blocks that must fit on a multiprocessor at once
PITCH = STRIP + 4  # floats between rows of the sums in shared memory: lanes of a warp fall on different banks
NO_X = (np.uint32(0),) * 4
NO_SUM = (np.float32(0),) * 4


def warps_of(strips: int, row_tiles: int, multiprocessors: int) -> int:
    """Warps in a block: 16 while every multiprocessor has at most one block, else 8, or 4 where registers are short."""
    if strips <= multiprocessors:
        return 16
    return 8 if row_tiles == 1 else 4


@functools.cache
def matvec_kernel(
    bits: int, group_size: int, zero: int | None, row_tiles: int, warps: int, *, ragged: bool, wide_scales: bool = False
):
    """The kernel ``(x, codes, scales, zeros, groups, y)`` that writes ``y = x @ W``.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        row_tiles: 1 for up to 8 rows of x, 2 for up to 16.
        warps: of a block, 4, 8 or 16: :func:`warps_of`.
        ragged: K is no multiple of 128.
        wide_scales: the scales are float32.

    Shapes: x float16 [M, K] with columns in the order of the sorted rows; codes, scales and zeros those of a DeviceLinear,
    flat, as uint32; ``groups`` the second axis of the scales; y float16 or float32 [M, N].
    Grid (strips), block ``32 * warps``.
    """
    # each warp's next chunk is asked for before the one in hand is multiplied, where registers allow it
    ahead = warps == 16 and row_tiles == 1 and bits < 8
    rows = 8 * row_tiles
    partial_size = warps * rows * PITCH
    load_codes = load_stream_pieces(bits)
    fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    fetch_x = _x_reader(ragged)
    multiply_chunk = _chunk_product(bits, group_size, zero, row_tiles, wide_scales)

    @device_function
    def fetch(x, codes, scales, zeros, codes_at, table, low_row, high_row, chunk):
        """All that a lane needs of one chunk."""
        words = load_codes(codes, codes_at + chunk * bits * CHUNK)
        scale, offset = fetch_tables(scales, zeros, table, chunk)
        k = CHUNK * chunk + 8 * (cuda.threadIdx.x & 3)
        low = fetch_x(x, low_row, k)
        high = fetch_x(x, high_row, k) if row_tiles == 2 else low
        return words, scale, offset, low, high

    @cuda.jit(launch_bounds=(32 * warps, RESIDENT[warps]))
    def matvec(x, codes, scales, zeros, groups, y):
        partial = cuda.shared.array(partial_size, np.float32)
        total = cuda.local.array((row_tiles, 8), np.float32)
        lane, warp, strip = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockIdx.x
        chunks = (x.shape[1] + CHUNK - 1) // CHUNK
        codes_at, table = strip * chunks * bits * CHUNK + 4 * lane, strip * groups * STRIP + 4 * (lane >> 2)
        low_row = min(lane >> 2, x.shape[0] - 1) * x.shape[1]  # rows that x has not got are computed and not stored
        high_row = min(8 + (lane >> 2), x.shape[0] - 1) * x.shape[1]
        for j in range(row_tiles):
            for e in range(8):
                total[j, e] = np.float32(0)

        start = min(warp, chunks - 1)
        words, scale, offset, low, high = fetch(x, codes, scales, zeros, codes_at, table, low_row, high_row, start)
        for chunk in range(warp, chunks, warps):
            after = min(chunk + warps, chunks - 1)
            if ahead:
                w, s, o, lo, hi = fetch(x, codes, scales, zeros, codes_at, table, low_row, high_row, after)
                multiply_chunk(total, words, scale, offset, low, high)
                words, scale, offset, low, high = w, s, o, lo, hi
            else:
                multiply_chunk(total, words, scale, offset, low, high)
                if chunk + warps < chunks:
                    words, scale, offset, low, high = fetch(
                        x, codes, scales, zeros, codes_at, table, low_row, high_row, after
                    )

        for j in range(row_tiles):
            for e in range(8):  # columns 4g .. 4g+3 of rows 2t and 2t+1
                row = 8 * j + 2 * (lane & 3) + e % 2
                partial[np.uint32((warp * rows + row) * PITCH + 4 * (lane >> 2) + e // 2)] = total[j, e]
        cuda.syncthreads()
        column = STRIP * strip + lane
        for row in range(warp, x.shape[0], warps):
            result = np.float32(0)
            for w in range(warps):
                result += partial[np.uint32((w * rows + row) * PITCH + lane)]
            if column < y.shape[1]:
                y[row, column] = result

    return matvec


def _x_reader(ragged):
    """Device function: a lane's x of one row and chunk, 8 neighbouring k of each unit; 0 beyond K."""
    load_x = load_words(4)

    @device_function
    def fetch(x, row, k):
        if ragged and k >= x.shape[1]:
            return NO_X
        return load_x(x, row + k)

    @device_function
    def fetch_x(x, row, k):
        return fetch(x, row, k), fetch(x, row, k + 32), fetch(x, row, k + 64), fetch(x, row, k + 96)

    return fetch_x


def _chunk_product(bits, group_size, zero, row_tiles, wide_scales):
    """Device function: add one chunk of W^T x^T to a warp's sums."""
    decode_scales, (_, decode_zeros) = scale_floats(wide_scales), table_decoder(bits, zero, wide_scales)
    unpack_0, unpack_1, unpack_2, unpack_3 = (levels(bits, unit) for unit in range(4))
    one_group = group_size % CHUNK == 0

    @device_function
    def multiply(v, x, p, q):
        """One unit: p holds columns 4g and 4g+1 of eight rows, q columns 4g+2 and 4g+3."""
        p = mma((v[0], v[4], v[1], v[5]), (x[0], x[1]), p)
        q = mma((v[8], v[12], v[9], v[13]), (x[0], x[1]), q)
        p = mma((v[2], v[6], v[3], v[7]), (x[2], x[3]), p)
        q = mma((v[10], v[14], v[11], v[15]), (x[2], x[3]), q)
        return p, q

    @device_function
    def add_scaled(total, j, s, p, q):
        total[j, 0] += s[0] * p[0]
        total[j, 1] += s[0] * p[1]
        total[j, 2] += s[1] * p[2]
        total[j, 3] += s[1] * p[3]
        total[j, 4] += s[2] * q[0]
        total[j, 5] += s[2] * q[1]
        total[j, 6] += s[3] * q[2]
        total[j, 7] += s[3] * q[3]

    @device_function
    def rows_of_one_group(total, j, s, v0, v1, v2, v3, x):
        p, q = multiply(v0, x[0], NO_SUM, NO_SUM)
        p, q = multiply(v1, x[1], p, q)
        p, q = multiply(v2, x[2], p, q)
        p, q = multiply(v3, x[3], p, q)
        add_scaled(total, j, s, p, q)

    @device_function
    def rows_of_one_unit(total, v, scale, low, high):
        s = decode_scales(scale)
        p, q = multiply(v, low, NO_SUM, NO_SUM)
        add_scaled(total, 0, s, p, q)
        if row_tiles == 2:
            p, q = multiply(v, high, NO_SUM, NO_SUM)
            add_scaled(total, 1, s, p, q)

    @device_function
    def multiply_chunk(total, words, scale, offset, low, high):
        lower, upper = decode_zeros(offset[0])
        v0 = unpack_0(words, lower, upper)
        lower, upper = decode_zeros(offset[1])
        v1 = unpack_1(words, lower, upper)
        lower, upper = decode_zeros(offset[2])
        v2 = unpack_2(words, lower, upper)
        lower, upper = decode_zeros(offset[3])
        v3 = unpack_3(words, lower, upper)
        if one_group:
            s = decode_scales(scale[0])
            rows_of_one_group(total, 0, s, v0, v1, v2, v3, low)
            if row_tiles == 2:
                rows_of_one_group(total, 1, s, v0, v1, v2, v3, high)
        else:
            rows_of_one_unit(total, v0, scale[0], low[0], high[0])
            rows_of_one_unit(total, v1, scale[1], low[1], high[1])
            rows_of_one_unit(total, v2, scale[2], low[2], high[2])
            rows_of_one_unit(total, v3, scale[3], low[3], high[3])

    return multiply_chunk
