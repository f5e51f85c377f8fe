"""1 to 16 rows of x: one decoded token, or a small batch, at the speed at which the weights can be read (8.0 and up).

A block computes a strip of 32 columns; its warps share out the chunks (128 k) of K and add up their sums at the end, in
shared memory and always in the same order. A lane gets the words of its codes with ``bits`` loads of 16 bytes
(:mod:`.layout`) and its part of x from a ring of the warp's own (:mod:`.activations`). As in :mod:`.matmul` the product is
computed transposed: W is A, so that 1 to 8 rows of x cost the same, and 9 to 16 one mma more for each. :mod:`.products`
says how codes are multiplied.

What limits it is how soon the first bytes are on their way, and how many at once:

- Weights are the first thing a warp asks for, before x, and, where the kernel begins beside the one in front of it
  (:mod:`.steps`), before that one has ended. Arguments are few, and those that are read first stand first: a kernel finds
  them through a cache that is cold, a line of 64 bytes at a time.
- A warp has two chunks under way, in two sets of registers that take turns. One set that was copied to another would have
  to be there first: the copy waits for memory, and so do the loads behind it.
- Whether there is a next chunk is asked by each load (a predicate), not by a branch: behind a branch no load comes before
  the products in front of it. So the assembler asks for the next words as soon as a unit of the last ones is unpacked.
- The end is short, and a loop: it runs once, and code that runs once is waited for.
- x comes by another road, and its sums are taken when it is there, while weights still are not.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tinygptq.kernels.cuda.activations import ring, ring_bytes
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.products import UNIT, leave_sums, run_of_codes, run_of_levels, sum_of_rows
from tinygptq.kernels.cuda.ptx import copy_async_wait
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.streams import load_stream_pieces_if
from tinygptq.kernels.cuda.tables import device_function, scale_floats, table_decoder, table_reader, zero_floats

PITCH = STRIP + 4  # floats between rows of the sums in shared memory: lanes of a warp fall on different banks
MOST_WARPS = 16  # of a block
RESERVED = 1 << 10  # bytes of shared memory that the system takes for each block


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
    column = np.int32(STRIP * strip + lane)
    if column < y.shape[1]:
        y[np.uint32(row), np.uint32(column)] = value


store = Epilogue(_read_nothing, (np.float32(0),), _store)
"""The plain one: ``y[row, 32 * strip + lane] = value``."""


@dataclass(frozen=True)
class Plan:
    """How a product is divided.

    Attributes:
        warps: of a block; each has one chunk at least.
        resident: blocks that must fit on a multiprocessor at once, which bounds the registers.
        sets: of registers for weights. Two that take turns have two chunks under way; one is half the code.
        short: no warp has more than two chunks, and there is no code for more, which is less to fetch before it can run.
        slots: chunks in a warp's ring of x. In one of three there is a free slot, which can be filled at once; in one of two
            all lanes must have read theirs before.
    """

    warps: int
    resident: int = 1
    sets: int = 2
    short: bool = False
    slots: int = 3

    def shared_bytes(self, row_tiles: int) -> int:
        """What a block takes of a multiprocessor's shared memory."""
        return 4 * self.warps * 8 * row_tiles * PITCH + ring_bytes(self.warps, 8 * row_tiles, self.slots) + RESERVED


