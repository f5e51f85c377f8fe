"""Codes to fp16 in registers, without a conversion instruction.

An fp16 number between 1024 and 2048 has the bits ``0x6400 | m`` for 1024 + m: m is its mantissa, 10 bits. So ``and`` a pair
of codes out of a word, ``or`` 0x6400 into both halves (one ``lop3``), and a half2 of 1024 + code is there; subtracting
1024 + zero leaves ``code - zero``, exactly. A pair that stands ``o`` bits higher in the word gives 1024 + code * 2^o, and
one fma by 2^-o makes ``code - zero`` of it as well. So a *window* of several pairs needs but one shift, or none.
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


def places(bits: int) -> int:
    """Pairs of a window: 4, 3 and 2 of 2, 3 and 4 bits. One of 8 bits, where each gets a shift of its own."""
    return {2: 4, 3: 3, 4: 2, 8: 1}[bits]


def base(bits: int, place: int) -> float:
    """What 1024 becomes when the code at a place of the window is brought down to the lowest."""
    return 1024 / 2 ** (bits * place)


def constant_offsets(bits: int, zero: int) -> tuple[int, ...]:
    """The half2 that turns a masked pair into ``code - zero``, for each place of the window: the first is subtracted, the
    others are added."""
    return half2(1024 + zero), *(half2(-(base(bits, place) + zero)) for place in range(1, places(bits)))


def levels(bits: int, unit: int):
    """The device function ``(words, offsets)`` -> 16 half2 of ``code - zero``: pair i of column c at place 4c + i.

    Args of the device function:
        words: the ``4 * bits`` words of a lane's chunk; word w of column c is words[4w + c].
        offsets: four half2, one for each column, for each place of the window, as :func:`constant_offsets` makes them.
    """

    def generate(context, builder, signature, args):
        words, offsets = _unpack(builder, args[0]), unpack_offsets(builder, args[1])
        pairs = itertools.product(range(4), range(4))
        return _pack(builder, [emit_level(builder, bits, unit, words, c, i, offsets) for c, i in pairs])

    @intrinsic
    def unit_levels(typingctx, words, offsets):
        return U32X16(words, offsets_type(bits)), generate

    return unit_levels


def offsets_type(bits: int) -> types.UniTuple:
    """What :func:`levels` takes."""
    return types.UniTuple(U32X4, places(bits))


def unpack_offsets(builder, offsets) -> list[list]:
    """The same as lists of registers, [place][column]."""
    return [_unpack(builder, columns) for columns in _unpack(builder, offsets)]


def emit_level(builder, bits, unit, words, column, pair, offsets):
    """The instructions of one half2 of :func:`levels`: lists of registers in."""
    found = place_of(bits, unit, pair)
    if found is None:
        return _subtract(builder, _spread_pair(builder, words, column), offsets[0][column])
    word, shift = words[4 * found[0] + column], found[1]
    place = shift // bits % places(bits)
    up = bits * place
    if shift > up:
        word = builder.lshr(word, I32(shift - up))
    number = _and_or(builder, word, I32(((1 << bits) - 1 << up) * HALF_ONES), I32(MAGIC))
    if not place:
        return _subtract(builder, number, offsets[0][column])
    return _call(builder, "fma.rn.f16x2 $0, $1, $2, $3;", number, I32(half2(2.0**-up)), offsets[place][column])


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
