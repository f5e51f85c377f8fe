"""What a user reads when something that the CUDA kernels need is missing, and the choice of kernel; no GPU is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tinygptq.errors import TinyGPTQError

HIDE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "numba_cuda" else find(name, package)
from tinygptq.errors import TinyGPTQError
try:
    import tinygptq.kernels.cuda.runtime
except TinyGPTQError as error:
    print(error)
"""


def test_without_numba_cuda():
    done = subprocess.run([sys.executable, "-c", HIDE], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("the CUDA kernels need the package numba-cuda, which is not installed")
    assert "pip install 'tinygptq[cuda]'" in done.stdout


def test_without_cupy(monkeypatch):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import runtime

    monkeypatch.setitem(sys.modules, "cupy", None)
    runtime.cupy.cache_clear()
    with pytest.raises(TinyGPTQError, match="need the package CuPy") as caught:
        runtime.cupy()
    assert "\n" not in str(caught.value)


def test_without_a_gpu(monkeypatch):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import runtime

    monkeypatch.setattr(runtime.cuda, "is_available", lambda: False)
    with pytest.raises(TinyGPTQError, match="no usable NVIDIA GPU was found"):
        runtime.require_gpu()


def test_the_name_lent_to_numba_cuda_is_taken_back():
    """numpy 2.5 has no ``row_stack``; importing the kernels must not leave one behind."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    script = (
        "import numpy as np\nbefore = hasattr(np, 'row_stack')\nimport tinygptq.kernels.cuda.runtime\n"
        "import numba.cuda.np.arrayobj\nprint(before == hasattr(np, 'row_stack'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(
    "capability,rows,bits,group_size,columns,expected",
    [
        ((9, 0), 1, 4, 128, 4096, "matvec"),
        ((8, 0), 16, 4, 128, 4096, "matvec"),
        ((8, 6), 17, 4, 32, 4096, "matmul"),
        ((9, 0), 64, 4, 128, 22016, "matmul"),
        ((9, 0), 65, 4, 128, 22016, "warpgroup"),
        ((9, 0), 65, 4, 128, 64, "matmul"),  # too few tiles
        ((8, 9), 65, 4, 128, 22016, "matmul"),
        ((12, 0), 512, 4, 128, 22016, "dequantise"),  # a newer card has no wgmma
        ((9, 0), 256, 4, 4096, 4096, "warpgroup"),
        ((9, 0), 193, 4, 128, 64, "dequantise"),
        ((9, 0), 513, 8, 128, 4096, "dequantise"),
        ((9, 0), 512, 8, 128, 22016, "warpgroup"),
        ((9, 0), 1024, 4, 128, 4096, "warpgroup"),
        ((9, 0), 1536, 4, 128, 4096, "dequantise"),  # the last round would be half empty
        ((9, 0), 1537, 4, 128, 22016, "dequantise"),
        ((7, 5), 1, 4, 128, 4096, "plain"),
        ((7, 5), 17, 4, 128, 4096, "dequantise"),
        ((9, 0), 1, 4, 48, 4096, "plain"),
        ((9, 0), 2000, 4, 20, 4096, "plain"),
    ],
)
def test_the_choice_of_kernel(capability, rows, bits, group_size, columns, expected):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import dispatch

    sizes = rows, 4096, columns, bits, group_size
    assert dispatch.choose(capability, *sizes, multiprocessors=132) == expected
    if expected == "warpgroup":
        few = dispatch.choose(capability, *sizes, multiprocessors=132, few_launches=True)
        assert few == ("matmul" if rows <= dispatch.MATMUL_ROWS else "dequantise")


@pytest.mark.parametrize(
    "rows,columns,inner", [(17, 4096, 4096), (64, 4096, 11008), (300, 22016, 4096), (1, 8, 32), (1024, 264, 160)]
)
@pytest.mark.parametrize("multiprocessors", [16, 108, 132])
def test_a_plan_covers_all_of_y_and_k_and_fits(rows, columns, inner, multiprocessors):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import matmul

    plan = matmul.plan(rows, columns, inner, multiprocessors)
    chunks = -(-inner // 128)
    assert plan.grid[0] * matmul.BLOCK_COLUMNS >= columns
    assert plan.grid[1] * 8 * plan.row_tiles >= rows
    teams = plan.grid[2] * plan.teams
    assert (teams - 1) * plan.chunks_each < chunks <= teams * plan.chunks_each  # and no team has nothing
    if plan.grid[2] > 1:  # splits wait for each other, so all blocks must be on the card at once
        assert plan.tiles * plan.grid[2] <= (matmul.RESIDENT if plan.teams == 1 else 1) * multiprocessors
    assert plan.shared_bytes <= 99 << 10  # which a block can have from compute capability 8.6 on, 8.0 more


@pytest.mark.parametrize("inner,columns", [(4096, 4096), (4096, 22016), (11008, 4096), (28672, 8192), (32, 8), (160, 80000)])
def test_pieces_cover_a_matrix_once_and_fit(inner, columns):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import dispatch

    found = dispatch.pieces(inner, columns)
    assert sum(count * depth for _, count, _, depth in found) == inner * columns
    assert len({(first, k) for first, _, k, _ in found}) == len(found)
    for first, count, k, depth in found:
        assert first % 32 == 0 and k % 128 == 0
        assert first + count <= columns and k + depth <= inner
        assert 2 * count * depth <= dispatch.DEQUANTISED_BYTES


@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])  # of a multiprocessor: 8.6 and 8.9, 8.0, 9.0
@pytest.mark.parametrize("strips", [1, 9, 128, 344, 688])
@pytest.mark.parametrize("inner", [32, 576, 4096, 11008])
def test_a_plan_for_few_rows_can_be_launched(strips, inner, shared):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import matvec_plan
    from tinygptq.kernels.cuda.activations import ring_bytes
    from tinygptq.kernels.cuda.block_sums import PITCH

    chunks = -(-inner // 128)
    kinds = ((1, 4, 128), (2, 4, 128), (2, 4, 32), (1, 8, 32), (2, 8, 128), (1, 3, 64), (2, 3, 64), (2, 2, 32), (2, 2, 128))
    for row_tiles, bits, group_size in kinds:
        plan = matvec_plan.plan(strips, inner, row_tiles, bits, group_size, 132, shared)
        assert 1 <= plan.warps <= chunks  # no warp is without work
        assert plan.sets == 2 or not plan.short
        assert not plan.short or chunks <= 2 * plan.warps
        assert plan.strips <= strips
        sums = 4 * plan.strips * plan.warps * 8 * row_tiles * PITCH
        needed = sums + ring_bytes(plan.warps, row_tiles, plan.slots) + 1024
        assert needed <= shared
        if shared == 228 << 10 or plan.strips > 1:  # the card where plans were measured: all blocks have the room they want
            assert needed * plan.resident <= shared
        assert 65536 // (32 * plan.warps * plan.resident) >= 120  # registers of a thread
