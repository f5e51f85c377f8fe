"""y = x @ W for a packed linear on the device: which kernel runs, from the table below.

    rows of x     compute capability 8.0 and up                       below
    1 - 16        matvec    weights at the memory's speed             plain
    17 - 192      matmul    unpacked in registers, tensor cores       dequantise
    193 -         dequantise to fp16, then a dense product (cuBLAS)   dequantise

and of exactly 9.0 (Hopper)

    65 - 1536     warpgroup     unpacked in registers beside the tensor cores' work, where the tiles keep the card busy

The lines on the left are where the next kernel became faster, measured on an H200 and, for warpgroup, an H100
(scripts/bench/results): writing the weights out as fp16 takes as long as some 200 rows do, and pays when cuBLAS wins that
back. The column on the right follows from what the kernels read; no such card was at hand. A group size that is no multiple
of 32 goes to the plain kernel, whatever the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda import block_sums, dequantise, matmul, matvec, matvec_plan, plain, warpgroup
from tinygptq.kernels.cuda.cublas import Part, cublas
from tinygptq.kernels.cuda.layout import COLUMNS, ROWS, DeviceLinear
from tinygptq.kernels.cuda.runtime import capability, cupy, multiprocessors, shared_memory

MATVEC_ROWS = 16  # at most
MATMUL_ROWS = 192
WARPGROUP_ROWS = range(65, 1537)
DEQUANTISED_BYTES = 64 << 20  # of weights that are fp16 at a time: enough to keep the card busy
TENSOR_CORES = (8, 0)  # first capability with mma.m16n8k16 and cp.async
HOPPER = (9, 0)  # the only one with wgmma


def choose(
    capability: tuple[int, int], rows: int, inner: int, columns: int, bits: int, group_size: int, multiprocessors: int,
    few_launches: bool = False,
) -> str:  # fmt: skip
    """The kernel for x [rows, inner] times W [inner, columns]: "matvec", "matmul", "warpgroup", "dequantise" or "plain".

    See the table above. Args: bits and group size of W; the card's compute capability, and its multiprocessors;
    few_launches: see :func:`linear`.
    """
    if group_size % 32:
        return "plain"
    if rows <= MATVEC_ROWS:
        return "matvec" if capability >= TENSOR_CORES else "plain"
    hopper = capability == HOPPER and rows in WARPGROUP_ROWS and not few_launches
    if hopper and warpgroup.pays(rows, columns, inner, bits, multiprocessors):
        return "warpgroup"
    return "matmul" if rows <= MATMUL_ROWS and capability >= TENSOR_CORES else "dequantise"


def linear(
    x: Any,
    layer: DeviceLinear,
    out: Any = None,
    stream: Any = None,
    *,
    gathered: bool = False,
    kernel: str | None = None,
    dependent: bool = False,
    few_launches: bool = False,
) -> Any:
    """``x @ W + bias``.

    Args:
        x: CuPy float16 [M, K], C-contiguous.
        layer: from :func:`~.layout.to_device`.
        out: CuPy float16 or float32 [M, N] to write to; a new float16 array by default.
        stream: a CuPy stream, None for CuPy's current one. The call only puts work on it; the work may be recorded in a
            CUDA graph once each kernel it needs has run.
        gathered: x's columns are in the order of ``layer.perm`` already, because the kernel before this one wrote them so;
            else they are in the model's order, and an act-order layer costs one small kernel more.
        kernel: one of :func:`choose`'s names instead of its choice.
        dependent: a matvec may begin early: see :func:`multiply_rows`.
        few_launches: rather a kernel that takes longer than one that needs others before and after it: for work that the
            card does faster than the host asks for it.

    Returns:
        ``out``.

    Raises:
        TinyGPTQError: x or out of another shape or dtype than the layer takes.
    """
    cp = cupy()
    _check(x, layer, out)
    stream = stream or cp.cuda.get_current_stream()
    if kernel is None:
        sizes = *x.shape, layer.out_features, layer.bits, layer.group_size
        kernel = choose(capability(), *sizes, multiprocessors(), few_launches)
    with stream:
        if out is None:
            out = cp.empty((x.shape[0], layer.out_features), np.float16)
        if x.shape[0] == 0:
            return out
        if layer.perm is not None and not gathered:
            x = gather(x, layer.perm, _x_workspace(x.size).reshape(x.shape), stream)
        if kernel == "matvec":
            multiply_rows(x, layer, out, stream, dependent=dependent)
        else:
            KERNELS[kernel](x, layer, out, stream)
        if layer.bias is not None:
            plain.add_bias(_blocks(out.size), 256, stream, out, layer.bias)
    return out


def _check(x: Any, layer: DeviceLinear, out: Any) -> None:
    if x.ndim != 2 or x.shape[1] != layer.in_features or x.dtype != np.float16 or not x.flags.c_contiguous:
        raise TinyGPTQError(
            f"x is {x.dtype.name} {x.shape}; this linear takes float16 [rows, {layer.in_features}], C-contiguous"
        )
    if out is not None:
        shape = (x.shape[0], layer.out_features)
        if out.shape != shape or out.dtype not in (np.float16, np.float32) or not out.flags.c_contiguous:
            raise TinyGPTQError(f"out is {out.dtype.name} {out.shape}; it must be float16 or float32 {shape}, C-contiguous")


def _run_plain(x: Any, layer: DeviceLinear, out: Any, stream: Any) -> None:
    grid, block = plain.grid_of(*out.shape)
    kernel = plain.plain_kernel(layer.bits, layer.group_size, layer.zero)
    zeros = layer.scales if layer.zeros is None else layer.zeros
    kernel(grid, block, stream, x, layer.codes, layer.scales, zeros, out)


def multiply_rows(
    x: Any,
    layer: DeviceLinear,
    y: Any,
    stream: Any,
    *,
    epilogue: Any = block_sums.store,
    extra: tuple = (),
    dependent: bool = False,
) -> None:
    """1 to 16 rows of x times the layer's weights, handed to an epilogue; from compute capability 8.0.

    Args:
        x: CuPy float16 [M, K], C-contiguous, its columns in the order of ``layer.perm``.
        y, extra: what the epilogue writes to and reads; by default y is float16 or float32 [M, N] and becomes ``x @ W``.
        epilogue: see :func:`~.matvec.matvec_kernel`.
        dependent: the kernel may begin while the one before it still runs (programmatic dependent launch, 9.0). It reads
            weights at once, so nothing that is still at work on the stream may write them.
    """
    row_tiles, strips = 1 if x.shape[0] <= 8 else 2, layer.strips
    sizes = strips, x.shape[1], row_tiles, layer.bits, layer.group_size
    plan = matvec_plan.plan(*sizes, multiprocessors(), shared_memory())
    special = {"ragged": x.shape[1] % ROWS != 0, "wide_scales": layer.scales.dtype.itemsize == 4, "epilogue": epilogue}
    kernel = matvec.matvec_kernel(layer.bits, layer.group_size, layer.zero, row_tiles, plan, **special)
    codes, scales, zeros = _addresses(layer)
    arguments = codes, scales, x.shape[1], strips, x.data.ptr, zeros, y, extra
    at_launch = {"dependent": dependent, "shared_bytes": plan.dynamic_bytes(row_tiles)}
    kernel(-(-strips // plan.strips), 32 * plan.warps, stream, *arguments, **at_launch)


def _run_matmul(x: Any, layer: DeviceLinear, out: Any, stream: Any) -> None:
    plan = matmul.plan(*out.shape, layer.in_features, multiprocessors())
    wide = {"wide_scales": layer.scales.dtype.itemsize == 4, "wide_out": out.dtype.itemsize == 4}
    kernel = matmul.matmul_kernel(layer.bits, layer.group_size, layer.zero, plan.row_tiles, plan.teams, **wide)
    sums, arrived = _sums_workspace(plan.sums), _arrived_workspace(2 * plan.tiles)
    codes, scales, zeros = _addresses(layer)
    arguments = codes, scales, layer.in_features, plan.chunks_each, x.data.ptr, zeros, out, sums.data.ptr, arrived
    kernel(plan.grid, matmul.THREADS * plan.teams, stream, *arguments, shared_bytes=plan.shared_bytes)


def _run_warpgroup(x: Any, layer: DeviceLinear, out: Any, stream: Any) -> None:
    (rows, inner), columns, chunks = x.shape, layer.out_features, layer.chunks
    grid, size = warpgroup.tile_grid(rows, inner)
    tiles = _tiles_workspace(size)
    warpgroup.tile_kernel()(grid, 4 * warpgroup.TOKENS, stream, x, 4 * chunks, tiles)
    each = warpgroup.split_of(rows, columns, inner, layer.bits, multiprocessors())
    splits = -(-chunks // each)
    y = out if splits == 1 else _sums_workspace(splits * out.size).reshape(splits * rows, columns)
    wide = {"wide_scales": layer.scales.dtype.itemsize == 4, "wide_out": y.dtype.itemsize == 4}
    kernel = warpgroup.warpgroup_kernel(layer.bits, layer.group_size, layer.zero, **wide)
    arguments = tiles.data.ptr, *_addresses(layer), chunks, each, rows, y
    at_launch = {"dependent": True, "shared_bytes": warpgroup.SHARED_BYTES}
    kernel((*warpgroup.grid_of(rows, columns), splits), warpgroup.THREADS, stream, *arguments, **at_launch)
    if splits > 1:
        add, grid_of_sum = warpgroup.sum_kernel(out.dtype.itemsize == 4), warpgroup.sum_grid(out.size)
        add(grid_of_sum, warpgroup.SUM_THREADS, stream, y.reshape(-1), splits, out, dependent=True)


def _run_dequantise(x: Any, layer: DeviceLinear, out: Any, stream: Any) -> None:
    (rows, inner), columns = x.shape, layer.out_features
    for first, count, k, depth in pieces(inner, columns):
        weight = dequantised(layer, stream, (first // COLUMNS, count), (k // ROWS, depth))
        a, b, c = Part(weight, depth, transposed=True), Part(x, inner, k), Part(out, columns, first)
        cublas().gemm(a, b, c, (count, rows, depth), stream.ptr, beta=float(k > 0))


def pieces(inner: int, columns: int) -> list[tuple[int, int, int, int]]:
    """(first column, columns, first row, rows) of the parts of W [inner, columns] that are fp16 at a time.

    A wide W is divided by columns. A long and narrow one by rows, their products being added up: half of its columns would
    be too few tiles for the card.
    """
    if inner <= columns:
        step = max(1, DEQUANTISED_BYTES // (2 * COLUMNS * inner)) * COLUMNS
        return [(first, min(step, columns - first), 0, inner) for first in range(0, columns, step)]
    parts = -(-2 * inner * columns // DEQUANTISED_BYTES)
    step = -(-inner // (ROWS * parts)) * ROWS
    return [(0, columns, k, min(step, inner - k)) for k in range(0, inner, step)]


def dequantised(
    layer: DeviceLinear, stream: Any, columns: tuple[int, int] | None = None, rows: tuple[int, int] | None = None
) -> Any:
    """W transposed, float16 [N, K] in the order of the sorted rows; the memory belongs to the next call too.

    Args: columns: (first strip, number of columns), all by default; rows: (first chunk, number of rows of W), likewise.
    """
    first_strip, count = columns or (0, layer.out_features)
    first_chunk, depth = rows or (0, layer.in_features)
    weight = _weight_workspace(count * depth).reshape(count, depth)
    kernel = dequantise.dequantise_kernel(layer.bits, layer.group_size, layer.zero, layer.scales.dtype.itemsize == 4)
    grid, block = dequantise.grid_of(depth, count)
    kernel(grid, block, stream, *_addresses(layer), layer.strips, first_strip, first_chunk, weight)
    return weight


def _addresses(layer: DeviceLinear) -> tuple[int, int, int]:
    """Of codes, scales and zeros, 0 where there are none."""
    codes, scales, zeros = (0 if array is None else array.data.ptr for array in (layer.codes, layer.scales, layer.zeros))
    return codes, scales, zeros


def gather(x: Any, perm: Any, out: Any, stream: Any) -> Any:
    """``out = x[:, perm]``, both float16 [M, K]; returns out."""
    plain.gather_columns(min(len(x), 8 * multiprocessors()), 256, stream, x, perm, out)
    return out


def _blocks(elements: int) -> int:
    return min(-(-elements // 256), 8 * multiprocessors())


class _Workspace:
    """Device memory, zero at first, that grows to the largest request; for one stream at a time.

    What it outgrew is kept, because CUDA graphs recorded earlier still write there.
    """

    def __init__(self, dtype: Any) -> None:
        self.dtype, self.memory = dtype, []

    def __call__(self, size: int) -> Any:
        if not self.memory or self.memory[-1].size < size:
            self.memory.append(cupy().zeros(size, self.dtype))
        return self.memory[-1][:size]


_x_workspace, _weight_workspace = _Workspace(np.float16), _Workspace(np.float16)
_sums_workspace, _arrived_workspace = _Workspace(np.float32), _Workspace(np.int32)
_tiles_workspace = _Workspace(np.uint32)


KERNELS = {"matmul": _run_matmul, "warpgroup": _run_warpgroup, "dequantise": _run_dequantise, "plain": _run_plain}
