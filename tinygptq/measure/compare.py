"""Two models on the same text: how much the second differs from the first, in its predictions and inside."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tinygptq.errors import TinyGPTQError
from tinygptq.measure.evaluate import perplexity_of
from tinygptq.model import Llama
from tinygptq.ops import array_module, to_numpy
from tinygptq.pictures import require_picture, save_picture
from tinygptq.tokenizer import Tokenizer
from tinygptq.windows import warn_of_long_windows

ROWS_AT_ONCE = 128  # positions whose logits of both models are formed together
CONTEXT_TOKENS = 12  # shown before a token that went wrong


@dataclass(frozen=True)
class WorstToken:
    """A position where the predictions differ much. kl: nats. actual: what the text goes on with. a, b: each model's most
    likely token, and the probability it gives it."""

    position: int
    kl: float
    context: str
    actual: str
    a: str
    b: str
    probability_a: float
    probability_b: float


@dataclass(frozen=True)
class Comparison:
    """Model B beside model A.

    Attributes:
        perplexity_a, perplexity_b: of the same windows. tokens: predicted ones.
        kl_mean, kl_p99: KL(A || B) of the predicted distributions, nats: mean and 99th percentile over tokens.
        top1_agreement: share of positions where both hold the same token for the most likely.
        hidden_error: relative error of the residual stream, ``|b - a| / |a|`` over all tokens: of the embedding, then after
            each block. worst: positions of largest KL.
        kl: float32 [tokens], of every position.
    """

    perplexity_a: float
    perplexity_b: float
    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    hidden_error: list[float]
    worst: list[WorstToken]
    kl: np.ndarray = field(repr=False, compare=False, default_factory=lambda: np.empty(0, np.float32))


def compare(
    a: Llama, b: Llama, ids: np.ndarray, tokenizer: Tokenizer, seqlen: int = 512, max_windows: int | None = None,
    worst: int = 10,
) -> Comparison:  # fmt: skip
    """Run both over non-overlapping windows of ``ids`` int [tokens].

    Raises:
        TinyGPTQError: other vocabularies or numbers of blocks, too little text, or predictions that are no numbers.
    """
    windows = _windows(a, b, ids, seqlen, max_windows)
    totals = _Totals(a.config.num_hidden_layers, worst)
    for number, window in enumerate(tqdm(windows, desc="comparing", unit="window", disable=None)):
        hidden = _side_by_side(a, b, window[None], totals)
        for start in range(0, len(window) - 1, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, len(window) - 1))
            log_a, log_b = (_log_softmax(model.logits(h[:, rows])[0]) for model, h in zip((a, b), hidden, strict=True))
            totals.add(log_a, log_b, window[rows.start + 1 : rows.stop + 1], number * len(window) + rows.start)
    return totals.result(windows.reshape(-1), tokenizer)


def _windows(a: Llama, b: Llama, ids: np.ndarray, seqlen: int, max_windows: int | None) -> np.ndarray:
    for what in ("vocab_size", "num_hidden_layers"):
        first, second = getattr(a.config, what), getattr(b.config, what)
        if first != second:
            raise TinyGPTQError(f"the models cannot be compared: {what} is {first} and {second}")
    if seqlen < 2 or len(ids) < 2:
        raise TinyGPTQError(f"nothing to compare: a text of {len(ids)} token(s), windows of {seqlen}; 2 are the least")
    if max_windows is not None and max_windows < 1:
        raise TinyGPTQError(f"--max-windows is {max_windows}, expected at least 1")
    seqlen = min(seqlen, len(ids))
    warn_of_long_windows(a.config, seqlen)
    count = len(ids) // seqlen if max_windows is None else min(max_windows, len(ids) // seqlen)
    return ids[: count * seqlen].reshape(count, seqlen)


def _side_by_side(a: Llama, b: Llama, ids: np.ndarray, totals: _Totals) -> tuple[np.ndarray, np.ndarray]:
    """Both residual streams after the last block, float32 [1, T, C]; their errors on the way are added up."""
    h_a, h_b = a.embed(ids), b.embed(ids)
    totals.add_hidden(0, h_a, h_b)
    for layer in range(a.config.num_hidden_layers):
        h_a, h_b = a.block(layer, h_a), b.block(layer, h_b)
        totals.add_hidden(layer + 1, h_a, h_b)
    return h_a, h_b


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [T, vocab] -> float64 [T, vocab], where the logits are."""
    xp = array_module(logits)
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))


