"""PTX instructions for blocks of one cluster, which can read each other's shared memory (from 9.0).

The conventions are those of :mod:`.ptx`. Source: the PTX ISA manual.
"""

from llvmlite import ir

from tinygptq.kernels.cuda.ptx import F32, SHARED, _address, _assembly, intrinsic, types


@intrinsic
def cluster_barrier(typingctx):
    """Wait for all threads of the cluster; what they wrote to shared memory before can be read after: barrier.cluster."""

    def generate(context, builder, signature, args):
        text = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        return _assembly(builder, ir.VoidType(), text, "", [], True)

    return types.void(), generate


@intrinsic
def load_shared_of(typingctx, shared, index, block):
    """A float32 of another block's shared memory, where ``shared[index]`` lies in this one's: mapa and ld.shared::cluster.
    ``block`` is its number in the cluster."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args[:2], SHARED)
        text = "{.reg .b32 there; mapa.shared::cluster.u32 there, $1, $2; ld.shared::cluster.f32 $0, [there];}"
        return _assembly(builder, F32, text, "=f,r,r", [address, args[2]], True)

    return types.float32(shared, types.int64, types.int32), generate
