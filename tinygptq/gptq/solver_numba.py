"""The fast twin of solver.py's definition: the same expressions, compiled by Numba, rows of W in parallel.

Three things differ from the definition, none in the result but for floating-point rounding:

- Rows are independent given Hinv, so that threads take chunks of rows through the whole algorithm. A chunk is transposed:
  its rows lie side by side in memory, and every step of the column loop is one vector operation over them.
- Blocks are cut where groups end, so that a group's columns carry all corrections where the group starts.
- H^-1 is never formed: with H = R R^T, R upper triangular, R^-1 is the upper Cholesky factor of H^-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit, prange

from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.grid import CLIPS, OVERFLOW, SMALLEST_SCALE
from tinygptq.gptq.solver import Columns
from tinygptq.threads import alone, share

B = 8  # columns in a block: what `_correct_by_block` holds in registers
ROWS = 96  # rows in a chunk: large enough for long vector loops, and small LLaMAs' widths give two threads equally many
LEAF = 96  # Hessians up to this size are factored directly
LOOK = 16  # columns between two looks whether a clip can still be the best one
STRIP = 96  # rows or columns of a product's strip: narrower ones leave out more of a triangle, but are slower


def inverse_cholesky(H: np.ndarray) -> np.ndarray | None:
    """Upper triangular Hinv with ``Hinv^T Hinv = H^-1`` for float64 H [in, in]; None when H is not positive definite."""
    Hinv = np.zeros_like(H)
    try:
        with alone():
            _factor_into(Hinv, H, len(H) * np.finfo(np.float64).eps * H.diagonal().max())
    except np.linalg.LinAlgError:
        return None
    return Hinv


def _factor_into(Hinv: np.ndarray, H: np.ndarray, smallest: float) -> None:
    """Write the inverse factor of H, of which the upper triangle is read, halves first. With H = R R^T and Hinv = R^-1:

        H = [A    C]   R = [P^-1   S  ]   Y factors D^-1,            S = C Y^T,
            [C^T  D]       [ 0    Y^-1]   P factors (A - S S^T)^-1,  and the corner of Hinv is -P S Y.

    Nearly all work is in four products, whose strips leave out what is zero, or not needed of a symmetric result. Raises
    LinAlgError for pivots of at most ``smallest``.
    """
    n = len(H)
    if n <= LEAF:
        L = np.linalg.cholesky(H[::-1, ::-1])  # reversed twice, a lower factor is an upper one
        if not (L.diagonal() ** 2 > smallest).all():
            raise np.linalg.LinAlgError
        Hinv[:] = np.linalg.inv(L[::-1, ::-1])  # upper again, and so inverted without exchanging rows: zeros stay zeros
        return
    h = n // 2
    A, C, P, corner, Y = H[:h, :h], H[:h, h:], Hinv[:h, :h], Hinv[:h, h:], Hinv[h:, h:]
    S, minus_SY, rest = np.empty((h, n - h)), np.empty((h, n - h)), np.zeros((h, h))
    _factor_into(Y, H[h:, h:], smallest)

    def multiply_by_Y_transposed(j: int, k: int) -> None:
        np.matmul(C[:, j:], Y[j:k, j:].T, out=S[:, j:k])

    def subtract_square(j: int, k: int) -> None:
        np.subtract(A[j:k, j:], S[j:k] @ S[j:].T, out=rest[j:k, j:])

    def multiply_by_Y(j: int, k: int) -> None:
        np.negative(np.matmul(S[:, :k], Y[:k, j:k]), out=minus_SY[:, j:k])

    def multiply_by_P(j: int, k: int) -> None:
        np.matmul(P[j:k, j:], minus_SY[j:], out=corner[j:k])

    _by_strips(n - h, multiply_by_Y_transposed)
    _by_strips(h, subtract_square)
    _factor_into(P, rest, smallest)
    _by_strips(n - h, multiply_by_Y)
    _by_strips(h, multiply_by_P)


def _by_strips(n: int, product: Callable[[int, int], None]) -> None:
    """Call ``product(j, k)`` for strips j .. k-1 that make up n rows or columns, at once: half of a product of n^3."""
    strips = max(1, n // STRIP)

    def some(of_them: slice) -> None:
        for i in range(of_them.start, of_them.stop):
            product(n * i // strips, n * (i + 1) // strips)

    share(strips, n**3 // 2, some, slices=strips)


def quantize_columns(
    W: np.ndarray,
    Hinv: np.ndarray,
    config: QuantizeConfig,
    column_groups: np.ndarray,
    static: tuple[np.ndarray, np.ndarray] | None,
    importance: np.ndarray | None = None,
) -> Columns:
    """Algorithm 1; arguments and result as for `solver.quantize_columns`."""
    rows, columns = W.shape
    real = W.dtype.type
    group_size = config.rows_per_group(columns)
    codes, losses = np.empty((columns, rows), np.uint8), np.empty(-(-rows // ROWS))
    if static is None:
        scales, zeros = (np.empty((config.num_groups(columns), rows), W.dtype) for _ in range(2))
    else:
        scales, zeros = (np.ascontiguousarray(grid.T) for grid in static)  # (G, out)
    _solve_rows(
        np.ascontiguousarray(W), np.ascontiguousarray(Hinv), codes, scales, zeros, losses, column_groups,
        _block_bounds(columns, group_size), group_size if static is None else 0,
        *_search(importance, W.dtype), config.sym, real(config.max_code), _least_zero(config, real),
    )  # fmt: skip
    if not np.isfinite(scales).all():
        raise TinyGPTQError(OVERFLOW)
    return Columns(codes.T, scales.T, zeros.T, float(losses.sum()) / 2)


def static_grids(
    W: np.ndarray, config: QuantizeConfig, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros [out, G] of contiguous groups of the weights as they are."""
    real, columns, none = W.dtype.type, W.shape[1], np.empty(0, np.int64)
    scales, zeros = (np.empty((config.num_groups(columns), len(W)), W.dtype) for _ in range(2))
    _solve_rows(
        np.ascontiguousarray(W), np.empty((0, 0), W.dtype), np.empty((0, 0), np.uint8), scales, zeros,
        np.empty(-(-len(W) // ROWS)), none, none, config.rows_per_group(columns),
        *_search(importance, W.dtype), config.sym, real(config.max_code), _least_zero(config, real),
    )  # fmt: skip
    if not np.isfinite(scales).all():
        raise TinyGPTQError(OVERFLOW)
    return scales.T, zeros.T


def _search(importance: np.ndarray | None, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What `_search_clip` needs: importance [in] and the clips to try, none at all where there is nothing to search.

    (The clips are handed in because Numba's disk cache would not notice that a constant of another module has changed.)
    """
    if importance is None:
        return np.empty(0, dtype), np.empty(0, dtype)
    return np.ascontiguousarray(importance), CLIPS.astype(dtype)


def _least_zero(config: QuantizeConfig, real: type) -> np.floating:
    return real(1 if config.checkpoint_format == "gptq" else 0)


def _block_bounds(columns: int, group_size: int) -> np.ndarray:
    """Where blocks of at most B columns start, and the end; no block crosses the end of a group."""
    groups = range(0, columns, group_size)
    return np.array([i for k in groups for i in range(k, min(k + group_size, columns), B)] + [columns])


@njit(cache=True, parallel=True, error_model="numpy")
def _solve_rows(
    W, Hinv, codes, scales, zeros, losses, column_groups, bounds, group_size, importance, clips, sym, maxq, least_zero
):
    """All rows of W [out, in], a chunk at a time; writes codes [in, out], losses [chunks] and, unless group_size is 0
    (static), scales and zeros [G, out]. Without bounds only the grids of contiguous groups are found and written.

    (One loop for both, because Numba compiles whatever a parallel loop calls anew for each, which takes seconds.)
    """
    for chunk in prange(len(losses)):
        r1 = chunk * ROWS
        w, count = _transposed_chunk(W, r1)
        scale, zero = np.ones((len(scales), ROWS), W.dtype), np.zeros((len(scales), ROWS), W.dtype)
        if group_size == 0:
            scale[:, :count], zero[:, :count] = scales[:, r1 : r1 + count], zeros[:, r1 : r1 + count]
        if len(bounds) == 0:
            for g in range(len(scales)):
                k, end = g * group_size, (g + 1) * group_size
                _find_grid(w[k:end], importance[k:end], clips, scale[g], zero[g], sym, maxq, least_zero)
        else:
            code = np.empty((W.shape[1], ROWS), np.uint8)
            losses[chunk] = _quantize_chunk(
                w, Hinv, code, scale, zero, column_groups, bounds, group_size, importance, clips, sym, maxq, least_zero
            )
            codes[:, r1 : r1 + count] = code[:, :count]
        scales[:, r1 : r1 + count], zeros[:, r1 : r1 + count] = scale[:, :count], zero[:, :count]


@njit(cache=True, error_model="numpy")
def _transposed_chunk(W, r1):
    """ROWS rows of W [out, in] from r1 as [in, ROWS], and how many there were; missing rows are zero."""
    count = min(ROWS, W.shape[0] - r1)
    w = np.zeros((W.shape[1], ROWS), W.dtype)
    w[:, :count] = W[r1 : r1 + count].T
    return w, count


@njit(cache=True, error_model="numpy")
def _quantize_chunk(w, Hinv, code, scale, zero, column_groups, bounds, group_size, importance, clips, sym, maxq, least_zero):
    """Algorithm 1 on w [in, ROWS], which it overwrites; returns the sum of squared errors."""
    Err = np.empty((B, ROWS), w.dtype)
    loss = 0.0
    for block in range(len(bounds) - 1):
        i1, i2 = bounds[block], bounds[block + 1]
        for i in range(i1, i2):
            g = column_groups[i]
            if group_size > 0 and i % group_size == 0:
                end = i + group_size
                _find_grid(w[i:end], importance[i:end], clips, scale[g], zero[g], sym, maxq, least_zero)
            loss += _round(w[i], scale[g], zero[g], maxq, Hinv[i, i], code[i], Err[i - i1])
            _correct(w[i + 1 : i2], Err[i - i1], Hinv[i, i + 1 : i2])
        if i2 - i1 == B:
            _correct_by_block(w[i2:], Err, Hinv[i1:i2, i2:])
        else:
            for i in range(i1, i2):
                _correct(w[i2:], Err[i - i1], Hinv[i, i2:])
    return loss


@njit(cache=True, error_model="numpy")
def _round(w, scale, zero, maxq, d, code, err):
    """One column: codes, the scaled error ``(w - q) / d``; returns the sum of its squares in float64."""
    for r in range(ROWS):
        c = np.rint(w[r] / scale[r]) + zero[r]
        c = min(max(c, w.dtype.type(0)), maxq)
        code[r] = np.uint8(c)
        err[r] = (w[r] - scale[r] * (c - zero[r])) / d
    loss = 0.0
    for r in range(ROWS):
        loss += np.float64(err[r]) * np.float64(err[r])
    return loss


@njit(cache=True, error_model="numpy")
def _correct(w, err, u):
    """``w[j] -= u[j] * err`` for all j: what one column's error [ROWS] means for the columns w [j, ROWS]."""
    for j in range(len(w)):
        for r in range(w.shape[1]):
            w[j, r] -= err[r] * u[j]


@njit(cache=True, error_model="numpy")
def _correct_by_block(w, Err, u):
    """``w -= u^T @ Err`` for Err [B, ROWS] and u [B, j]: one load and one store of w for the errors of all B columns."""
    for j in range(len(w)):
        u0, u1, u2, u3, u4, u5, u6, u7 = u[0, j], u[1, j], u[2, j], u[3, j], u[4, j], u[5, j], u[6, j], u[7, j]
        for r in range(ROWS):
            first = u0 * Err[0, r] + u1 * Err[1, r] + u2 * Err[2, r] + u3 * Err[3, r]
            second = u4 * Err[4, r] + u5 * Err[5, r] + u6 * Err[6, r] + u7 * Err[7, r]
            w[j, r] -= first + second


@njit(cache=True, error_model="numpy")
def _find_grid(W, importance, clips, scale, zero, sym, maxq, least_zero):
    """`grid.find_grid` for W [columns of the group, rows], written to scale and zero [rows]; `grid.search_clip` after it,
    unless clips is empty."""
    real = W.dtype.type
    xmin, xmax = np.zeros(W.shape[1], W.dtype), np.zeros(W.shape[1], W.dtype)
    for k in range(W.shape[0]):
        for r in range(W.shape[1]):
            xmin[r] = min(xmin[r], W[k, r])
            xmax[r] = max(xmax[r], W[k, r])
    for r in range(W.shape[1]):
        low, high = xmin[r], xmax[r]
        if sym:
            high = max(-low, high)
            low = -high
        if low == high:
            low, high = real(-1), real(1)
        s = _as_stored((high - low) / maxq, sym)
        if sym:
            z = (maxq + real(1)) / real(2)
        else:
            z = min(max(np.rint(-low / real(s)), real(0)), maxq)
            if z < least_zero:
                s = _as_stored(high / (maxq - real(1)), False)
                z = least_zero
        scale[r], zero[r] = s, z
    if len(clips) > 0:
        _search_clip(W, importance, clips, scale, zero, maxq)


@njit(cache=True, error_model="numpy")
def _search_clip(W, importance, clips, scale, zero, maxq):
    """`grid.search_clip` for W [columns of the group, rows], in place."""
    tried, loss, lowest, highest = scale.copy(), np.empty_like(scale), -zero, maxq - zero  # multiples of the scale
    best, least = scale.copy(), np.full(W.shape[1], np.inf, W.dtype)
    for clip in clips:
        if clip < 1:
            for r in range(W.shape[1]):
                tried[r] = _as_stored(scale[r] * clip, False)
        loss[:] = 0
        for k in range(W.shape[0]):
            for r in range(W.shape[1]):
                error = W[k, r] - tried[r] * min(max(np.rint(W[k, r] / tried[r]), lowest[r]), highest[r])
                loss[r] += error * error * importance[k]
            if k % LOOK == LOOK - 1 and not _any_less(loss, least):  # losses only grow
                break
        for r in range(W.shape[1]):
            if loss[r] < least[r]:
                best[r], least[r] = tried[r], loss[r]
    scale[:] = best


@njit(cache=True, error_model="numpy")
def _any_less(a, b):
    """Whether any number of a is less than the same of b (a sum: a loop that ended early would not be one of vectors)."""
    less = 0
    for r in range(len(a)):
        less += int(a[r] < b[r])
    return less > 0


@njit(cache=True, error_model="numpy")
def _as_stored(scale, down):
    """`grid.as_stored` for one number: Numba has no fp16, so round to its 11 significant bits, or to multiples of 2^-24."""
    exponent = math.frexp(scale)[1]
    step = math.ldexp(1.0, max(exponent - 11, -24))
    steps = np.float64(scale) / step
    rounded = max((np.floor(steps) if down else np.rint(steps)) * step, SMALLEST_SCALE)
    return rounded if scale < 65520.0 else np.inf  # 65520 is half-way to what would be fp16's next number
