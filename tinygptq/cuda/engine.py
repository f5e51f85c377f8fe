"""Runs a model on the GPU: prompts through many-row kernels in chunks, tokens through one CUDA graph a step.

The same interface as the CPU engine, and more: tokens drawn on the GPU ahead of the host, and several sequences at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tinygptq import ops
from tinygptq.config import LlamaConfig
from tinygptq.cuda.decode import DecodeStep, orders_of
from tinygptq.cuda.memory import allocate, cache_plan, predict, require_room, sequences_plan
from tinygptq.cuda.model import CudaLlama
from tinygptq.cuda.prefill import Prefill
from tinygptq.cuda.weights import shared_with_host, upload
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda.draw import MOST
from tinygptq.kernels.cuda.runtime import capability, cupy
from tinygptq.kvcache import require_tokens
from tinygptq.model import check_ids
from tinygptq.sampling import Sampler
from tinygptq.weights import Weights

TENSOR_CORES = (8, 0)  # the least capability that the decoding kernels are written for
MOST_ROWS = 16  # sequences that run at once
AHEAD = 4  # steps that the GPU may be ahead of the host


class CudaEngine:
    """R sequences at once (one unless asked for more); as an :class:`~tinygptq.generate.Engine` it is the first of them.

    Attributes:
        capacity: tokens that fit, of each of ``rows`` sequences. length: tokens of the first sequence that are cached.
    """

    def __init__(
        self, config: LlamaConfig, weights: Weights, context: int | None = None, *, rows: int = 1, cache_bits: int = 16
    ) -> None:
        """``context``: tokens to make room for, None is the model's own maximum; ``cache_bits``: 16 or 8.

        Raises:
            TinyGPTQError: no GPU, one too old, or an option out of range.
        """
        if not 1 <= rows <= MOST_ROWS:
            raise TinyGPTQError(f"{rows} sequences at once: 1 to {MOST_ROWS} are possible")
        if cache_bits not in (8, 16):
            raise TinyGPTQError(f"the cache can hold 16 or 8 bits, not {cache_bits}")
        cp = cupy()
        if capability() < TENSOR_CORES:
            major, minor = capability()
            raise TinyGPTQError(f"this GPU has compute capability {major}.{minor}; 8.0 is needed (Ampere or newer)")
        self.config, self.capacity, self.rows = config, context or config.max_position_embeddings, rows
        self.stream = cp.cuda.Stream(non_blocking=True)
        self.length = 0
        free = cp.cuda.Device().mem_info[0]
        wanted = predict(config, weights, self.capacity, rows, cache_bits)
        require_room(wanted, free, config, rows, cache_bits)
        self.weights = upload(config, weights)
        orders = orders_of(self.weights)
        self.sequences = allocate(sequences_plan(config, rows, self.capacity), cp)
        # the draws write here, so that the host can read a token with no copy between one step and the next
        self._history, self.sequences.history = shared_with_host((rows, self.capacity + 1), np.int32)
        cache = tuple(vars(allocate(cache_plan(config, rows, self.capacity, cache_bits), cp)).values())
        cos, sin = decode_tables(config, self.capacity)
        self.step = DecodeStep(config, self.weights, orders, self.sequences, cache, cos, sin, self.stream)
        self.prompt = Prefill(config, self.weights, orders, cache, self.capacity, self.stream)
        cp.cuda.Device().synchronize()

    @cached_property
    def model(self) -> CudaLlama:
        """The forward pass over these weights that gives the logits of every position."""
        return CudaLlama(self.config, self.weights)

    # ------------------------------------------------------------------ one sequence

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        if not 0 <= length <= self.length:
            raise TinyGPTQError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens int [T], T >= 1; return the logits after the last one, float32 [vocab]."""
        ids = self._checked(ids, self.length)
        self.prompt.run(ids, self.length, 0, self.sequences.logits[:1])
        self.length += len(ids)
        return self._logits()

    def decode(self, token: int) -> np.ndarray:
        """Append one token; return the logits after it, float32 [vocab].

        Raises:
            TinyGPTQError: the context is full, or the token is outside the vocabulary.
        """
        ids = self._checked(np.array([token]), self.length)
        self._place(ids, [self.length])
        self.step.replay(drawing=False)
        self.length += 1
        return self._logits()

    def _logits(self) -> np.ndarray:
        self.stream.synchronize()
        return self.sequences.logits[0].get()

    # ------------------------------------------------------------------ drawing on the GPU

    def can_draw(self, sampler: Sampler) -> bool:
        """Whether tokens can be drawn on the GPU: greedy, or with a top-k of at most 1,024."""
        return sampler.params.temperature == 0.0 or 0 < sampler.params.top_k <= MOST

    def draw_ahead(self, sampler: Sampler, most: int) -> Iterator[int]:
        """Draw ``most`` tokens at most after what has been prefilled; the GPU works ahead while the host looks at them.

        The engine holds, whenever this stops, the tokens before the last one yielded.
        """
        start = self.length
        self._set_sampling([sampler], [start])
        try:
            for number, tokens in enumerate(self._drawn(most)):
                self.length = start + number
                yield _sound(int(tokens[0]))
        finally:
            self.stream.synchronize()

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler], most: int, eos_token_ids: tuple[int, ...],
        ended: Callable[[int, int], bool] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """New tokens of several sequences decoded together, at most R; each stops on its own, at the end of text or when
        ``ended``, told its number and its newest token, says so.

        Raises:
            TinyGPTQError: too many prompts, an empty one, or one that fills the context.
        """
        if not 1 <= len(prompts) <= self.rows:
            raise TinyGPTQError(f"{len(prompts)} prompts for an engine of {self.rows} sequences")
        found: list[list[int]] = [[] for _ in prompts]
        rooms = [min(most, self.capacity - len(prompt)) for prompt in prompts]
        running = set(range(len(prompts)))
        for tokens in self.draw_batch(prompts, samplers, max(rooms)):
            for row in tuple(running):
                token = _sound(int(tokens[row]))
                if token not in eos_token_ids:
                    found[row].append(token)
                done = token in eos_token_ids or (ended is not None and ended(row, token))
                if done or len(found[row]) == rooms[row]:
                    running.discard(row)
            if not running:
                break
        return found

    def draw_batch(self, prompts: Sequence[Sequence[int]], samplers: Sequence[Sampler], most: int) -> Iterator[np.ndarray]:
        """The next token of each sequence, int32 [R], ``most`` times; those of rows without a prompt mean nothing."""
        self.length, lengths = 0, []
        for row, prompt in enumerate(prompts):
            ids = self._checked(np.asarray(prompt), 0, drawn=1)
            self.prompt.run(ids, 0, row, self.sequences.logits[row : row + 1])
            lengths.append(len(ids))
        self._set_sampling(samplers, lengths)
        try:
            yield from self._drawn(most)
        finally:
            self.stream.synchronize()

    def _set_sampling(self, samplers: Sequence[Sampler], lengths: Sequence[int]) -> None:
        """Put what the draws depend on into device memory; the first draw then follows the prompts' logits."""
        now, steps = self.sequences, self.capacity + 1
        rows = self.rows
        filled = [*samplers, *[samplers[0]] * (rows - len(samplers))]
        params = [sampler.params for sampler in filled]
        settings = [(p.temperature, p.top_p, p.repetition_penalty) for p in params]
        now.settings.set(np.array(settings, np.float32))
        now.top_ks.set(np.array([max(p.top_k, 1) for p in params], np.int32))
        now.minima.set(np.array([p.min_new_tokens for p in params], np.int32))
        now.ends.set(samplers[0].ends)
        now.seen.set(np.stack([s.seen if s.params.repetition_penalty != 1.0 else np.zeros_like(s.seen) for s in filled]))
        draws = [s.uniforms(steps) if s.params.temperature > 0 else np.zeros(steps) for s in samplers]
        now.uniforms.set(np.stack([*draws, *[np.zeros(steps)] * (rows - len(draws))]))
        now.drawn.fill(0)
        now.positions.set(np.array([*lengths, *[1] * (rows - len(lengths))], np.int32) - 1)
        cupy().cuda.get_current_stream().synchronize()

    def _drawn(self, most: int) -> Iterator[np.ndarray]:
        """Each step's tokens, int32 [R]; the draw from the prompts' logits is the first."""
        done = [cupy().cuda.Event(disable_timing=True) for _ in range(AHEAD + 1)]
        launched = 0
        for number in range(most):
            while launched < min(number + 1 + AHEAD, most):
                if launched == 0:
                    self.step.launch_draw()
                else:
                    self.step.replay(drawing=True)
                done[launched % (AHEAD + 1)].record(self.stream)
                launched += 1
            done[number % (AHEAD + 1)].synchronize()
            yield self._history[:, number].copy()

    def _checked(self, ids: np.ndarray, length: int, drawn: int = 0) -> np.ndarray:
        """Tokens as int32 [T], if they, and so many drawn after them, fit after ``length`` others."""
        ids = np.asarray(ids)
        check_ids(ids[None], self.config.vocab_size)
        require_tokens(length, len(ids) + drawn, self.capacity)
        return ids.astype(np.int32)

    def _place(self, tokens: np.ndarray, positions: Sequence[int]) -> None:
        rows = self.rows - len(tokens)
        self.sequences.tokens.set(np.array([*tokens, *[0] * rows], np.int32), self.stream)
        self.sequences.positions.set(np.array([*positions, *[0] * rows], np.int32), self.stream)


def _sound(token: int) -> int:
    if token < 0:
        raise TinyGPTQError("the logits hold NaN or infinity: the model's weights or its scales are broken")
    return token


def decode_tables(config: LlamaConfig, capacity: int) -> tuple[Any, Any]:
    """cos and sin for a token decoded at each position, float32 [capacity, D / 2] on the device.

    "dynamic" scaling turns by an angle that depends on the length reached, which is then the position and one.
    """
    cp = cupy()
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        tables = [ops.rope_tables(ops.rope_frequencies(config, p + 1), p, 1) for p in range(capacity)]
        cos, sin = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    else:
        cos, sin = ops.rope_tables(ops.rope_frequencies(config, capacity), 0, capacity)
    return cp.asarray(cos), cp.asarray(sin)
