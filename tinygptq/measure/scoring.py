"""Log-likelihoods of continuations: what multiple-choice benchmarks are scored by.

:func:`log_likelihood` is the definition, one plain forward pass for one continuation. :class:`Scorer` gives the same for
thousands at once: what is equal is computed once (shared_prefix.py), the rest in batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
from tqdm import tqdm

from tinygptq.errors import TinyGPTQError
from tinygptq.kvcache import KVCache
from tinygptq.measure.evaluate import ROWS_AT_ONCE, cross_entropy
from tinygptq.measure.shared_prefix import Batch, ForkedCache, common_length, plan
from tinygptq.model import Llama
from tinygptq.ops import array_module, softmax
from tinygptq.tokenizer import Tokenizer

MAX_BATCH = 64


class LogLikelihood(NamedTuple):
    """Of a continuation, given its context.

    logprob: natural logarithm, summed over the continuation's tokens. is_greedy: whether each of them is the most likely.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class Request:
    """Token ids of a context (at least one) and of the continuation to score (at least one)."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def inputs(self) -> list[int]:
        """What the model reads: all but the last token, which is only predicted."""
        return [*self.context, *self.continuation[:-1]]


def log_likelihood(model: Llama, request: Request) -> LogLikelihood:
    """The definition: one forward pass over the whole sequence; each token is read off the logits before it."""
    _check(request, model.config.vocab_size, math.inf)
    logits = model.forward(np.asarray(request.inputs)[None])[0, len(request.context) - 1 :]  # (N, vocab)
    probabilities = softmax(logits.astype(np.float64))
    targets = np.asarray(request.continuation)
    chosen = probabilities[np.arange(len(targets)), targets]  # (N,)
    return LogLikelihood(float(np.log(chosen).sum()), bool((logits.argmax(axis=-1) == targets).all()))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Token ids of the whole text, cut where the context's own ids end, as lm-evaluation-harness cuts it.

    Spaces at the context's end go to the continuation, where a token usually begins with its space. An empty context is the
    beginning-of-sequence token, or the end-of-sequence one of a tokenizer that has no other.

    Raises:
        TinyGPTQError: no continuation is left, because it is empty or melts into the context's last token.
    """
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    if context:
        head, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        request = Request(head, whole[len(head) :])
    else:
        own = tokenizer.encode(continuation, bos=False)
        first = prefix_token(tokenizer)
        request = Request([first], own) if own[:1] != [first] else Request(own[:1], own[1:])
    if not request.continuation:
        raise TinyGPTQError(f"the continuation {continuation!r} holds no token of its own after its context")
    return request


