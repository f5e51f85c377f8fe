"""The PTX instructions the kernels use, each as one function that a Numba kernel can call.

A 32-bit register that holds two fp16 numbers is a *half2*, kept in a ``uint32``: element 0 in the low half. An *index*
counts an array's elements from its first, whatever the array's shape; arrays are C-contiguous. Of an array in global memory
a kernel may have the address alone (int64), which is one argument and not seven, and stands for an array of uint32.
Functions that move 16 bytes need an address that is a multiple of 16.

mma.m16n8k16 multiplies a 16 x 16 tile A by a 16 x 8 tile B and adds to a 16 x 8 tile C. Each tile is spread over the 32
lanes of a warp; with g = lane // 4 and t = lane % 4, lane's registers hold::

    A (row, k)       k: 2t, 2t+1     2t+8, 2t+9      B (k, col)     col g          C (row, col)   col: 2t     2t+1
    row g               a[0]           a[2]          k: 2t, 2t+1     b[0]          row g            c[0]      c[1]
    row g+8             a[1]           a[3]          k: 2t+8, 2t+9   b[1]          row g+8          c[2]      c[3]

The sum over k may run in any order: A and B need only agree on which k a place stands for.

Source: the PTX ISA manual. "From sm_xy" is the lowest compute capability that has the instruction.
"""

import functools

from llvmlite import ir

from tinygptq.kernels.cuda.runtime import cuda  # first: it may have to help numba-cuda load

types, intrinsic = cuda.types, cuda.extending.intrinsic

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
U32X4, U32X2, F32X2 = types.UniTuple(types.uint32, 4), types.UniTuple(types.uint32, 2), types.UniTuple(types.float32, 2)
F32X4 = types.UniTuple(types.float32, 4)
GLOBAL, SHARED = 1, 3  # LLVM's numbers of the address spaces


def _assembly(builder, result, text, constraints, operands, side_effects=False):
    """Emit one instruction; ``result`` is an LLVM type, or a list of them for an instruction with several results.

    Side effects keep the instruction where it stands; without them it may be moved, merged or dropped like an addition.
    """
    several = isinstance(result, list)
    returned = result if not several else result[0] if len(result) == 1 else ir.LiteralStructType(result)
    if side_effects:
        constraints += ",~{memory}"
    kind = ir.FunctionType(returned, [operand.type for operand in operands])
    value = builder.call(ir.InlineAsm(kind, text, constraints.lstrip(","), side_effect=side_effects), operands)
    if not several:
        return value
    return _pack(builder, [value] if len(result) == 1 else [builder.extract_value(value, i) for i in range(len(result))])


def _pack(builder, values):
    """Values of one type to what Numba's UniTuple is in LLVM."""
    packed = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        packed = builder.insert_value(packed, value, i)
    return packed


def _unpack(builder, values):
    return [builder.extract_value(values, i) for i in range(values.type.count)]


def _address(context, builder, array_type, array, index, space):
    """Where element ``index`` lies: an i64 in global memory, an i32 in shared memory."""
    if isinstance(array_type, types.Integer):
        return builder.add(array, builder.shl(index, I64(2)))
    data = context.make_array(array_type)(context, builder, value=array).data
    pointer = builder.gep(data, [index])
    pointer = builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, space))
    return builder.ptrtoint(pointer, I64 if space == GLOBAL else I32)


# Loads and stores of 16 bytes


@functools.cache
def load_words(count: int):
    """The function ``(array, index)`` -> 1, 2 or 4 uint32 of global memory at once: ld.global.nc, through L1; from sm_50.

    The address must be a multiple of all the bytes loaded.
    """
    vector = "" if count == 1 else f".v{count}"
    registers = ", ".join(f"${i}" for i in range(count))

    @intrinsic
    def load(typingctx, array, index):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args, GLOBAL)
            text = f"ld.global.nc{vector}.u32 {{{registers}}}, [${count}];" if count > 1 else "ld.global.nc.u32 $0, [$1];"
            return _assembly(builder, [I32] * count, text, "=r," * count + "l", [address])

        return types.UniTuple(types.uint32, count)(array, types.int64), generate

    return load


