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

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.solver import check_method, functions_of
from tinygptq.ops import array_module
from tinygptq.threads import product

RIDGE = 0.1  # of each diagonal entry of H
DAMP = 0.01  # of the mean of diag(H)


class Cross:
    """``2/n * sum over tokens of e x^T``, n the number of calibration sequences: the scale of `gptq.Hessian`.

    Args:
        multiply: the product of two float32 matrices.
    """

    def __init__(self, multiply: Callable[[Any, Any], Any] = product) -> None:
        self._sum: Any = None
        self._samples, self._multiply = 0, multiply

    def add(self, E: np.ndarray, X: np.ndarray) -> None:
        """Add a batch: E [B, T, M], X [B, T, in]."""
        e, x = (array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False) for array in (E, X))
        part = self._multiply(e.T, x)  # (M, in)
        self._sum = part if self._sum is None else array_module(part).add(self._sum, part, out=self._sum)
        self._samples += len(X)

    @property
    def C(self) -> np.ndarray:
        """The sum so far, [M, in]."""
        return self._sum * np.float32(2 / self._samples)


def inverse(H: np.ndarray, *, method: str | Any = None) -> np.ndarray:
    """Upper triangular R, ``R^T R`` the inverse of H with a ridge; shared by the linears that have this input.

    Args:
        H: [in, in] from `gptq.Hessian`, not modified. method: whose `inverse_cholesky` factors it, as for `gptq.solve`.
    Raises:
        TinyGPTQError: not even the ridge makes H positive definite.
    """
    xp, method = array_module(H), check_method(method, H)
    ridged = H.astype(np.float64 if isinstance(method, str) else H.dtype)
    steps, diagonal = xp.arange(len(H)), ridged.diagonal().copy()
    ridged[steps, steps] += xp.where(diagonal > 0, RIDGE * diagonal + DAMP * diagonal.mean(), 1)
    R = functions_of(method).inverse_cholesky(ridged)
    if R is None:
        raise TinyGPTQError(
            "H is not positive definite, as a sum of x x^T would be; recipe 'fast' needs no inverse of it that is not damped"
        )
    return R.astype(np.float32, copy=False)


def target(W: np.ndarray, C: np.ndarray, R: np.ndarray) -> np.ndarray:
    """``W + C (H + ridge)^-1``: the weights to quantise in place of W.

    Args:
        W: float32 [out, in]. C: [out, in], E X^T at H's scale. R: [in, in], what `inverse` gave. None is modified.
    """
    return W + product(product(C, R.T), R)
