"""The small functions a LLaMA is made of, over NumPy or CuPy arrays alike (whichever their inputs belong to).

Everything is float32 in, float32 out. Shape letters: B batch, T new tokens, S tokens seen so far (S >= T), H query heads,
G key-value heads, D head dimension.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.weights import Linear


def array_module(x: Any) -> ModuleType:
    """The module whose functions work on ``x``: numpy, or cupy for arrays on a GPU."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def to_numpy(x: Any) -> np.ndarray:
    """``x`` in the host's memory."""
    return x if isinstance(x, np.ndarray) else x.get()


def linear(x: np.ndarray, layer: Linear) -> np.ndarray:
    """``x [..., K] @ W [K, N] + bias`` in float32: the definition; kernels do the same without forming W."""
    y = x @ layer.dequantize()
    return y if layer.bias is None else y + layer.bias


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Scale each vector of ``x [..., C]`` to unit mean square, then by ``weight [C]`` (Zhang & Sennrich 2019)."""
    xp = array_module(x)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """``x * sigmoid(x)``; exp overflows to inf for very negative x, and x / inf is the right answer, -0."""
    xp = array_module(x)
    with np.errstate(over="ignore"):
        return x / (1.0 + xp.exp(-x))


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """``silu(gate) * up``, the MLP's nonlinearity (Shazeer 2020)."""
    return silu(gate) * up


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, with the maximum taken out first so that exp cannot overflow."""
    xp = array_module(x)
    e = xp.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rope_frequencies(config: LlamaConfig, length: int) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [D/2], following transformers' ``modeling_rope_utils``.

    Args:
        length: tokens the sequence reaches; only ``dynamic`` scaling looks at it.
    """
    scaling, dim, theta = config.rope_scaling, config.head_dim, config.rope_theta
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    if scaling is not None and scaling.kind == "dynamic":
        trained = scaling.original_max_position_embeddings
        reached = max(length, trained)
        theta = theta * (scaling.factor * reached / trained - (scaling.factor - 1)) ** (dim / (dim - 2))
    frequencies = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    # llama3: wavelengths longer than the trained context are divided by the factor, short ones kept, a ramp between
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (frequencies * keep + frequencies / scaling.factor * (1 - keep)).astype(np.float32)


def rope_tables(frequencies: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions ``start .. start+count-1``, each float32 [count, D/2]."""
    xp = array_module(frequencies)
    angles = xp.arange(start, start + count, dtype=np.float32)[:, None] * frequencies
    return xp.cos(angles), xp.sin(angles)


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate ``x [B, H, T, D]`` by its positions (Su et al. 2021), in the half-split pairing of Hugging Face checkpoints.

    Element d of the first half and element d of the second half form a pair (the original LLaMA release pairs neighbours).
    """
    xp = array_module(x)
    a, b = xp.split(x, 2, axis=-1)  # each (B, H, T, D/2)
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)  # (B, H, T, D)


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Each query attends to the keys at its own position and before it; query heads share key-value heads in order.

    Shapes:
        q: [B, H, T, D], the last T of S positions. k, v: [B, G, S, D]. Returns [B, T, H * D].
    """
    xp = array_module(q)
    batch, heads, tokens, dim = q.shape
    groups, seen = k.shape[1], k.shape[2]
    q = q.reshape(batch, groups, heads // groups, tokens, dim)  # (B, G, H/G, T, D)
    scores = q @ k[:, :, None].swapaxes(-1, -2) * np.float32(dim**-0.5)  # (B, G, H/G, T, S)
    future = xp.arange(seen) > xp.arange(seen - tokens, seen)[:, None]  # (T, S)
    scores = xp.where(future, np.float32(-np.inf), scores)
    mixed = softmax(scores) @ v[:, :, None]  # (B, G, H/G, T, D)
    return mixed.reshape(batch, heads, tokens, dim).swapaxes(1, 2).reshape(batch, tokens, heads * dim)  # (B, T, H*D)
