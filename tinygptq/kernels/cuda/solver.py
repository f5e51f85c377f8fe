"""GPTQ's solver on the device: the twins of gptq/solver.py's parts for CuPy arrays, given to it as this module.

- Rows of W are independent given Hinv. A warp takes one row through a whole block of up to 128 columns, in registers: one
  launch does what a loop over columns would do in a thousand, and the trailing update is one dense product.
- Blocks are cut where groups end, so that a group's columns carry all corrections where the group starts: a block holds
  whole groups, or is a part of one. A longer group's grid is found by the kernel for grids before its first block.
- H^-1 is never formed: with H = R R^T, R upper triangular, R^-1 is the upper Cholesky factor of H^-1.

The expressions are the definition's, but for the order of sums and for products that are not rounded before an addition.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.grid import CLIPS, OVERFLOW, SMALLEST_SCALE
from tinygptq.gptq.solver import Columns
from tinygptq.kernels.cuda.cublas import cublas
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import half2_from_floats, half2_to_floats
from tinygptq.kernels.cuda.refine import descend
from tinygptq.kernels.cuda.runtime import cuda, cupy
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL, warp_max, warp_sum

__all__ = ["descend", "inverse_cholesky", "quantize_columns", "static_grids"]

log = logging.getLogger("tinygptq")

LANES, B = 32, 128  # columns in a block (the paper's value)
WARPS = 8  # rows of W in a block of threads
ACCURATE = 1e-2  # how far a float32 factor may miss H^-1 (see `inverse_cholesky`) before float64 takes its place
ZERO, ONE, INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
SMALLEST = np.float32(SMALLEST_SCALE)

rint = cuda.libdevice.rintf


# ------------------------------------------------------------------------------------------------------------- grids


@device_function
def as_stored(scale, down):
    """`grid.as_stored` for one number."""
    word = half2_from_floats(scale, ZERO)
    stored = half2_to_floats(word)[0]
    if down != 0 and stored > scale and stored < INFINITY:
        stored = half2_to_floats(word - np.uint32(1))[0]
    return max(stored, SMALLEST)


@device_function
def grid_of(low, high, sym, maxq, least_zero):
    """`grid.find_grid` for one row whose weights, and 0, run from low to high."""
    if sym != 0:
        high = max(-low, high)
        low = -high
    if low == high:
        low, high = -ONE, ONE
    scale = as_stored((high - low) / maxq, sym)
    if sym != 0:
        return scale, (maxq + ONE) / np.float32(2)
    zero = min(max(rint(-low / scale), ZERO), maxq)
    if zero < least_zero:
        return as_stored(high / (maxq - ONE), 0), least_zero
    return scale, zero


@device_function
def code_of(w, scale, zero, maxq):
    """`grid.quantize` for one weight."""
    return min(max(rint(w / scale) + zero, ZERO), maxq)


@device_function
def rounding_loss(w, scale, zero, maxq, importance):
    error = w - scale * (code_of(w, scale, zero, maxq) - zero)
    return error * error * importance


@device_function
def find_grid_of_columns(W, row, begin, end, importance, offset, clips, sym, maxq, least_zero):
    """Scale and zero of W[row, begin:end], by one warp; clips empty: no search. W[row, k] is of importance[offset + k]."""
    lane = cuda.threadIdx.x % LANES
    low, high = ZERO, ZERO
    for k in range(begin + lane, end, LANES):
        low, high = min(low, W[row, k]), max(high, W[row, k])
    scale, zero = grid_of(-warp_max(-low), warp_max(high), sym, maxq, least_zero)
    best, least = scale, INFINITY
    for i in range(clips.size):
        tried = scale if clips[i] == ONE else as_stored(scale * clips[i], 0)
        loss = ZERO
        for k in range(begin + lane, end, LANES):
            loss += rounding_loss(W[row, k], tried, zero, maxq, importance[offset + k])
        loss = warp_sum(loss)
        if loss < least:
            best, least = tried, loss
    return best, zero


@functools.cache
def grids_kernel() -> Kernel:
    """The kernel that finds grids of consecutive groups: blockIdx.y counts them from ``first_group``.

    Shapes: W float32 [rows, columns]; importance float32 [columns] and clips float32 [n], or both empty; scales and zeros
    float32 [rows, G]. Grid (ceil(rows / 8), groups), block 256.
    """

    def find_grids(W, importance, clips, scales, zeros, first_group, group_size, sym, maxq, least_zero):
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.x // LANES
        if row < W.shape[0]:
            g = first_group + cuda.blockIdx.y
            begin = g * group_size
            end = min(begin + group_size, W.shape[1])
            scale, zero = find_grid_of_columns(W, row, begin, end, importance, 0, clips, sym, maxq, least_zero)
            if cuda.threadIdx.x % LANES == 0:
                scales[row, g], zeros[row, g] = scale, zero

    return Kernel(find_grids, LANES * WARPS)


# ------------------------------------------------------------------------------------------------- a block of columns


# A lane holds four columns of its warp's row, 32 apart; "four" is a tuple of their numbers, each in a register.


@device_function
def pick(part, four):
    """The number of columns 32 * part .. of the block."""
    a, b, c, d = four
    return (a if part == 0 else b) if part < 2 else (c if part == 2 else d)


@device_function
def keep(part, mine, err, code, w, z):
    """Weights and zeros, of which those of columns 32 * part .. become error and code in the lane that says ``mine``."""
    a, b, c, d = w
    za, zb, zc, zd = z
    a, za = (err, code) if mine and part == 0 else (a, za)
    b, zb = (err, code) if mine and part == 1 else (b, zb)
    c, zc = (err, code) if mine and part == 2 else (c, zc)
    d, zd = (err, code) if mine and part == 3 else (d, zd)
    return (a, b, c, d), (za, zb, zc, zd)


@device_function
def load_four(array, at, there):
    """``array[at]`` and what is 32, 64 and 96 further on, where it is there; else 0."""
    a, b = array[at] if there[0] else ZERO, array[at + np.uint32(32)] if there[1] else ZERO
    return a, b, array[at + np.uint32(64)] if there[2] else ZERO, array[at + np.uint32(96)] if there[3] else ZERO


@device_function
def grid_at(scales, zeros, column_groups, table, column, there):
    """Scale and zero of a column of the row whose grids begin at ``table``."""
    if there:
        g = table + column_groups[column]
        return scales[g], zeros[g]
    return ONE, ZERO


@device_function
def grids_at(scales, zeros, column_groups, table, column, there):
    """Four scales and four zeros of a row whose grids are known."""
    sa, za = grid_at(scales, zeros, column_groups, table, column, there[0])
    sb, zb = grid_at(scales, zeros, column_groups, table, column + np.uint32(32), there[1])
    sc, zc = grid_at(scales, zeros, column_groups, table, column + np.uint32(64), there[2])
    sd, zd = grid_at(scales, zeros, column_groups, table, column + np.uint32(96), there[3])
    return (sa, sb, sc, sd), (za, zb, zc, zd)


@device_function
def within(scale, zero, old_scale, old_zero, column, begin, end):
    """The new grid for columns of a group, the old one for others."""
    if column >= begin and column < end:
        return scale, zero
    return old_scale, old_zero


@device_function
def replace_grids(scale, zero, s, z, lane, begin, end):
    """Four scales and four zeros, of which those of columns begin .. end-1 of the block become the new ones."""
    sa, za = within(scale, zero, s[0], z[0], lane, begin, end)
    sb, zb = within(scale, zero, s[1], z[1], lane + 32, begin, end)
    sc, zc = within(scale, zero, s[2], z[2], lane + 64, begin, end)
    sd, zd = within(scale, zero, s[3], z[3], lane + 96, begin, end)
    return (sa, sb, sc, sd), (za, zb, zc, zd)


@device_function
def grid_of_group(tile, warp, lane, w, begin, end, importance, first, clips, sym, maxq, least_zero):
    """Scale and zero of the block's columns begin .. end-1, which are spread over the lanes: they meet in shared memory."""
    tile[warp, lane], tile[warp, lane + np.uint32(32)] = w[0], w[1]
    tile[warp, lane + np.uint32(64)], tile[warp, lane + np.uint32(96)] = w[2], w[3]
    cuda.syncwarp()
    grid = find_grid_of_columns(tile, warp, begin, end, importance, first, clips, sym, maxq, least_zero)
    cuda.syncwarp()  # all have read before the next group is written
    return grid


