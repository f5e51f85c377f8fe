"""Codes times x on tensor cores: what the matvec adds up for each group.

Up to 8 rows of x, codes as they are. A code's bits are, read as an fp16 number, the subnormal ``code * 2^-24``; a code that
stands ``offset`` bits higher is ``code * 2^offset * 2^-24``, as long as it stays within the 10 bits of the mantissa. So one
``and`` makes a half2 of two codes, with no exponent to put in and nothing to subtract. What the half2 lacks is made up for
in float32::

    sum of scale * (code - zero) * x  =  2^24 * scale * (sums[0] + sums[offset] * 2^-offset + ... - zero * 2^-24 * ones)

where ``ones`` is the sum of x, from an mma whose A is 1 everywhere, which need not wait for codes. Powers of two are exact;
the caller multiplies by 2^24 once, at the very end. Each product of a code and a number in fp16 is exact; their sum is not,
and less so than float32's: tensor cores line products up at the largest exponent among them and drop what falls below some
24 bits from there, and a subnormal has the exponent of 2^-14 whatever its size. A code at offset o so loses up to 10 - o of
these bits, which leaves a relative error of some 1e-6 in a sum.

From 9 rows on, levels: ``code - zero`` as a normal fp16 number (:mod:`.unpack`), which leaves 1e-7. A subtraction for each
half2 is a quarter more work for 8 rows. For 16, of which two products share a half2, it is less than what falls away: the
mma of ones, a third of all, and two of the three operations in which a group's sums are joined and added up.
"""

import functools
import itertools

from llvmlite import ir

from tinygptq.kernels.cuda.layout import HALF_ONES, place_of
from tinygptq.kernels.cuda.ptx import (
    F32,
    F32X4,
    I32,
    _pack,
    _unpack,
    intrinsic,
    mma_assembly,
    types,
)
from tinygptq.kernels.cuda.unpack import emit_level, offsets_type, unpack_offsets

UNIT = 2.0**24  # what sums have to be multiplied by at the end
ONE = 0x3C003C00  # 1 in both halves
NO_SUM = (ir.Constant(F32, 0.0),) * 4


def offset_of(bits: int, unit: int, step: int) -> int:
    """How many bits above the lowest the codes of a unit's pairs ``2 * step`` and ``2 * step + 1`` are used.

    Both pairs go into one mma and must agree. At most 10 - bits; the more, the more exact, but never for a shift more.
    """
    if bits == 3 and unit == 3:
        return 6
    return {2: 4 + 2 * step, 3: 3 * step, 4: 4 * step, 8: 0}[bits]


@functools.cache
def run_of_codes(bits: int, first: int, units: int):
    """The device function ``(total, words, scale, zero, x, ones)`` -> ``total``, for 8 rows of x and a run of units that are
    of one group.

    Args of the device function:
        total: 8 float32, C's registers of a strip's two column tiles, in units of 2^-24.
        words: a lane's ``4 * bits`` words of a chunk; word w of column c is words[4w + c].
        scale, zero: of a lane's four columns, float32; zero in units of 2^-24.
        x: B's registers of the chunk: 4 for each of four units.
        ones: the run's, from :func:`sum_of_rows`.
    """

    def generate(context, builder, signature, args):
        operands = (_unpack(builder, values) for values in args)
        return _pack(builder, emit_codes(builder, bits, range(first, first + units), *operands))

    @intrinsic
    def product(typingctx, total, words, scale, zero, x, ones):
        sums, of_x = (types.UniTuple(types.float32, n) for n in (8, 2))
        codes, rows = (types.UniTuple(types.uint32, n) for n in (4 * bits, 16))
        return sums(sums, codes, F32X4, F32X4, rows, of_x), generate

    return product


@functools.cache
def sum_of_rows(first: int, units: int):
    """The device function ``x`` -> ``ones``: the float32 sums of rows 2t and 2t + 1 of x over a run of units."""

    def generate(context, builder, signature, args):
        return _pack(builder, emit_sums(builder, range(first, first + units), _unpack(builder, args[0])))

    @intrinsic
    def sums(typingctx, x):
        return types.UniTuple(types.float32, 2)(types.UniTuple(types.uint32, 16)), generate

    return sums


