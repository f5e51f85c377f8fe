"""Perplexity, as the GPTQ papers measure it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from tinygptq.errors import TinyGPTQError
from tinygptq.model import Llama

TOKENS_AT_ONCE = 2048  # short windows go through the model together
LARGEST_NATS = 700.0  # exp overflows float64 at 709.8; a model that knows nothing at all needs log(vocabulary), about 10
ROWS_AT_ONCE = 512  # positions whose logits are formed together: 512 x 32,000 floats are 65 MB


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(mean negative log-likelihood in nats over ``tokens`` predicted tokens)."""

    perplexity: float
    tokens: int
    windows: int
    seqlen: int


def perplexity(model: Llama, ids: np.ndarray, seqlen: int = 2048, max_windows: int | None = None) -> Perplexity:
    """Non-overlapping windows of ``seqlen`` tokens; in each, every token but the first is predicted.

    Args:
        ids: int [tokens], one text; what does not fill a last window is left out, as in the papers. A text shorter than
            one window is one shorter window.

    Raises:
        TinyGPTQError: fewer than two tokens, ``seqlen`` under two, or logits that are NaN or hopeless.
    """
    if seqlen < 2:
        raise TinyGPTQError(f"--seqlen is {seqlen}, expected at least 2 (a window's first token is not predicted)")
    if len(ids) < 2:
        raise TinyGPTQError(f"the text holds {len(ids)} token(s); perplexity needs at least 2")
    seqlen = min(seqlen, len(ids))
    windows = len(ids) // seqlen if max_windows is None else min(max_windows, len(ids) // seqlen)
    if windows < 1:
        raise TinyGPTQError(f"--max-windows is {max_windows}, expected at least 1")
    total = 0.0
    cut, at_once = ids[: windows * seqlen].reshape(windows, seqlen), max(1, TOKENS_AT_ONCE // seqlen)
    with tqdm(total=windows, desc="perplexity", unit="window", disable=None) as bar:
        for i in range(0, windows, at_once):
            batch = cut[i : i + at_once]
            total += negative_log_likelihood(model, batch).sum(dtype=np.float64)
            tokens = min(i + at_once, windows) * (seqlen - 1)
            value = _perplexity_of(total / tokens)
            bar.set_postfix_str(f"{value:.3f}")
            bar.update(len(batch))
    return Perplexity(value, tokens, windows, seqlen)


def _perplexity_of(nats: float) -> float:
    if not nats < LARGEST_NATS:  # also true for NaN
        raise TinyGPTQError(f"the mean negative log-likelihood is {nats:g} nats, no finite perplexity: the model is broken")
    return math.exp(nats)


def negative_log_likelihood(model: Llama, windows: np.ndarray) -> np.ndarray:
    """Nats of each token but a window's first given those before it, int [B, T] -> float32 [B, T - 1]."""
    h = model.hidden(windows)[:, :-1]  # (B, T-1, C)
    h = h.reshape(-1, h.shape[-1])  # (B * (T-1), C)
    targets = windows[:, 1:].reshape(-1)
    nll = np.empty(len(targets), np.float32)
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(targets)))
        nll[rows] = _cross_entropy(model.logits(h[None, rows])[0], targets[rows])
    return nll.reshape(len(windows), -1)


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """logsumexp(logits) - logits[target], float32 [T, vocab], int [T] -> float32 [T]."""
    top = logits.max(axis=-1, keepdims=True)  # (T, 1)
    chosen = np.take_along_axis(logits, targets[:, None], axis=-1) - top  # (T, 1)
    logits -= top
    return np.log(np.exp(logits, out=logits).sum(axis=-1)) - chosen[:, 0]
