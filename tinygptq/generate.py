"""Text from an engine, token by token: prefill, draw, decode, stop, stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.sampling import Sampler


class Engine(Protocol):
    """What runs a model for one sequence: the same interface on every device. The KV cache inside owns the position."""

    capacity: int

    def reset(self) -> None:
        """Forget the sequence."""

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens int [T]; the logits after the last one, float32 [vocab]."""

    def decode(self, token: int) -> np.ndarray:
        """Append one token; the logits after it, float32 [vocab], valid until the next call."""


@runtime_checkable
class DrawingEngine(Engine, Protocol):
    """An engine that can draw tokens itself, ahead of whoever reads them."""

    def can_draw(self, sampler: Sampler) -> bool:
        """Whether it can with these settings."""

    def draw_ahead(self, sampler: Sampler, most: int) -> Iterator[int]:
        """Draw up to ``most`` tokens after the last logits; each counts as appended once the next has come."""


@runtime_checkable
class BatchEngine(DrawingEngine, Protocol):
    """An engine that decodes up to ``rows`` sequences together."""

    rows: int

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler], most: int, eos_token_ids: tuple[int, ...],
        ended: Callable[[int, int], bool] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The new token ids of each, at most ``most``; each stops on its own, also once ``ended(number, token)`` says so."""


class PrefixEngine:
    """An engine that remembers its tokens: a new sequence is computed from where it first differs from the last one.

    So a conversation's next turn, or the next question after the same examples, costs its own tokens only. Whoever uses the
    engine beside it must call :meth:`forget` afterwards.
    """

    def __init__(self, engine: Engine, config: LlamaConfig) -> None:
        self.inner = engine
        self.capacity = engine.capacity
        # "dynamic" scaling turns every position by an angle that depends on the length: earlier keys cannot be kept
        self._keeps = config.rope_scaling is None or config.rope_scaling.kind != "dynamic"
        self._held: list[int] = []  # the tokens in the engine
        self._position = 0
        engine.reset()

    def forget(self) -> None:
        """Begin anew, sharing nothing."""
        self._held, self._position = [], 0
        self.inner.reset()

    def reset(self) -> None:
        """Begin a new sequence; what it shares with the last one is found when its tokens come."""
        self._position = 0

    def truncate(self, length: int) -> None:
        self._position = length

    def common(self, ids: Sequence[int], position: int = 0) -> int:
        """How many of ``ids`` at ``position`` need not be computed; never all, for the last one's logits are wanted."""
        known = self._held[position : position + len(ids) - 1] if self._keeps else []
        return next((i for i, (old, new) in enumerate(zip(known, ids, strict=False)) if old != new), len(known))

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        tokens = [int(token) for token in ids]
        kept = self.common(tokens, self._position)
        self._cut(self._position + kept)
        logits = self.inner.prefill(np.asarray(tokens[kept:]))
        self._held += tokens[kept:]
        self._position += len(tokens)
        return logits

    def decode(self, token: int) -> np.ndarray:
        self._cut(self._position)
        logits = self.inner.decode(token)
        self._held.append(int(token))
        self._position += 1
        return logits

    def can_draw(self, sampler: Sampler) -> bool:
        return isinstance(self.inner, DrawingEngine) and self.inner.can_draw(sampler)

    def draw_ahead(self, sampler: Sampler, most: int) -> Iterator[int]:
        assert isinstance(self.inner, DrawingEngine)  # for can_draw was asked
        self._cut(self._position)
        last = None
        for token in self.inner.draw_ahead(sampler, most):
            if last is not None:
                self._held.append(last)
                self._position += 1
            yield (last := token)

    def _cut(self, length: int) -> None:
        """Also after an interruption between the engine's last step and our note of it."""
        self.inner.truncate(length)
        del self._held[length:]


def generate_ids(
    engine: Engine, prompt: Sequence[int], sampler: Sampler, max_new_tokens: int, eos_token_ids: tuple[int, ...]
) -> Iterator[int]:
    """Yield new token ids until one of ``eos_token_ids`` (not yielded) or ``max_new_tokens``.

    Raises:
        TinyGPTQError: an empty prompt, one that fills the engine's context, or ids outside the vocabulary.
    """
    if max_new_tokens < 0:
        raise TinyGPTQError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
    if len(prompt) == 0:
        raise TinyGPTQError("the prompt holds no tokens")
    if len(prompt) >= engine.capacity:
        raise TinyGPTQError(f"the prompt's {len(prompt)} tokens fill the context of {engine.capacity}; shorten it")
    max_new_tokens = min(max_new_tokens, engine.capacity - len(prompt))
    sampler.observe(list(prompt))
    engine.reset()
    logits = engine.prefill(np.asarray(prompt))
    if isinstance(engine, DrawingEngine) and engine.can_draw(sampler):
        draws = engine.draw_ahead(sampler, max_new_tokens)
    else:
        draws = _draws(engine, logits, sampler, max_new_tokens)
    for token in draws:
        if token in eos_token_ids:
            return
        yield token


