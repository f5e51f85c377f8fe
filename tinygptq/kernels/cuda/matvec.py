"""1 to 16 rows of x: one decoded token, or a small batch, at the speed at which the weights can be read (8.0 and up).

A block computes one or two strips of 32 columns; its warps share out the chunks (128 k) of K and add up their sums at the
end, in shared memory and always in the same order. A lane gets the words of its codes with ``bits`` loads of 16 bytes
(:mod:`.layout`) and its part of x, which all blocks read and the caches hold, straight as mma's B. As in :mod:`.matmul`
the product is computed transposed: W is A, so that 1 to 8 rows of x cost the same, and 9 to 16 one mma more for each.
:mod:`.products` says how codes are multiplied.

What limits it is how soon the first bytes are on their way, and how many at once. So weights are the first thing a warp
asks for, before x, and, where the kernel begins beside the one in front of it (:mod:`.steps`), before that one has ended.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinygptq.kernels.cuda.clusters import cluster_barrier, load_shared_of
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.products import UNIT, leave_sums, run_product
from tinygptq.kernels.cuda.ptx import load_written_words
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.streams import load_stream_pieces, load_stream_pieces_if
from tinygptq.kernels.cuda.tables import device_function, scale_floats, table_reader, zero_floats

PITCH = STRIP + 4  # floats between rows of the sums in shared memory: lanes of a warp fall on different banks
NO_X = (np.uint32(0),) * 4


class Epilogue(NamedTuple):
    """What is done with the sums of one row and strip, by a whole warp: lane i has column ``32 * strip + i``, beyond N too.

    Attributes:
        read: device function ``(row, strip, lane, y, extra)`` -> what the end needs to know, a tuple of numbers; called
            before the weights are multiplied, so that nobody waits for it then.
        nothing: a tuple of the same types.
        finish: device function ``(row, strip, lane, value, y, extra, known)``.
    y and the tuple extra are arrays that the kernel was given for it.
    """

    read: Any
    nothing: tuple
    finish: Any


@device_function
def _read_nothing(row, strip, lane, y, extra):
    return (np.float32(0),)


@device_function
def _store(row, strip, lane, value, y, extra, known):
    column = STRIP * strip + lane
    if column < y.shape[1]:
        y[row, column] = value


store = Epilogue(_read_nothing, (np.float32(0),), _store)
"""The plain one: ``y[row, 32 * strip + lane] = value``."""


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    Attributes:
        warps: of a block.
        width: strips of a block; its warps share them, and x, which the multiprocessor's cache then holds for all of them.
        split: blocks that share K, as one cluster (compute capability 9.0), and add up their sums through shared memory.
        ahead: each warp asks for its next chunk before it multiplies the one in hand.
        resident: blocks that must fit on a multiprocessor at once, which bounds the registers. Where ``ahead`` finds some to
            spare (one block), the last turn asks for nothing; elsewhere, for the branch, for 16 bytes that nobody uses.
    """

    warps: int
    width: int = 1
    split: int = 1
    ahead: bool = False
    resident: int = 1