@functools.lru_cache(maxsize=4096)
def plan(strips: int, inner: int, row_tiles: int, bits: int, group_size: int, multiprocessors: int, shared: int) -> Plan:
    """How to divide a product of so many strips by ``inner`` rows of W, by what was fastest on an H100.

    ``row_tiles``, ``bits`` and ``group_size`` as for :func:`matvec_kernel`; ``shared``: bytes of a multiprocessor's memory.
    """
    each, chunks = -(-strips // multiprocessors), -(-inner // CHUNK)  # blocks of a multiprocessor; chunks of a strip
    sets = 1 if group_size % (CHUNK // 2) else 2
    if each == 1:
        if chunks <= 2 * MOST_WARPS and (row_tiles, sets) != (2, 1):
            found = Plan(MOST_WARPS, short=True, slots=2)
        elif row_tiles == 2:
            found = Plan(12, sets=1) if bits < 4 else Plan(8, sets=sets)
        else:
            found = Plan(8 if bits == 8 else MOST_WARPS, sets=sets)
    else:
        if bits == 8 or (row_tiles == 2 and (group_size % CHUNK or each <= 3)):  # much code for a chunk
            sets = 1
        if each <= 3:
            found = Plan(5 if (bits, row_tiles, sets) == (4, 1, 2) else 4, 3, sets)
        else:
            found = Plan(4, 3, sets) if bits == 8 else Plan(2, 6, sets)
    return _fitting(replace(found, warps=min(found.warps, chunks)), chunks, row_tiles, shared)


def _fitting(plan: Plan, chunks: int, row_tiles: int, shared: int) -> Plan:
    """The same with fewer slots, and then with fewer warps, where a multiprocessor has less memory than it would take."""
    if plan.resident * plan.shared_bytes(row_tiles) > shared:
        plan = replace(plan, slots=2)
    while plan.shared_bytes(row_tiles) > shared:
        plan = replace(plan, warps=plan.warps - 1)
    return replace(plan, short=plan.short and chunks <= 2 * plan.warps)


class Source(NamedTuple):
    """Where a lane finds its strip's weights: three addresses, and what there is of int32.

    Attributes:
        codes, scales, zeros: as the kernel's.
        codes_at, pitch: its first word of chunk 0, and how far the next chunk's is.
        table: where its scales and zeros are: see :func:`~.tables.table_reader`.
        last: the strip's last chunk.
    """

    codes: Any
    scales: Any
    zeros: Any
    codes_at: Any
    pitch: Any
    table: Any
    last: Any


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
    """The kernel ``(codes, scales, inner, strips, x, zeros, y, extra)`` that hands the sums of ``x @ W`` to an epilogue.

    Args:
        bits, group_size, zero: as in :class:`~.layout.DeviceLinear`; the group size a multiple of 32.
        row_tiles: 1 for up to 8 rows of x, 2 for up to 16.
        plan: for a product of this size.
        ragged: K is no multiple of 128.
        wide_scales: the scales are float32.
        epilogue: gets the float32 sums, once for each row and strip.

    Of codes, scales and zeros (those of a DeviceLinear) and of x, float16 [M, K] with columns in the order of the sorted
    rows, the kernel has the addresses; ``inner`` is K; ``strips`` is the grid's size (4096x4096 took 3 % longer when the
    kernel asked for that itself); y [M, N] and the tuple extra are as the epilogue wants them.
    Grid (strips), block ``32 * warps``, :func:`~.activations.ring_bytes` of dynamic shared memory.
    """
    warps, tile_rows, chunk_words = plan.warps, 8 * row_tiles, bits * CHUNK
    partial_size = warps * tile_rows * PITCH
    locate_tables, fetch = _weights_reader(bits, group_size, zero, wide_scales)
    locate, copy_chunk, take = ring(row_tiles, plan.slots, ragged or plan.short)

    @device_function
    def copy(shared, place, source, x, chunk, slot):
        copy_chunk(shared, place, x, chunk, np.int32(source.last + 1), slot)

    multiply_chunks = _run(
        plan, fetch, copy, take, _chunk_product(bits, group_size, zero, row_tiles, wide_scales), tile_rows
    )
    leave = leave_sums(row_tiles, PITCH)
    finish = finisher(tile_rows, warps, UNIT if row_tiles == 1 else 1, epilogue)
    read, nothing = epilogue.read, epilogue.nothing

    def matvec(codes, scales, inner, strips, x, zeros, y, extra):
        partial = cuda.shared.array(partial_size, np.float32, alignment=16)
        shared = cuda.shared.array(0, np.uint32)
        lane, warp, strip = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5), np.int32(cuda.blockIdx.x)
        inner, strips, rows = np.int32(inner), np.int32(strips), np.int32(y.shape[0])
        chunks = np.int32(inner + CHUNK - 1 >> 7)
        codes_at, pitch = np.int32(strip * chunk_words + 4 * lane), np.int32(strips * chunk_words)
        source = Source(codes, scales, zeros, codes_at, pitch, locate_tables(strip, strips, lane), np.int32(chunks - 1))

        # weights, which no kernel writes, before the kernels in front of this one have ended; x after
        weights = fetch(source, warp, True)
        begin_dependents()
        place = locate(rows, inner)
        wait_for_dependencies()
        known = read(warp, strip, lane, y, extra) if warp < rows else nothing  # for the row that this warp will finish first
        copy(shared, place, source, x, warp, 0)
        copy(shared, place, source, x, np.int32(warp + warps), 1)
        total = multiply_chunks(source, weights, shared, place, x, warp, chunks)
        leave(partial, (warp * tile_rows + 2 * (lane & 3)) * PITCH + 4 * (lane >> 2), total)
        finish(partial, strip, rows, y, extra, known)

    return Kernel(matvec, (32 * warps, plan.resident))


def _run(plan, fetch, copy, take, multiply_chunk, tile_rows):
    """Device function: a warp's sums over its chunks, the first chunk's weights ``a`` and two of x being under way."""
    warps, slots, no_sums = plan.warps, plan.slots, (np.float32(0),) * tile_rows

    @device_function
    def multiply(total, weights, shared, place, source, x, slot, ahead):
        """With the chunk of x in a slot; chunk ``ahead`` starts on its way to the slot that is free."""
        copy_async_wait(1)
        cuda.syncwarp()  # the other lanes' copies are there too, and every lane has read the slot before this one
        of_x = take(shared, place, slot)
        if slots == 2:
            cuda.syncwarp()
            copy(shared, place, source, x, ahead, slot)
        else:
            copy(shared, place, source, x, ahead, np.int32(slot - 1 if slot > 0 else slots - 1))
        return multiply_chunk(total, weights, of_x)

    @device_function
    def after(slot):
        return np.int32(slot + 1 if slot < slots - 1 else 0)

    @device_function
    def short(source, a, shared, place, x, warp, chunks):
        second = np.int32(warp + warps)
        b = fetch(source, second if second < chunks else warp, True)
        copy_async_wait(1)
        cuda.syncwarp()
        total = multiply_chunk(no_sums, a, take(shared, place, 0))
        copy_async_wait(0)
        cuda.syncwarp()
        return multiply_chunk(total, b, take(shared, place, 1))  # by 0 where there is no second chunk: no branch

    @device_function
    def one_set(source, a, shared, place, x, warp, chunks):
        total, chunk, slot = no_sums, warp, np.int32(0)
        while chunk < chunks:
            chunk = np.int32(chunk + warps)
            total = multiply(total, a, shared, place, source, x, slot, np.int32(chunk + warps))
            a, slot = fetch(source, chunk, chunk < chunks), after(slot)
        return total

    @device_function
    def two_sets(source, a, shared, place, x, warp, chunks):
        total, chunk, second, slot = no_sums, warp, np.int32(warp + warps), np.int32(0)
        b = fetch(source, second if second < chunks else warp, True)
        while chunk < chunks:
            chunk = np.int32(chunk + 2 * warps)
            total = multiply(total, a, shared, place, source, x, slot, chunk)
            a, slot = fetch(source, chunk, chunk < chunks), after(slot)
            if second < chunks:
                second = np.int32(chunk + warps)
                total = multiply(total, b, shared, place, source, x, slot, second)
                b, slot = fetch(source, second, second < chunks), after(slot)
        return total

    return short if plan.short else one_set if plan.sets == 1 else two_sets


def finisher(tile_rows, warps, unit, epilogue):
    """Device function: add up what the warps left, in so large units, and hand it to the epilogue.

    ``partial`` is float32 [warps, tile_rows, PITCH], ``known`` what the epilogue has read for this warp's first row.
    """
    read, end, unit = epilogue.read, epilogue.finish, np.float32(unit)

    @device_function
    def finish(partial, strip, rows, y, extra, known):
        lane, row = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        step, first = np.int32(cuda.blockDim.x >> 5), row  # not the constant, for which the loop would be written out
        cuda.syncthreads()
        while row < rows:
            if row != first:
                known = read(row, strip, lane, y, extra)
            even, odd = np.float32(0), np.float32(0)  # two chains, which do not wait for each other
            for w in range(warps):
                value = partial[np.uint32((w * tile_rows + row) * PITCH + lane)]
                if w % 2:
                    odd += value
                else:
                    even += value
            end(row, strip, lane, (even + odd) * unit, y, extra, known)
            row = np.int32(row + step)

    return finish


def _weights_reader(bits, group_size, zero, wide_scales):
    """Device functions: where a lane's scales and zero points are, and what it needs of the weights of one chunk, as it is
    in memory: words, scales and zero points.

    Where they are not ``wanted`` it reads no words, and the last chunk's scales.
    """
    load_codes = load_stream_pieces_if(bits)
    locate, fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)

    @device_function
    def fetch(source, chunk, wanted):
        words = load_codes(source.codes, np.int32(source.codes_at + chunk * source.pitch), wanted)
        of_chunk = chunk if wanted else source.last
        scale, offset = fetch_tables(source.scales, source.zeros, source.table, of_chunk)
        return words, scale, offset

    return locate, fetch


