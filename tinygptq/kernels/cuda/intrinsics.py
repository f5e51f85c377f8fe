"""More PTX instructions: those that attention needs. The conventions are those of :mod:`.ptx`."""

from tinygptq.kernels.cuda.ptx import GLOBAL, I32, SHARED, U32X2, U32X4, _address, _assembly, intrinsic, types


@intrinsic
def load_8_bytes(typingctx, array, index):
    """8 bytes of global memory that another kernel or block wrote, past L1: two uint32. ld.global.cg; from sm_50."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args, GLOBAL)
        return _assembly(builder, [I32] * 2, "ld.global.cg.v2.u32 {$0, $1}, [$2];", "=r,=r,l", [address], True)

    return U32X2(array, types.int64), generate


@intrinsic
def load_transposed(typingctx, array, index):
    """Four 8 x 8 tiles of fp16 in shared memory, each transposed: ldmatrix.x4.trans; from sm_75.

    Lane 8i + r gives the place of row r of tile i, 16 bytes. Of each tile a lane gets one half2: column ``lane // 4`` of
    rows ``2 (lane % 4)`` and the next, which is mma's B when rows are k and columns are B's columns.
    """

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args, SHARED)
        text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
        return _assembly(builder, [I32] * 4, text, "=r,=r,=r,=r,r", [address], True)

    return U32X4(array, types.int64), generate
