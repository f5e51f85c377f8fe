"""Loads of weights, which are read once: past L1, 16 bytes a lane, several at a time (from 7.5).

The conventions are those of :mod:`.ptx`. Source: the PTX ISA manual.
"""

import functools

from tinygptq.kernels.cuda.ptx import GLOBAL, I32, _address, _assembly, _pack, _unpack, intrinsic, types

LOAD = "ld.global.nc.L1::no_allocate.L2::128B.v4.u32"


@functools.cache
def load_stream_pieces(count: int):
    """The function ``(array, index)`` -> ``4 * count`` uint32: ``count`` times 16 bytes that are read once, 512 bytes apart:
    ld.global.nc, past L1, in this order and place.

    With ``index`` 16 bytes further for each lane, the warp reads ``512 * count`` bytes in one piece.
    """
    text = f"{LOAD} {{{{$0, $1, $2, $3}}}}, [$4 + {{}}];"

    @intrinsic
    def load(typingctx, array, index):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args, GLOBAL)
            return _pack(builder, _load(builder, count, text, [address]))

        return types.UniTuple(types.uint32, 4 * count)(array, types.int64), generate

    return load


@functools.cache
def load_stream_pieces_if(count: int):
    """As :func:`load_stream_pieces`, ``(array, index, wanted)``: where not ``wanted``, nothing is read, words are undefined.

    Unlike a branch it leaves the assembler free to ask for the words before work that stands in front of it.
    """
    text = f"{{{{.reg .pred p; setp.ne.u32 p, $5, 0; @p {LOAD} {{{{$0, $1, $2, $3}}}}, [$4 + {{}}];}}}}"

    @intrinsic
    def load(typingctx, array, index, wanted):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args[:2], GLOBAL)
            return _pack(builder, _load(builder, count, text, [address, builder.zext(args[2], I32)]))

        return types.UniTuple(types.uint32, 4 * count)(array, types.int64, types.boolean), generate

    return load


@functools.cache
def reload_stream_pieces(count: int, pieces: tuple[int, ...]):
    """The function ``(words, array, index)``: what :func:`load_stream_pieces` gives, of which only these pieces are read and
    the others stay as they are in ``words``.

    Called when their words have been used, and not before, it lets the new ones come to the same registers. A copy from
    others, at the end of a loop, would wait for memory.
    """

    @intrinsic
    def reload(typingctx, words, array, index):
        def generate(context, builder, signature, args):
            address, result = _address(context, builder, signature.args[1], *args[1:], GLOBAL), _unpack(builder, args[0])
            for piece in pieces:
                text = f"{LOAD} {{{{$0, $1, $2, $3}}}}, [$4 + {512 * piece} + {{}}];"
                result[4 * piece : 4 * piece + 4] = _load(builder, 1, text, [address])
            return _pack(builder, result)

        kind = types.UniTuple(types.uint32, 4 * count)
        return kind(kind, array, types.int64), generate

    return reload


def _load(builder, count, text, operands):
    """``count`` loads of four registers, ``text`` being given the distance of each in bytes."""
    constraints, words = "=r,=r,=r,=r,l" + ",r" * (len(operands) - 1), []
    for i in range(count):
        words += _unpack(builder, _assembly(builder, [I32] * 4, text.format(512 * i), constraints, operands, True))
    return words