def prefix_token(tokenizer: Tokenizer) -> int:
    """What stands before a text that has no context: beginning of sequence, else end of sequence."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return token
    raise TinyGPTQError("an empty context needs a BOS or EOS token, and this tokenizer has neither")


@dataclass
class _Job:
    """One sequence to run, and all requests that can be read off it: their inputs are its first tokens."""

    inputs: np.ndarray
    requests: list[int] = field(default_factory=list)
    needed: int = 0  # the first position whose logits a request asks for


class Scorer:
    """Scores many requests with one model; what it computed last can be the beginning of what comes next.

    Args:
        model: on any device. context: tokens that fit; None is the model's own maximum.
        max_batch: sequences in one pass. max_tokens: tokens in one pass; None is the model's own ``tokens_at_once``.
        share: False computes every sequence from its first token (what sharing is measured against).
    """

    def __init__(
        self, model: Llama, context: int | None = None, max_batch: int = MAX_BATCH,
        max_tokens: int | None = None, share: bool = True,
    ) -> None:  # fmt: skip
        max_tokens = model.tokens_at_once if max_tokens is None else max_tokens
        if max_batch < 1 or max_tokens < 1:
            raise TinyGPTQError(f"a batch of {max_batch} sequences of {max_tokens} tokens holds nothing; expected 1 or more")
        self.model, self.context = model, context or model.config.max_position_embeddings
        self.max_batch, self.max_tokens, self._share = max_batch, max_tokens, share
        self.tokens_computed = 0
        self._trunk: KVCache | None = None
        self._held: list[int] = []  # the tokens in the trunk

    def score(
        self, requests: Sequence[Request], progress: bool = False,
        on_result: Callable[[int, LogLikelihood], None] | None = None,
    ) -> list[LogLikelihood]:  # fmt: skip
        """The log-likelihood of each request, in order; equal to :func:`log_likelihood` but for rounding.

        Args:
            progress: show a bar on a terminal. on_result: called with a request's index and result as soon as it is known.

        Raises:
            TinyGPTQError: an empty context or continuation, a token outside the vocabulary, a request longer than the
                context, or logits that are NaN.
        """
        for request in requests:
            _check(request, self.model.config.vocab_size, self.context)
        jobs = _jobs(requests)
        self._make_room(max((len(job.inputs) for job in jobs), default=0))
        results: list[LogLikelihood | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc="scoring", unit="request", disable=None if progress else True) as bar:
            for batch in self._plan(jobs):
                members = jobs[batch.start : batch.end]
                hidden = self._run(members, batch)
                for index, found in self._read(members, requests, hidden, batch.shared):
                    results[index] = found
                    if on_result is not None:
                        on_result(index, found)
                    bar.update()
        return cast(list[LogLikelihood], results)  # every request was a member of one batch

    def _plan(self, jobs: list[_Job]) -> list[Batch]:
        inputs, needed = [job.inputs for job in jobs], [job.needed for job in jobs]
        scaling = self.model.config.rope_scaling
        # "dynamic" turns every position by an angle that depends on the whole length: nothing can be shared or padded
        stretched = scaling is not None and scaling.kind == "dynamic" and any(
            len(tokens) > scaling.original_max_position_embeddings for tokens in inputs)  # fmt: skip
        if stretched:
            return [Batch(i, i + 1, 0) for i in range(len(jobs))]
        if self._share:
            return plan(inputs, needed, self.max_batch, self.max_tokens, self._held, self.model.pass_cost)
        return _batches_without_sharing(inputs, self.max_batch, self.max_tokens)

    def _make_room(self, longest: int) -> None:
        if self._trunk is None or self._trunk.capacity < longest:
            xp = array_module(self.model.weights.embedding)
            self._trunk, self._held = KVCache(self.model.config, 1, longest, xp), []

    def _run(self, members: list[_Job], batch: Batch) -> np.ndarray:
        """The residual stream of each member after its first ``batch.shared`` tokens, float32 [B, T, C], padded."""
        inputs = members[0].inputs
        kept = min(batch.shared, common_length(np.asarray(self._held, np.int64), inputs))
        assert self._trunk is not None  # _make_room came first
        self._trunk.truncate(kept)
        del self._held[kept:]
        if len(members) == 1:
            return self._grow(inputs[kept:])
        if kept < batch.shared:
            self._grow(inputs[kept : batch.shared])
        longest = max(len(job.inputs) for job in members) - batch.shared
        ids = np.zeros((len(members), longest), np.int64)  # what stands after a shorter sequence is never looked at
        for row, job in zip(ids, members, strict=True):
            row[: len(job.inputs) - batch.shared] = job.inputs[batch.shared :]
        self.tokens_computed += ids.size
        fork = ForkedCache(self._trunk, len(members), longest)
        return self.model.hidden(ids, fork)  # type: ignore[arg-type]  # it does what a KVCache does

    def _grow(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens to the trunk; int [T] -> float32 [1, T, C]."""
        hidden = self.model.hidden(ids[None], self._trunk)
        self._held += ids.tolist()
        self.tokens_computed += len(ids)
        return hidden

    def _read(
        self, members: list[_Job], requests: Sequence[Request], hidden: np.ndarray, shared: int
    ) -> Iterator[tuple[int, LogLikelihood]]:
        """The index and the result of each request of a batch, from its residual stream float32 [B, T, C]."""
        rows, targets, indices = [], [], []
        for row, job in enumerate(members):
            for index in job.requests:
                start = len(requests[index].context) - 1 - shared
                targets.append(np.asarray(requests[index].continuation))
                rows.append(hidden[row, start : start + len(targets[-1])])  # (N, C)
                indices.append(index)
        xp = array_module(hidden)
        nats, greedy = self._likelihoods(xp.concatenate(rows), xp.asarray(np.concatenate(targets)))
        ends = np.cumsum([len(one) for one in targets])
        for index, start, end in zip(indices, [0, *ends], ends, strict=False):
            total = math.fsum(nats[start:end])
            if not math.isfinite(total):
                raise TinyGPTQError("the logits hold NaN or infinity: the model's weights or its scales are broken")
            yield index, LogLikelihood(-total, all(greedy[start:end]))

    def _likelihoods(self, rows: np.ndarray, targets: np.ndarray) -> tuple[list[float], list[bool]]:
        """Nats of each target and whether it is the most likely: float32 [N, C], int [N] -> N of each."""
        nats, greedy = [], []
        for start in range(0, len(targets), ROWS_AT_ONCE):
            some = targets[start : start + ROWS_AT_ONCE]
            logits = self.model.logits(rows[None, start : start + ROWS_AT_ONCE])[0]  # (n, vocab)
            greedy += (logits.argmax(axis=-1) == some).tolist()
            nats += cross_entropy(logits, some).tolist()
        return nats, greedy


def _jobs(requests: Sequence[Request]) -> list[_Job]:
    """The sequences to run, sorted; a request whose inputs are the beginning of another's needs none of its own."""
    order = sorted(((request.inputs, index) for index, request in enumerate(requests)), reverse=True)
    jobs: list[_Job] = []
    for inputs, index in order:
        last = jobs[-1].inputs if jobs else np.empty(0, np.int64)
        if not jobs or len(inputs) > len(last) or not np.array_equal(last[: len(inputs)], inputs):
            jobs.append(_Job(np.asarray(inputs, np.int64), needed=len(inputs)))
        jobs[-1].requests.append(index)
        jobs[-1].needed = min(jobs[-1].needed, len(requests[index].context) - 1)
    return jobs[::-1]


def _batches_without_sharing(inputs: list[np.ndarray], max_batch: int, max_tokens: int) -> list[Batch]:
    """Neighbours together for as long as a pass has room for them."""
    batches: list[Batch] = []
    start = longest = 0
    for end, tokens in enumerate(inputs):
        longest = max(longest, len(tokens))
        if end > start and (end - start == max_batch or (end - start + 1) * longest > max_tokens):
            batches.append(Batch(start, end, 0))
            start, longest = end, len(tokens)
    return [*batches, Batch(start, len(inputs), 0)] if inputs else []


def _check(request: Request, vocab_size: int, context: float) -> None:
    if not len(request.context) or not len(request.continuation):
        raise TinyGPTQError("a context and a continuation of at least one token each are needed to score")
    tokens = len(request.context) + len(request.continuation) - 1
    if tokens > context:
        raise TinyGPTQError(f"{tokens} tokens to score do not fit the context of {context}; shorten the text")
    low, high = min(*request.context, *request.continuation), max(*request.context, *request.continuation)
    if low < 0 or high >= vocab_size:
        raise TinyGPTQError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
