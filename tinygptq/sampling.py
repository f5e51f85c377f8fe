"""From logits to the next token: penalties, temperature, top-k, top-p, one seeded draw.

The steps and their order are those of transformers' logits processors, so the same settings mean the same distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.ops import softmax

LARGEST = 1e6  # of what logits are multiplied or divided by: they stay within float32


@dataclass(frozen=True)
class SamplingParams:
    """temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. repetition_penalty: 1 is off (Keskar et al. 2019).

    min_new_tokens: end-of-text is not drawn before this many new tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, LARGEST),
            ("top_k", 0, np.inf),
            ("top_p", 0.0, 1.0),
            ("repetition_penalty", 1 / LARGEST, LARGEST),
            ("min_new_tokens", 0, np.inf),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not low <= value <= high:  # also false for NaN
                raise TinyGPTQError(f"{name} is {value!r}, expected {low} to {high}")
        if 0.0 < self.temperature < 1 / LARGEST:
            raise TinyGPTQError(
                f"temperature is {self.temperature}, expected 0 (the most likely token) or {1 / LARGEST} and more"
            )


def check_seed(seed: int | None) -> None:
    """Raise TinyGPTQError for a seed that no generator takes; None is fresh randomness."""
    if seed is not None and seed < 0:
        raise TinyGPTQError(f"seed is {seed}, expected at least 0")


def penalise_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Make tokens already in the text less likely: positive logits divided by the penalty, negative ones multiplied.

    logits: float32 [vocab]. seen: bool [vocab].
    """
    penalised = np.where(logits > 0, logits / np.float32(penalty), logits * np.float32(penalty))
    return np.where(seen, penalised, logits)


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """-inf for all but the ``k`` largest logits (and those equal to the k-th); 0 keeps all."""
    if k == 0 or k >= len(logits):
        return logits
    kth = np.partition(logits, -k)[-k]
    return np.where(logits < kth, np.float32(-np.inf), logits)


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """-inf for all but the smallest set of most likely tokens whose probability reaches ``p`` (Holtzman et al. 2019)."""
    if p >= 1.0:
        return logits
    alive = np.flatnonzero(logits > -np.inf)
    order = alive[np.argsort(logits[alive], kind="stable")]  # ascending
    below = np.cumsum(softmax(logits[order]))  # probability of each token and everything less likely
    kept = logits.copy()
    kept[order[:-1][below[:-1] <= 1.0 - p]] = -np.inf  # the most likely token always stays
    return kept


class Sampler:
    """Draws one sequence's tokens: knows which tokens have occurred, and holds the random generator.

    Args:
        eos_token_ids: what must not be drawn before ``min_new_tokens``.
        seed: the same seed and logits give the same tokens on every device; None is fresh randomness.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, eos_token_ids: tuple[int, ...], seed: int | None) -> None:
        check_seed(seed)
        self.params = params
        self._seen = np.zeros(vocab_size, np.bool_)
        self._eos = [token for token in eos_token_ids if token < vocab_size]
        self._random = np.random.default_rng(seed)
        self._drawn = 0

    @property
    def seen(self) -> np.ndarray:
        """bool [vocab]: tokens that have occurred."""
        return self._seen

    @property
    def ends(self) -> np.ndarray:
        """bool [vocab]: tokens that end the text."""
        ends = np.zeros_like(self._seen)
        ends[self._eos] = True
        return ends

    def uniforms(self, count: int) -> np.ndarray:
        """The numbers in [0, 1) that the next ``count`` draws would use, float64; for whoever draws elsewhere."""
        return self._random.random(count)

    def observe(self, ids: list[int]) -> None:
        """Count tokens (the prompt's) as having occurred."""
        for token in ids:
            if not 0 <= token < len(self._seen):
                raise TinyGPTQError(f"token id {token} is outside the vocabulary of {len(self._seen)}")
        self._seen[ids] = True

    def distribution(self, logits: np.ndarray) -> np.ndarray:
        """The processed logits, float32 [vocab], -inf where a token is excluded; ``logits`` stays as it is."""
        params = self.params
        if params.repetition_penalty != 1.0:
            logits = penalise_repetition(logits, self._seen, params.repetition_penalty)
        if self._drawn < params.min_new_tokens:
            logits = logits.copy()
            logits[self._eos] = -np.inf
        if params.temperature == 0.0:
            return logits
        return keep_top_p(keep_top_k(logits / np.float32(params.temperature), params.top_k), params.top_p)

    def draw(self, logits: np.ndarray) -> int:
        """The next token id for float32 logits [vocab]."""
        if not -np.inf < logits.max() < np.inf:  # also true when one is NaN
            raise TinyGPTQError("the logits hold NaN or infinity: the model's weights or its scales are broken")
        logits = self.distribution(logits)
        if self.params.temperature == 0.0:
            token = int(np.argmax(logits))
        else:
            alive = np.flatnonzero(logits > -np.inf)
            upto = np.cumsum(softmax(logits[alive].astype(np.float64)))  # (candidates,)
            token = int(alive[np.searchsorted(upto, self._random.random() * upto[-1], side="right")])
        self._seen[token] = True
        self._drawn += 1
        return token