@device_function
def put(codes, Err, at, out, code, error, there):
    """Store a column's code and error, where there is such a column."""
    if there:
        codes[at], Err[out] = np.uint8(code), error


@functools.cache
def block_kernel() -> Kernel:
    """The kernel that takes every row through one block of columns.

    Shapes (arrays flat; R rows, C columns, G groups):
        W: float32 [R, C], the block's columns with all corrections of earlier blocks; not changed. Hinv: float32 [C, C],
        zero below its diagonal. codes: uint8 [R, C] and Err: float32 [R, 128], written. losses: float64 [R], added to.
        scales, zeros: float32 [R, G]; read, or written where ``group_size`` says that grids are found here. column_groups:
        int32 [C]. importance, clips: as for `grids_kernel`.
    first, count: the block. group_size: of the groups that begin within it, one at its start; 0 where all grids are known.
    Grid ceil(R / 8), block 256.

    When one of a lane's columns has had its turn, its weight's register keeps its error from then on (the zeros below Hinv's
    diagonal leave it alone), and its zero point's register its code.
    """

    def quantize_block(
        W, Hinv, codes, Err, losses, scales, zeros, column_groups, importance, clips,
        columns, groups, first, count, group_size, sym, maxq, least_zero,
    ):  # fmt: skip
        tile = cuda.shared.array((WARPS, B), np.float32)  # where a group's weights lie while its grid is found
        lane, warp = np.uint32(cuda.threadIdx.x % LANES), cuda.threadIdx.x // LANES
        row = cuda.blockIdx.x * WARPS + warp
        if row < losses.size:
            there = lane < count, lane + 32 < count, lane + 64 < count, lane + 96 < count
            at, below = np.uint32(row * columns + first) + lane, np.uint32(first * columns + first) + lane
            w, s, z = load_four(W, at, there), (ONE, ONE, ONE, ONE), (ZERO, ZERO, ZERO, ZERO)
            loss, next_group, g = ZERO, 0 if group_size > 0 else count, row * groups
            if group_size == 0:
                s, z = grids_at(scales, zeros, column_groups, g, np.uint32(first) + lane, there)
            else:
                g += first // group_size
            for step in range(count):
                if step == next_group:
                    next_group = min(step + group_size, count)
                    scale, zero = grid_of_group(
                        tile, warp, lane, w, step, next_group, importance, first, clips, sym, maxq, least_zero
                    )
                    s, z = replace_grids(scale, zero, s, z, lane, step, next_group)
                    if lane == 0:
                        scales[g], zeros[g] = scale, zero
                    g += 1
                h = load_four(Hinv, below, there)
                below += np.uint32(columns)
                part, turn = step >> 5, step & 31
                weight = cuda.shfl_sync(ALL, pick(part, w), turn)
                scale, zero = cuda.shfl_sync(ALL, pick(part, s), turn), cuda.shfl_sync(ALL, pick(part, z), turn)
                code = code_of(weight, scale, zero, maxq)
                err = (weight - scale * (code - zero)) / cuda.shfl_sync(ALL, pick(part, h), turn)
                loss += err * err
                w = w[0] - err * h[0], w[1] - err * h[1], w[2] - err * h[2], w[3] - err * h[3]
                w, z = keep(part, lane == turn, err, code, w, z)
            out = np.uint32(row * B) + lane
            put(codes, Err, at, out, z[0], w[0], there[0])
            put(codes, Err, at + np.uint32(32), out + np.uint32(32), z[1], w[1], there[1])
            put(codes, Err, at + np.uint32(64), out + np.uint32(64), z[2], w[2], there[2])
            put(codes, Err, at + np.uint32(96), out + np.uint32(96), z[3], w[3], there[3])
            if lane == 0:
                losses[row] += np.float64(loss)

    return Kernel(quantize_block, LANES * WARPS)