class _Totals:
    """Sums over all windows, and the worst positions so far."""

    def __init__(self, layers: int, worst: int) -> None:
        self._nats, self._agreed = [0.0, 0.0], 0
        self._kl: list[np.ndarray] = []
        self._errors, self._sizes = np.zeros(layers + 1), np.zeros(layers + 1)
        self._most = worst
        self._worst: list[tuple] = []

    def add_hidden(self, index: int, a: np.ndarray, b: np.ndarray) -> None:
        if a.shape != b.shape:
            raise TinyGPTQError(f"the models cannot be compared: hidden sizes {a.shape[-1]} and {b.shape[-1]}")
        self._errors[index] += float(((b.astype(np.float64) - a) ** 2).sum())
        self._sizes[index] += float((a.astype(np.float64) ** 2).sum())

    def add(self, log_a: np.ndarray, log_b: np.ndarray, targets: np.ndarray, position: int) -> None:
        """Log-probabilities float64 [T, vocab] of tokens int [T], the first of which is predicted at ``position``."""
        xp, rows = array_module(log_a), np.arange(len(targets))
        kl = to_numpy((xp.exp(log_a) * (log_a - log_b)).sum(axis=-1)).clip(0.0)  # rounding can take a zero below zero
        self._nats[0] -= float(log_a[xp.asarray(rows), xp.asarray(targets)].sum())
        self._nats[1] -= float(log_b[xp.asarray(rows), xp.asarray(targets)].sum())
        top_a, top_b = to_numpy(log_a.argmax(axis=-1)), to_numpy(log_b.argmax(axis=-1))
        likely_a, likely_b = to_numpy(xp.exp(log_a.max(axis=-1))), to_numpy(xp.exp(log_b.max(axis=-1)))
        self._agreed += int((top_a == top_b).sum())
        self._kl.append(kl)
        for i in np.argsort(kl)[::-1][: self._most]:
            found = (float(kl[i]), position + int(i), int(targets[i]), int(top_a[i]), int(top_b[i]),
                     float(likely_a[i]), float(likely_b[i]))  # fmt: skip
            heapq.heappush(self._worst, found)
            if len(self._worst) > self._most:
                heapq.heappop(self._worst)

    def result(self, ids: np.ndarray, tokenizer: Tokenizer) -> Comparison:
        kl = np.concatenate(self._kl)
        if not np.isfinite(kl).all():
            raise TinyGPTQError("a model's predictions are NaN or infinite: its weights or its scales are broken")
        return Comparison(
            perplexity_a=perplexity_of(self._nats[0] / kl.size),
            perplexity_b=perplexity_of(self._nats[1] / kl.size),
            tokens=kl.size,
            kl_mean=float(kl.mean()),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=self._agreed / kl.size,
            hidden_error=[math.sqrt(error / size) for error, size in zip(self._errors, self._sizes, strict=True)],
            worst=list(self._shown(ids, tokenizer)),
            kl=kl.astype(np.float32),
        )

    def _shown(self, ids: np.ndarray, tokenizer: Tokenizer) -> Iterator[WorstToken]:
        for kl, position, actual, top_a, top_b, p_a, p_b in sorted(self._worst, reverse=True):
            before = ids[max(position + 1 - CONTEXT_TOKENS, 0) : position + 1]
            context = tokenizer.decode(before.tolist(), skip_special=False)
            is_, a, b = (tokenizer.token_text(token) for token in (actual, top_a, top_b))
            yield WorstToken(position, kl, context, is_, a, b, p_a, p_b)


def plot(comparison: Comparison, path: str | Path, names: tuple[str, str] = ("A", "B")) -> None:
    """Two panels as a PNG: the error of the residual stream block by block, and the distribution of KL over tokens."""
    require_picture(path, "--plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    perplexities = f"perplexity {comparison.perplexity_a:.3f} → {comparison.perplexity_b:.3f}"
    same = f"{100 * comparison.top1_agreement:.1f} % same first choice"
    figure.suptitle(f"{names[1]} beside {names[0]}: {perplexities}, {same}")
    left.plot(range(len(comparison.hidden_error)), [100 * error for error in comparison.hidden_error], marker="o", ms=3)
    left.set(xlabel="blocks passed", ylabel="relative error of hidden states, %")
    left.set_ylim(bottom=0)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    kl = np.sort(comparison.kl)[::-1]
    right.plot(100 * np.arange(1, kl.size + 1) / kl.size, np.maximum(kl, 1e-9))
    right.axhline(comparison.kl_mean, color="tab:orange", ls="--", label=f"mean {comparison.kl_mean:.3g}")
    right.axhline(comparison.kl_p99, color="tab:red", ls=":", label=f"99th percentile {comparison.kl_p99:.3g}")
    right.set(xscale="log", yscale="log", xlabel="share of tokens with at least this KL, %", ylabel="KL, nats")
    right.grid(alpha=0.3, which="both")
    right.legend()
    save_picture(figure, path, "--plot")
