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

    @intrinsic
    def load(typingctx, array, index):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args, GLOBAL)
            words = []
            for i in range(count):
                text = f"{LOAD} {{$0, $1, $2, $3}}, [$4 + {512 * i}];"
                words += _unpack(builder, _assembly(builder, [I32] * 4, text, "=r,=r,=r,=r,l", [address], True))
            return _pack(builder, words)

        return types.UniTuple(types.uint32, 4 * count)(array, types.int64), generate

    return load
