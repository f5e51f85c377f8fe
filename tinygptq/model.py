"""LLaMA's forward pass: the definition. Opens no file, knows no kernel by name.

Read it bottom-up. :class:`Llama` holds arrays and the functions it works with: those of ops.py, plain NumPy (or CuPy: the
arrays decide), or faster twins under the same names, which an engine hands in. A block is four stages, each named after
what it makes: the input that one set of linears shares. GPTQ calibrates exactly those inputs, so quantization/blocks.py
walks the same four functions.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tinygptq import ops
from tinygptq.config import LlamaConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.kvcache import KVCache
from tinygptq.weights import DenseLinear, Linear, Weights


class Functions(Protocol):
    """What the forward pass is made of; ops.py is the definition, a module of kernels may offer twins."""

    def linear(self, x: np.ndarray, layer: Linear) -> np.ndarray: ...

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray: ...

    def apply_rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray: ...

    def causal_attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray: ...

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray: ...


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises TinyGPTQError unless ids are int [B, T], T at least 1, of the vocabulary."""
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise TinyGPTQError(f"token ids should have the shape [batch, tokens], found {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise TinyGPTQError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")


class Llama:
    """A LLaMA over arrays.

    Args:
        functions: a module (or any object) with the five functions of :class:`Functions`. Twins may overwrite arrays that
            the forward pass has no further use for.

    Attributes:
        tokens_at_once: as many as keep the processor busy; more only take memory. pass_cost: what a pass costs beside its
            tokens, in tokens (all weights are read and widened: 0.15 s, measured on SmolLM2).
    """

    tokens_at_once, pass_cost = 2048, 40

    def __init__(self, config: LlamaConfig, weights: Weights, functions: Functions = ops) -> None:
        self.config, self.weights, self.functions = config, weights, functions
        self._head = DenseLinear(weights.head)
        self._norms = {name: norm.astype(np.float32) for name, norm in weights.norms.items()}

    # ------------------------------------------------------------------ the whole pass

    def forward(self, ids: np.ndarray, cache: KVCache | None = None, last_only: bool = False) -> np.ndarray:
        """Logits of every position, or of the last alone.

        Args:
            ids: int [B, T], each below vocab_size. cache: where earlier tokens are and these are appended, or None.

        Returns:
            float32 [B, T, vocab], or [B, 1, vocab] with ``last_only``.
        """
        return self.logits(self.hidden(ids, cache, last_only))

    def hidden(self, ids: np.ndarray, cache: KVCache | None = None, last_only: bool = False) -> np.ndarray:
        """The residual stream after the last block, float32 [B, T, C]; :meth:`logits` turns any part of it into logits.

        With ``last_only`` it is that of the last position, [B, 1, C].
        """
        h, last = self.embed(ids), self.config.num_hidden_layers - 1
        for layer in range(self.config.num_hidden_layers):
            h = self.block(layer, h, cache, last_only and layer == last)
        if cache is not None:
            cache.advance(ids.shape[1])
        return h

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """int [B, T] -> float32 [B, T, C]."""
        check_ids(ids, self.config.vocab_size)
        return self.weights.embedding[ids].astype(np.float32)

    def block(self, layer: int, h: np.ndarray, cache: KVCache | None = None, last_only: bool = False) -> np.ndarray:
        """One transformer block, float32 [B, T, C] -> [B, T, C]: attention and MLP, each added to the residual stream.

        With ``last_only`` the result is the last position's, [B, 1, C]; of the others just keys and values are needed then.
        """
        mixed = self.attention_mix(layer, self.attention_input(layer, h), cache)
        if last_only:
            h, mixed = h[:, -1:], mixed[:, -1:]
        h = h + self.linear(layer, "self_attn.o_proj", mixed)
        h = h + self.linear(layer, "mlp.down_proj", self.mlp_mix(layer, self.mlp_input(layer, h)))
        return h

    def logits(self, h: np.ndarray) -> np.ndarray:
        """float32 [B, T, C] -> [B, T, vocab]: final norm, then the head."""
        return self.functions.linear(self._norm(h, "model.norm"), self._head)

    # ------------------------------------------------------------------ the four stages of a block

    def attention_input(self, layer: int, h: np.ndarray) -> np.ndarray:
        """The input q_proj, k_proj and v_proj share, [B, T, C]."""
        return self._norm(h, f"model.layers.{layer}.input_layernorm")

    def attention_mix(self, layer: int, x: np.ndarray, cache: KVCache | None = None) -> np.ndarray:
        """The input of o_proj: every head's mixture of values, [B, T, H * D]."""
        config, tokens = self.config, x.shape[1]
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.require(tokens)
        q = self._heads(layer, "self_attn.q_proj", x, config.num_attention_heads)  # (B, H, T, D)
        k = self._heads(layer, "self_attn.k_proj", x, config.num_key_value_heads)  # (B, G, T, D)
        v = self._heads(layer, "self_attn.v_proj", x, config.num_key_value_heads)  # (B, G, T, D)
        frequencies = ops.array_module(x).asarray(ops.rope_frequencies(config, start + tokens))
        cos, sin = ops.rope_tables(frequencies, start, tokens)  # (T, D/2)
        q, k = self.functions.apply_rope(q, cos, sin), self.functions.apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, G, S, D)
        return self.functions.causal_attention(q, k, v)  # (B, T, H*D)

    def mlp_input(self, layer: int, h: np.ndarray) -> np.ndarray:
        """The input gate_proj and up_proj share, [B, T, C]."""
        return self._norm(h, f"model.layers.{layer}.post_attention_layernorm")

    def mlp_mix(self, layer: int, x: np.ndarray) -> np.ndarray:
        """The input of down_proj: SiLU(gate) * up, [B, T, I]."""
        return self.functions.swiglu(self.linear(layer, "mlp.gate_proj", x), self.linear(layer, "mlp.up_proj", x))

    # ------------------------------------------------------------------ the parts

    def linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        """Apply the linear ``model.layers.{layer}.{name}`` to float32 [..., K]."""
        return self.functions.linear(x, self.weights.linears[f"model.layers.{layer}.{name}"])

    def _norm(self, h: np.ndarray, name: str) -> np.ndarray:
        return self.functions.rms_norm(h, self._norms[name], self.config.rms_norm_eps)

    def _heads(self, layer: int, name: str, x: np.ndarray, heads: int) -> np.ndarray:
        batch, tokens, _ = x.shape
        return self.linear(layer, name, x).reshape(batch, tokens, heads, -1).swapaxes(1, 2)  # (B, heads, T, D)
