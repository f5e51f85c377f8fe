"""A loaded model with its tokenizer and engine: what ``tinygptq.load`` returns and every command works with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinygptq.config import GenerationConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.generate import PrefixEngine, StoppedText, generate_batch, generate_ids
from tinygptq.measure import evaluate
from tinygptq.measure.scoring import LogLikelihood, Scorer, encode_pair
from tinygptq.ops import to_numpy
from tinygptq.release.hub import resolve
from tinygptq.sampling import Sampler, SamplingParams
from tinygptq.tokenizer import Tokenizer
from tinygptq.windows import usual_window, warn_of_long_windows

if TYPE_CHECKING:
    from tinygptq.cuda.engine import CudaEngine
    from tinygptq.engine import CpuEngine

DEVICES = ("cpu", "cuda")
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")  # of sampling, as generation_config.json names them


class LanguageModel:
    """A LLaMA ready to run.

    Attributes:
        config: the model's shape. quantization: how it was quantised, or None. defaults: the folder's sampling settings.
    """

    def __init__(
        self, checkpoint: Checkpoint, context: int | None = None, device: str = "cpu", rows: int = 1, cache_bits: int = 16
    ) -> None:
        self.checkpoint, self.config, self.quantization = checkpoint, checkpoint.config, checkpoint.quantization
        self.defaults = GenerationConfig.from_folder(checkpoint.folder, checkpoint.config)
        self.engine: CpuEngine | CudaEngine
        if device == "cuda":
            from tinygptq.cuda.engine import CudaEngine  # only here: it needs the extra [cuda]

            self.engine = CudaEngine(checkpoint.config, checkpoint.weights, context, rows=rows, cache_bits=cache_bits)
        else:
            from tinygptq.engine import CpuEngine  # only here: importing Numba takes a while

            self.engine = CpuEngine(checkpoint.config, checkpoint.weights, context)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.checkpoint.folder)

    @cached_property
    def sequence(self) -> PrefixEngine:
        """The engine as a conversation uses it: what a new sequence shares with the last one is not computed again."""
        return PrefixEngine(self.engine, self.config)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every position: int [B, T] -> float32 [B, T, vocab]."""
        return to_numpy(self.engine.model.forward(np.asarray(ids)))

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Continue ``prompt``, one str a token (it may be empty: part of a character, or of a possible stop string).

        What is None comes from the folder's generation_config.json; temperature 0 is greedy. The text ends before the
        first of ``stop``, at the model's end-of-text token, after ``max_new_tokens``, or when the context is full.

        Raises:
            TinyGPTQError: a setting out of range, or a prompt that is empty or longer than the context.
        """
        chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
        sampler = self._sampler(seed, min_new_tokens, chosen)
        ids = self._encode(prompt)
        tokens = self._tokens(ids, sampler, max_new_tokens)
        return _text(tokens, self.tokenizer, stop, min(max_new_tokens, self.engine.capacity - len(ids)))

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        ids = [] if isinstance(prompt, bytes) else list(prompt)
        wrong = [one for one in ids if isinstance(one, bool) or not isinstance(one, Integral)]
        if wrong or isinstance(prompt, bytes):
            found = f"{type(prompt).__name__} with {wrong[0]!r}" if wrong else "bytes"
            raise TinyGPTQError(f"a prompt is text or a list of token ids, not {found}")
        return [int(one) for one in ids]

    def _sampler(self, seed: int | None, min_new_tokens: int, chosen: Mapping[str, float | None]) -> Sampler:
        """``chosen`` settings; what is None comes from the folder's generation_config.json."""
        defaults = {name: getattr(self.defaults, name) for name in SETTINGS}
        settings = defaults | {name: value for name, value in chosen.items() if value is not None}
        params = SamplingParams(**settings, min_new_tokens=min_new_tokens)
        return Sampler(params, self.config.vocab_size, self.defaults.eos_token_ids, seed)

    def _tokens(self, ids: list[int], sampler: Sampler, max_new_tokens: int) -> Iterator[int]:
        self.sequence.forget()  # so that the same seed gives the same text whatever came before, to the last bit
        yield from generate_ids(self.sequence, ids, sampler, max_new_tokens, self.defaults.eos_token_ids)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        **settings: float | None,
    ) -> list[str]:
        """The whole continuations of several prompts; on a GPU ``rows`` of them (see :func:`load`) are decoded together.

        Settings as for :meth:`stream`; prompt number i draws with ``seed + i``. What a prompt gets does not depend on the
        others but for rounding.

        Raises:
            TinyGPTQError: as :meth:`stream`, or a setting of another name.
        """
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise TinyGPTQError(f"{unknown[0]!r} is no setting; there are {', '.join(SETTINGS)}")
        if isinstance(prompts, (str, bytes)):
            raise TinyGPTQError("generate_batch takes a list of prompts; for a single one there is generate")
        ids = [self._encode(prompt) for prompt in prompts]
        seeds = [None if seed is None else seed + number for number in range(len(ids))]
        samplers = [self._sampler(one, min_new_tokens, settings) for one in seeds]
        texts = [_stopped(self.tokenizer, stop) for _ in ids]
        self.sequence.forget()
        generate_batch(self.sequence, ids, samplers, max_new_tokens, self.defaults.eos_token_ids,
                       lambda number, token: texts[number].ends(token))  # fmt: skip
        return [text.whole() for text in texts]

    def generate(self, prompt: str | Sequence[int], **settings) -> str:
        """The whole continuation of ``prompt``; settings as for :meth:`stream`."""
        return "".join(self.stream(prompt, **settings))

    @cached_property
    def scorer(self) -> Scorer:
        """Scores continuations; keeps the tokens it scored last, so that what begins alike need not be computed again."""
        return Scorer(self.engine.model)

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        """``(logprob, is_greedy)`` of a continuation: its tokens' summed log-probability, and whether each is the likeliest.

        An empty context stands for the beginning of a text. For many at once see :meth:`loglikelihoods`.

        Raises:
            TinyGPTQError: a continuation without a token of its own, or more tokens than the model's context holds.
        """
        return self.loglikelihoods([(context, continuation)])[0]

    def loglikelihoods(self, pairs: Iterable[tuple[str, str]]) -> list[LogLikelihood]:
        """:meth:`loglikelihood` of many ``(context, continuation)`` pairs, batched, what they share computed once."""
        return self.scorer.score([encode_pair(self.tokenizer, context, continuation) for context, continuation in pairs])

    def perplexity(
        self, text: str, seqlen: int | None = None, max_windows: int | None = None, stride: int | None = None
    ) -> evaluate.Perplexity:
        """Perplexity of a text in windows, without overlap or strided; see :func:`tinygptq.measure.evaluate.perplexity`.

        Args: seqlen: None is 2,048, or as many tokens as the model was made for, if those are fewer.
        """
        seqlen = usual_window(self.config) if seqlen is None else seqlen
        ids = np.asarray(self.tokenizer.encode(text), np.int64)
        warn_of_long_windows(self.config, min(seqlen, len(ids)))
        return evaluate.perplexity(self.engine.model, ids, seqlen, max_windows, stride)


