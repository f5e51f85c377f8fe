"""Every kernel compiles to PTX without a GPU for the cards it serves, and holds the instructions it is built on.

Numba's compiler needs seconds for the larger kernels, so the variants share the capabilities among them; the tests on a GPU
run the rest.
"""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra [cuda])", allow_module_level=True)

from numba.cuda import types

from tinygptq.kernels.cuda import block_sums, dequantise, matmul, matvec, matvec_plan, plain, warpgroup
from tinygptq.kernels.cuda.launch import assemble

WORDS, HALVES, FLOATS, COUNTS = (types.Array(t, 1, "C") for t in (types.uint32, types.float16, types.float32, types.int32))
ROWS = types.Array(types.float16, 2, "C")
STREAM = "ld.global.nc.L1::no_allocate.L2::128B.v4.u32"
MATMULS = (  # capability, bits, group size, zero point or None, row tiles, teams
    ((8, 0), 4, 128, 8, 4, 1),
    ((8, 6), 3, 64, None, 4, 2),
    ((8, 9), 8, 128, 128, 4, 1),
    ((9, 0), 2, 32, 2, 4, 2),
)


def to_ptx(kernel, arguments: tuple, capability: tuple[int, int]) -> str:
    text = kernel.ptx(arguments, capability)
    assert f".target sm_{capability[0]}{capability[1]}" in text
    assert ".entry" in text
    return text


def count(ptx: str, instruction: str) -> int:
    return len(re.findall(rf"\b{re.escape(instruction)}", ptx))


@pytest.mark.parametrize("bits,group_size,zero", [(4, 128, 8), (3, 96, None), (8, 4096, 128), (2, 20, None)])
def test_plain(bits, group_size, zero):
    codes, scales = types.Array(types.uint32, 5, "C"), types.Array(types.float16, 4, "C")
    zeros = scales if zero is not None else types.Array(types.uint16 if bits == 8 else types.uint8, 4, "C")
    ptx = to_ptx(plain.plain_kernel(bits, group_size, zero), (ROWS, codes, scales, zeros, ROWS), (7, 5))
    assert count(ptx, "fma.rn.f32")
    for instruction in ("mma.sync", "cp.async", "ld.global.nc"):  # nothing that a reader would have to look up
        assert not count(ptx, instruction)


def test_the_kernels_beside_the_plain_one():
    assert count(to_ptx(plain.gather_columns, (ROWS, COUNTS, ROWS), (7, 5)), "st.global")
    assert count(to_ptx(plain.add_bias, (ROWS, FLOATS), (7, 5)), "add.f32")


@pytest.mark.parametrize("bits,group_size,zero", [(4, 128, 8), (3, 32, None), (8, 128, None), (2, 64, 2)])
def test_dequantise(bits, group_size, zero):
    arguments = (*(types.int64,) * 6, ROWS)
    capability = {4: (8, 0), 3: (7, 5), 8: (8, 9), 2: (9, 0)}[bits]
    ptx = to_ptx(dequantise.dequantise_kernel(bits, group_size, zero), arguments, capability)
    assert count(ptx, STREAM) == bits  # a chunk's words, 16 bytes a lane
    assert count(ptx, "st.global.v4.u32") == 16  # 4 units of 4 columns
    assert count(ptx, "mul.rn.f16x2") == 64


@pytest.mark.parametrize("capability,bits,group_size,zero,row_tiles,teams", MATMULS)
def test_matmul(capability, bits, group_size, zero, row_tiles, teams):
    kernel = matmul.matmul_kernel(bits, group_size, zero, row_tiles, teams)
    ptx = to_ptx(kernel, (*(types.int64,) * 6, ROWS, types.int64, COUNTS), capability)
    assert count(ptx, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == 4 * 4 * row_tiles  # units, steps and tiles
    assert count(ptx, "cp.async.cg.shared.global") >= 2
    assert count(ptx, STREAM) == 2 * bits  # the first chunk's words, and the next one's
    assert not count(ptx, "st.local")  # the sums stay in registers
    # a team waits for itself alone: for each of the loop's two stages, and before the second one leaves its sums there
    assert count(ptx, "barrier.sync.aligned") == 3 * (teams - 1)
    assert count(ptx, "atom.acq_rel.gpu") == 2 and count(ptx, "ld.acquire.gpu")  # splits wait for each other


@pytest.mark.parametrize("bits,group_size,zero,wide", [(4, 128, 8, False), (3, 32, None, True), (8, 64, None, False)])
def test_warpgroup(bits, group_size, zero, wide):
    kernel = warpgroup.warpgroup_kernel(bits, group_size, zero, wide_scales=wide, wide_out=wide)
    y = types.Array(types.float32, 2, "C") if wide else ROWS
    ptx = kernel.ptx((*(types.int64,) * 7, y), (9, 0))
    assert ".target sm_90a" in ptx
    assert count(ptx, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16") == 4 * 4  # units, and steps for two tiles
    assert count(ptx, "wgmma.wait_group.sync.aligned 1") == 2  # one group is always at work while the next is unpacked
    assert count(ptx, "cp.async.bulk.shared::cluster.global") >= 3  # the first stages, and what follows each of a chunk
    assert count(ptx, STREAM) == 2 * bits
    assert "griddepcontrol.wait" in ptx
    assert assemble(ptx, (9, 0), specific=True)
    assert "serialized" not in what_the_assembler_says(ptx)
    # as products are, one after the other, when it sees a register of theirs written too early
    assert "serialized" in what_the_assembler_says(ptx.replace("wait_group.sync.aligned 1", "wait_group.sync.aligned 2"))


def what_the_assembler_says(ptx: str) -> str:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch="sm_90a", verbose=True))
    linker.link("cubin")
    return linker.get_info_log()


