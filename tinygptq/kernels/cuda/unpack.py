"""Codes to fp16 in registers, without a conversion instruction.

An fp16 number between 1024 and 2048 has the bits ``0x6400 | m`` for 1024 + m: m is its mantissa, 10 bits. So ``and`` a pair
of codes out of a word, ``or`` 0x6400 into both halves (one ``lop3``), and a half2 of 1024 + code is there; subtracting
1024 + zero leaves ``code - zero``, exactly. A pair that stands ``bits`` higher in the word gives 1024 + code * 2^bits, and
one fma by 2^-bits makes ``code - zero`` of it as well, so that only every second place needs a shift.
"""

import itertools

import numpy as np
from llvmlite import ir

from tinygptq.kernels.cuda.layout import HALF_ONES, place_of
from tinygptq.kernels.cuda.ptx import I32, U32X4, _pack, _unpack, intrinsic, types

U32X16 = types.UniTuple(types.uint32, 16)
MAGIC = 0x64006400  # 1024 in both halves


def half2(value: float) -> int:
    """The half2 with ``value`` in both halves."""
    return int(np.float16(value).view(np.uint16)) * HALF_ONES


def upper_place(bits: int) -> float:
    """What 1024 becomes in an upper place: 1024 / 2^bits. Zero for 8 bits, where each code gets a shift of its own."""
    return 1024 / 2**bits if bits < 8 else 0


def constant_offsets(bits: int, zero: int) -> tuple[int, int]:
    """(lower, upper) half2 constants that turn a masked pair into ``code - zero``: lower is subtracted, upper is added."""
    return half2(1024 + zero), half2(-(upper_place(bits) + zero))


def levels(bits: int, unit: int):
    """The device function ``(words, lower, upper)`` -> 16 half2 of ``code - zero``: pair i of column c at place 4c + i.

    Args of the device function:
        words: the ``4 * bits`` words of a lane's chunk; word w of column c is words[4w + c].
        lower, upper: four half2 each, one for each column, as :func:`constant_offsets` makes them.
    """

    def generate(context, builder, signature, args):
        words, lower, upper = (_unpack(builder, values) for values in args)
        pairs = itertools.product(range(4), range(4))
        return _pack(builder, [emit_level(builder, bits, unit, words, c, i, lower[c], upper[c]) for c, i in pairs])

    @intrinsic
    def unit_levels(typingctx, words, lower, upper):
        return U32X16(words, U32X4, U32X4), generate

    return unit_levels


def emit_level(builder, bits, unit, words, column, pair, lower, upper):
    """The instructions of one half2 of :func:`levels`: lists of registers, and the column's lower and upper, in."""
    place = place_of(bits, unit, pair)
    if place is None:
        return _subtract(builder, _spread_pair(builder, words, column), lower)
    word, shift = words[4 * place[0] + column], place[1]
    in_upper = bits < 8 and shift // bits % 2 == 1
    if shift := shift - bits * in_upper:
        word = builder.lshr(word, I32(shift))
    mask = ((1 << bits) - 1) * HALF_ONES
    number = _and_or(builder, word, I32(mask << bits if in_upper else mask), I32(MAGIC))
    if in_upper:
        return _call(builder, "fma.rn.f16x2 $0, $1, $2, $3;", number, I32(half2(2.0**-bits)), upper)
    return _subtract(builder, number, lower)


def _spread_pair(builder, words, column):
    """Pair 15 of 3 bits: bit b of its codes is bit 15 of the halves of word b."""
    number = I32(MAGIC)
    for bit in range(3):
        word = builder.lshr(words[4 * bit + column], I32(15 - bit))
        number = _and_or(builder, word, I32(HALF_ONES << bit), number)
    return number


def _and_or(builder, a, b, c):
    return _call(builder, "lop3.b32 $0, $1, $2, $3, 0xEA;", a, b, c)


def _subtract(builder, number, lower):
    return _call(builder, "sub.rn.f16x2 $0, $1, $2;", number, lower)


def _call(builder, text, *operands):
    kind = ir.FunctionType(I32, [I32] * len(operands))
    return builder.call(ir.InlineAsm(kind, text, "=r" + ",r" * len(operands), side_effect=False), operands)
