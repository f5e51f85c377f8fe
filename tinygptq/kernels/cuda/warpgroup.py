"""Many rows of x on Hopper's tensor cores, the weights unpacked in registers (compute capability 9.0).

Four warps, a *warpgroup*, compute a tile of y: 128 columns by TOKENS rows of x. As in :mod:`.matmul` the product is computed
transposed, W is the operand in registers, and each warp has a strip of 32 columns whose words it reads itself. But here the
tensor cores read x in shared memory and work while the warps unpack what comes next; two such blocks on a multiprocessor
leave them hardly idle.

x is written anew first (:func:`tile_kernel`), as the very bytes that are wanted in shared memory: tiles of TOKENS rows and
32 k, swizzled, with k in the order in which a lane's words hold them. Then a *stage* of 64 k comes with one bulk copy, which
one thread asks for; a barrier in shared memory tells when it is there, another when all four warps are done with its slot.
"""

import functools

import numpy as np

from tinygptq.kernels.cuda import hopper
from tinygptq.kernels.cuda.fragments import NO_SUMS, add_bits, store_four, store_row, weight_fragments
from tinygptq.kernels.cuda.hopper import SUMS
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.ptx import load_16_bytes, load_words, store_16_bytes
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import wait_for_dependencies
from tinygptq.kernels.cuda.streams import load_stream_pieces
from tinygptq.kernels.cuda.tables import device_function, table_reader

WARPS = 4
THREADS = 32 * WARPS
TOKENS = hopper.COLUMNS  # rows of x in a tile
UNIT_WORDS = 16 * TOKENS  # half2 of a tile of 32 k
STAGE_BYTES = 2 * 4 * UNIT_WORDS  # of 64 k
STAGES = 6  # slots for stages; two blocks of a multiprocessor share its memory
FULL, FREE = STAGES * STAGE_BYTES, STAGES * (STAGE_BYTES + 8)  # where the barriers are: of a stage that is there, of a slot
SHARED_BYTES = STAGES * (STAGE_BYTES + 16)
RESIDENT = 2  # blocks on a multiprocessor
ALONE, PAIRED = (0.9, 1.45), (1.55, 1.8)  # microseconds a chunk takes one block, or two together, on an H100; with 8 bits
SUM_BEGINS, SUMMED = 2, 350_000  # microseconds before splits are summed, and numbers summed in one
SUM_THREADS, MOST_SPLITS = 256, 8
FEW_ROWS = 512  # up to here whatever else there is takes much longer
UNITS_EACH = 4  # that a thread of the tile kernel writes a piece of
ALL_ZERO = (np.float32(0),) * SUMS


# ------------------------------------------------------------------------------------------ x as tiles


def place_in_tile(token, quarter):
    """Where the four half2 of a quarter of 32 k of a token begin, in words; plain integers, for NumPy too.

    A quarter is 16 bytes of the tensor cores' B: half2 ``j`` of it is what lane ``4g + j`` multiplies by.
    """
    return 16 * token + 4 * (quarter ^ (token >> 1 & 3))


def source_of(quarter, j):
    """Which half2 of 32 k of x, counted from 0, is half2 ``j`` of a quarter.

    Lane 4g + j has the weights of k 8j .. 8j + 7, two after two in the order of the quarters.
    """
    return 4 * j + quarter


