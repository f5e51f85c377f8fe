"""More PTX instructions: those that attention needs. The conventions are those of :mod:`.ptx`."""

from tinygptq.kernels.cuda.ptx import F32, GLOBAL, I32, SHARED, U32X4, _address, _assembly, intrinsic, load_in_place, types

load_8_bytes = load_in_place("ld.global.cg.v2.u32", 2, GLOBAL)
"""8 bytes of global memory that another kernel or block wrote, past L1: ld.global.cg.v2; from sm_50."""

load_shared_8_bytes = load_in_place("ld.shared.v2.u32", 2, SHARED)
"""8 bytes of shared memory: ld.shared.v2; from sm_50."""


def _on_number(text: str, register, kind):
    """The function ``(array, index)`` -> one number, by an instruction on it in global memory that stays in its place."""
    constraints = "=f,l" if register is F32 else "=r,l"

    @intrinsic
    def apply(typingctx, array, index):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args, GLOBAL)
            return _assembly(builder, register, text, constraints, [address], True)

        return kind(array, types.int64), generate

    return apply


load_float = _on_number("ld.global.cg.f32 $0, [$1];", F32, types.float32)
"""A float32 of global memory that another block of this kernel wrote, past L1: ld.global.cg; from sm_50."""

arrive = _on_number("atom.acq_rel.gpu.global.add.s32 $0, [$1], 1;", I32, types.int32)
"""Add 1 to an int32 of global memory; returns what it was: atom.acq_rel.gpu.add; from sm_70.

What a block wrote before a barrier that this thread passed, those see that arrive later, after a barrier of their own.
"""

load_acquire = _on_number("ld.acquire.gpu.global.s32 $0, [$1];", I32, types.int32)
"""An int32 of global memory that others add to with :func:`arrive`: ld.acquire.gpu; from sm_70."""


def _load_tiles(variant: str):
    """The function ``(array, index)`` -> four uint32: ldmatrix.x4, with or without ``.trans``."""

    @intrinsic
    def load(typingctx, array, index):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args, SHARED)
            text = f"ldmatrix.sync.aligned.m8n8.x4{variant}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
            return _assembly(builder, [I32] * 4, text, "=r,=r,=r,=r,r", [address], True)

        return U32X4(array, types.int64), generate

    return load


load_tiles = _load_tiles("")
"""Four 8 x 8 tiles of fp16 in shared memory: ldmatrix.x4; from sm_75.

Lane 8i + r gives the place of row r of tile i, 16 bytes. Of each tile a lane gets one half2: row ``lane // 4``, columns ``2
(lane % 4)`` and the next. So four tiles are mma's A (both halves of its rows, then the same of the next 8 k), and two are
its B when rows are B's columns and columns are k.
"""

load_transposed = _load_tiles(".trans")
"""The same, each tile transposed: ldmatrix.x4.trans; from sm_75.

A lane gets column ``lane // 4`` of rows ``2 (lane % 4)`` and the next, which is mma's B when rows are k and columns are B's
columns.
"""