def generate_batch(
    engine: PrefixEngine, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler], most: int,
    eos_token_ids: tuple[int, ...], ended: Callable[[int, int], bool] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The new token ids of several prompts, each as from :func:`generate_ids`; decoded together where the engine can.

    Args:
        ended: is told each prompt's number and newest token, and says whether that prompt has what it wants.
    """
    found: list[list[int]] = []
    rows, inner = batch_rows(engine, samplers), engine.inner
    if rows > 1:
        assert isinstance(inner, BatchEngine)
        engine.forget()
        for first in range(0, len(prompts), rows):
            some = prompts[first : first + rows], samplers[first : first + rows]
            for prompt, sampler in zip(*some, strict=True):
                sampler.observe(list(prompt))
            stop = None if ended is None else functools.partial(_from, first, ended)
            found += inner.generate_batch(*some, most, eos_token_ids, stop)
        return found
    for number, (prompt, sampler) in enumerate(zip(prompts, samplers, strict=True)):
        found.append([])
        for token in generate_ids(engine, prompt, sampler, most, eos_token_ids):
            found[-1].append(token)
            if ended is not None and ended(number, token):
                break
    return found


def batch_rows(engine: PrefixEngine, samplers: Sequence[Sampler]) -> int:
    """How many sequences the engine decodes together with these settings."""
    inner = engine.inner
    return inner.rows if isinstance(inner, BatchEngine) and all(inner.can_draw(sampler) for sampler in samplers) else 1


def _from(first: int, ended: Callable[[int, int], bool], number: int, token: int) -> bool:
    return ended(first + number, token)


def _draws(engine: Engine, logits: np.ndarray, sampler: Sampler, most: int) -> Iterator[int]:
    """``most`` tokens after those whose last logits are given, drawn on the host."""
    for step in range(most):
        token = sampler.draw(logits)
        yield token
        if step + 1 < most:
            logits = engine.decode(token)


class StopStrings:
    """Cuts a stream of text where the first stop string begins, holding back only what could be the start of one.

    What comes out does not depend on how the text is cut into pieces. So a stop string that is found has to wait as long
    as text before it could still become another one ("b" in "ab", when "abc" is one too).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        self._held += piece
        split = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        at = self._find()
        if at is not None and at <= split:
            return self._cut(at)
        text, self._held = self._held[:split], self._held[split:]
        return text

    def flush(self) -> str:
        """What was held back, when the text ends: all of it, or what comes before a stop string."""
        at = self._find()
        if at is not None:
            return self._cut(at)
        text, self._held = self._held, ""
        return text

    def _find(self) -> int | None:
        """Where the first stop string in the held text begins."""
        return min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)

    def _cut(self, at: int) -> str:
        text, self._held, self.found = self._held[:at], "", True
        return text


class StoppedText:
    """A text as its tokens come, which ends where the first stop string begins.

    Args:
        decoder: with ``push(token)`` and ``flush()``, each a str (`tokenizer.Tokenizer.stream`).

    Attributes:
        text: as far as it has come.
    """

    def __init__(self, decoder: Any, stops: Sequence[str]) -> None:
        self._decoder, self._stops, self.text = decoder, StopStrings(stops), ""

    @property
    def ended(self) -> bool:
        """Whether a stop string has come; what follows it is passed over."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that is now certain to belong to it."""
        return "" if self.ended else self._grow(self._stops.push(self._decoder.push(token)))

    def ends(self, token: int) -> bool:
        """Push, and whether the text has ended."""
        self.push(token)
        return self.ended

    def rest(self) -> str:
        """What was held back, when no further token comes."""
        if self.ended:
            return ""
        piece = self._stops.push(self._decoder.flush())
        return self._grow(piece if self.ended else piece + self._stops.flush())

    def whole(self) -> str:
        """All of it, when no further token comes."""
        self.rest()
        return self.text

    def _grow(self, piece: str) -> str:
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