@functools.cache
def tile_kernel():
    """The kernel ``(x, units, tiles)``: float16 [M, K] to uint32 [M / TOKENS, units, TOKENS, 16], what is beyond x being 0.

    Grid (units / UNITS_EACH, M / TOKENS), block 4 * TOKENS.
    """
    place, half2_of = device_function(place_in_tile), device_function(source_of)
    load_half2 = load_words(1)

    def tile_activations(x, units, tiles):
        token, quarter = cuda.threadIdx.x // 4, cuda.threadIdx.x % 4
        row, first = cuda.blockIdx.y * TOKENS + token, cuda.blockIdx.x * UNITS_EACH
        source = np.int64(min(row, x.shape[0] - 1)) * x.shape[1]
        at = (np.int64(cuda.blockIdx.y) * units + first) * UNIT_WORDS + place(token, quarter)
        for i in range(UNITS_EACH):
            inside = row < x.shape[0] and 32 * (first + i) < x.shape[1]
            k = source + 32 * min(first + i, x.shape[1] // 32 - 1)
            a, b = load_half2(x, k + 2 * half2_of(quarter, 0)), load_half2(x, k + 2 * half2_of(quarter, 1))
            c, d = load_half2(x, k + 2 * half2_of(quarter, 2)), load_half2(x, k + 2 * half2_of(quarter, 3))
            keep = np.uint32(0xFFFFFFFF) if inside else np.uint32(0)
            store_16_bytes(tiles, at + i * UNIT_WORDS, (a[0] & keep, b[0] & keep, c[0] & keep, d[0] & keep))

    return Kernel(tile_activations, 4 * TOKENS)


def tile_grid(rows: int, inner: int) -> tuple[tuple[int, int], int]:
    """(the tile kernel's grid, words that it writes) for x [rows, inner]."""
    chunks, tiles = -(-inner // CHUNK), -(-rows // TOKENS)
    return (4 * chunks // UNITS_EACH, tiles), 4 * chunks * tiles * UNIT_WORDS


# ------------------------------------------------------------------------------------------ the product


@functools.cache
def warpgroup_kernel(bits: int, group_size: int, zero: int | None, *, wide_scales: bool = False, wide_out: bool = False):
    """The kernel ``(tiles, codes, scales, zeros, chunks, chunks_each, rows, y)`` that writes ``y = x @ W``.

    Args: as :func:`~.matmul.matmul_kernel`'s.

    Of tiles, what :func:`tile_kernel` wrote, and of codes, scales and zeros (those of a DeviceLinear) the kernel has the
    addresses; ``chunks`` is the first axis of the codes, ``chunks_each`` how many a split of K has. y [splits * rows, N]
    gets what the splits contribute, one below the other.
    Grid (*:func:`grid_of`, splits), block THREADS, dynamic shared memory SHARED_BYTES. It may begin while the tile kernel
    still runs.
    """
    load_codes = load_stream_pieces(bits)
    locate, fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    fragments = [weight_fragments(bits, zero, unit, wide_scales) for unit in range(4)]
    first_unit, second_unit, third_unit, fourth_unit = fragments
    wait_for_all_but_one = hopper.wait_for_all_but_one(4 * bits)

    def warpgroup_matmul(tiles, codes, scales, zeros, chunks, chunks_each, rows, y):
        shared = cuda.shared.array(0, np.uint32)
        even_sums, odd_sums = cuda.local.array(SUMS, np.float32), cuda.local.array(SUMS, np.float32)
        lane, warp = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32
        strips = (y.shape[1] + STRIP - 1) // STRIP
        strip = min(cuda.blockIdx.y * WARPS + warp, strips - 1)
        first = cuda.blockIdx.z * chunks_each
        last = min(first + chunks_each, chunks)  # this block's chunks: first <= chunk < last
        table, base = locate(strip, strips, lane), hopper.place_of_shared(shared)
        source, stages = tiles + 2 * STAGE_BYTES * (np.int64(chunks) * cuda.blockIdx.x + first), 2 * (last - first)
        matrix = _describe(base)

        words = load_codes(codes, (first * strips + strip) * bits * 128 + 4 * lane)
        scale, offset = fetch_tables(scales, zeros, table, first)
        if cuda.threadIdx.x == 0:
            for slot in range(STAGES):
                hopper.make_barrier(base + FULL + 8 * slot, 1)
                hopper.make_barrier(base + FREE + 8 * slot, WARPS)
            hopper.show_to_copies()
        cuda.syncthreads()
        wait_for_dependencies()
        if cuda.threadIdx.x == 0:
            for slot in range(min(STAGES, stages)):
                _copy_stage_if(1, base + STAGE_BYTES * slot, source + STAGE_BYTES * slot, base + FULL + 8 * slot)
        even, odd, slot, parity = ALL_ZERO, ALL_ZERO, np.int64(0), np.int64(0)
        for chunk in range(first, last):
            after, stage = min(chunk + 1, last - 1), 2 * (chunk - first)
            next_words = load_codes(codes, (after * strips + strip) * bits * 128 + 4 * lane)
            next_scale, next_offset = fetch_tables(scales, zeros, table, after)

            a, b = first_unit(words, scale[0], offset[0]), second_unit(words, scale[1], offset[1])
            hopper.wait_for_phase(base + FULL + 8 * slot, parity)
            even, odd = _multiply_stage(even, odd, a, b, matrix + STAGE_BYTES // 16 * slot)
            words = wait_for_all_but_one(words)
            slot, parity = _refill(base, source, stage, stages, slot, parity, lane == 0)

            a, b = third_unit(words, scale[2], offset[2]), fourth_unit(words, scale[3], offset[3])
            hopper.wait_for_phase(base + FULL + 8 * slot, parity)
            even, odd = _multiply_stage(even, odd, a, b, matrix + STAGE_BYTES // 16 * slot)
            words, scale, offset = wait_for_all_but_one(next_words), next_scale, next_offset
            slot, parity = _refill(base, source, stage + 1, stages, slot, parity, lane == 0)

        hopper.spread_sums(even_sums, hopper.finished(even))
        hopper.spread_sums(odd_sums, hopper.finished(odd))
        _store(even_sums, odd_sums, wide_out, y, rows, cuda.blockIdx.y * WARPS + warp, lane)

    return Kernel(warpgroup_matmul, (THREADS, RESIDENT), specific=True)


_describe, _copy_stage_if = device_function(hopper.describe), hopper.copy_bulk_if(STAGE_BYTES)


@device_function
def _multiply_stage(even, odd, a, b, matrix):
    """Ask for the products of 64 k: two units, of each two steps of 16 k for two tiles of 16 columns."""
    after = matrix + 4 * UNIT_WORDS // 16
    hopper.begin_group()
    even, odd = hopper.multiply(even, a[0], matrix), hopper.multiply(odd, a[2], matrix)
    even, odd = hopper.multiply(even, a[1], matrix + 2), hopper.multiply(odd, a[3], matrix + 2)
    even, odd = hopper.multiply(even, b[0], after), hopper.multiply(odd, b[2], after)
    even, odd = hopper.multiply(even, b[1], after + 2), hopper.multiply(odd, b[3], after + 2)
    hopper.end_group()
    return even, odd


@device_function
def _refill(base, source, stage, stages, slot, parity, is_first):
    """The stage before this one is done: its slot is free. That of the one before it is filled with what comes next.

    Returns the next slot, and its phase's parity.
    """
    done, old = (slot + STAGES - 1) % STAGES, (slot + STAGES - 2) % STAGES
    hopper.arrive_if(np.int64(is_first and stage >= 1), base + FREE + 8 * done)
    if stage >= 2 and stage - 2 + STAGES < stages:
        hopper.wait_for_phase(base + FREE + 8 * old, parity ^ np.int64(slot < 2))
        wanted, to = np.int64(cuda.threadIdx.x == 0), base + STAGE_BYTES * old
        _copy_stage_if(wanted, to, source + STAGE_BYTES * (stage - 2 + STAGES), base + FULL + 8 * old)
    return (slot + 1) % STAGES, parity ^ np.int64(slot == STAGES - 1)


@device_function
def _store(even, odd, wide, y, rows, strip, lane):
    """A warp's sums to y: lane 4g + t holds columns 4g .. 4g+3 of rows 8j + 2t and 8j + 2t + 1."""
    nowhere = y.shape[0]
    for j in range(TOKENS // 8):
        row = cuda.blockIdx.x * TOKENS + 8 * j + 2 * (lane % 4)
        place = cuda.blockIdx.z * rows + row
        above, below = place if row < rows else nowhere, place + 1 if row + 1 < rows else nowhere
        store_row(y, wide, above, strip, lane, even[4 * j], even[4 * j + 2], odd[4 * j], odd[4 * j + 2])
        store_row(y, wide, below, strip, lane, even[4 * j + 1], even[4 * j + 3], odd[4 * j + 1], odd[4 * j + 3])


@functools.cache
def sum_kernel(wide_out: bool):
    """The kernel ``(parts, splits, y)``: y is the sum of so many float32 arrays of its size, one after the other in parts.

    Grid :func:`sum_grid`, block SUM_THREADS.
    """

    def sum_splits(parts, splits, y):
        wait_for_dependencies()
        at = 4 * (np.int64(cuda.blockIdx.x) * SUM_THREADS + cuda.threadIdx.x)
        if at < y.size:
            total = NO_SUMS
            for split in range(splits):
                total = add_bits(total, load_16_bytes(parts, at + split * y.size))
            store_four(y, at, wide_out, total[0], total[1], total[2], total[3])

    return Kernel(sum_splits, SUM_THREADS)


def sum_grid(size: int) -> int:
    return -(-size // (4 * SUM_THREADS))


# ------------------------------------------------------------------------------------------ how it is divided


def grid_of(rows: int, columns: int) -> tuple[int, int]:
    """Tiles of x, and of columns; those that share weights run together."""
    return -(-rows // TOKENS), -(-columns // (STRIP * WARPS))


@functools.lru_cache(maxsize=4096)
def split_of(rows: int, columns: int, inner: int, bits: int, multiprocessors: int) -> int:
    """Chunks of one split of K, so that few tiles fill the card too: the least estimated time."""
    token_tiles, column_tiles = grid_of(rows, columns)
    chunks, tiles = -(-inner // CHUNK), token_tiles * column_tiles

    def microseconds(each: int) -> float:
        splits = -(-chunks // each)
        rounds = -(-tiles * splits // (RESIDENT * multiprocessors))
        chunk = ALONE[bits == 8] if tiles * splits <= multiprocessors else rounds * PAIRED[bits == 8]
        return chunk * each + (splits > 1) * (SUM_BEGINS + splits * rows * columns / SUMMED)

    return min(range(-(-chunks // MOST_SPLITS), chunks + 1), key=microseconds)


def pays(rows: int, columns: int, inner: int, bits: int, multiprocessors: int) -> bool:
    """Whether the tiles of y keep the card busy: enough of them for so few rows, and for many no half-empty last round."""
    token_tiles, column_tiles = grid_of(rows, columns)
    tiles, at_once = token_tiles * column_tiles, RESIDENT * multiprocessors
    if rows <= FEW_ROWS:
        chunks = -(-inner // CHUNK)
        return 2 * tiles * -(-chunks // split_of(rows, columns, inner, bits, multiprocessors)) >= 0.95 * multiprocessors
    return bits < 8 and tiles >= 0.9 * at_once * -(-tiles // at_once)
