"""1 to 16 rows of x: one decoded token, or a small batch, at the speed at which the weights can be read (8.0 and up).

A block computes a strip of 32 columns; its warps share out the chunks (128 k) of K and add up their sums at the end
(:mod:`.block_sums`). A lane gets the words of its codes with ``bits`` loads of 16 bytes (:mod:`.layout`) and its part of x
from a ring of the warp's own (:mod:`.activations`). As in :mod:`.matmul` the product is computed transposed: W is A, so that
1 to 8 rows of x cost the same, and 9 to 16 one mma more for each. :mod:`.products` says how codes are multiplied. Where
arithmetic and x take longer than the weights (2 bits and 16 rows) a block has several strips, and each warp multiplies what
it has of x by the weights of all.

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
from typing import Any, NamedTuple

import numpy as np

from tinygptq.kernels.cuda.activations import ring, ring_bytes
from tinygptq.kernels.cuda.block_sums import PITCH, Epilogue, finisher, leave_sums, store
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import COLUMNS as STRIP
from tinygptq.kernels.cuda.layout import ROWS as CHUNK
from tinygptq.kernels.cuda.layout import groups_together
from tinygptq.kernels.cuda.matvec_plan import Plan
from tinygptq.kernels.cuda.products import UNIT, run_of_codes, run_of_levels, sum_of_rows
from tinygptq.kernels.cuda.ptx import copy_async_wait
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.steps import begin_dependents, wait_for_dependencies
from tinygptq.kernels.cuda.streams import load_stream_pieces_if
from tinygptq.kernels.cuda.tables import (
    device_function,
    scale_floats,
    table_decoder,
    table_reader,
    tuple_of,
    zero_floats,
)


class Source(NamedTuple):
    """Where a lane finds the weights of the block's first strip: three addresses, and what there is of int32.

    Attributes:
        codes, scales, zeros: as the kernel's.
        codes_at, pitch: its first word of chunk 0, and how far the next chunk's is.
        table: where its scales and zeros are: see :func:`~.tables.table_reader`.
        last: a strip's last chunk.
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
    rows, the kernel has the addresses; ``inner`` is K; ``strips`` are W's (4096x4096 took 3 % longer when the kernel asked
    for the grid's size itself); y [M, N] and the tuple extra are as the epilogue wants them.
    Grid (ceil(strips / plan.strips)), block ``32 * warps``, ``plan.dynamic_bytes`` of dynamic shared memory.
    """
    warps, several, short, tile_rows, chunk_words = plan.warps, plan.strips, plan.short, 8 * row_tiles, bits * CHUNK
    sums_at, strip_sums = ring_bytes(warps, row_tiles, plan.slots) // 4, warps * tile_rows * PITCH  # in floats
    locate_tables, fetch = _weights_reader(bits, group_size, zero, wide_scales, several)
    locate, copy_chunk, take = ring(row_tiles, plan.slots, ragged or short)

    @device_function
    def copy(shared, place, source, x, chunk, slot):
        copy_chunk(shared, place, x, chunk, np.int32(source.last + 1), slot)

    multiply = functools.partial(_strip_product, _chunk_product(bits, group_size, zero, row_tiles, wide_scales))
    multiply_chunks = _run(plan, fetch, copy, take, tuple_of(multiply, several), tile_rows)
    first_strip = _first_strip(several)
    leave, finish = leave_sums(row_tiles), finisher(tile_rows, warps, UNIT if row_tiles == 1 else 1, epilogue, several)
    read, nothing = epilogue.read, epilogue.nothing

    def matvec(codes, scales, inner, strips, x, zeros, y, extra):
        shared, partial = cuda.shared.array(0, np.uint32), cuda.shared.array(0, np.float32)  # one memory, by two types
        lane, warp = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        strip, skipped = first_strip(np.int32(strips))
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
        second = np.int32(warp + warps)
        copy(shared, place, source, x, warp, 0)
        if short:  # all of it is asked for at once, in the order in which it will be needed
            weights = weights, fetch(source, second if second < chunks else warp, True)
        copy(shared, place, source, x, second, 1)
        total = multiply_chunks(source, weights, shared, place, x, warp, chunks)
        at = sums_at + (warp * tile_rows + 2 * (lane & 3)) * PITCH + 4 * (lane >> 2)
        for i in range(several):
            leave(partial, at + i * strip_sums, total[i])
        finish(partial, sums_at, strip, skipped, rows, y, extra, known)

    return Kernel(matvec, (32 * warps, plan.resident))


def _first_strip(several):
    """Device function: the block's first strip, and how many of its strips another block has too, and finishes."""

    @device_function
    def first_strip(strips):
        strip, shared = np.int32(cuda.blockIdx.x), np.int32(0)
        if several > 1:
            strip = np.int32(several * strip)
            shared = max(np.int32(strip + several - strips), shared)
        return np.int32(strip - shared), shared

    return first_strip


def _run(plan, fetch, copy, take, multiply_chunk, tile_rows):
    """Device function: a warp's sums over its chunks, the first chunk's weights ``a`` and two of x being under way.

    In a short plan the second chunk's weights are, too.
    """
    warps, slots, no_sums = plan.warps, plan.slots, ((np.float32(0),) * tile_rows,) * plan.strips

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
    def short(source, weights, shared, place, x, warp, chunks):
        first, second = weights
        copy_async_wait(1)
        cuda.syncwarp()
        total = multiply_chunk(no_sums, first, take(shared, place, 0))
        copy_async_wait(0)
        cuda.syncwarp()
        return multiply_chunk(total, second, take(shared, place, 1))  # by 0 where there is no second chunk: no branch

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


def _weights_reader(bits, group_size, zero, wide_scales, strips):
    """Device functions: where a lane's scales and zero points are, and what it needs of the weights of one chunk, as it is
    in memory: words, scales and zero points, for each strip.

    Where they are not ``wanted`` it reads no words, and the last chunk's scales.
    """
    load_codes = load_stream_pieces_if(bits)
    locate, fetch_tables = table_reader(bits, group_size, zero is None, wide_scales)
    chunk_words, table_size = bits * CHUNK, STRIP * groups_together(group_size)  # of a strip

    def reader(strip):
        """Device function for one of the block's strips."""
        words_further, table_further = chunk_words * strip, table_size * strip

        @device_function
        def fetch(source, chunk, wanted):
            at = np.int32(source.codes_at + chunk * source.pitch + words_further)
            words = load_codes(source.codes, at, wanted)
            of_chunk = chunk if wanted else source.last
            table = np.int32(source.table[0] + table_further), source.table[1]
            scale, offset = fetch_tables(source.scales, source.zeros, table, of_chunk)
            return words, scale, offset

        return fetch

    return locate, tuple_of(reader, strips)


def _strip_product(multiply_chunk, strip):
    """Device function: the same for one of the block's strips, of tuples of sums and of weights."""

    @device_function
    def multiply(total, weights, x):
        return multiply_chunk(total[strip], weights[strip], x)

    return multiply


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
        return product(total, words, scales(scale), offsets(offset), x)

    return run
