"""Instructions of Hopper alone (compute capability 9.0, PTX target sm_90a): products by four warps together, bulk copies.

The conventions are those of :mod:`.ptx`; a place in shared memory is its address in bytes, as int64.

wgmma.mma_async multiplies 64 x 16 numbers A by a 16 x 128 matrix B and adds to C, while the warps go on. Warp w of the four
has rows 16w .. 16w + 15 of A and C, in the registers that mma.m16n8k16 has them in (see :mod:`.ptx`), C as 16 tiles of eight
columns side by side. B lies in shared memory by columns, 16 k of one after the other, here in rows of 32 k (64 bytes)::

    bytes of column n     0..15    16..31   32..47   48..63       of which piece p lies at piece  p ^ (n // 2 % 4)
    k                      0-7      8-15    16-23    24-31        ("swizzle 64 bytes": eight columns lie in eight places)

Products are asked for in *groups*; one may wait until but so many are unfinished. A register of A may not be written before.

A barrier in shared memory (mbarrier) counts arrivals, and bytes that copies are to bring; when nothing is missing its phase
ends. Phases count from 0; who waits names the phase's last bit.

Source: the PTX ISA manual, asynchronous warpgroup level matrix instructions, and mbarrier.
"""

import functools

from llvmlite import ir

from tinygptq.kernels.cuda.ptx import F32, I32, I64, SHARED, U32X4, _address, _assembly, _pack, _unpack, intrinsic, types

COLUMNS = 128  # of B and C
EIGHT_COLUMNS = 8 * 64  # bytes of B from eight columns to the next eight
SUMS = COLUMNS // 2  # numbers of C in a lane
F32X64 = types.UniTuple(types.float32, SUMS)
WAIT = "mbarrier.try_wait.parity.shared::cta.b64"
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


def _same(builder, text, kind, registers):
    """An instruction after which ``registers``, its operands too, have what it may have changed."""
    count = len(registers)
    constraints = ",".join(["=f" if kind is F32 else "=r"] * count + [str(i) for i in range(count)])
    return _unpack(builder, _assembly(builder, [kind] * count, text, constraints, registers, True))


def _order(instruction: str):
    """The function ``()`` for an instruction without operands."""

    @intrinsic
    def order(typingctx):
        def generate(context, builder, signature, args):
            return _assembly(builder, ir.VoidType(), instruction, "", [], True)

        return types.void(), generate

    return order


begin_group = _order("wgmma.fence.sync.aligned;")
"""The registers that the products to come read have been written."""
end_group = _order("wgmma.commit_group.sync.aligned;")
"""Close a group: every product asked for since the last one."""
show_to_copies = _order("fence.proxy.async.shared::cta;")
"""What this thread wrote to shared memory, barriers too, is there for bulk copies."""


@intrinsic
def multiply(typingctx, c, a, b):
    """``a @ b + c`` by four warps: wgmma.mma_async.m64n128k16, fp16 in, float32 sums.

    Args: 64 float32 of C and four half2 of A (fragments: see the module), B's descriptor (:func:`describe`). Returns C.
    """
    sums, a_registers = ", ".join(f"${i}" for i in range(SUMS)), ", ".join(f"${SUMS + i}" for i in range(4))
    text = (
        "{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        f"{{{sums}}}, {{{a_registers}}}, ${SUMS + 4}, p, 1, 1, 0;}}"
    )
    constraints = "=f," * SUMS + "r,r,r,r,l," + ",".join(str(i) for i in range(SUMS))

    def generate(context, builder, signature, args):
        operands = [*_unpack(builder, args[1]), args[2], *_unpack(builder, args[0])]
        return _pack(builder, _unpack(builder, _assembly(builder, [F32] * SUMS, text, constraints, operands, True)))

    return F32X64(F32X64, U32X4, types.int64), generate


