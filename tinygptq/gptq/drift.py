"""Correcting for what quantising has already changed before a linear: its inputs, and the residual stream it adds to.

GPTQ asks a linear to repeat ``W X`` on the quantised model's inputs X. What the unquantised model computes there is
``W X_fp``, X_fp its own inputs; and the stream that the output is added to has drifted too, from h_fp to h. So the target is

    W X + E,   E = drift * W (X_fp - X) + residual * (h_fp - h)

and ``min ||T X - (W X + E)||^2`` over matrices T has the answer ``T = W + E X^T H^-1``: these are the weights to quantise,
by whatever method, with the same H.

The first term is GPTAQ's asymmetric calibration (Li et al. 2025, arXiv 2504.02692), moved into the weights before they are
quantised as in QEP (Arai and Ichikawa 2025, arXiv 2504.09629), whose strength parameter ``drift`` is. The second carries it
over the residual connection, for the two linears that write to it. Strengths below 1 and the ridge are there because a
linear function of X cannot explain much of E: a few ten thousand tokens are fitted better than the text to come.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.refine import product
from tinygptq.gptq.solver import inverse_cholesky
from tinygptq.ops import array_module

RIDGE = 0.1  # of each diagonal entry of H
DAMP = 0.01  # of the mean of diag(H)


class Cross:
    """``2/n * sum over tokens of e x^T``, n the number of calibration sequences: the scale of `gptq.Hessian`."""

    def __init__(self) -> None:
        self._sum: Any = None
        self._samples = 0

    def add(self, E: np.ndarray, X: np.ndarray) -> None:
        """Add a batch: E [B, T, M], X [B, T, in]."""
        e, x = (array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False) for array in (E, X))
        part = product(e.T, x)  # (M, in)
        self._sum = part if self._sum is None else self._sum + part
        self._samples += len(X)

    @property
    def C(self) -> np.ndarray:
        """The sum so far, [M, in]."""
        return self._sum * np.float32(2 / self._samples)


def inverse(H: np.ndarray, *, invert: Any = None) -> np.ndarray:
    """Upper triangular R, ``R^T R`` the inverse of H with a ridge; shared by the linears that have this input.

    Args:
        H: [in, in] from `gptq.Hessian`, not modified. invert: `solver.inverse_cholesky` or a twin; None picks by the array.
    Raises:
        TinyGPTQError: not even the ridge makes H positive definite.
    """
    xp = array_module(H)
    ridged, diagonal = H.astype(np.float64), H.diagonal().astype(np.float64)
    steps = xp.arange(len(H))
    ridged[steps, steps] += xp.where(diagonal > 0, RIDGE * diagonal + DAMP * diagonal.mean(), 1)
    R = (invert or (_twin() if xp is np else inverse_cholesky))(ridged)
    if R is None:
        raise TinyGPTQError("H is not positive definite; a sum of x x^T would be")
    return R.astype(np.float32)


def target(W: np.ndarray, C: np.ndarray, R: np.ndarray) -> np.ndarray:
    """``W + C (H + ridge)^-1``: the weights to quantise in place of W.

    Args:
        W: float32 [out, in]. C: [out, in], E X^T at H's scale. R: [in, in], what `inverse` gave. None is modified.
    """
    return W + product(product(C, R.T), R)


def _twin() -> Any:
    from tinygptq.gptq import solver_numba  # only here: importing Numba takes a while

    return solver_numba.inverse_cholesky