def load_in_place(instruction: str, count: int, space: int):
    """The function ``(array, index)`` -> 2 or 4 uint32 at once, by an instruction that stays in its place."""
    registers, register = ", ".join(f"${i}" for i in range(count)), "l" if space == GLOBAL else "r"

    @intrinsic
    def load(typingctx, array, index):
        def generate(context, builder, signature, args):
            address = _address(context, builder, signature.args[0], *args, space)
            text = f"{instruction} {{{registers}}}, [${count}];"
            return _assembly(builder, [I32] * count, text, "=r," * count + register, [address], True)

        return types.UniTuple(types.uint32, count)(array, types.int64), generate

    return load


load_16_bytes = load_in_place("ld.global.cg.v4.u32", 4, GLOBAL)
"""16 bytes of global memory that another block of this kernel wrote, past L1: ld.global.cg.v4; from sm_50."""

load_shared = load_in_place("ld.shared.v4.u32", 4, SHARED)
"""16 bytes of shared memory: ld.shared.v4; from sm_50."""


@intrinsic
def float_from_bits(typingctx, word):
    """The float32 whose bits are ``word``; no instruction at all."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], F32)

    return types.float32(types.uint32), generate


@intrinsic
def store_16_bytes(typingctx, array, index, values):
    """Four uint32 to 16 bytes of global memory: st.global.v4; from sm_50."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args[:2], GLOBAL)
        operands = [address, *_unpack(builder, args[2])]
        return _assembly(builder, ir.VoidType(), "st.global.v4.u32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", operands, True)

    return types.void(array, types.int64, U32X4), generate


# Bits and half2 arithmetic


@intrinsic
def and_or(typingctx, word, mask, bits):
    """``word & mask | bits`` in one instruction: lop3.b32, table 0xEA; from sm_50."""

    def generate(context, builder, signature, args):
        return _assembly(builder, I32, "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", args)

    return types.uint32(types.uint32, types.uint32, types.uint32), generate


