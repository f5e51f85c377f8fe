"""17 to some 200 rows of x on tensor cores, the weights unpacked in registers (compute capability 8.0 and up).

A block of four warps computes a tile of y: 128 columns by 8 * ``row_tiles`` rows. Each warp owns a strip of 32 columns; the
rows of x are shared by the four and pass through shared memory in *stages* of 64 k, copied asynchronously while earlier
ones are multiplied. The words of a chunk (128 k) go straight from memory to the registers of the lane that needs them
(:mod:`.layout`), one chunk ahead of their use.

The product is computed transposed, y^T = W^T x^T, so that W is mma's A operand, which is the one that arrives in registers
anyway, and eight rows of x are its B::

    unit (32 k)      W: 4 columns of 8 k in each lane  ->  2 tiles of 16 columns x 2 steps of 16 k    (16 registers)
                     x: 8 rows, 16 bytes a lane        ->  1 tile of 8 rows x 2 steps of 16 k         (4 registers)

When the tiles are too few to fill the card, K is divided among *splits*, one block each. A split leaves its float32 sums in
a workspace, waits for the others of its tile, and adds up its share of the rows, always in the same order.
"""

import functools
from dataclasses import dataclass

import numpy as np

from tinygptq.kernels.cuda.fragments import NO_SUMS, add_bits, bits_of, store_row, weight_fragments
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.ptx import (
    copy_async_commit,
    copy_async_or_zero,
    copy_async_wait,
    load_16_bytes,
    load_shared,
    mma,
    store_16_bytes,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.streams import load_stream_pieces
from tinygptq.kernels.cuda.tables import device_function, table_reader

WARPS = 4
THREADS = 32 * WARPS
BLOCK_COLUMNS = STRIP * WARPS
STAGE, STAGES = 64, 4  # k of x in one stage (two units), and how many there is room for
ROWS_AT_ONCE = THREADS // 4  # rows of x of which the block copies 32 k with one instruction
RESIDENT = {4: 3, 8: 3}  # row tiles: blocks that fit on a multiprocessor at once
SPLIT_COST = 1  # what adding up splits takes, in chunks


@functools.cache
def matmul_kernel(
    bits: int, group_size: int, zero: int | None, row_tiles: int, *, wide_scales: bool = False, wide_out: bool = False
):
    """The kernel ``(x, codes, scales, zeros, groups, chunks_each, y, sums, arrived)`` that writes ``y = x @ W``.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        row_tiles: a block computes ``8 * row_tiles`` rows of y: 4 or 8.
        wide_scales, wide_out: the scales, or y, are float32.

    Shapes: x float16 [M, K] with columns in the order of the sorted rows; codes, scales and zeros those of a DeviceLinear,
    flat, as uint32; ``groups`` the second axis of the scales; ``chunks_each`` the chunks of one split; y [M, N]; sums
    float32, flat, of :class:`Plan`'s size; arrived int32 [2 * tiles], zero before and after.
    Grid (column tiles, row tiles, splits), block 128: :func:`plan`.
    """
    rows = 8 * row_tiles
    stage_words = rows * STAGE // 2
    shared_words, pending = STAGES * stage_words, STAGES - 2  # stages that may still be on their way when one is used
    load_codes, copy_stage = load_stream_pieces(bits), _stage_copier(rows)
    fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    multiply_early, multiply_late = (_stage_product(bits, zero, row_tiles, first, wide_scales) for first in (0, 2))

    def fused_matmul(x, codes, scales, zeros, groups, chunks_each, y, sums, arrived):
        shared = cuda.shared.array(shared_words, np.float32)
        total = cuda.local.array((row_tiles, 8), np.float32)
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        chunks = (x.shape[1] + CHUNK - 1) // CHUNK
        strips = (y.shape[1] + STRIP - 1) // STRIP
        strip = min(cuda.blockIdx.x * WARPS + warp, strips - 1)
        first_row = cuda.blockIdx.y * rows
        first = cuda.blockIdx.z * chunks_each
        last = min(first + chunks_each, chunks)  # this block's chunks: first <= chunk < last
        table = strip * groups * STRIP + 4 * (lane // 4)

        for j in range(row_tiles):
            for e in range(8):
                total[j, e] = np.float32(0)
        words = load_codes(codes, (strip * chunks + first) * bits * 128 + 4 * lane)
        scale, offset = fetch_tables(scales, zeros, table, first)
        my_row = first_row + cuda.threadIdx.x // 4
        source, rows_left = np.int64(my_row) * x.shape[1] + 8 * (cuda.threadIdx.x % 4), x.shape[0] - my_row
        k, slot = CHUNK * first, 0
        for stage in range(STAGES - 1):
            copy_stage(shared, stage, x, source, rows_left, k + STAGE * stage)
        for chunk in range(first, last):
            after = min(chunk + 1, last - 1)
            next_words = load_codes(codes, (strip * chunks + after) * bits * 128 + 4 * lane)
            next_scale, next_offset = fetch_tables(scales, zeros, table, after)

            copy_async_wait(pending)
            cuda.syncthreads()  # this stage is there for all, and the slot of the stage before is free
            copy_stage(shared, (slot + STAGES - 1) % STAGES, x, source, rows_left, k + STAGE * (STAGES - 1))
            at = slot * stage_words + 4 * lane
            multiply_early(total, words, scale[0], offset[0], scale[1], offset[1], shared, at)

            copy_async_wait(pending)
            cuda.syncthreads()
            copy_stage(shared, slot, x, source, rows_left, k + STAGE * STAGES)
            at = (slot + 1) * stage_words + 4 * lane
            multiply_late(total, words, scale[2], offset[2], scale[3], offset[3], shared, at)
            k, slot = k + CHUNK, (slot + 2) % STAGES  # slot is 0 or 2
            words, scale, offset = next_words, next_scale, next_offset

        strip = cuda.blockIdx.x * WARPS + warp
        if cuda.gridDim.z == 1:
            _store(total, row_tiles, wide_out, y, first_row, strip, lane)
        else:
            _leave(total, row_tiles, sums, arrived)
            _add_and_store(row_tiles, wide_out, sums, y, first_row, strip, lane)
            _count_out(arrived)

    return Kernel(fused_matmul, (THREADS, RESIDENT[row_tiles]))


def _stage_copier(rows):
    """Device function: start copying a stage of x to its slot; a block's threads copy it together."""
    stage_words = rows * STAGE // 2
    turns = rows // ROWS_AT_ONCE  # of the block's threads, to copy one unit (32 k) of all rows

    @device_function
    def copy_stage(shared, slot, x, source, rows_left, k):
        """Start copying [rows, 64 k] of x, as [2 units][rows][32 k]; what lies beyond x becomes 0.

        ``source`` is where this thread's first 16 bytes of k = 0 are in x, ``rows_left`` how many rows x has from there on.
        """
        for i in range(2 * turns):
            unit, row = i // turns, ROWS_AT_ONCE * (i % turns)
            inside = row < rows_left and k + 32 * unit < x.shape[1]
            to = slot * stage_words + 4 * (cuda.threadIdx.x + THREADS * i)
            copy_async_or_zero(shared, to, x, source + row * x.shape[1] + k + 32 * unit, inside)
        copy_async_commit()

    return copy_stage


def _stage_product(bits, zero, row_tiles, first_unit, wide_scales):
    """Device function: add two units (64 k) of W^T x^T to a warp's sums."""
    unit_words = 16 * 8 * row_tiles
    first_fragments, second_fragments = (weight_fragments(bits, zero, first_unit + i, wide_scales) for i in range(2))

    @device_function
    def multiply(total, weights, shared, at):
        a0, a1, b0, b1 = weights
        for j in range(0, row_tiles, 2):  # two by two, so that four independent products stand between dependent ones
            x0, x1 = load_shared(shared, at + 128 * j), load_shared(shared, at + 128 * (j + 1))  # 8 rows of x each, 32 k
            c0 = mma(a0, (x0[0], x0[1]), (total[j, 0], total[j, 1], total[j, 2], total[j, 3]))
            c1 = mma(a0, (x1[0], x1[1]), (total[j + 1, 0], total[j + 1, 1], total[j + 1, 2], total[j + 1, 3]))
            d0 = mma(b0, (x0[0], x0[1]), (total[j, 4], total[j, 5], total[j, 6], total[j, 7]))
            d1 = mma(b0, (x1[0], x1[1]), (total[j + 1, 4], total[j + 1, 5], total[j + 1, 6], total[j + 1, 7]))
            total[j, 0], total[j, 1], total[j, 2], total[j, 3] = mma(a1, (x0[2], x0[3]), c0)
            total[j + 1, 0], total[j + 1, 1], total[j + 1, 2], total[j + 1, 3] = mma(a1, (x1[2], x1[3]), c1)
            total[j, 4], total[j, 5], total[j, 6], total[j, 7] = mma(b1, (x0[2], x0[3]), d0)
            total[j + 1, 4], total[j + 1, 5], total[j + 1, 6], total[j + 1, 7] = mma(b1, (x1[2], x1[3]), d1)

    @device_function
    def stage_product(total, words, scale, offset, next_scale, next_offset, shared, at):
        multiply(total, first_fragments(words, scale, offset), shared, at)
        multiply(total, second_fragments(words, next_scale, next_offset), shared, at + unit_words)

    return stage_product


@device_function
def _leave(total, row_tiles, sums, arrived):
    """Put this block's sums into the workspace and wait until every split of the tile has."""
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    size = 8 * row_tiles * THREADS
    mine = (tile * cuda.gridDim.z + cuda.blockIdx.z) * size + 4 * cuda.threadIdx.x
    for j in range(row_tiles):
        even = bits_of(total[j, 0], total[j, 1], total[j, 2], total[j, 3])
        odd = bits_of(total[j, 4], total[j, 5], total[j, 6], total[j, 7])
        store_16_bytes(sums, mine + 8 * j * THREADS, even)
        store_16_bytes(sums, mine + (8 * j + 4) * THREADS, odd)
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.atomic.add(arrived, 2 * tile, 1)
        while cuda.atomic.add(arrived, 2 * tile, 0) < cuda.gridDim.z:
            pass
        cuda.threadfence()
    cuda.syncthreads()


@device_function
def _count_out(arrived):
    """The last split of a tile that has seen all the others makes the counters ready for the next product."""
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    if cuda.threadIdx.x == 0 and cuda.atomic.add(arrived, 2 * tile + 1, 1) == cuda.gridDim.z - 1:
        arrived[2 * tile] = 0
        arrived[2 * tile + 1] = 0


@device_function
def _add_and_store(row_tiles, wide, sums, y, first_row, strip, lane):
    """Add up what all splits left, and store it: each block of the tile takes its share of the rows.

    A thread reads what its like in other blocks wrote, in the order of the splits, so that every run gives the same sum.
    """
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    size = 8 * row_tiles * THREADS
    for j in range(cuda.blockIdx.z, row_tiles, cuda.gridDim.z):
        at = tile * cuda.gridDim.z * size + 8 * j * THREADS + 4 * cuda.threadIdx.x
        even, odd = NO_SUMS, NO_SUMS
        for split in range(0, cuda.gridDim.z, 4):  # four at a time, so that one latency is waited for and not four
            last = cuda.gridDim.z - 1
            at_0, at_1 = at + split * size, at + min(split + 1, last) * size
            at_2, at_3 = at + min(split + 2, last) * size, at + min(split + 3, last) * size
            even_0, odd_0 = load_16_bytes(sums, at_0), load_16_bytes(sums, at_0 + 4 * THREADS)
            even_1, odd_1 = load_16_bytes(sums, at_1), load_16_bytes(sums, at_1 + 4 * THREADS)
            even_2, odd_2 = load_16_bytes(sums, at_2), load_16_bytes(sums, at_2 + 4 * THREADS)
            even_3, odd_3 = load_16_bytes(sums, at_3), load_16_bytes(sums, at_3 + 4 * THREADS)
            even, odd = add_bits(even, even_0), add_bits(odd, odd_0)
            if split + 1 <= last:
                even, odd = add_bits(even, even_1), add_bits(odd, odd_1)
            if split + 2 <= last:
                even, odd = add_bits(even, even_2), add_bits(odd, odd_2)
            if split + 3 <= last:
                even, odd = add_bits(even, even_3), add_bits(odd, odd_3)
        row = first_row + 8 * j + 2 * (lane % 4)
        store_row(y, wide, row, strip, lane, even[0], even[2], odd[0], odd[2])
        store_row(y, wide, row + 1, strip, lane, even[1], even[3], odd[1], odd[3])


@device_function
def _store(total, row_tiles, wide, y, first_row, strip, lane):
    """A warp's sums to y: lane 4g + t holds columns 4g .. 4g+3 of rows 8j + 2t and 8j + 2t + 1."""
    for j in range(row_tiles):
        row = first_row + 8 * j + 2 * (lane % 4)
        store_row(y, wide, row, strip, lane, total[j, 0], total[j, 2], total[j, 4], total[j, 6])
        store_row(y, wide, row + 1, strip, lane, total[j, 1], total[j, 3], total[j, 5], total[j, 7])


@dataclass(frozen=True)
class Plan:
    """How a product is divided: the kernel's ``row_tiles``, its grid (columns, rows, splits), and the chunks of a split."""

    row_tiles: int
    grid: tuple[int, int, int]
    chunks_each: int

    @property
    def tiles(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sums(self) -> int:
        """Float32 numbers that the splits leave for each other."""
        return self.tiles * self.grid[2] * self.row_tiles * 8 * THREADS if self.grid[2] > 1 else 1


@functools.lru_cache(maxsize=4096)
def plan(rows: int, columns: int, inner: int, multiprocessors: int) -> Plan:
    """Tiles of y, and K divided so that the busiest multiprocessor is done first.

    Blocks of one multiprocessor share its tensor cores, but one alone leaves a quarter of them idle, waiting. As the splits
    of a tile wait for each other, all blocks must fit on the card at once when there is more than one.
    """
    row_tiles = 4 if rows <= 32 else 8
    row_blocks, column_blocks = -(-rows // (8 * row_tiles)), -(-columns // BLOCK_COLUMNS)
    chunks, tiles = -(-inner // CHUNK), row_blocks * column_blocks

    def cost(chunks_each: int) -> float:
        splits = -(-chunks // chunks_each)
        return max(-(-tiles * splits // multiprocessors), 1.3) * chunks_each + SPLIT_COST * (splits > 1)

    def fits(chunks_each: int) -> bool:
        splits = -(-chunks // chunks_each)
        return splits == 1 or tiles * splits <= RESIDENT[row_tiles] * multiprocessors

    chunks_each = min(filter(fits, range(1, chunks + 1)), key=cost)
    return Plan(row_tiles, (column_blocks, row_blocks, -(-chunks // chunks_each)), chunks_each)
