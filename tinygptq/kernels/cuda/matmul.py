"""17 to some 200 rows of x on tensor cores, the weights unpacked in registers (compute capability 8.0 and up).

A *team* of four warps computes a tile of y: 128 columns by 8 * ``row_tiles`` rows. Each warp owns a strip of 32 columns; the
rows of x are shared by the four and pass through shared memory in *stages* of 64 k, copied asynchronously while earlier
ones are multiplied. The words of a chunk (128 k) go straight from memory to the registers of the lane that needs them
(:mod:`.layout`): those of the next chunk are asked for as soon as the last ones in their registers are unpacked.

The product is computed transposed, y^T = W^T x^T, so that W is mma's A operand, which is the one that arrives in registers
anyway, and eight rows of x are its B::

    unit (32 k)      W: 4 columns of 8 k in each lane  ->  2 tiles of 16 columns x 2 steps of 16 k    (16 registers)
                     x: 8 rows, 16 bytes a lane        ->  1 tile of 8 rows x 2 steps of 16 k         (4 registers)

When the tiles are too few to fill the card, K is divided among *splits*, one block each. A split leaves its float32 sums in
a workspace, waits for the others of its tile, and adds up its share of the rows, always in the same order. A block may have
two teams, which share out its part of K and add up their sums in shared memory first.
"""

import functools
from dataclasses import dataclass

import numpy as np

from tinygptq.kernels.cuda.fragments import NO_SUMS, add_bits, bits_of, store_row, weight_fragments
from tinygptq.kernels.cuda.intrinsics import arrive, load_acquire
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.layout import finished_words
from tinygptq.kernels.cuda.ptx import (
    copy_async_commit,
    copy_async_or_zero,
    copy_async_wait,
    load_16_bytes,
    load_shared,
    mma,
    store_16_bytes,
    sync_team,
)
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.streams import load_stream_pieces, reload_stream_pieces
from tinygptq.kernels.cuda.tables import device_function, table_reader

WARPS = 4
THREADS = 32 * WARPS
BLOCK_COLUMNS = STRIP * WARPS
STAGE = 64  # k of x in one stage (two units)
STAGES = 4  # that a team has room for
ROWS_AT_ONCE = THREADS // 4  # rows of x of which a team copies 32 k with one instruction
RESIDENT = 3  # blocks of one team that fit on a multiprocessor at once
SPLIT_COST = 1  # what adding up splits takes, in chunks


@functools.cache
def matmul_kernel(
    bits: int,
    group_size: int,
    zero: int | None,
    row_tiles: int,
    teams: int = 1,
    *,
    wide_scales: bool = False,
    wide_out: bool = False,
):
    """The kernel ``(codes, scales, inner, chunks_each, x, zeros, y, sums, arrived)`` that writes ``y = x @ W``.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        row_tiles: a block computes ``8 * row_tiles`` rows of y: 4 or 8.
        teams: of four warps in a block, 1 or 2, which share out its chunks of K.
        wide_scales, wide_out: the scales, or y, are float32.

    Of codes, scales and zeros (those of a DeviceLinear), of x, float16 [M, K] with columns in the order of the sorted rows,
    and of sums, float32 of :class:`Plan`'s size, the kernel has the addresses; ``inner`` is K, ``chunks_each`` the
    chunks of one team, of which none may have nothing; y [M, N]; arrived int32 [2 * tiles], zero before and after.
    Grid (column tiles, row tiles, splits), block ``128 * teams``, ``shared_bytes`` of dynamic shared memory: :func:`plan`.
    """
    add_chunks = _chunks_product(bits, group_size, zero, row_tiles, teams, wide_scales)
    stages_words = _stages_words(row_tiles)
    static_words = stages_words if teams == 1 else 0  # two teams' stages are more than static memory may be

    def fused_matmul(codes, scales, inner, chunks_each, x, zeros, y, sums, arrived):
        shared = cuda.shared.array(static_words, np.float32)
        total = cuda.local.array((row_tiles, 8), np.float32)
        team = np.int32(cuda.threadIdx.x >> 7 if teams > 1 else 0)
        for j in range(row_tiles):
            for e in range(8):
                total[j, e] = np.float32(0)
        weights, numbers = (codes, scales, zeros), (np.int32(inner), np.int32(chunks_each))
        add_chunks(total, shared, weights, x, y.shape, numbers, team)
        if teams > 1:
            _join_teams(total, row_tiles, shared, stages_words, team)
        lane, strip = cuda.threadIdx.x % 32, cuda.blockIdx.x * WARPS + cuda.threadIdx.x // 32 % WARPS
        first_row = cuda.blockIdx.y * 8 * row_tiles
        if cuda.gridDim.z > 1:
            if team == 0:
                _leave(total, row_tiles, sums)
            _wait_for_splits(arrived)
            _add_and_store(row_tiles, wide_out, sums, y, first_row, strip, lane, teams, team)
            _count_out(arrived)
        elif team == 0:
            _store(total, row_tiles, wide_out, y, first_row, strip, lane)

    return Kernel(fused_matmul, (THREADS * teams, RESIDENT if teams == 1 else 1))


