"""The Hessian of a linear's squared output error, gathered from calibration activations one batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tinygptq import threads
from tinygptq.errors import TinyGPTQError
from tinygptq.ops import array_module

TAKING = 16  # multiplications that take as long as moving one number to another place


class Hessian:
    """``H = 2/n * sum over tokens of x x^T``, n the number of calibration sequences (Frantar et al. 2022, section 3).

    H is the second derivative, with respect to any one row w of W, of the squared output error ``||(w - q) X||^2 / n``.
    Counting sequences and not tokens is the original implementation's scale: it changes no code, only what a loss of 1
    means. NumPy and CuPy activations alike; the sum lives where they live.

    Args:
        in_features: length of x.
        dtype: of the activations in the product and of the sum, float32 or float64.
        gram: computes ``x.T @ x`` of NumPy's [T, in].
    """

    def __init__(
        self, in_features: int, dtype: type = np.float32, gram: Callable[[np.ndarray], np.ndarray] = threads.gram
    ) -> None:
        self.in_features, self._gram = in_features, gram
        self.dtype = np.dtype(dtype)
        self.n_samples = 0
        self._sum: Any = None  # sum of x x^T so far, [in, in]

    def add(self, X: np.ndarray) -> None:
        """Add activations ``X [B, T, in]`` (B sequences) or ``[T, in]`` (one); an empty batch changes nothing.

        Raises:
            TinyGPTQError: another width than ``in_features``, or a NaN or infinity (nothing is added then).
        """
        xp = array_module(X)
        if X.ndim not in (2, 3) or X.shape[-1] != self.in_features:
            raise TinyGPTQError(f"activations of shape {X.shape}: expected [B, T, {self.in_features}] or [T, same]")
        X = X.astype(self.dtype, copy=False)
        x = X.reshape(-1, self.in_features)  # (B * T, in)
        with np.errstate(over="ignore", invalid="ignore"):
            xxT = self._gram(x) if xp is np else x.T @ x  # (in, in)
        # A NaN or infinity in column k of x shows in diagonal entry k, so that the tokens need no pass of their own.
        bad = ~xp.isfinite(xp.diagonal(xxT))
        if bad.any():
            found = f"first at input {int(bad.argmax())} of {self.in_features}"
            raise TinyGPTQError(f"activations hold NaN, infinity or values whose square overflows ({found})")
        self._sum = xxT if self._sum is None else xp.add(self._sum, xxT, out=self._sum)
        if x.shape[0]:
            self.n_samples += X.shape[0] if X.ndim == 3 else 1

    @property
    def H(self) -> np.ndarray:
        """The Hessian so far, [in, in]; an error when nothing was added."""
        if not self.n_samples:
            raise TinyGPTQError("the Hessian is empty: no calibration activations were added")
        return self._sum * self.dtype.type(2 / self.n_samples)

    def take(self) -> np.ndarray:
        """H, which is then the caller's alone; nothing of it is kept here, where it would be the largest array of all."""
        H = self.H
        self._sum, self.n_samples = None, 0
        return H

    @property
    def dead(self) -> np.ndarray:
        """Inputs that were zero in every token, bool [in]: their weights do not matter."""
        return self.H.diagonal() == 0


def shrink(H: np.ndarray, share: float) -> np.ndarray:
    """H with ``share`` of every entry off the diagonal taken away, float [in, in] -> a new array; H itself for a share of 0.

    The sum over a few ten thousand tokens overstates how inputs go together, and GPTQ trades errors along exactly the
    directions in which it does so most. Shrinking a covariance towards its diagonal is the usual remedy (Schäfer and
    Strimmer 2005, target D); unlike damping, which adds the same to all inputs, it treats small and large ones alike.
    """
    if not share:
        return H
    shrunk = H * H.dtype.type(1 - share)
    steps = array_module(H).arange(len(H))
    shrunk[steps, steps] = H.diagonal()
    return shrunk


def reordered(H: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows and columns of H [n, n] in another order, int [n]: a new array."""
    xp = array_module(H)
    if xp is not np:
        return xp.take(xp.take(H, order, axis=0), order, axis=1)  # CuPy's H[ix_] would make index arrays of its size
    return _taken(H, order, lambda rows: H[order[rows]])


def columns_reordered(W: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Columns of W [rows, n] in another order, int [n]: a new array, C-contiguous, which NumPy's ``W[:, order]`` is not."""
    xp = array_module(W)
    return _taken(W, order, lambda rows: W[rows]) if xp is np else xp.take(W, order, axis=1)


def _taken(like: np.ndarray, order: np.ndarray, some_rows: Callable[[slice], np.ndarray]) -> np.ndarray:
    """A new array like NumPy's ``like`` of what ``some_rows`` gives, the columns in another order."""
    out = np.empty(like.shape, like.dtype)

    def some(rows: slice) -> None:
        np.take(some_rows(rows), order, axis=1, out=out[rows], mode="clip")  # any other mode would copy ``out`` first

    threads.share(len(like), like.size * TAKING, some)
    return out
