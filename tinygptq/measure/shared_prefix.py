"""Sequences that begin alike: the beginning is computed once, and each goes on from there.

Questions of one benchmark share thousands of tokens of worked examples. Here is what scoring.py needs to use that: in which
order and in what company to run the sequences (:func:`plan`), and a cache in which several sequences continue one
(:class:`ForkedCache`). The definition is to run every sequence from its first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinygptq.kvcache import KVCache
from tinygptq.model import Llama
from tinygptq.ops import array_module


class ForkedCache:
    """``forks`` sequences that continue what ``trunk`` holds, for one forward pass of the model; the trunk stays as it is.

    A layer's keys and values are joined in one buffer, which the next layer overwrites: they cannot be continued further.

    Shapes: trunk of batch 1; ``append`` takes float32 [forks, G, T, D] and returns [forks, G, trunk.length + T, D].
    """

    def __init__(self, trunk: KVCache, forks: int, tokens: int) -> None:
        xp = array_module(trunk.keys)
        _, _, groups, _, dim = trunk.keys.shape
        self._trunk, self.length = trunk, trunk.length
        self._keys = xp.empty((forks, groups, trunk.length + tokens, dim), np.float32)
        self._values = xp.empty_like(self._keys)

    def require(self, tokens: int) -> None:
        """Part of the cache's interface; the room was made for the pass it is used in."""

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = self._trunk.length
        for buffer, shared, own in ((self._keys, self._trunk.keys, k), (self._values, self._trunk.values, v)):
            buffer[:, :, :length] = shared[layer, :, :, :length]  # (forks, G, P, D) of (1, G, P, D)
            buffer[:, :, length:] = own
        return self._keys, self._values

    def advance(self, tokens: int) -> None:
        self.length += tokens


@dataclass(frozen=True)
class Batch:
    """Sequences ``start .. end-1`` run together; the first ``shared`` tokens of each are the trunk's."""

    start: int
    end: int
    shared: int


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many first elements of two vectors are equal."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if differ.size else size


def plan(
    sequences: Sequence[np.ndarray], needed: Sequence[int], max_batch: int, max_tokens: int, held: Sequence[int] = (),
    pass_cost: int = Llama.pass_cost,
) -> list[Batch]:  # fmt: skip
    """Cut sequences, in sorted order, into batches so that few tokens are computed in few passes.

    A batch of one runs on the trunk itself; one of several runs padded to its longest, after the trunk has been brought to
    ``shared`` tokens. Found by dynamic programming over where the last batch begins.

    Args:
        sequences: int [length] each, sorted as lists are. needed: the first position of each whose output is wanted, which
            therefore cannot come from the trunk. max_batch: sequences in a pass. max_tokens: tokens in a pass of several.
        held: the tokens that the trunk holds already. pass_cost: see :class:`~tinygptq.model.Llama`.
    """
    before = [np.asarray(held, np.int64), *sequences]
    common = [common_length(before[i], before[i + 1]) for i in range(len(sequences))]  # with the one before
    lengths = [len(sequence) for sequence in sequences]
    costs, holds, last = [0], [len(held)], [Batch(0, 0, 0)]  # the cheapest way to run the first 0, 1, .. sequences
    for end in range(1, len(sequences) + 1):
        best: tuple[int, int, int, int] | None = None  # cost, what the trunk then holds, start, shared
        most, longest = min(lengths[end - 1], needed[end - 1]), 0
        for start in range(end - 1, max(end - max_batch, 0) - 1, -1):
            most, longest = min(most, needed[start]), max(longest, lengths[start])
            kept = min(holds[start], common[start], most)
            cost, shared, held_then = _cost(end - start, longest, kept, most, pass_cost)
            if (end - start == 1 or (end - start) * (longest - shared) <= max_tokens) and (
                best is None or costs[start] + cost < best[0]
            ):
                best = costs[start] + cost, held_then, start, shared
            most = min(most, common[start])
        assert best is not None  # a sequence alone is always allowed
        costs.append(best[0])
        holds.append(best[1])
        last.append(Batch(best[2], end, best[3]))
    batches, end = [], len(sequences)
    while end:
        batches.append(last[end])
        end = last[end].start
    return batches[::-1]


def _cost(count: int, longest: int, kept: int, most: int, pass_cost: int) -> tuple[int, int, int]:
    """Of a batch: its cost, how much it shares, and what the trunk holds after it.

    kept: tokens the trunk has already. most: tokens that the members share and nobody wants the output of.
    """
    as_it_is = pass_cost + count * (longest - kept)
    if count == 1:
        return as_it_is, kept, longest
    grown = 2 * pass_cost + (most - kept) + count * (longest - most)
    return (grown, most, most) if most > kept and grown < as_it_is else (as_it_is, kept, kept)