def plan(
    strips: int,
    inner: int,
    row_tiles: int,
    bits: int,
    group_size: int,
    multiprocessors: int,
    capability: tuple[int, int],
) -> Plan:
    """How to divide a product of so many strips by ``inner`` rows of W, by what was fastest on an H100.

    ``row_tiles``, ``bits`` and ``group_size`` as for :func:`matvec_kernel`. All blocks run at once where they fit; asking
    early for the next chunk pays while there are registers for it.
    """
    each = -(-strips // multiprocessors)  # blocks of a multiprocessor
    if row_tiles == 2:
        # x is read again by every block: for a long K that is more than the L2 gives, unless two strips share it
        if each == 1 and inner >= 64 * CHUNK and strips % 2 == 0 and capability >= (9, 0):
            return Plan(8, width=2, split=2)
        return Plan(8) if each == 1 else Plan(4, resident=3)
    if each == 1 or bits == 8:
        return Plan(16, ahead=bits in (3, 4))
    ahead = bits == 4 and group_size % CHUNK == 0
    return Plan(8, resident=3, ahead=ahead) if each <= 3 else Plan(4, resident=6, ahead=ahead)


@functools.cache
def matvec_kernel(
    bits: int,
    group_size: int,
    zero: int | None,
    row_tiles: int,
    plan: Plan,
    *,
    ragged: bool = False,
    wide_scales: bool = False,
    epilogue: Epilogue = store,
):
    """The kernel ``(x, codes, scales, zeros, groups, y, extra)`` that hands the sums of ``x @ W`` to an epilogue.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        row_tiles: 1 for up to 8 rows of x, 2 for up to 16.
        plan: its width divides the strips and its warps.
        ragged: K is no multiple of 128.
        wide_scales: the scales are float32.
        epilogue: gets the float32 sums, once for each row and strip.

    Shapes: x float16 [M, K] with columns in the order of the sorted rows; codes, scales and zeros those of a DeviceLinear,
    flat, as uint32; ``groups`` the second axis of the scales; y [M, N] and the tuple extra as the epilogue wants them.
    Grid (strips // width * split) in clusters of ``split``, block ``32 * warps``.
    """
    warps, width, split = plan.warps, plan.width, plan.split
    rows, step, chunk_words = 8 * row_tiles, warps // width, bits * CHUNK
    partial_size, ahead, spare = warps * rows * PITCH, plan.ahead, plan.resident == 1
    among = row_tiles == 2 and not ahead
    fetch, fetch_if = _weights_readers(bits, group_size, zero, wide_scales)
    fetch_x = _x_reader(ragged, row_tiles)
    leave = leave_sums(row_tiles, PITCH)
    multiply_chunk = _chunk_product(bits, group_size, zero, row_tiles, wide_scales)
    finish = _finisher(rows, plan, epilogue)
    read, nothing = epilogue.read, epilogue.nothing
    no_sums = (np.float32(0),) * rows

    def matvec(x, codes, scales, zeros, groups, y, extra):
        partial = cuda.shared.array(partial_size, np.float32, alignment=16)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        tile, rank = cuda.blockIdx.x // split, cuda.blockIdx.x % split
        chunks = (x.shape[1] + CHUNK - 1) // CHUNK
        each = (chunks + split - 1) // split
        strip, first = width * tile + warp % width, each * rank + warp // width  # this warp's strip and first chunk
        last = min(each * (rank + 1), chunks)
        codes_at, table = strip * chunks * chunk_words + 4 * lane, strip * groups * STRIP + 4 * (lane >> 2)

        # weights, which no kernel writes, before the kernels in front of this one have ended; x after
        words, scale, offset = fetch(codes, scales, zeros, codes_at, table, min(first, chunks - 1))
        begin_dependents()
        wait_for_dependencies()
        item, known = warps * rank + warp, nothing
        if item < width * x.shape[0]:  # the first that this warp will finish
            known = read(item // width, width * tile + item % width, lane, y, extra)
        total = no_sums
        for chunk in range(first, last, step):
            after, more = min(chunk + step, last - 1), chunk + step < last
            w, s, o = words, scale, offset
            if ahead and not spare:  # with no branch, which would take registers: at the end all lanes read the same bytes
                w, s, o = fetch(codes, scales, zeros, codes_at if more else codes_at - 4 * lane, table, after)
            rows_of_x = fetch_x(x, chunk, lane)
            if ahead and spare and more:
                w, s, o = fetch(codes, scales, zeros, codes_at, table, after)
            total = multiply_chunk(total, words, scale, offset, rows_of_x)
            words, scale, offset = w, s, o
            if among:  # with no branch around them, loads come to stand among the products; with 8 rows registers run out
                words, scale, offset = fetch_if(codes, scales, zeros, codes_at, table, after, more)
            elif not ahead and more:
                words, scale, offset = fetch(codes, scales, zeros, codes_at, table, after)
        leave(partial, (warp * rows + 2 * (lane & 3)) * PITCH + 4 * (lane >> 2), total)
        finish(partial, tile, rank, x.shape[0], y, extra, known)

    return Kernel(matvec, (32 * warps, plan.resident))


def _finisher(rows, plan, epilogue):
    """Device function: add up what the warps (of all the cluster's blocks) left, and hand it to the epilogue."""
    warps, width, split, unit = plan.warps, plan.width, plan.split, np.float32(UNIT)
    read, end = epilogue.read, epilogue.finish

    @device_function
    def finish(partial, tile, rank, rows_of_x, y, extra, known):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        if split > 1:
            cluster_barrier()
        else:
            cuda.syncthreads()
        first = warps * rank + warp
        for item in range(first, width * rows_of_x, warps * split):
            row, within = item // width, item % width
            if item != first:
                known = read(row, width * tile + within, lane, y, extra)
            result = np.float32(0)
            for block in range(split):
                for w in range(warps // width):
                    at = ((w * width + within) * rows + row) * PITCH + lane
                    if split > 1:
                        result += load_shared_of(partial, at, np.int32(block))
                    else:
                        result += partial[np.uint32(at)]
            end(row, width * tile + within, lane, result * unit, y, extra, known)
        if split > 1:
            cluster_barrier()  # a block's shared memory lives until all have read it

    return finish


def _weights_readers(bits, group_size, zero, wide_scales):
    """Device functions: what a lane needs of one chunk's weights; and the same, but codes only where they are wanted."""
    load_codes, load_codes_if, chunk_words = load_stream_pieces(bits), load_stream_pieces_if(bits), bits * CHUNK
    fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)

    @device_function
    def fetch(codes, scales, zeros, codes_at, table, chunk):
        words = load_codes(codes, codes_at + chunk * chunk_words)
        scale, offset = fetch_tables(scales, zeros, table, chunk)
        return words, scale, offset

    @device_function
    def fetch_if(codes, scales, zeros, codes_at, table, chunk, wanted):
        words = load_codes_if(codes, codes_at + chunk * chunk_words, wanted)
        scale, offset = fetch_tables(scales, zeros, table, chunk)
        return words, scale, offset

    return fetch, fetch_if


def _x_reader(ragged, row_tiles):
    """Device function: a lane's x of one chunk, 8 neighbouring k of each unit, for each 8 rows; 0 beyond K.

    Rows that x has not got are computed, from its last one, and not stored.
    """

    @device_function
    def fetch(x, row, k):
        if ragged and k >= x.shape[1]:
            return NO_X
        return load_written_words(x, row + k)

    @device_function
    def fetch_rows(x, first, lane, k):
        row = min(first + (lane >> 2), x.shape[0] - 1) * x.shape[1]
        return fetch(x, row, k) + fetch(x, row, k + 32) + fetch(x, row, k + 64) + fetch(x, row, k + 96)

    @device_function
    def fetch_x(x, chunk, lane):
        k = CHUNK * chunk + 8 * (lane & 3)
        if row_tiles == 1:
            return fetch_rows(x, 0, lane, k)
        return fetch_rows(x, 0, lane, k) + fetch_rows(x, 8, lane, k)

    return fetch_x


def _chunk_product(bits, group_size, zero, row_tiles, wide_scales):
    """Device function: add one chunk of W^T x^T to a warp's sums, group by group."""
    scales, zeros = scale_floats(wide_scales), zero_floats(bits, zero, 1 / UNIT)
    units = 4 if group_size % CHUNK == 0 else 2 if group_size % (CHUNK // 2) == 0 else 1  # that surely share a group
    first, second, third, fourth = (run_product(bits, i * units % 4, units, row_tiles) for i in range(4))

    @device_function
    def multiply_chunk(total, words, scale, offset, x):
        total = first(total, words, scales(scale[0]), zeros(offset[0]), x)
        if units == 2:
            total = second(total, words, scales(scale[2]), zeros(offset[2]), x)
        if units == 1:
            total = second(total, words, scales(scale[1]), zeros(offset[1]), x)
            total = third(total, words, scales(scale[2]), zeros(offset[2]), x)
            total = fourth(total, words, scales(scale[3]), zeros(offset[3]), x)
        return total

    return multiply_chunk