def _stages_words(row_tiles):
    """32-bit words of a team's stages of x."""
    return STAGES * 8 * row_tiles * STAGE // 2


def _chunks_product(bits, group_size, zero, row_tiles, teams, wide_scales):
    """Device function: a team's chunks of W^T x^T, added to its warps' sums."""
    rows, chunk_words = 8 * row_tiles, bits * CHUNK
    stage_words = _stages_words(row_tiles) // STAGES
    pending = STAGES - 2  # stages that may still be on their way when one is used
    load_codes, copy_stage = load_stream_pieces(bits), _stage_copier(rows)
    locate, fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    first, second, third, fourth = (_unit_product(bits, zero, row_tiles, unit, wide_scales) for unit in range(4))
    unit_words = stage_words // 2

    @device_function
    def ready(team):
        """A stage is there for the whole team, and the slot of the stage before is free."""
        copy_async_wait(pending)
        if teams == 1:
            cuda.syncthreads()
        else:
            sync_team(team + 1, THREADS)

    @device_function
    def add_chunks(total, shared, weights, x, shape, numbers, team):
        (codes, scales, zeros), (inner, chunks_each) = weights, numbers
        thread = np.int32(cuda.threadIdx.x & THREADS - 1)
        lane = np.int32(thread & 31)
        chunks, strips = np.int32(inner + CHUNK - 1 >> 7), np.int32(shape[1] + STRIP - 1 >> 5)
        strip = min(np.int32(cuda.blockIdx.x * WARPS + (thread >> 5)), np.int32(strips - 1))
        chunk = np.int32(np.int32(cuda.blockIdx.z * teams + team) * chunks_each)
        last = np.int32(min(np.int32(chunk + chunks_each), chunks) - 1)  # of this team's chunks
        codes_at, pitch = np.int32(strip * chunk_words + 4 * lane), np.int32(strips * chunk_words)
        table = locate(strip, strips, lane)
        words = load_codes(codes, np.int32(codes_at + chunk * pitch))
        scale, offset = fetch_tables(scales, zeros, table, chunk)

        row = np.int32(cuda.blockIdx.y * rows + (thread >> 2))
        source, rows_left = np.int32(row * (inner >> 1) + 4 * (thread & 3)), np.int32(shape[0] - row)
        k, slot, base = np.int32(CHUNK * chunk), np.int32(0), np.int32(team * STAGES * stage_words)
        for stage in range(STAGES - 1):
            copy_stage(shared, base + stage * stage_words, x, source, rows_left, inner, np.int32(k + STAGE * stage))
        while True:  # for one chunk at least: the first loads would be put off until it is known that there is one
            following = min(np.int32(chunk + 1), last)
            after = np.int32(codes_at + following * pitch)
            next_scale, next_offset = fetch_tables(scales, zeros, table, following)
            ready(team)
            free = np.int32(base + (slot ^ 2 | 1) * stage_words)
            copy_stage(shared, free, x, source, rows_left, inner, np.int32(k + STAGE * (STAGES - 1)))
            at = np.int32(base + slot * stage_words + 4 * lane)
            words = first(total, words, scale[0], offset[0], codes, after, shared, at)
            words = second(total, words, scale[1], offset[1], codes, after, shared, at + unit_words)

            ready(team)
            free = np.int32(base + slot * stage_words)
            copy_stage(shared, free, x, source, rows_left, inner, np.int32(k + STAGE * STAGES))
            words = third(total, words, scale[2], offset[2], codes, after, shared, at + 2 * unit_words)
            words = fourth(total, words, scale[3], offset[3], codes, after, shared, at + 3 * unit_words)
            k, slot, chunk = np.int32(k + CHUNK), np.int32(slot ^ 2), np.int32(chunk + 1)
            scale, offset = next_scale, next_offset
            if chunk > last:
                break

    return add_chunks


def _stage_copier(rows):
    """Device function: start copying a stage of x to its slot; a team's threads copy it together."""
    turns = rows // ROWS_AT_ONCE  # of the team's threads, to copy one unit (32 k) of all rows

    @device_function
    def copy_stage(shared, to, x, source, rows_left, inner, k):
        """Start copying [rows, 64 k] of x to a place in words, as [2 units][rows][32 k]; what lies beyond x becomes 0.

        ``source`` is the word of x where this thread's first 16 bytes of k = 0 are, ``rows_left`` how many rows x has from
        there on.
        """
        mine = np.int32(to + 4 * (cuda.threadIdx.x & THREADS - 1))
        for i in range(2 * turns):
            unit, row = i // turns, ROWS_AT_ONCE * (i % turns)
            inside = row < rows_left and k < np.int32(inner - 32 * unit)
            from_word = np.int32(source + row * (inner >> 1) + (k >> 1) + 16 * unit)
            copy_async_or_zero(shared, mine + 4 * THREADS * i, x, from_word, inside)
        copy_async_commit()

    return copy_stage