@intrinsic
def pick_bytes(typingctx, low, high, selector):
    """Four of the eight bytes of (low, high), numbered 0..7 from the lowest: digit i of ``selector`` (base 16) is the source
    of byte i. prmt.b32; from sm_50."""

    def generate(context, builder, signature, args):
        return _assembly(builder, I32, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", args)

    return types.uint32(types.uint32, types.uint32, types.uint32), generate


@intrinsic
def sub_half2(typingctx, a, b):
    """``a - b`` in each half: sub.rn.f16x2; from sm_53."""

    def generate(context, builder, signature, args):
        return _assembly(builder, I32, "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", args)

    return types.uint32(types.uint32, types.uint32), generate


@intrinsic
def mul_half2(typingctx, a, b):
    """``a * b`` in each half: mul.rn.f16x2; from sm_53."""

    def generate(context, builder, signature, args):
        return _assembly(builder, I32, "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", args)

    return types.uint32(types.uint32, types.uint32), generate


@intrinsic
def half2_from_floats(typingctx, low, high):
    """Two float32 rounded to nearest even into a half2: two cvt.rn.f16.f32; from sm_53."""

    def generate(context, builder, signature, args):
        text = "{.reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h};}"
        return _assembly(builder, I32, text, "=r,f,f", args)

    return types.uint32(types.float32, types.float32), generate


@intrinsic
def half2_to_floats(typingctx, pair):
    """The two float32 that a half2 stands for: two cvt.f32.f16; from sm_53."""

    def generate(context, builder, signature, args):
        text = "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
        return _assembly(builder, [F32] * 2, text, "=f,=f,r", args)

    return F32X2(types.uint32), generate


# Tensor cores


@intrinsic
def mma(typingctx, a, b, c):
    """``a @ b + c`` of a whole warp, fp16 in, float32 sums: mma.sync.m16n8k16; from sm_80. Fragments: see the module.

    Args: four half2 of A, two half2 of B, four float32 of C. Returns four float32 laid out as C.
    """

    def generate(context, builder, signature, args):
        return _pack(builder, mma_assembly(builder, *(_unpack(builder, values) for values in args)))

    return F32X4(U32X4, U32X2, F32X4), generate


def mma_assembly(builder, a, b, c):
    """:func:`mma` for code that is written with LLVM's builder: from and to lists of registers."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};"
    )
    operands = [*a, *b, *c]
    return _unpack(builder, _assembly(builder, [F32] * 4, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", operands))


# Copies from global to shared memory that pass by no register


@intrinsic
def copy_async_commit(typingctx):
    """Close a group: every copy this thread has started since the last one. cp.async.commit_group; from sm_80."""

    def generate(context, builder, signature, args):
        return _assembly(builder, ir.VoidType(), "cp.async.commit_group;", "", [], True)

    return types.void(), generate


@intrinsic
def copy_async_wait(typingctx, pending):
    """Wait until at most ``pending`` (a constant) of this thread's groups are unfinished: cp.async.wait_group; from sm_80.

    It speaks for this thread's copies only: a barrier must follow before other threads read them.
    """
    if not isinstance(pending, types.IntegerLiteral):
        return None
    text = f"cp.async.wait_group {pending.literal_value};"

    def generate(context, builder, signature, args):
        return _assembly(builder, ir.VoidType(), text, "", [], True)

    return types.void(pending), generate


@intrinsic
def copy_async_or_zero(typingctx, shared, shared_index, array, index, wanted):
    """Start copying 16 bytes from global to shared memory, past L1: cp.async.cg; from sm_80.

    Where ``wanted`` is false, nothing is read and the 16 bytes become 0.
    """

    def generate(context, builder, signature, args):
        to = _address(context, builder, signature.args[0], *args[:2], SHARED)
        source = _address(context, builder, signature.args[2], *args[2:4], GLOBAL)
        size = builder.select(args[4], I32(16), I32(0))
        text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        return _assembly(builder, ir.VoidType(), text, "r,l,r", [to, source, size], True)

    return types.void(shared, types.int64, array, types.int64, types.boolean), generate


@functools.cache
def copy_async_pair_if(further: int):
    """The function ``(shared, shared_index, array, index, wanted, first, second)``: :func:`copy_async_or_zero` of two pieces
    of 16 bytes, 128 bytes apart here and there; nothing where not ``wanted``.

    They come ``further`` bytes from where the index says. What is not to be read, ``first`` or ``second``, becomes 0. Lines
    are fetched whole into the L2; from sm_80.
    """
    copy = "@wanted cp.async.cg.shared.global.L2::128B"
    text = (
        "{.reg .pred wanted; setp.ne.u32 wanted, $2, 0;"
        f" {copy} [$0 + {further}], [$1], 16, $3; {copy} [$0 + {further + 128}], [$1 + 128], 16, $4;}}"
    )

    @intrinsic
    def copy_pair(typingctx, shared, shared_index, array, index, wanted, first, second):
        def generate(context, builder, signature, args):
            to = _address(context, builder, signature.args[0], *args[:2], SHARED)
            source = _address(context, builder, signature.args[2], *args[2:4], GLOBAL)
            flag = builder.select(args[4], I32(1), I32(0))
            sizes = [builder.select(inside, I32(16), I32(0)) for inside in args[5:]]
            return _assembly(builder, ir.VoidType(), text, "r,l,r,r,r", [to, source, flag, *sizes], True)

        flags = (types.boolean,) * 3
        return types.void(shared, types.int64, array, types.int64, *flags), generate

    return copy_pair


@intrinsic
def sync_team(typingctx, number, threads):
    """Wait for so many threads of the block (a constant), whole warps that all give the same number, 1 to 15.

    barrier.sync.aligned; from sm_70.
    """

    def generate(context, builder, signature, args):
        text = f"barrier.sync.aligned $0, {threads.literal_value};"
        return _assembly(builder, ir.VoidType(), text, "r", [builder.trunc(args[0], I32)], True)

    if not isinstance(threads, types.IntegerLiteral):
        return None
    return types.void(types.int64, threads), generate


# Results


@intrinsic
def store_8_bytes(typingctx, array, index, values):
    """Two uint32 to 8 bytes of global memory (8-byte aligned): st.global.v2; from sm_50."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], *args[:2], GLOBAL)
        operands = [address, *_unpack(builder, args[2])]
        return _assembly(builder, ir.VoidType(), "st.global.v2.u32 [$0], {$1, $2};", "l,r,r", operands, True)

    return types.void(array, types.int64, U32X2), generate


@intrinsic
def bits_from_float(typingctx, number):
    """The bits of a float32 as uint32; no instruction at all."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), generate