def _chunk_product(bits, group_size, zero, row_tiles, wide_scales):
    """Device function: add one chunk of W^T x^T to a warp's sums, group by group."""
    units = 4 if group_size % CHUNK == 0 else 2 if group_size % (CHUNK // 2) == 0 else 1  # that surely share a group
    runs = ((bits, zero, i * units % 4, units, wide_scales) for i in range(4))
    first, second, third, fourth = (_run_by_codes(*run) if row_tiles == 1 else _run_by_levels(*run) for run in runs)

    @device_function
    def multiply_chunk(total, weights, x):
        words, scale, offset = weights
        total = first(total, words, scale[0], offset[0], x)
        if units == 2:
            total = second(total, words, scale[2], offset[2], x)
        if units == 1:
            total = second(total, words, scale[1], offset[1], x)
            total = third(total, words, scale[2], offset[2], x)
            total = fourth(total, words, scale[3], offset[3], x)
        return total

    return multiply_chunk


def _run_by_codes(bits, zero, first, units, wide_scales):
    """Device function: add the product of a run of units, those of one group, to the sums of 8 rows of x."""
    scales, zeros = scale_floats(wide_scales), zero_floats(bits, zero, 1 / UNIT)
    product, sums_of_x = run_of_codes(bits, first, units), sum_of_rows(first, units)

    @device_function
    def run(total, words, scale, offset, x):
        return product(total, words, scales(scale), zeros(offset), x, sums_of_x(x))

    return run


def _run_by_levels(bits, zero, first, units, wide_scales):
    """Device function: the same for 16 rows."""
    scales, (_, offsets) = scale_floats(wide_scales), table_decoder(bits, zero, wide_scales)
    product = run_of_levels(bits, first, units)

    @device_function
    def run(total, words, scale, offset, x):
        lower, upper = offsets(offset)
        return product(total, words, scales(scale), lower, upper, x)

    return run
