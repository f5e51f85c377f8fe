"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", Algorithm 1): round one column of W at a time, and correct the columns to come for the error just made.

The symbols are the paper's: W the weights [out, in], H the Hessian of the output error [in, in], Hinv the upper Cholesky
factor of H^-1, Q the quantised weights, Err a block's scaled rounding errors, damp the share of mean(diag(H)) added to
the diagonal, B the block of columns whose corrections are applied together to the rest.

`quantize_columns` is the definition; solver_numba.py is its fast twin, and the tests hold them together. Beyond the paper:
groups of columns with their own grid, act-order, static groups. Where a group starts, its grid is found from weights
carrying every correction made so far, also those of the block in progress: the original implementation reads stale
weights there whenever a group is smaller than the block.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq.grid import dequantize, find_grid, quantize, search_clip
from tinygptq.gptq.hessian import columns_reordered, reordered
from tinygptq.ops import array_module

B = 128  # columns in a block (the paper's value); any other gives the same codes but for floating-point rounding
FIRST_DAMP = 1e-4  # where damping starts to grow from when 0 was asked for
LAST_DAMP = 1.0  # damping grows no further: at this point mean(diag(H)) itself has been added to the diagonal

log = logging.getLogger("tinygptq")


@dataclass(frozen=True)
class Solution:
    """A quantised linear, columns in their original order: ``W ~ scales[:, g_idx] * (codes - zeros[:, g_idx])``.

    Shapes:
        codes: uint8 [out, in]. scales: float16 [out, G], the values that were rounded with. zeros: uint16 [out, G], true
        zero points. g_idx: int32 [in], group of each column.
    loss is ``1/2 tr((W - Q) H (W - Q)^T)`` with the damped H, as the original reports it (NaN when no H was given); damp
    the share of mean(diag(H)) that was added in the end.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    g_idx: np.ndarray
    loss: float
    damp: float

    def dequantize(self) -> np.ndarray:
        """Q, float32 [out, in]."""
        scale, zero = self.scales[:, self.g_idx], self.zeros[:, self.g_idx]  # (out, in)
        return dequantize(self.codes.astype(np.float32), scale.astype(np.float32), zero.astype(np.float32))


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian; linears that share their input share it (q, k, v; gate, up). See `prepare`.

    Shapes:
        Hinv: [in, in] upper triangular, ``Hinv^T Hinv`` the inverse of the damped H, in processing order. perm: int [in],
        column perm[i] is the i-th to be processed, None for the identity. dead: bool [in] and importance: [in], diag(H) as
        damped, both in original order.
    """

    Hinv: np.ndarray
    perm: np.ndarray | None
    dead: np.ndarray
    importance: np.ndarray
    damp: float