@functools.cache
def run_of_levels(bits: int, first: int, units: int):
    """The device function ``(total, words, scale, offsets, x)`` -> ``total``: the same for 16 rows of x.

    Args of the device function:
        total, x: those of the first 8 rows, and then those of the others; total is not in units of 2^-24.
        words, scale: as for :func:`run_of_codes`.
        offsets: as for :func:`~.unpack.levels`.
    """

    def generate(context, builder, signature, args):
        total, words, scale, x = (_unpack(builder, args[i]) for i in (0, 1, 2, 4))
        span, offsets = range(first, first + units), unpack_offsets(builder, args[3])
        return _pack(builder, emit_levels(builder, bits, span, total, words, scale, offsets, x))

    @intrinsic
    def product(typingctx, total, words, scale, offsets, x):
        sums, (codes, rows) = types.UniTuple(types.float32, 16), (types.UniTuple(types.uint32, n) for n in (4 * bits, 32))
        return sums(sums, codes, F32X4, offsets_type(bits), rows), generate

    return product


def emit_sums(builder, units, x):
    """The instructions of :func:`sum_of_rows`: lists of registers in and out."""
    steps = [NO_SUM, NO_SUM]  # two chains, which do not wait for each other
    for unit, step in itertools.product(units, range(2)):
        steps[step] = mma_assembly(builder, (I32(ONE),) * 4, _part_of(x, 0, unit, step), steps[step])
    return [builder.fadd(steps[0][i], steps[1][i]) for i in range(2)]


def emit_codes(builder, bits, units, total, words, scale, zero, x, ones):
    """The instructions of :func:`run_of_codes`: lists of registers in, the new ``total`` out."""
    sums = {}  # C's registers, by (column tile, offset)
    for unit, step in itertools.product(units, range(2)):
        codes = [[_codes(builder, words, c, bits, unit, 2 * step + i) for i in range(2)] for c in range(4)]
        for half in range(2):
            key = half, offset_of(bits, unit, step)
            a = _fragment(*codes[2 * half : 2 * half + 2])
            sums[key] = mma_assembly(builder, a, _part_of(x, 0, unit, step), sums.get(key, NO_SUM))
    total = list(total)
    for half, i in itertools.product(range(2), range(4)):
        column, place = 2 * half + i // 2, 4 * half + i
        value = _merge(builder, {o: c[i] for (h, o), c in sums.items() if h == half})
        value = builder.fma(builder.fsub(F32(-0.0), zero[column]), ones[i % 2], value)  # NVVM's LLVM has no fneg
        total[place] = builder.fma(scale[column], value, total[place])
    return total


def emit_levels(builder, bits, units, total, words, scale, offsets, x):
    """The instructions of :func:`run_of_levels`: lists of registers in, the new ``total`` out."""
    sums = dict.fromkeys(itertools.product(range(2), range(2)), NO_SUM)  # C's registers, by (row tile, column tile)
    for unit, step, half in itertools.product(units, range(2), range(2)):
        pairs = 2 * step, 2 * step + 1
        a = _fragment(*([emit_level(builder, bits, unit, words, c, pair, offsets) for pair in pairs]
                        for c in (2 * half, 2 * half + 1)))  # fmt: skip
        for tile in range(2):
            sums[tile, half] = mma_assembly(builder, a, _part_of(x, tile, unit, step), sums[tile, half])
    total = list(total)
    for tile, half, i in itertools.product(range(2), range(2), range(4)):
        column, place = 2 * half + i // 2, 8 * tile + 4 * half + i
        total[place] = builder.fma(scale[column], sums[tile, half][i], total[place])
    return total


def _part_of(x, tile, unit, step):
    """mma's B: 16 k of 8 rows of x."""
    return x[16 * tile + 4 * unit + 2 * step :][:2]


def _fragment(first, second):
    """mma's A, of two columns' two half2 each."""
    return first[0], second[0], first[1], second[1]


def _codes(builder, words, column, bits, unit, pair):
    """The half2 of a pair's codes, ``offset_of`` bits above the lowest."""
    offset, place = offset_of(bits, unit, pair // 2), place_of(bits, unit, pair)
    if place is None:
        return _spread_codes(builder, words, column, offset)
    word, shift = words[4 * place[0] + column], place[1] - offset
    if shift:
        word = builder.lshr(word, I32(shift)) if shift > 0 else builder.shl(word, I32(-shift))
    return builder.and_(word, I32(((1 << bits) - 1 << offset) * HALF_ONES))


def _spread_codes(builder, words, column, offset):
    """3 bits, unit 3, pair 3: bit b of its codes is bit 15 of the halves of word b."""
    number = I32(0)
    for bit in range(3):
        word = builder.lshr(words[4 * bit + column], I32(15 - offset - bit))
        number = builder.or_(number, builder.and_(word, I32(HALF_ONES << offset + bit)))
    return number


def _merge(builder, by_offset):
    """Sums that were taken at several offsets, as one."""
    lowest, *others = sorted(by_offset)
    value = by_offset[lowest]
    if lowest:
        value = builder.fmul(value, F32(2.0**-lowest))
    for offset in others:
        value = builder.fma(by_offset[offset], F32(2.0**-offset), value)
    return value