# ------------------------------------------------------------------------------------------ the twins of solver.py's parts


def quantize_columns(
    W: Any,
    Hinv: Any,
    config: QuantizeConfig,
    column_groups: Any,
    static: tuple[Any, Any] | None,
    importance: Any = None,
) -> Columns:
    """Algorithm 1; arguments and result as for `gptq.solver.quantize_columns`, arrays CuPy's, float32."""
    cp = cupy()
    stream = cp.cuda.get_current_stream()
    (rows, columns), group_size = W.shape, config.rows_per_group(W.shape[1])
    W, Hinv = cp.array(W, np.float32, order="C"), cp.ascontiguousarray(Hinv)
    codes, Err = cp.empty((rows, columns), np.uint8), cp.empty((rows, B), np.float32)
    losses, column_groups = cp.zeros(rows, np.float64), column_groups.astype(np.int32)
    if static is None:
        scales, zeros = (cp.zeros((rows, config.num_groups(columns)), np.float32) for _ in range(2))
    else:
        scales, zeros = (cp.ascontiguousarray(grid) for grid in static)
    search, rounding = _search(importance), _rounding(config)
    flat, tables = [array.ravel() for array in (W, Hinv, codes, Err)], (scales.ravel(), zeros.ravel())
    in_block = group_size if static is None and group_size <= B else 0
    for first, end in block_bounds(columns, group_size if static is None else columns):
        if static is None and group_size > B and first % group_size == 0:
            _find_grids(W, search, scales, zeros, first // group_size, 1, group_size, rounding)
        block_kernel()(
            -(-rows // WARPS), LANES * WARPS, stream, *flat, losses, *tables, column_groups, *search,
            columns, scales.shape[1], first, end - first, in_block, *rounding,
        )  # fmt: skip
        if end < columns:
            cublas().subtract_product(W, Err, Hinv, first, end, stream.ptr)
    _require_finite(scales)
    return Columns(codes, scales, zeros, float(losses.sum()) / 2)


def static_grids(W: Any, config: QuantizeConfig, importance: Any = None) -> tuple[Any, Any]:
    """Scales and zeros [out, G] of contiguous groups of the weights as they are."""
    cp = cupy()
    W, groups = cp.ascontiguousarray(W), config.num_groups(W.shape[1])
    scales, zeros = (cp.empty((len(W), groups), np.float32) for _ in range(2))
    size = config.rows_per_group(W.shape[1])
    _find_grids(W, _search(importance), scales, zeros, 0, groups, size, _rounding(config))
    _require_finite(scales)
    return scales, zeros


def _find_grids(W, search, scales, zeros, first_group, groups, group_size, rounding) -> None:
    grid, stream = (-(-len(W) // WARPS), groups), cupy().cuda.get_current_stream()
    grids_kernel()(grid, LANES * WARPS, stream, W, *search, scales, zeros, first_group, group_size, *rounding)


def _search(importance: Any) -> tuple[Any, Any]:
    """importance [in] and the clips to try; both empty where there is nothing to search."""
    cp = cupy()
    if importance is None:
        return cp.empty(0, np.float32), cp.empty(0, np.float32)
    return cp.ascontiguousarray(importance, dtype=np.float32), cp.asarray(CLIPS, np.float32)


def _rounding(config: QuantizeConfig) -> tuple[int, np.float32, np.float32]:
    """sym, the largest code and the least zero point."""
    return int(config.sym), np.float32(config.max_code), np.float32(config.checkpoint_format == "gptq")


def _require_finite(scales: Any) -> None:
    if not bool(cupy().isfinite(scales).all()):
        raise TinyGPTQError(OVERFLOW)


def block_bounds(columns: int, group_size: int) -> list[tuple[int, int]]:
    """First column and end of each block: at most B columns, whole groups or a part of one."""
    step = B // group_size * group_size if group_size <= B else group_size
    spans = [(k, min(k + step, columns)) for k in range(0, columns, step)]
    return [(i, min(i + B, end)) for k, end in spans for i in range(k, end, B)]


def inverse_cholesky(H: Any) -> Any:
    """Upper triangular Hinv, in float32, with ``Hinv^T Hinv = H^-1`` for H [in, in]; None when H is not positive definite.

    float32's factor is taken if ``Hinv^T Hinv H v`` is v to within ACCURATE for a random v, which weighs all directions
    alike, those of the smallest eigenvalues too, where an inverse goes wrong first. Else H is factored in float64.
    """
    cp = cupy()
    Hinv = _inverse_factor(H, np.float32)
    if Hinv is not None:
        v = cp.asarray(np.random.default_rng(0).choice(np.array([-1, 1], np.float32), len(H)))
        missed = cp.linalg.norm(Hinv.T @ (Hinv @ (H @ v)) - v) / cp.linalg.norm(v)
        if bool(missed < ACCURATE):  # False for NaN
            return Hinv
    log.debug("a Hessian of %d inputs is factored in float64: float32 misses its inverse", len(H))
    Hinv = _inverse_factor(H, np.float64)
    return None if Hinv is None else Hinv.astype(np.float32)


def _inverse_factor(H: Any, dtype: type) -> Any:
    """R^-1 for H = R R^T (reversed twice, a lower factor is an upper one); None where H is not positive definite."""
    from cupyx import errstate
    from cupyx.scipy.linalg import solve_triangular

    cp = cupy()
    try:
        with errstate(linalg="raise"):
            L = cp.linalg.cholesky(H[::-1, ::-1].astype(dtype))
    except np.linalg.LinAlgError:
        return None
    # a rank-deficient H can pass on rounding noise alone (see `gptq.solver.cholesky`); float32 is checked by its result
    if dtype == np.float64 and not bool((L.diagonal() ** 2 > len(H) * np.finfo(dtype).eps * H.diagonal().max()).all()):
        return None
    # L.T is in Fortran's order as it lies, so that nothing is copied
    inverse = solve_triangular(L.T, cp.eye(len(H), dtype=dtype, order="F"), trans=1, lower=False, overwrite_b=True)
    return cp.ascontiguousarray(inverse[::-1, ::-1])
