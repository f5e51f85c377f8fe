"""Keys and values of the tokens seen so far, and with them the position: it is kept here and in no second place."""

from __future__ import annotations

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.errors import TinyGPTQError


def require_tokens(length: int, tokens: int, capacity: int) -> None:
    """Raise unless ``tokens`` more fit after ``length`` that are cached."""
    if length + tokens > capacity:
        raise TinyGPTQError(f"context is full: {length} tokens are cached and {tokens} more do not fit in {capacity}")


class KVCache:
    """Room for ``capacity`` tokens of ``batch`` sequences, made once; ``length`` tokens are filled.

    Shapes: keys and values float32 [layers, B, G, capacity, D]: a head's keys lie together, so that attention for one
    token reads them in one sweep.
    """

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, xp=np) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        try:
            self.keys = xp.zeros(shape, np.float32)
            self.values = xp.zeros(shape, np.float32)
        except (MemoryError, ValueError):  # NumPy raises the latter for sizes beyond the address space
            gigabytes = 8e-9 * config.num_hidden_layers * batch * config.num_key_value_heads * capacity * config.head_dim
            raise TinyGPTQError(
                f"a context of {capacity} tokens needs {gigabytes:.3g} GB for keys and values, more than there is; "
                "choose a smaller --context"
            ) from None
        self.length = 0

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def require(self, tokens: int) -> None:
        """Raise unless ``tokens`` more fit."""
        require_tokens(self.length, tokens, self.capacity)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write ``k, v [B, G, T, D]`` after the cached tokens of one layer; return all of that layer's, [B, G, S, D].

        The length moves on with :meth:`advance`, once per forward pass, when every layer has appended.
        """
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on (a shared prefix can then be continued differently)."""
        if not 0 <= length <= self.length:
            raise TinyGPTQError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length