def _unit_product(bits, zero, row_tiles, unit, wide_scales):
    """Device function: add a unit (32 k) of W^T x^T to a warp's sums; returns the words, the finished ones being the next
    chunk's."""
    fragments = weight_fragments(bits, zero, unit, wide_scales)
    reload_finished = reload_stream_pieces(bits, finished_words(bits, unit))

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
    def unit_product(total, words, scale, offset, codes, after, shared, at):
        weights = fragments(words, scale, offset)
        words = reload_finished(words, codes, after)
        multiply(total, weights, shared, at)
        return words

    return unit_product


@device_function
def _join_teams(total, row_tiles, shared, stages_words, team):
    """The first team's sums become those of both; the second team's pass through the memory where its stages of x were."""
    mine = stages_words + cuda.threadIdx.x % THREADS
    if team == 1:
        copy_async_wait(0)
        sync_team(2, THREADS)  # all of the team have read their last stage, and nothing more arrives in its memory
        for j in range(row_tiles):
            for e in range(8):
                shared[mine + (8 * j + e) * THREADS] = total[j, e]
    cuda.syncthreads()
    if team == 0:
        for j in range(row_tiles):
            for e in range(8):
                total[j, e] += shared[mine + (8 * j + e) * THREADS]


@device_function
def _leave(total, row_tiles, sums):
    """Put a block's sums into the workspace."""
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    size = 8 * row_tiles * THREADS
    mine = (tile * cuda.gridDim.z + cuda.blockIdx.z) * size + 4 * cuda.threadIdx.x
    for j in range(row_tiles):
        even = bits_of(total[j, 0], total[j, 1], total[j, 2], total[j, 3])
        odd = bits_of(total[j, 4], total[j, 5], total[j, 6], total[j, 7])
        store_16_bytes(sums, mine + 8 * j * THREADS, even)
        store_16_bytes(sums, mine + (8 * j + 4) * THREADS, odd)


@device_function
def _wait_for_splits(arrived):
    """Until every split of the tile has left its sums."""
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        arrive(arrived, 2 * tile)
        while load_acquire(arrived, 2 * tile) < cuda.gridDim.z:
            pass
    cuda.syncthreads()


@device_function
def _count_out(arrived):
    """The last split of a tile that has seen all the others makes the counters ready for the next product."""
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    if cuda.threadIdx.x == 0 and arrive(arrived, 2 * tile + 1) == cuda.gridDim.z - 1:
        arrived[2 * tile] = 0
        arrived[2 * tile + 1] = 0


@device_function
def _add_and_store(row_tiles, wide, sums, y, first_row, strip, lane, teams, team):
    """Add up what all splits left, and store it: each team of each block of the tile takes its share of the rows.

    A thread reads what its like in other blocks wrote, in the order of the splits, so that every run gives the same sum.
    """
    tile = cuda.blockIdx.y * cuda.gridDim.x + cuda.blockIdx.x
    size = 8 * row_tiles * THREADS
    for j in range(cuda.blockIdx.z * teams + team, row_tiles, cuda.gridDim.z * teams):
        at = tile * cuda.gridDim.z * size + 8 * j * THREADS + 4 * (cuda.threadIdx.x % THREADS)
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
    """How a product is divided: the kernel's ``row_tiles`` and ``teams``, its grid (columns, rows, splits), and the chunks
    of one team."""

    row_tiles: int
    grid: tuple[int, int, int]
    chunks_each: int
    teams: int = 1

    @property
    def tiles(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sums(self) -> int:
        """Float32 numbers that the splits leave for each other."""
        return self.tiles * self.grid[2] * self.row_tiles * 8 * THREADS if self.grid[2] > 1 else 1

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 4 * self.teams * _stages_words(self.row_tiles) if self.teams > 1 else 0


@functools.lru_cache(maxsize=4096)
def plan(rows: int, columns: int, inner: int, multiprocessors: int) -> Plan:
    """Tiles of y, and K divided so that the busiest multiprocessor is done first.

    Blocks of one multiprocessor share its tensor cores, but one alone leaves a quarter of them idle, waiting. As the splits
    of a tile wait for each other, all blocks must fit on the card at once when there is more than one. Two splits that
    would share a multiprocessor with no third are the two teams of one block: less has to pass through the L2.
    """
    row_tiles = 4 if rows <= 32 else 8
    row_blocks, column_blocks = -(-rows // (8 * row_tiles)), -(-columns // BLOCK_COLUMNS)
    chunks, tiles = -(-inner // CHUNK), row_blocks * column_blocks

    def cost(chunks_each: int) -> float:
        splits = -(-chunks // chunks_each)
        return max(-(-tiles * splits // multiprocessors), 1.3) * chunks_each + SPLIT_COST * (splits > 1)

    def fits(chunks_each: int) -> bool:
        splits = -(-chunks // chunks_each)
        return splits == 1 or tiles * splits <= RESIDENT * multiprocessors

    chunks_each = min(filter(fits, range(1, chunks + 1)), key=cost)
    splits = -(-chunks // chunks_each)
    teams = 2 if splits % 2 == 0 and tiles * splits <= 2 * multiprocessors else 1
    return Plan(row_tiles, (column_blocks, row_blocks, splits // teams), chunks_each, teams)
