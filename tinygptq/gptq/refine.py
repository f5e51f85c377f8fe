"""A second pass over GPTQ's solution: codes by coordinate descent, scales by least squares, in turn.

GPTQ decides each code once, before it knows the codes to come, on scales found before any code. Given a whole solution Q,
both can be improved under the same objective, the layer's output error ``tr((W - Q) H (W - Q)^T)``, H damped:

- `descend`: one code at a time moves to the best one given all others (cyclic coordinate descent; Behdin et al. 2023,
  "QuantEase", section 3, which starts from rounded weights where this starts from GPTQ's).
- `refit_scales`: given the codes, Q is linear in a row's scales, and the best ones solve a linear system.

Neither ever makes the objective larger. Rows do not depend on each other. refine_numba.py has `descend`'s fast twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.gptq.grid import as_stored, dequantize, quantize
from tinygptq.gptq.hessian import reordered
from tinygptq.gptq.solver import Factor, Solution
from tinygptq.ops import array_module
from tinygptq.threads import product

PASSES = 8  # over all codes, at most; few move after the third
RIDGE = 1e-6  # of the diagonal: keeps the system solvable where two groups' inputs are the same
BYTES_AT_ONCE = 256 << 20  # of linear systems formed together


def refine(
    W: np.ndarray, H: np.ndarray, solution: Solution, factor: Factor, config: QuantizeConfig, *, method: Any = None
) -> Solution:
    """``config.recipe.refine`` rounds of `refit_scales` and `descend`, then the scales once more.

    Args:
        W: float32 [out, in], what the solution approximates. H: float32 [in, in], undamped. factor: what `gptq.prepare` made
            of it; its damping and its order of columns are used. None of them is modified.
        method: as for `gptq.solve`: "definition" has `descend` do the work; a module its own twin of it, if it has one;
            anything else the Numba twin where arrays are NumPy's.
    Returns:
        A solution in the same format, with its own loss.
    """
    xp = array_module(W)
    W = xp.where(factor.dead, np.float32(0), W).astype(np.float32)
    H = H.astype(np.float32)
    diagonal = xp.arange(len(H))
    H[diagonal, diagonal] = factor.importance
    g_idx, scales = solution.g_idx, solution.scales.astype(np.float32)
    zero = solution.zeros.astype(np.float32)[:, g_idx]  # (out, in)
    codes, WH = solution.codes.astype(np.float32), product(W, H)
    order = xp.arange(W.shape[1]) if factor.perm is None else factor.perm
    walk = _twin() if xp is np and method != "definition" else getattr(method, "descend", descend)
    for _ in range(config.recipe.refine):
        scales = refit_scales(WH, H, codes - zero, scales, g_idx)
        scale = scales[:, g_idx]
        G = WH - product(dequantize(codes, scale, zero), H)
        codes = walk(G, H, codes, scale, zero, config.max_code, order, PASSES)
    scales = refit_scales(WH, H, codes - zero, scales, g_idx)
    error = W - dequantize(codes, scales[:, g_idx], zero)
    loss = float((product(error, H) * error).sum(dtype=np.float64)) / 2
    return replace(solution, codes=codes.astype(np.uint8), scales=scales.astype(np.float16), loss=loss)


def descend(
    G: np.ndarray,
    H: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    maxq: int,
    order: np.ndarray,
    passes: int,
) -> np.ndarray:
    """Coordinate descent: each code to its best value given all others, until none moves, ``passes`` times at most.

    With ``G = (W - Q) H``, minus half the gradient with respect to Q, the error as a function of ``q = Q[:, i]`` alone is a
    parabola with its least value at ``q + G[:, i] / H[i, i]``: the nearest grid value is the best code. A step d of q
    changes G by ``-d H[i]``.

    Args:
        G: [out, in]. H: [in, in], positive definite. codes, scale, zero: [out, in], in G's dtype. order: int [in], the order
            in which columns are visited. None is modified.
    Returns:
        The codes, [out, in].
    """
    G, codes = G.copy(), codes.copy()
    for _ in range(passes):
        before = codes.copy()
        for i in order:
            s, z = scale[:, i], zero[:, i]
            best = quantize(dequantize(codes[:, i], s, z) + G[:, i] / H[i, i], s, z, maxq)
            G -= (s * (best - codes[:, i]))[:, None] * H[i]
            codes[:, i] = best
        if bool((codes == before).all()):
            break
    return codes


def refit_scales(WH: np.ndarray, H: np.ndarray, C: np.ndarray, scales: np.ndarray, g_idx: np.ndarray) -> np.ndarray:
    """The scales of each row that minimise its error ``(w - Q) H (w - Q)^T``, its codes given.

    With ``C_g`` the row's ``codes - zeros`` in group g and zero elsewhere, ``Q = sum_g s[g] C_g``, so that the best s solves
    ``A s = b``, ``A[g, g'] = C_g H C_g'^T`` and ``b[g] = C_g H w^T``. The result is rounded to fp16, and kept where it is
    within a factor of two of the scale there was and makes the row's error no larger.

    Args:
        WH: [out, in], the weights times H. H: [in, in]. C: [out, in], codes minus zeros. scales: [out, G]. g_idx: int [in].
    Returns:
        [out, G] in the dtype of ``scales``, fp16 values.
    """
    xp, G = array_module(WH), scales.shape[1]
    order = xp.argsort(g_idx, kind="stable")  # columns group by group
    if bool((order == xp.arange(len(order))).all()):
        order = slice(None)
    else:
        H = reordered(H, order)
    bounds = [int(start) for start in xp.searchsorted(g_idx[order], xp.arange(G + 1))]
    fitted, rows = xp.empty_like(scales), max(1, BYTES_AT_ONCE // (8 * G * G))
    # on a GPU a launch takes longer than a group's work; a processor's cache holds one group's
    at_once = 1 if xp is np else max(1, BYTES_AT_ONCE // (4 * C.size))
    for r in range(0, len(C), rows):
        c, s = C[r : r + rows, order], scales[r : r + rows].astype(np.float64)
        b = _group_sums(WH[r : r + rows, order] * c, bounds).astype(np.float64)  # (rows, G)
        A = xp.empty((len(c), G, G))
        for g, m in _runs(bounds, at_once):  # A is symmetric
            k, end = bounds[g], bounds[g + m]
            own = c[:, k:end].reshape(len(c), m, -1).swapaxes(0, 1)  # (m, rows, columns)
            left = product(own, H[k:end, k:].reshape(m, own.shape[2], -1))
            left *= c[:, k:]
            sums = _group_sums(left, bounds[g:])  # (m, rows, G - g)
            A[:, g : g + m, g:], A[:, g:, g : g + m] = sums.swapaxes(0, 1), sums.transpose(1, 2, 0)
        fitted[r : r + rows] = _solved(A, b, s)
    return fitted


def _runs(bounds: list[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of groups of one length that follow each other, ``most`` at a time; bounds as in `_group_sums`."""
    groups = len(bounds) - 1
    whole = groups if bounds[-1] - bounds[-2] == bounds[1] - bounds[0] else groups - 1
    for g in range(0, whole, most):
        yield g, min(most, whole - g)
    if whole < groups:
        yield whole, 1


def _group_sums(x: np.ndarray, bounds: list[int]) -> np.ndarray:
    """The sums of consecutive columns, [..., columns] -> [..., groups]; bounds: where groups start, and the end.

    All groups have the length of the first, but for the last. (CuPy's add.reduceat takes differences of running sums, and
    loses digits.)
    """
    xp, size = array_module(x), bounds[1] - bounds[0]
    whole = x.shape[-1] // size * size
    sums = x[..., :whole].reshape(*x.shape[:-1], -1, size).sum(axis=-1)
    return sums if whole == x.shape[-1] else xp.concatenate([sums, x[..., whole:].sum(axis=-1, keepdims=True)], axis=-1)


def _solved(A: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The solutions of ``A s = b`` as scales, or the ones there were; A [rows, G, G], b and s [rows, G], float64."""
    xp = array_module(A)
    steps = xp.arange(A.shape[1])
    ridged, diagonal = A.copy(), A[:, steps, steps]
    ridged[:, steps, steps] += xp.where(diagonal > 0, RIDGE * diagonal, 1)  # a group of zeros keeps its scale
    best = s + xp.linalg.solve(ridged, (b - (A @ s[..., None])[..., 0])[..., None])[..., 0]
    best = as_stored(xp.where((best > s / 2) & (best < 2 * s), best, s))  # false for NaN too
    better = _error(A, b, best) <= _error(A, b, s)  # (rows,)
    return xp.where(better[:, None], best, s)


def _error(A: np.ndarray, b: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The rows' errors but for a constant, ``s A s^T - 2 b s^T``."""
    return (s * ((A @ s[..., None])[..., 0] - 2 * b)).sum(axis=1)


def _twin() -> Any:
    from tinygptq.gptq import refine_numba  # only here: importing Numba takes a while

    return refine_numba.descend
