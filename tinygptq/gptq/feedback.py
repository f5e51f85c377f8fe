"""Errors made up for across a linear's outputs: GPTQ's own step, once more, over the rows of W.

GPTQ minimises ``tr(E H E^T)``, E = W - Q: the squared error of all outputs together, as if the model cared for each of them
alike and for each by itself. It does not. To second order, an error e of a token's outputs changes the prediction by
``1/2 e^T A e``, A the expected ``dy dy^T`` of the output's gradients (backward.py), and with A and H taken for independent
the error to make small is

    tr(A E H E^T)

(the Kronecker-factored Fisher information: Martens and Grosse 2015, arXiv 1503.05671; as a rounding objective: Tseng, Sun
and De Sa 2025, "Model-Preserving Adaptive Rounding", arXiv 2505.22988, where errors are fed back along rows and columns
both). Rows are quantised part by part. Given the error ``E_b`` of a part, what the rows r still to come can do about it is

    E_r = -A_rr^-1 A_rb E_b,  so that  W_r becomes  W_r + A_rr^-1 A_rb E_b

and the next part is quantised from there, by whatever method, with the same H. Within a part, rows are taken for
independent; the first parts are those of the largest ``A_ii``, as with act-order. Of A only blocks along its diagonal are
used, of a few hundred outputs each: what is beyond them helps little and would take most of the time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from tinygptq import threads
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.hessian import reordered
from tinygptq.gptq.solver import Factor, Solution, check_method, functions_of
from tinygptq.ops import array_module
from tinygptq.threads import product

DAMP = 1e-3  # of the mean of diag(A)
ROWS, PARTS = 64, 12  # rows in a part: as many as the solver's twin works on together, or a twelfth of all


class Outputs(NamedTuple):
    """A block of A, factored: order, int [n], the block's rows in the order in which they are quantised; R, [n, n] upper
    triangular, ``R^T R`` the inverse of the block in that order."""

    order: np.ndarray
    R: np.ndarray


def factor_outputs(A: np.ndarray, share: float, *, method: str | Any = None, name: str = "weight") -> Outputs:
    """Order the outputs of one block of A and factor its inverse.

    Args:
        A: [n, n], a sum of ``dy dy^T`` over tokens, at any scale; not modified. share: how much of its off-diagonal entries
            is kept; the rest is taken away for the same reason as with `gptq.hessian.shrink`.
        method: whose `inverse_cholesky` factors it, as for `gptq.solve`. name: what an error calls the linear.
    Raises:
        TinyGPTQError: A holds NaN or infinity, or is no sum of such products.
    """
    xp, method, diagonal = array_module(A), check_method(method, A), A.diagonal().astype(np.float64)
    if not bool(xp.isfinite(A).all()):
        raise TinyGPTQError(f"{name}: the gradients of its outputs hold NaN or infinity, or their squares overflow")
    order, steps = xp.argsort(-diagonal, kind="stable"), xp.arange(len(A))
    mean = float(diagonal.mean()) or 1.0
    A = reordered(A, order).astype(np.float64) / mean * share
    A[steps, steps] = diagonal[order] / mean + DAMP
    R = functions_of(method).inverse_cholesky(A)
    if R is None:
        raise TinyGPTQError(f"{name}: the matrix of its outputs' gradients is not positive definite")
    return Outputs(order, R.astype(np.float32))


def solve_in_parts(
    W: np.ndarray,
    H: np.ndarray,
    factor: Factor,
    outputs: Sequence[Outputs],
    solve: Callable[[np.ndarray], Solution],
    rows: int = 0,
) -> Solution:
    """Quantise part by part, the rows to come making up for the errors so far.

    Args:
        W: float32 [out, in]. H: float32 [in, in], undamped. factor: what `gptq.prepare` made of it. outputs: A's blocks, one
            after the other. None is modified. solve: quantises some rows of weights, float32 [rows, in], by themselves.
        rows: in a part; 0 stands for what ROWS and PARTS say.
    Returns:
        A solution for all of W; its loss is GPTQ's, ``1/2 tr(E H E^T)`` with H damped and E the error against W as it was
        given: larger than without feedback, which lets it grow where the prediction does not depend on it.
    """
    xp, rows = array_module(W), rows or max(ROWS, -(-len(W) // PARTS))
    parts: list[Solution] = []
    order: list[np.ndarray] = []
    for block in outputs:
        own = sum(map(len, order)) + block.order
        order.append(own)
        left = W[own]
        for start in range(0, len(left), rows):
            now, later = slice(start, start + rows), slice(start + rows, None)
            parts.append(solve(left[now]))
            if start + rows < len(left):
                error = left[now] - parts[-1].dequantize()  # (rows, in)
                left[later] -= product(_coupling(block.R, now, later).T, error)
    back = xp.argsort(xp.concatenate(order))
    codes, scales, zeros = (
        xp.concatenate([getattr(part, field) for part in parts])[back] for field in ("codes", "scales", "zeros")
    )
    whole = replace(parts[0], codes=codes, scales=scales, zeros=zeros)
    error = xp.where(factor.dead, np.float32(0), W) - whole.dequantize()
    H, steps = H.copy(), xp.arange(len(H))
    H[steps, steps] = factor.importance
    return replace(whole, loss=float((product(error, H) * error).sum(dtype=np.float64)) / 2)


def _coupling(R: np.ndarray, b: slice, r: slice) -> np.ndarray:
    """``-A_br A_rr^-1``, [b, r], which is ``R_bb^-1 R_br``: r all the rows after b."""
    with threads.alone():
        inverse = array_module(R).linalg.inv(R[b, b])
    return product(inverse, R[b, r])
