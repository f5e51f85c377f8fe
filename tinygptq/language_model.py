"""A loaded model with its tokenizer and engine: what ``tinygptq.load`` returns and every command works with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from tinygptq import evaluate
from tinygptq.checkpoint import Checkpoint, load_checkpoint
from tinygptq.config import GenerationConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.generate import StopStrings, generate_ids
from tinygptq.hub import resolve
from tinygptq.sampling import Sampler, SamplingParams
from tinygptq.tokenizer import Tokenizer


class LanguageModel:
    """A LLaMA ready to run.

    Attributes:
        config: the model's shape. quantization: how it was quantised, or None. defaults: the folder's sampling settings.
    """

    def __init__(self, checkpoint: Checkpoint, context: int | None = None) -> None:
        from tinygptq.engine import CpuEngine  # only here: importing Numba takes a while

        self.checkpoint, self.config, self.quantization = checkpoint, checkpoint.config, checkpoint.quantization
        self.defaults = GenerationConfig.from_folder(checkpoint.folder, checkpoint.config)
        self.engine = CpuEngine(checkpoint.config, checkpoint.weights, context)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.checkpoint.folder)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every position: int [B, T] -> float32 [B, T, vocab]."""
        return self.engine.model.forward(np.asarray(ids))

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
        defaults = {name: getattr(self.defaults, name) for name in chosen}
        settings = defaults | {name: value for name, value in chosen.items() if value is not None}
        params = SamplingParams(**settings, min_new_tokens=min_new_tokens)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        sampler = Sampler(params, self.config.vocab_size, self.defaults.eos_token_ids, seed)
        tokens = generate_ids(self.engine, ids, sampler, max_new_tokens, self.defaults.eos_token_ids)
        stops = StopStrings((stop,) if isinstance(stop, str) else stop)
        return _text(tokens, self.tokenizer, stops, min(max_new_tokens, self.engine.capacity - len(ids)))

    def generate(self, prompt: str | Sequence[int], **settings) -> str:
        """The whole continuation of ``prompt``; settings as for :meth:`stream`."""
        return "".join(self.stream(prompt, **settings))

    def perplexity(self, text: str, seqlen: int = 2048, max_windows: int | None = None) -> evaluate.Perplexity:
        """Perplexity of a text in non-overlapping windows; see :func:`tinygptq.evaluate.perplexity`."""
        ids = np.asarray(self.tokenizer.encode(text), np.int64)
        return evaluate.perplexity(self.engine.model, ids, seqlen, max_windows)


def _text(tokens: Iterator[int], tokenizer: Tokenizer, stops: StopStrings, most: int) -> Iterator[str]:
    """One piece a token, of which there are ``most`` at most; end-of-text's own piece is what was held back, if any."""
    decoder = tokenizer.stream(continues=True)

    def rest() -> str:
        text = stops.push(decoder.flush())
        return text if stops.found else text + stops.flush()

    for count, token in enumerate(tokens, 1):
        piece = stops.push(decoder.push(token))
        yield piece + rest() if count == most and not stops.found else piece
        if stops.found:
            return
    if text := rest():
        yield text


def load(
    source: str | Path, device: str = "cpu", context: int | None = None, revision: str | None = None
) -> LanguageModel:
    """Load a model, fp16, bf16, fp32 or GPTQ alike.

    Args:
        source: a folder, or a repository of the hub as ``owner/name`` or ``owner/name:branch``.
        device: ``cpu``.
        context: tokens of prompt and answer together to make room for; None is the model's own maximum.
        revision: branch, tag or commit of a repository.
    """
    if device != "cpu":
        raise TinyGPTQError(f"device {device!r} is not available; use 'cpu'")
    checkpoint = load_checkpoint(resolve(source, revision))
    if context is not None and context < 1:
        raise TinyGPTQError(f"context is {context}, expected at least 1 token")
    return LanguageModel(checkpoint, context)