def test_sums_of_splits():
    ptx = to_ptx(warpgroup.sum_kernel(False), (FLOATS, types.int64, ROWS), (9, 0))
    assert count(ptx, "ld.global.cg.v4.u32") >= 2 and count(ptx, "st.global.v2.u32") == 1


def test_tiles_of_x():
    ptx = to_ptx(warpgroup.tile_kernel(), (ROWS, types.int64, WORDS), (9, 0))
    assert count(ptx, "ld.global.nc.u32") == 4 * warpgroup.UNITS_EACH
    assert count(ptx, "st.global.v4.u32") == warpgroup.UNITS_EACH


MATVECS = (  # capability, bits, group size, zero point or None, row tiles, plan, and what only some kernels have
    ((8, 0), 8, 128, 128, 1, matvec_plan.Plan(8, sets=1), {}),
    ((8, 6), 3, 32, None, 1, matvec_plan.Plan(16, sets=1), {"ragged": True}),
    ((8, 9), 2, 64, 2, 2, matvec_plan.Plan(4, resident=3), {"wide_scales": True}),
    ((9, 0), 4, 128, 8, 1, matvec_plan.Plan(5, resident=3), {}),
    ((9, 0), 4, 128, 8, 1, matvec_plan.Plan(2, resident=6), {}),
    ((9, 0), 4, 128, None, 2, matvec_plan.Plan(16, short=True, slots=2), {}),
    ((9, 0), 2, 128, 2, 2, matvec_plan.Plan(8, sets=1, strips=3), {}),
)
ADDRESSES = (types.int64,) * 6  # of codes, scales, x and zeros, and two numbers


@pytest.mark.parametrize("capability,bits,group_size,zero,row_tiles,plan,special", MATVECS)
def test_matvec(capability, bits, group_size, zero, row_tiles, plan, special):
    kernel = matvec.matvec_kernel(bits, group_size, zero, row_tiles, plan, **special)
    ptx = to_ptx(kernel, (*ADDRESSES, ROWS, types.Tuple(())), capability)
    # 4 units, 2 steps and 2 column tiles; for up to 8 rows codes as they are, with the sums of x, for 16 as levels
    products, levels = (16 + 8, 0) if row_tiles == 1 else (2 * 16, 64)
    chunks = plan.sets * plan.strips  # of weights that there is code to multiply
    assert count(ptx, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == chunks * products
    decoded = count(ptx, "sub.rn.f16x2") + count(ptx, "fma.rn.f16x2") - 4 * plan.sets * (row_tiles == 2 and zero is None)
    assert decoded == chunks * levels  # and of zero points that are read, four columns' upper offsets
    asked = 2 if plan.short or plan.sets == 1 else 4  # the first words of each set, and where there is a loop the next ones
    assert count(ptx, STREAM) == asked * bits * plan.strips
    copies = 2 if plan.short else 2 + plan.sets  # of x: the ring's two chunks, and in a loop what follows each
    assert count(ptx, "cp.async.cg.shared.global.L2::128B") == copies * 4 * row_tiles
    assert not count(ptx, "ld.global.v4.u32")  # x goes past the registers
    assert not count(ptx, "st.local")
    assert ("griddepcontrol.wait" in ptx) == ("griddepcontrol.launch_dependents" in ptx) == (capability >= (9, 0))


def test_an_epilogue_takes_the_place_of_the_store():
    from tinygptq.kernels.cuda.tables import device_function

    @device_function
    def read(row, strip, lane, y, extra):
        return (extra[0][row],)

    @device_function
    def scale(row, strip, lane, value, y, extra, known):
        y[row, 32 * strip + lane] = value * known[0]

    epilogue = block_sums.Epilogue(read, (np.float32(0),), scale)
    kernel = matvec.matvec_kernel(4, 128, 8, 1, matvec_plan.Plan(8), epilogue=epilogue)
    ptx = to_ptx(kernel, (*ADDRESSES, ROWS, types.Tuple((FLOATS,))), (9, 0))
    assert count(ptx, "ld.global.f32")
