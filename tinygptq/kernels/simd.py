"""Eight numbers at a time: the few vector instructions that the CPU kernels are written in.

Numba turns loops over scalars into vector code by itself, but not into *this* code: it has no 16-bit floats on the CPU,
and it does not know the instruction that multiplies pairs of 16-bit integers. So this module teaches it two types,

    ``i32x8``  eight int32        ``f32x8``  eight float32

with ``+ - * & |`` between equals, and the functions below. All of it is ordinary LLVM vector code, which LLVM turns into
AVX2, into pairs of SSE registers or into NEON, as the machine has it. Addresses are plain int64, in bytes: kernels walk
over tables of them (``array.ctypes.data``), and whoever makes such a table keeps its arrays alive. Functions of plain
numbers also compile several times faster.
"""

from __future__ import annotations

import functools
import operator

from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# For functions that only compiled code calls: no entry points for Python or C, and no check for division by zero.
inner = functools.partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")

LANES = 8  # numbers in one vector: 8 x 32 bits, an AVX2 register
_I1, _I16, _I32, _I64 = ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F16, _F32 = ir.HalfType(), ir.FloatType()
_I16X8, _I32X8, _F32X8 = ir.VectorType(_I16, LANES), ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_I16X16, _I32X16 = ir.VectorType(_I16, 2 * LANES), ir.VectorType(_I32, 2 * LANES)


# ------------------------------------------------------------------------------------------ the two types


class IntVector(types.Type):
    """The class of ``i32x8``."""


class FloatVector(types.Type):
    """The class of ``f32x8``."""


i32x8, f32x8 = IntVector(name="i32x8"), FloatVector(name="f32x8")


@register_model(IntVector)
class _IntVectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _I32X8)


@register_model(FloatVector)
class _FloatVectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _F32X8)


def _declare_operator(function, vector: types.Type, instruction: str) -> None:
    """Let Numba compile ``a <operator> b`` of two such vectors into the LLVM instruction of that name."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            return signature(vector, vector, vector) if args == (vector, vector) else None

    infer_global(function)(Template)
    lower_builtin(function, vector, vector)(lambda context, builder, sig, args: getattr(builder, instruction)(*args))


for _symbol, _on_int, _on_float in (
    (operator.add, "add", "fadd"),
    (operator.sub, "sub", "fsub"),
    (operator.mul, "mul", "fmul"),
    (operator.and_, "and_", None),
    (operator.or_, "or_", None),
):
    _declare_operator(_symbol, i32x8, _on_int)
    if _on_float:
        _declare_operator(_symbol, f32x8, _on_float)


def instruction(result, *arguments):
    """Make ``emit(builder, *values) -> value`` callable from compiled code, with these fixed Numba types."""
    sig = signature(result, *arguments)

    def declare(emit):
        def codegen(context, builder, _, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if result is types.void else value

        @functools.wraps(emit)  # Numba reads the number of arguments from emit's signature, and skips the first
        def typing(typingctx, *_):
            return sig, codegen

        return intrinsic(typing)

    return declare


# ------------------------------------------------------------------------------------------ memory


def _load(builder, address, kind: ir.Type, align: int):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(builder, address, value, align: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def _splat(builder, scalar):
    kind = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_I32X8, [0] * LANES))


def _splat_bits(builder, value: int):
    return ir.Constant(_I32X8, [value] * LANES)


@instruction(i32x8, types.int64)
def load_i32(builder, address):
    """Eight int32 from an address (a multiple of 4)."""
    return _load(builder, address, _I32X8, 4)


@instruction(i32x8, types.int64)
def load_u16(builder, address):
    """Eight uint16, widened to int32."""
    return builder.zext(_load(builder, address, _I16X8, 2), _I32X8)


@instruction(f32x8, types.int64)
def load_f32(builder, address):
    """Eight float32."""
    return _load(builder, address, _F32X8, 4)


@instruction(f32x8, types.int64)
def load_f16(builder, address):
    """Eight float16, widened to float32 (one instruction, vcvtph2ps, where the machine has F16C)."""
    return builder.fpext(_load(builder, address, ir.VectorType(_F16, LANES), 2), _F32X8)


@instruction(f32x8, types.int64)
def load_bf16(builder, address):
    """Eight bfloat16, widened to float32: the same bits, sixteen places up."""
    bits = builder.zext(_load(builder, address, _I16X8, 2), _I32X8)
    return builder.bitcast(builder.shl(bits, _splat_bits(builder, 16)), _F32X8)


@instruction(i32x8, types.int64)
def load_splat_i32(builder, address):
    """One int32, in all eight lanes."""
    return _splat(builder, _load(builder, address, _I32, 4))


@instruction(types.int64, types.int64, types.int64)
def get(builder, table, place):
    """Number ``place`` of a table of int64."""
    return _load(builder, builder.add(table, builder.mul(place, _I64(8))), _I64, 8)


@instruction(types.void, types.int64, types.int64, types.int64)
def put(builder, table, place, value):
    """Set number ``place`` of a table of int64."""
    _store(builder, builder.add(table, builder.mul(place, _I64(8))), value, 8)


@instruction(types.int64, types.int64)
def read_i32(builder, address):
    """One int32, as an ordinary integer."""
    return builder.sext(_load(builder, address, _I32, 4), _I64)


@instruction(types.int64, types.int64)
def read_u32(builder, address):
    """One uint32, as an ordinary integer."""
    return builder.zext(_load(builder, address, _I32, 4), _I64)


@instruction(types.void, types.int64, types.int64)
def write_u32(builder, address, value):
    """The lower 32 bits of an integer to an address."""
    _store(builder, address, builder.trunc(value, _I32), 4)


@instruction(types.float32, types.int64)
def read_f32(builder, address):
    """One float32, as an ordinary number."""
    return _load(builder, address, _F32, 4)


@instruction(types.float32, types.int64)
def read_f16(builder, address):
    """One float16, as a float32."""
    return builder.fpext(_load(builder, address, _F16, 2), _F32)


@instruction(types.float32, types.int64)
def read_bf16(builder, address):
    """One bfloat16, as a float32."""
    bits = builder.zext(_load(builder, address, _I16, 2), _I32)
    return builder.bitcast(builder.shl(bits, ir.Constant(_I32, 16)), _F32)


@instruction(types.void, types.int64, f32x8)
def store_f32(builder, address, vector):
    """Eight float32 to an address."""
    _store(builder, address, vector, 4)


@instruction(types.void, types.int64, i32x8)
def store_i32(builder, address, vector):
    """Eight int32 to an address."""
    _store(builder, address, vector, 4)


@instruction(types.void, types.int64, types.float32)
def write_f32(builder, address, value):
    """One float32 to an address."""
    _store(builder, address, value, 4)


@instruction(types.void, types.int64)
def prefetch(builder, address):
    """Ask for the cache line at an address that will be read soon; it may lie beyond the end of an array."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    read, keep, data = _I32(0), _I32(3), _I32(1)
    builder.call(function, [builder.inttoptr(address, pointer), read, keep, data])