def _text(tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str], most: int) -> Iterator[str]:
    """One piece a token, of which there are ``most`` at most; end-of-text's own piece is what was held back, if any."""
    text = _stopped(tokenizer, stop)
    for count, token in enumerate(tokens, 1):
        piece = text.push(token)
        yield piece + text.rest() if count == most else piece
        if text.ended:
            return
    if last := text.rest():
        yield last


def _stopped(tokenizer: Tokenizer, stop: Sequence[str]) -> StoppedText:
    """A continuation's text, before its tokens come."""
    return StoppedText(tokenizer.stream(continues=True), (stop,) if isinstance(stop, str) else stop)


def load(
    source: str | Path,
    device: str = "cpu",
    context: int | None = None,
    revision: str | None = None,
    *,
    rows: int = 1,
    cache_bits: int = 16,
) -> LanguageModel:
    """Load a model, fp16, bf16, fp32 or GPTQ alike.

    Args:
        source: a folder, or a repository of the hub as ``owner/name`` or ``owner/name:branch``.
        device: ``cpu``, or ``cuda`` for an NVIDIA GPU of compute capability 8.0 or more (extra ``[cuda]``).
        context: tokens of prompt and answer together to make room for; None is the model's own maximum.
        revision: branch, tag or commit of a repository.
        rows: on a GPU, sequences that can be decoded together (:meth:`LanguageModel.generate_batch`), 1 to 16.
        cache_bits: on a GPU, 16, or 8 for half the memory of keys and values.
    """
    if device not in DEVICES:
        raise TinyGPTQError(f"device {device!r} is not known; use {' or '.join(map(repr, DEVICES))}")
    if context is not None and context < 1:
        raise TinyGPTQError(f"context is {context}, expected at least 1 token")
    if device == "cpu" and (rows, cache_bits) != (1, 16):
        raise TinyGPTQError("several sequences at once, and an 8-bit cache, are the GPU engine's: use --device cuda")
    if device == "cuda":
        from tinygptq.kernels.cuda.runtime import require_gpu  # before a folder of gigabytes is read

        require_gpu()
    checkpoint = load_checkpoint(resolve(source, revision), sort_rows=device == "cpu")  # a GPU sorts them on its own
    return LanguageModel(checkpoint, context, device, rows, cache_bits)