class Columns(NamedTuple):
    """What `quantize_columns` and its twin return, columns in processing order: codes [out, in] uint8, scales and zeros
    [out, G] in the working dtype, loss."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    loss: float


def solve(
    W: np.ndarray,
    H: np.ndarray | Factor,
    config: QuantizeConfig,
    *,
    method: str | Any = None,
    dtype: type = np.float32,
    name: str = "weight",
) -> Solution:
    """Quantise one linear's weights by GPTQ.

    Args:
        W: float [out, in]; not modified.
        H: float [in, in] from `Hessian.H`, not modified; or the `Factor` that `prepare` made of it.
        config: bits, group_size, sym, desc_act, static_groups, damp_percent, checkpoint_format, recipe are used.
        method: "numba" (the fast twin, NumPy arrays only), "definition" (NumPy or CuPy), or a module with twins of
            `inverse_cholesky`, `quantize_columns` and `static_grids`; None picks one of the first two by the array.
        dtype: of W, Hinv and all arithmetic on them, float32 or float64. H is factored in float64, or as a module of twins
            chooses (it is given H as it is).
        name: what error messages and the log call this linear.
    Raises:
        TinyGPTQError: shapes that do not fit, NaN or infinity in W or H, an H that no damping makes positive definite, a
            scale beyond fp16.
    Dead inputs (zero in all calibration data) get the code of the zero point: their weights become zero.
    """
    xp = array_module(W)
    method = check_method(method, W)
    W = _checked_weights(W, dtype, name)
    factor = H if isinstance(H, Factor) else prepare(H, config, method=method, dtype=dtype, name=name)
    if factor.dead.shape != W.shape[1:]:
        raise TinyGPTQError(f"{name}: W is {W.shape}, so H should be [{W.shape[1]}, same], found {factor.dead.shape[0]}")
    W *= ~factor.dead  # (out, in), a copy of the caller's
    with _named(name):
        importance: Any = factor.importance.astype(dtype, copy=False) if config.recipe.clip else None
        static = functions_of(method).static_grids(W, config, importance) if config.grids_first else None
    k_to_group = xp.arange(W.shape[1]) // config.rows_per_group(W.shape[1])
    if factor.perm is None:
        g_idx = column_groups = k_to_group
    else:
        W = columns_reordered(W, factor.perm)
        importance = None if importance is None else importance[factor.perm]
        column_groups = k_to_group[factor.perm] if config.grids_first else k_to_group
        g_idx = xp.empty_like(column_groups)
        g_idx[factor.perm] = column_groups
    quantize_all = functions_of(method).quantize_columns
    with _named(name):
        codes, scales, zeros, loss = quantize_all(
            W, factor.Hinv.astype(dtype, copy=False), config, column_groups, static, importance
        )
    if not np.isfinite(loss):
        raise TinyGPTQError(f"{name}: the corrections overflow, H is too ill-conditioned; raise damp_percent")
    if factor.perm is not None:
        unpermuted = xp.empty_like(codes)
        unpermuted[:, factor.perm] = codes
        codes = unpermuted
    scales, zeros = scales.astype(np.float16), zeros.astype(np.uint16)
    return Solution(codes, scales, zeros, g_idx.astype(np.int32), loss, factor.damp)


def quantize_columns(
    W: np.ndarray,
    Hinv: np.ndarray,
    config: QuantizeConfig,
    column_groups: np.ndarray,
    static: tuple[np.ndarray, np.ndarray] | None,
    importance: np.ndarray | None = None,
) -> Columns:
    """Algorithm 1, with a grid for each group of columns.

    Args:
        W: [out, in], columns in processing order; not modified.
        Hinv: [in, in] in W's dtype, upper triangular.
        column_groups: int [in], group of each column; without ``static`` they are 0 .. G-1 in consecutive runs.
        static: scales and zeros [out, G] found beforehand, None to find each where its group starts.
        importance: [in], what `search_clip` weighs errors by, in processing order; None for grids without it.
    """
    xp = array_module(W)
    rows, columns = W.shape
    group_size, maxq = config.rows_per_group(columns), config.max_code
    W, codes, loss = W.copy(), xp.empty(W.shape, np.uint8), 0.0
    scales, zeros = static or (xp.empty((rows, config.num_groups(columns)), W.dtype) for _ in range(2))
    for i1 in range(0, columns, B):
        i2 = min(i1 + B, columns)
        Err = xp.zeros((rows, i2 - i1), W.dtype)
        for i in range(i1, i2):
            g = int(column_groups[i])
            if static is None and i % group_size == 0:
                # The group's columns beyond this block still lack the corrections for the block's errors so far.
                late = slice(i2, max(i + group_size, i2))
                corrected = W[:, late] - Err[:, : i - i1] @ Hinv[i1:i, late]  # (rows, columns beyond the block)
                group = xp.concatenate([W[:, i : min(i + group_size, i2)], corrected], axis=1)  # (rows, group)
                scales[:, g], zeros[:, g] = _group_grid(group, config, importance, i)
            w, d = W[:, i], Hinv[i, i]
            code = quantize(w, scales[:, g], zeros[:, g], maxq)
            err = (w - dequantize(code, scales[:, g], zeros[:, g])) / d
            W[:, i + 1 : i2] -= err[:, None] * Hinv[i, i + 1 : i2]  # (rows, rest of the block)
            codes[:, i], Err[:, i - i1] = code, err
        W[:, i2:] -= Err @ Hinv[i1:i2, i2:]  # (rows, all later columns)
        loss += float((Err * Err).sum(dtype=np.float64)) / 2
    return Columns(codes, scales, zeros, loss)


def prepare(
    H: np.ndarray,
    config: QuantizeConfig,
    *,
    method: str | Any = None,
    dtype: type = np.float32,
    name: str = "Hessian",
) -> Factor:
    """Order the columns, damp H and factor its inverse; the result serves every linear that has this input.

    Act-order (desc_act, or the recipe's) processes columns by descending diag(H); equal ones keep their order. Dead inputs,
    where diag(H) is 0, come last then; their diagonal becomes 1, and they stay out of the mean that damping is measured by.

    Args and errors: as for `solve`; H is float [in, in] and is not modified.
    """
    xp = array_module(H)
    method = check_method(method, H)
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise TinyGPTQError(f"{name}: H should be square, found shape {H.shape}")
    if not xp.isfinite(H).all():
        raise TinyGPTQError(f"{name}: H holds NaN or infinity; look at the activations it was gathered from")
    dead = H.diagonal() == 0
    perm = None
    if config.in_act_order:
        perm = xp.argsort(-H.diagonal(), kind="stable")
        H = reordered(H, perm)
    wide = np.float64 if isinstance(method, str) else H.dtype
    H = H.astype(wide, copy=perm is None)  # a copy in any case, damped in place below
    diagonal = H.diagonal().copy()
    mean = float(diagonal.sum() / max(1, int((diagonal != 0).sum())))
    diagonal[diagonal == 0] = 1
    invert = functions_of(method).inverse_cholesky
    Hinv, damp = _damped(H, diagonal, mean, config.damp_percent, invert, name)
    importance = xp.empty_like(diagonal)
    importance[slice(None) if perm is None else perm] = diagonal + damp * mean
    return Factor(Hinv.astype(dtype, copy=False), perm, dead, importance, damp)


def _damped(H: np.ndarray, diagonal: np.ndarray, mean: float, damp: float, invert, name: str) -> tuple[np.ndarray, float]:
    """Add ``damp * mean`` to the diagonal and factor; damp grows tenfold until that succeeds. Overwrites H's diagonal."""
    steps = array_module(H).arange(len(H))
    asked = damp
    while True:
        H[steps, steps] = diagonal + damp * mean
        Hinv = invert(H)
        if Hinv is not None:
            return Hinv, damp
        if damp >= LAST_DAMP or mean <= 0:
            tried = f"not even with damping {damp:g} (asked for: {asked:g})"
            raise TinyGPTQError(f"{name}: H is not positive definite, {tried}; a sum of x x^T would be")
        larger = min(max(10 * damp, FIRST_DAMP), LAST_DAMP)
        log.warning("%s: H is not positive definite with damping %g, trying %g", name, damp, larger)
        damp = larger


def inverse_cholesky(H: np.ndarray) -> np.ndarray | None:
    """Upper triangular Hinv with ``Hinv^T Hinv = H^-1`` for float64 H [in, in]; None when H is not positive definite."""
    xp = array_module(H)
    L = cholesky(H)
    if L is None:
        return None
    L_inverse = xp.linalg.inv(L)
    L = cholesky(L_inverse.T @ L_inverse, tolerance=0)  # H^-1 = L^-T L^-1
    return None if L is None else L.T


def cholesky(A: np.ndarray, tolerance: float = np.finfo(np.float64).eps) -> np.ndarray | None:
    """Lower Cholesky factor of float64 A [n, n], or None unless A is positive definite to working precision.

    A rank-deficient matrix can pass LAPACK's own test (pivots above zero) on rounding noise alone, so that pivots below
    ``n * tolerance * max(diag(A))`` count as zero too.
    """
    xp = array_module(A)
    try:
        L = xp.linalg.cholesky(A)
    except np.linalg.LinAlgError:
        return None
    pivots = L.diagonal() ** 2
    smallest = len(A) * tolerance * A.diagonal().max()
    return L if bool((pivots > smallest).all()) else None  # also False for the NaN that CuPy gives in place of an error


def round_to_nearest(
    W: np.ndarray, config: QuantizeConfig, H: np.ndarray | None = None, *, name: str = "weight"
) -> Solution:
    """Quantise by rounding each weight to its grid, no corrections: the baseline (RTN), on the same grids as `solve`.

    Args:
        W: float [out, in]; groups are ``k // group_size``. config: bits, group_size, sym, checkpoint_format are used.
        H: when given, [in, in], the result carries the same loss as GPTQ's (damped by damp_percent), else NaN.
    """
    xp = array_module(W)
    W = _checked_weights(W, np.float32, name)
    with _named(name):
        scales, zeros = static_grids(W, config)
    g_idx = xp.arange(W.shape[1]) // config.rows_per_group(W.shape[1])
    scale, zero = scales[:, g_idx], zeros[:, g_idx]  # (out, in)
    codes = quantize(W, scale, zero, config.max_code)
    loss = float("nan")
    if H is not None:
        H = H.astype(np.float64)
        error = W - dequantize(codes, scale, zero)
        diagonal = H.diagonal()
        damped = config.damp_percent * diagonal.sum() / max(1, int((diagonal != 0).sum()))
        error[:, diagonal == 0] = 0
        loss = float(((error @ H) * error).sum() + damped * (error * error).sum()) / 2
    codes, scales, zeros = codes.astype(np.uint8), scales.astype(np.float16), zeros.astype(np.uint16)
    return Solution(codes, scales, zeros, g_idx.astype(np.int32), loss, config.damp_percent)


def _group_grid(group: np.ndarray, config: QuantizeConfig, importance: np.ndarray | None, k: int):
    """Scale and zero [out] of the group [out, columns] that starts at column k, narrowed where an importance is given."""
    scale, zero = find_grid(group, config.bits, config.sym, config.checkpoint_format)
    if importance is not None:
        scale = search_clip(group, scale, zero, config.max_code, importance[k : k + group.shape[1]])
    return scale, zero


def static_grids(
    W: np.ndarray, config: QuantizeConfig, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros [out, G] of contiguous groups of the weights as they are."""
    xp = array_module(W)
    size = config.rows_per_group(W.shape[1])
    grids = [_group_grid(W[:, k : k + size], config, importance, k) for k in range(0, W.shape[1], size)]
    return xp.stack([scale for scale, _ in grids], axis=1), xp.stack([zero for _, zero in grids], axis=1)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the linear's name before the one line of an error."""
    try:
        yield
    except TinyGPTQError as error:
        raise TinyGPTQError(f"{name}: {error}") from None


def _checked_weights(W: np.ndarray, dtype: type, name: str) -> np.ndarray:
    if W.ndim != 2 or 0 in W.shape:
        raise TinyGPTQError(f"{name}: weights should be [out, in], found shape {W.shape}")
    W = W.astype(dtype)
    if not array_module(W).isfinite(W).all():
        raise TinyGPTQError(f"{name}: the weights hold NaN or infinity")
    return W


def check_method(method: str | Any, array: np.ndarray) -> str | Any:
    """``method`` of `solve`, chosen by the array where it is None."""
    on_cpu = isinstance(array, np.ndarray)
    if method is not None and not isinstance(method, str):
        return method
    if method is None:
        return "numba" if on_cpu else "definition"
    if method not in ("numba", "definition") or (method == "numba" and not on_cpu):
        raise TinyGPTQError(f"method is {method!r}: expected 'definition', or 'numba' for NumPy arrays")
    return method


def functions_of(method: str | Any) -> Any:
    """The module that a method stands for: its `inverse_cholesky`, `quantize_columns` and `static_grids` are used."""
    if not isinstance(method, str):
        return method
    if method == "definition":
        return sys.modules[__name__]
    from tinygptq.gptq import solver_numba  # only here: importing Numba takes longer than the definition's whole run

    return solver_numba