# ------------------------------------------------------------------------------------------ arithmetic


@instruction(f32x8, types.float32)
def splat(builder, value):
    """One float32, in all eight lanes."""
    return _splat(builder, value)


@instruction(i32x8, types.int32)
def splat_i32(builder, value):
    """One int32, in all eight lanes."""
    return _splat(builder, value)


@instruction(i32x8, i32x8, types.int32)
def shift_halves(builder, vector, count):
    """Shift each of the sixteen 16-bit halves right by ``count`` places; zeros come in from the left."""
    halves = builder.bitcast(vector, _I16X16)
    counts = _splat(builder, builder.trunc(count, _I16))  # eight of the sixteen
    counts = builder.shuffle_vector(counts, counts, ir.Constant(_I32X16, [0] * 16))
    return builder.bitcast(builder.lshr(halves, counts), _I32X8)


@instruction(i32x8, i32x8, i32x8)
def dot_pairs(builder, a, b):
    """In each lane, ``a_low * b_low + a_high * b_high`` of the two signed 16-bit halves (vpmaddwd on AVX2).

    Sixteen products in one instruction; LLVM recognises it from this multiply, de-interleave and add.
    """
    a16 = builder.sext(builder.bitcast(a, _I16X16), _I32X16)
    b16 = builder.sext(builder.bitcast(b, _I16X16), _I32X16)
    products = builder.mul(a16, b16)
    low = builder.shuffle_vector(products, products, ir.Constant(_I32X8, list(range(0, 16, 2))))
    high = builder.shuffle_vector(products, products, ir.Constant(_I32X8, list(range(1, 16, 2))))
    return builder.add(low, high)


@instruction(f32x8, i32x8)
def to_f32(builder, vector):
    """int32 to the nearest float32."""
    return builder.sitofp(vector, _F32X8)


