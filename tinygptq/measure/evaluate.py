"""Perplexity, as the GPTQ papers measure it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tinygptq import memory
from tinygptq.errors import TinyGPTQError
from tinygptq.model import Llama
from tinygptq.ops import array_module, to_numpy
from tinygptq.windows import WINDOW

LARGEST_NATS = 700.0  # exp overflows float64 at 709.8; a model that knows nothing at all needs log(vocabulary), about 10
ROWS_AT_ONCE = 512  # positions whose logits are formed together: 512 x 32,000 floats are 65 MB


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(mean negative log-likelihood in nats over ``tokens`` predicted tokens).

    stride: tokens from one window's beginning to the next one's; ``seqlen`` when they do not overlap.
    """

    perplexity: float
    tokens: int
    windows: int
    seqlen: int
    stride: int


@memory.kept()
def perplexity(
    model: Llama, ids: np.ndarray, seqlen: int = WINDOW, max_windows: int | None = None, stride: int | None = None
) -> Perplexity:
    """Windows of ``seqlen`` tokens, by default without overlap; in each, every token but the first is predicted.

    Args:
        ids: int [tokens], one text; what does not fill a last window is left out, as in the papers. A text shorter than
            one window is one shorter window.
        stride: let windows begin so many tokens apart. A window then predicts only what the one before it has not, so that
            every token has at least ``seqlen - stride`` tokens before it, and the last window is as long as the text lets
            it be: the strided perplexity of transformers' documentation.

    Raises:
        TinyGPTQError: fewer than two tokens, ``seqlen`` under two, a stride outside it, or logits that are NaN or hopeless.
    """
    if seqlen < 2:
        raise TinyGPTQError(f"--seqlen is {seqlen}, expected at least 2 (a window's first token is not predicted)")
    if len(ids) < 2:
        raise TinyGPTQError(f"the text holds {len(ids)} token(s); perplexity needs at least 2")
    if stride is not None and not 1 <= stride <= seqlen:
        raise TinyGPTQError(f"--stride is {stride}, expected 1 to --seqlen, which is {seqlen}")
    if max_windows is not None and max_windows < 1:
        raise TinyGPTQError(f"--max-windows is {max_windows}, expected at least 1")
    seqlen = min(seqlen, len(ids))
    windows = _windows(len(ids), seqlen, stride)[:max_windows]
    total, tokens = 0.0, 0
    with tqdm(total=len(windows), desc="perplexity", unit="window", disable=None) as bar:
        for batch in _alike(windows, max(1, model.tokens_at_once // seqlen)):
            nats = negative_log_likelihood(model, np.stack([ids[w.start : w.end] for w in batch]), batch[0].seen)
            total += nats.sum(dtype=np.float64)
            tokens += nats.size
            value = perplexity_of(total / tokens)
            bar.set_postfix_str(f"{value:.3f}")
            bar.update(len(batch))
    return Perplexity(value, tokens, len(windows), seqlen, seqlen if stride is None else stride)


class _Window(NamedTuple):
    """Tokens ``start .. end-1``, of which the first ``seen`` are not predicted."""

    start: int
    end: int
    seen: int


def _windows(tokens: int, seqlen: int, stride: int | None) -> list[_Window]:
    if stride is None:
        return [_Window(start, start + seqlen, 1) for start in range(0, tokens - seqlen + 1, seqlen)]
    windows, predicted = [], 1  # the text's first token has nothing before it
    for start in range(0, tokens, stride):
        end = min(start + seqlen, tokens)
        windows.append(_Window(start, end, max(predicted - start, 1)))
        predicted = end
        if end == tokens:
            break
    return windows if windows[-1].seen < windows[-1].end - windows[-1].start else windows[:-1]


def _alike(windows: list[_Window], at_once: int) -> Iterator[list[_Window]]:
    """Neighbours of one length that predict equally many tokens, ``at_once`` at most."""
    for _, group in itertools.groupby(windows, lambda window: (window.end - window.start, window.seen)):
        same = list(group)
        for i in range(0, len(same), at_once):
            yield same[i : i + at_once]


def perplexity_of(nats: float) -> float:
    """exp of a mean negative log-likelihood; one that is NaN or overflows is a TinyGPTQError."""
    if not nats < LARGEST_NATS:  # also true for NaN
        raise TinyGPTQError(f"the mean negative log-likelihood is {nats:g} nats, no finite perplexity: the model is broken")
    return math.exp(nats)


def negative_log_likelihood(model: Llama, windows: np.ndarray, seen: int = 1) -> np.ndarray:
    """Nats of each token but a window's first ``seen`` given those before it, int [B, T] -> float32 [B, T - seen]."""
    h = model.hidden(windows)[:, seen - 1 : -1]  # (B, T-seen, C)
    h = h.reshape(-1, h.shape[-1])  # (B * (T-seen), C)
    xp = array_module(h)
    targets = xp.asarray(windows[:, seen:].reshape(-1))
    nll = xp.empty(len(targets), np.float32)
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(targets)))
        nll[rows] = cross_entropy(model.logits(h[None, rows])[0], targets[rows])
    return to_numpy(nll).reshape(len(windows), -1)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """logsumexp(logits) - logits[target] in nats, float32 [T, vocab], int [T] -> float32 [T]; ``logits`` is overwritten."""
    top = logits.max(axis=-1, keepdims=True)  # (T, 1)
    xp = array_module(logits)
    chosen = xp.take_along_axis(logits, targets[:, None], axis=-1) - top  # (T, 1)
    logits -= top
    return xp.log(xp.exp(logits, out=logits).sum(axis=-1)) - chosen[:, 0]
