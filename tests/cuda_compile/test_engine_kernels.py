"""The kernels of the GPU's engine compile without a GPU, hold what they are built on and keep their sums in registers."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra [cuda])", allow_module_level=True)

from numba.cuda import types

from tinygptq import ops
from tinygptq.cuda.weights import TURN, alternating
from tinygptq.kernels.cuda import cache_codec, decode_attention, dense, draw, epilogues, prefill_attention, rows

F16, F32, F64, I32, I8 = types.float16, types.float32, types.float64, types.int32, types.int8
MMA, WAIT = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "griddepcontrol.wait"


def array(dtype, dimensions):
    return types.Array(dtype, dimensions, "C")


def together(*parts):
    return types.Tuple.from_types(parts)


def check(kernel, signature, capability, *instructions):
    ptx = kernel.ptx(signature, capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry" in ptx
    for instruction in instructions:
        assert instruction in ptx
    assert (WAIT in ptx) <= (capability >= (9, 0))  # older cards do not have it
    assert not re.search(r"\bst\.local", ptx)
    return ptx


@pytest.mark.parametrize("capability,bits,splits", [((8, 0), 16, 5), ((9, 0), 8, 2)])
def test_decode_attention(capability, bits, splits):
    numbers = F16 if bits == 16 else I8
    cache = together(array(numbers, 4), array(numbers, 4), array(F16, 1), array(F16, 1))
    signature = (*[array(F32, 2)] * 3, array(I32, 1), cache, array(I32, 1), array(F32, 1), array(I32, 1), array(F16, 2))
    kernel = decode_attention.decode_attention_kernel(6, 2, 64, bits, splits)
    check(kernel, signature, capability, MMA, "ex2.approx", "atom.", *([WAIT] if capability >= (9, 0) else []))


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
def test_prefill_attention(capability):
    tables = array(F32, 2), array(F32, 2)
    signature = (array(F16, 2), *tables, array(F16, 3), array(F16, 3), types.int64, array(F16, 2))
    kernel = prefill_attention.prefill_attention_kernel(6, 2, 64, 64)
    check(kernel, signature, capability, MMA, "ldmatrix.sync.aligned.m8n8.x4.trans", "cp.async.cg.shared.global")


SQUARES = (array(F32, 2), array(F32, 2))


@pytest.mark.parametrize(
    "capability,epilogue,y,extra",
    [
        ((8, 0), epilogues.normed(96, 1e-5, True), array(F32, 2), (*SQUARES, array(F32, 1))),
        ((8, 9), epilogues.swiglu(96, 1e-5, False), array(F16, 2), (*SQUARES, array(F32, 1))),
        ((9, 0), epilogues.residual(96, 1e-5, False), array(F32, 2),
         (SQUARES[0], array(F32, 1), array(F32, 1), array(I32, 1), array(F16, 2), SQUARES[0])),
    ],
)  # fmt: skip
def test_dense_products_and_epilogues(capability, epilogue, y, extra):
    kernel = dense.dense_kernel(1 if capability == (9, 0) else 2, epilogue)
    signature = array(F16, 2), array(F16, 2), y, together(*extra)
    check(kernel, signature, capability, MMA, "ld.global.nc.L1::no_allocate.L2::128B.v4.u32")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_small_layers(capability):
    embed = rows.embed_kernel(96, 1e-5)
    order, norm = array(I32, 1), array(F32, 1)
    check(
        embed, (array(F16, 2), order, norm, order, array(F32, 2), array(F16, 2), array(F32, 3)), capability, "rsqrt.approx"
    )
    check(
        rows.add_norm_kernel(96, 1e-5, True, capability == (9, 0)),
        (array(F32, 2), array(F16, 2), norm, order, array(F16, 2)),
        capability,
    )
    check(rows.swiglu, (array(F16, 2), array(F16, 2)), capability, "ex2.approx")
    cache = together(array(F16, 4), array(F16, 4), array(F16, 1), array(F16, 1))
    signature = (array(F16, 2), *[array(F32, 2)] * 2, *[types.int64] * 2, cache)
    check(cache_codec.fill_kernel(6, 2, 64, 16), signature, capability, "st.global.v4")


def test_draw():
    flags, some, several = array(types.boolean, 1), array(I32, 1), array(types.boolean, 2)
    logits, drawn = (array(F32, 2), array(F32, 2), some, some, flags, several, array(F64, 2)), (some, some, some)
    signature = (*logits, *drawn, array(I32, 2), types.int64)
    check(draw.draw, signature, (9, 0), "bar.red.or", WAIT)


def test_gate_and_up_alternate_in_the_order_of_downs_rows():
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, 5, 64)).astype(np.float32)
    order = rng.permutation(64)
    turns = np.concatenate([gate, up], axis=1)[:, alternating(order)].reshape(5, -1, 2, TURN)
    assert np.array_equal(ops.swiglu(turns[:, :, 0], turns[:, :, 1]).reshape(5, -1), ops.swiglu(gate, up)[:, order])