@intrinsic
def finished(typingctx, c):
    """The same 64 float32 once all groups are done: wgmma.wait_group 0."""

    def generate(context, builder, signature, args):
        return _pack(builder, _same(builder, "wgmma.wait_group.sync.aligned 0;", F32, _unpack(builder, args[0])))

    return F32X64(F32X64), generate


@functools.cache
def wait_for_all_but_one(count: int):
    """The function ``(words)`` -> the same ``count`` uint32, when at most one group is unfinished: wgmma.wait_group 1.

    What is computed from them can then be no register that an earlier group still reads.
    """

    @intrinsic
    def wait(typingctx, words):
        def generate(context, builder, signature, args):
            return _pack(builder, _same(builder, "wgmma.wait_group.sync.aligned 1;", I32, _unpack(builder, args[0])))

        return words(words), generate

    return wait


@intrinsic
def spread_sums(typingctx, array, c):
    """The 64 float32 of C to a local array, which can be indexed in a loop; no instruction at all once it is unrolled."""

    def generate(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, value=args[0]).data
        for i, value in enumerate(_unpack(builder, args[1])):
            builder.store(value, builder.gep(data, [I64(i)]))

    return types.void(array, F32X64), generate


# Shared memory, barriers and copies


@intrinsic
def place_of_shared(typingctx, array):
    """The place of a shared array."""

    def generate(context, builder, signature, args):
        return builder.zext(_address(context, builder, signature.args[0], args[0], I64(0), SHARED), I64)

    return types.int64(array), generate


def describe(place):
    """B's descriptor: its place and the distance of eight columns, both in units of 16 bytes; swizzle 64 bytes.

    Adding ``bytes // 16`` to a descriptor moves the matrix. Plain integers, for compiled code and for NumPy alike.
    """
    return ((place & 0x3FFFF) >> 4) | (1 << 16) | (EIGHT_COLUMNS // 16 << 32) | (-1 << 63)


def _on_places(text: str, constraints: str, kinds: str):
    """The function for an instruction without result; int64 operands that ``kinds`` marks ``r`` are cut to 32 bits."""

    def generate(context, builder, signature, args):
        operands = [builder.trunc(a, I32) if kind == "r" else a for a, kind in zip(args, kinds, strict=True)]
        return _assembly(builder, ir.VoidType(), text, constraints, operands, True)

    return types.void(*[types.int64] * len(kinds)), generate


@intrinsic
def make_barrier(typingctx, barrier, arrivals):
    """A barrier whose phase ends after so many arrivals: mbarrier.init."""
    return _on_places("mbarrier.init.shared::cta.b64 [$0], $1;", "r,r", "rr")


@intrinsic
def wait_for_phase(typingctx, barrier, parity):
    """Wait until the phase whose number ends in bit ``parity`` is over: mbarrier.try_wait, again and again."""
    text = f"{{.reg .pred p; WAIT${{:uid}}: {WAIT} p, [$0], $1; @!p bra WAIT${{:uid}};}}"
    return _on_places(text, "r,r", "rr")


@intrinsic
def arrive_if(typingctx, wanted, barrier):
    """Arrive at a barrier where ``wanted`` is not 0: mbarrier.arrive."""
    text = "{.reg .pred p; setp.ne.b32 p, $0, 0; @p mbarrier.arrive.shared::cta.b64 _, [$1];}"
    return _on_places(text, "r,r", "rr")


@functools.cache
def copy_bulk_if(count: int):
    """The function ``(wanted, to, source, barrier)``: where ``wanted`` is not 0, arrive at a barrier and start copying
    ``count`` bytes from a global address, whose arrival its phase waits for too: cp.async.bulk.

    Both ends are multiples of 16 bytes.
    """
    text = (
        "{.reg .pred p; setp.ne.b32 p, $0, 0;"
        f" @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], {count}; @p {COPY} [$1], [$2], {count}, [$3];}}"
    )

    @intrinsic
    def copy(typingctx, wanted, to, source, barrier):
        return _on_places(text, "r,r,l,r", "rrlr")

    return copy