@instruction(f32x8, f32x8, f32x8, f32x8)
def fma(builder, a, b, c):
    """``a * b + c``, in one instruction where the machine has one."""
    function = builder.module.declare_intrinsic("llvm.fmuladd.v8f32", (), ir.FunctionType(_F32X8, [_F32X8] * 3))
    return builder.call(function, [a, b, c])


@instruction(types.float32, f32x8)
def total(builder, vector):
    """The sum of the eight lanes: halves added to halves, three times."""
    for step in (4, 2, 1):
        mask = ir.Constant(_I32X8, [(lane + step) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, vector, mask))
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@instruction(f32x8, f32x8, f32x8)
def larger(builder, a, b):
    """The larger of each pair; b's where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@instruction(types.int64, i32x8)
def total_i32(builder, vector):
    """The sum of the eight lanes; it must fit in an int32."""
    for step in (4, 2, 1):
        mask = ir.Constant(_I32X8, [(lane + step) % LANES for lane in range(LANES)])
        vector = builder.add(vector, builder.shuffle_vector(vector, vector, mask))
    return builder.sext(builder.extract_element(vector, ir.Constant(_I32, 0)), _I64)


@instruction(types.float32, f32x8)
def largest(builder, vector):
    """The largest of the eight lanes."""
    for step in (4, 2, 1):
        mask = ir.Constant(_I32X8, [(lane + step) % LANES for lane in range(LANES)])
        other = builder.shuffle_vector(vector, vector, mask)
        vector = builder.select(builder.fcmp_ordered(">", vector, other), vector, other)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@instruction(f32x8, f32x8)
def magnitude(builder, vector):
    """Absolute values: the sign bit cleared."""
    bits = builder.bitcast(vector, _I32X8)
    return builder.bitcast(builder.and_(bits, _splat_bits(builder, 0x7FFFFFFF)), _F32X8)


@instruction(f32x8, f32x8, f32x8)
def divide(builder, a, b):
    """``a / b``, by IEEE rules (x / inf is 0)."""
    return builder.fdiv(a, b)


@instruction(i32x8, i32x8, types.int32)
def shift_right(builder, vector, count):
    """Shift signed int32 right by ``count`` places, rounding towards minus infinity."""
    return builder.ashr(vector, _splat(builder, count))


@instruction(i32x8, i32x8, types.int32)
def shift_left(builder, vector, count):
    """Shift int32 left by ``count`` places."""
    return builder.shl(vector, _splat(builder, count))


@instruction(f32x8, f32x8, f32x8)
def smaller(builder, a, b):
    """The smaller of each pair; b's where either is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@instruction(f32x8, i32x8)
def power_of_two(builder, exponent):
    """``2^e`` for e in -127 .. 128, made by writing the exponent's bits; -127 gives zero, 128 infinity."""
    biased = builder.add(exponent, _splat_bits(builder, 127))
    return builder.bitcast(builder.shl(biased, _splat_bits(builder, 23)), _F32X8)


@instruction(i32x8, f32x8)
def nearest(builder, vector):
    """float32 (below 2^31) to the nearest int32."""
    function = builder.module.declare_intrinsic("llvm.rint.v8f32", (), ir.FunctionType(_F32X8, [_F32X8]))
    return builder.fptosi(builder.call(function, [vector]), _I32X8)


@inner
def exp(x):
    """e^x to within 2 units in the last place (Cephes' expf); below -88 it is 0, above 88.4 infinite.

    x = n ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial, 2^n is written into the exponent bits.
    """
    x = larger(splat(-88.02969), x)  # there n is -127, whose power_of_two is zero; a NaN stays NaN
    x = smaller(splat(88.722), x)  # and here 128, infinity
    n = nearest(x * splat(1.44269504))
    whole = to_f32(n)
    r = fma(whole, splat(-0.693359375), x)  # ln 2 in two parts, the first exact in few bits
    r = fma(whole, splat(2.12194440e-4), r)
    p = splat(1.9875691500e-4)
    p = fma(p, r, splat(1.3981999507e-3))
    p = fma(p, r, splat(8.3334519073e-3))
    p = fma(p, r, splat(4.1665795894e-2))
    p = fma(p, r, splat(1.6666665459e-1))
    p = fma(p, r, splat(5.0000001201e-1))
    p = fma(p, r * r, r + splat(1.0))
    return p * power_of_two(n)


# ------------------------------------------------------------------------------------------ calls


@instruction(types.void, types.int64, types.int64, types.int64, types.float32)
def call(builder, function, job, part, number):
    """Call the compiled C function ``void (int64, int64, float32)`` at an address."""
    kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _F32])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [job, part, number])
