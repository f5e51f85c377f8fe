"""The quantisation grid of one group: a scale and a zero point for each row, from the smallest and largest weight.

A row's grid is the ``2^bits`` values ``scale * (code - zero)``, code = 0 .. 2^bits - 1. Scales are rounded to fp16, the
width they are stored in, before any weight is rounded with them: the codes then belong to the stored scales exactly.
"""

from __future__ import annotations

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.ops import array_module

SMALLEST_SCALE = 2.0**-24  # fp16's smallest positive number, a subnormal: every fp16 reader decodes those exactly
CLIPS = 1 - np.arange(24) / 40  # the shares of a grid's width that `search_clip` tries, 1 down to 0.425
OVERFLOW = "the weights need a scale beyond fp16's 65504: rescale them, or raise damp_percent if the Hessian is at fault"


def find_grid(W: np.ndarray, bits: int, sym: bool, storage: str = "gptq") -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row of ``W``, the weights of one group (min-max, Frantar et al. 2022, section 4).

    Symmetric grids span [-max|w|, max|w|] with zero = 2^(bits-1). Asymmetric ones span [min(w, 0), max(w, 0)] with
    zero = rint(-min / scale). The format ``gptq`` stores zero - 1, so there a zero of 0 (a row without negative weights)
    becomes 1, and the scale widens so that the largest weight keeps a code.

    Symmetric scales are rounded to fp16 downwards. The largest weight lies half-way between two codes there: a negative one
    goes to code 0, beyond it, as an exact scale (and the original implementation's, in fp32) makes it; with a scale only a
    little larger it would go to code 1, and all such weights would shrink. On SmolLM2-135M at 4 bits in groups of 128,
    rounding weights to nearest gives perplexity 26.76 this way, 27.37 with scales to the nearest fp16, 26.85 in fp32.

    Outcomes of odd rows: all zeros take the grid of [-1, 1] and stay exactly zero. A constant row is like any other:
    asymmetric grids hold it to within the rounding of the scale, symmetric ones to within half a scale (max|w| lies
    half-way between two codes, and the positive end has no code beyond it). Scales too small for fp16 become 2^-24.

    Args:
        W: float [rows, columns of the group].
        storage: the checkpoint format, ``gptq`` or ``gptq_v2``.
    Returns:
        scale, zero: both [rows] in W's dtype; the scales are fp16 values.
    Raises:
        TinyGPTQError: a scale exceeds fp16's range.
    """
    xp = array_module(W)
    maxq = 2**bits - 1
    xmin = xp.minimum(W.min(axis=1), 0)  # (rows,)
    xmax = xp.maximum(W.max(axis=1), 0)
    if sym:
        xmax = xp.maximum(-xmin, xmax)
        xmin = -xmax
    empty = xmin == xmax
    xmin, xmax = xp.where(empty, -1, xmin).astype(W.dtype), xp.where(empty, 1, xmax).astype(W.dtype)
    scale = as_stored((xmax - xmin) / maxq, down=sym)
    if sym:
        zero = xp.full_like(scale, 2 ** (bits - 1))
    else:
        zero = xp.clip(xp.rint(-xmin / scale), 0, maxq)
        if storage == "gptq":
            low = zero < 1
            scale = xp.where(low, as_stored(xmax / (maxq - 1)), scale)
            zero = xp.where(low, 1, zero).astype(W.dtype)
    if not xp.isfinite(scale).all():
        raise TinyGPTQError(OVERFLOW)
    return scale, zero


def search_clip(W: np.ndarray, scale: np.ndarray, zero: np.ndarray, maxq: int, importance: np.ndarray) -> np.ndarray:
    """Narrow each row's grid where that rounds the group better: of the scales ``clip * scale``, clip in `CLIPS`, the one
    with the smallest ``sum_k importance[k] * (w[k] - q[k])^2``, the first of equals.

    A narrower grid gives up the largest weights, which it clips, to be finer for all others. Weighing the errors by diag(H),
    the mean square of each input, makes the sum the layer's output error but for the inputs' correlations, which are GPTQ's
    part.

    (The search over shrunken ranges is the original implementation's ``mse`` option, there unweighted; weighted by
    activations it is AWQ's clip search, Lin et al. 2023, section 4.)

    Args:
        W: float [rows, columns of the group]. scale, zero: [rows], what `find_grid` gave. importance: [columns], at least 0.
    Returns:
        [rows] in W's dtype, fp16 values.
    """
    xp = array_module(W)
    best, least = scale, xp.full(len(W), np.inf, W.dtype)
    for clip in CLIPS:
        tried = scale if clip == 1 else as_stored(scale * W.dtype.type(clip))
        error = W - dequantize(quantize(W, tried[:, None], zero[:, None], maxq), tried[:, None], zero[:, None])
        loss = (error * error) @ importance  # (rows,)
        best, least = xp.where(loss < least, tried, best), xp.minimum(loss, least)
    return best


def as_stored(scale: np.ndarray, down: bool = False) -> np.ndarray:
    """Round to fp16 (to nearest, ties to even; or down) and back; too large gives inf, too small 2^-24."""
    xp = array_module(scale)
    with np.errstate(over="ignore"):
        stored = scale.astype(np.float16)
    if down:
        above = (stored.astype(scale.dtype) > scale) & xp.isfinite(stored)
        stored = xp.where(above, xp.nextafter(stored, np.float16(0)), stored)
    return xp.maximum(stored.astype(scale.dtype), SMALLEST_SCALE)


def quantize(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, maxq: int) -> np.ndarray:
    """Code of the nearest grid value, in w's dtype: ``clip(rint(w / scale) + zero, 0, maxq)``, ties to the even multiple."""
    xp = array_module(w)
    return xp.clip(xp.rint(w / scale) + zero, 0, maxq)


def dequantize(code: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The grid value of a code: ``scale * (code - zero)``."""
    return scale * (code - zero)
