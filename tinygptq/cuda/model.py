"""The forward pass of model.py over the GPU's weights: logits of every position, for perplexity, scoring and comparing.

The four stages of a block are model.py's, on CuPy arrays; the products are the fused ones that generating uses, and so is
attention. Between them everything is float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq import ops
from tinygptq.config import LlamaConfig
from tinygptq.cuda.weights import TURN, DeviceWeights, Product, multiply
from tinygptq.kernels.cuda.layout import cache_width
from tinygptq.kernels.cuda.prefill_attention import QUERIES, THREADS, prefill_attention_kernel
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.kvcache import KVCache
from tinygptq.model import Llama, check_ids
from tinygptq.weights import Weights


class CudaLlama(Llama):
    """A :class:`~tinygptq.model.Llama` whose arrays are CuPy's, float32, on the current stream."""

    tokens_at_once, pass_cost = 4096, 1000  # launching a pass takes some 50 ms of the host, whatever its tokens

    def __init__(self, config: LlamaConfig, device: DeviceWeights) -> None:
        norms = {"model.norm": device.norm}
        for layer, block in enumerate(device.blocks):
            norms[f"model.layers.{layer}.input_layernorm"] = block.input_norm
            norms[f"model.layers.{layer}.post_attention_layernorm"] = block.post_norm
        super().__init__(config, Weights(device.embedding, device.head.weight, norms, {}))
        self.device = device
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._width = cache_width(dim)
        self._turns: tuple[int, tuple[Any, Any]] | None = None
        self._attend = prefill_attention_kernel(heads, groups, dim, self._width)

    def embed(self, ids: Any) -> Any:
        check_ids(np.asarray(ids), self.config.vocab_size)
        return self.weights.embedding[cupy().asarray(ids)].astype(np.float32)

    def logits(self, h: Any) -> Any:
        return product(self._norm(h, "model.norm"), self.device.head, np.float32)

    def attention_mix(self, layer: int, x: Any, cache: KVCache | None = None) -> Any:
        config, (batch, tokens, _) = self.config, x.shape
        start = 0 if cache is None else cache.length
        if cache is not None:
            cache.require(tokens)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = product(x, self.device.blocks[layer].qkv, np.float32)
        qkv = qkv.reshape(batch, tokens, heads + 2 * groups, dim).swapaxes(1, 2)  # (B, H + 2G, T, D)
        cos, sin = self._tables(start + tokens)
        k, v = ops.apply_rope(qkv[:, heads : heads + groups], cos[start:], sin[start:]), qkv[:, heads + groups :]
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, G, S, D)
        return self._attention(qkv[:, :heads], k, v, cos, sin)

    def _tables(self, length: int) -> tuple[Any, Any]:
        """cos and sin of the first ``length`` positions; those of the last length asked for are kept for the next layer."""
        if self._turns is None or self._turns[0] != length:
            frequencies = cupy().asarray(ops.rope_frequencies(self.config, length))
            self._turns = length, ops.rope_tables(frequencies, 0, length)
        return self._turns[1]

    def mlp_mix(self, layer: int, x: Any) -> Any:
        """As the definition's, but with its columns in the order in which ``down`` has its rows."""
        both = product(x, self.device.blocks[layer].gate_up, np.float32)
        both = both.reshape(*x.shape[:2], -1, 2, TURN)  # gate and up alternate
        return ops.swiglu(both[..., 0, :], both[..., 1, :]).reshape(*x.shape[:2], -1)

    def linear(self, layer: int, name: str, x: Any) -> Any:
        """o_proj and down_proj; the others are part of a larger product."""
        block = self.device.blocks[layer]
        products = {"self_attn.o_proj": block.o, "mlp.down_proj": block.down}
        return product(x, products[name], np.float32, gathered=name == "mlp.down_proj")  # see mlp_mix

    def _attention(self, q: Any, k: Any, v: Any, cos: Any, sin: Any) -> Any:
        """ops.apply_rope on q, and ops.causal_attention without a T x S matrix in memory.

        q [B, H, T, D], k, v [B, G, S, D] -> [B, T, H * D].
        """
        cp, (batch, heads, tokens, dim), seen = cupy(), q.shape, k.shape[2]
        out = cp.empty((batch, tokens, heads * dim), np.float16)
        rows = cp.ascontiguousarray(q.swapaxes(1, 2).reshape(batch, tokens, heads * dim)).astype(np.float16)
        keys, values = (self._wide(array) for array in (k, v))
        grid, stream = (heads, -(-tokens // QUERIES)), cp.cuda.get_current_stream()
        for b in range(batch):
            self._attend(grid, THREADS, stream, rows[b], cos, sin, keys[b], values[b], seen - tokens, out[b])
        return out.astype(np.float32)

    def _wide(self, array: Any) -> Any:
        """fp16 [B, G, S, width], zeros behind each head's own dimensions."""
        if array.shape[-1] == self._width:
            return cupy().ascontiguousarray(array.astype(np.float16))
        wide = cupy().zeros((*array.shape[:-1], self._width), np.float16)
        wide[..., : array.shape[-1]] = array
        return wide


def product(x: Any, layer: Product, dtype: Any, *, gathered: bool = False) -> Any:
    """``x [..., K] @ W + bias``, x float32, rounded to fp16; sums float32, the result of ``dtype``.

    ``gathered``: x's columns are in the order of the layer's rows, and not in the model's.
    """
    cp, shape = cupy(), (*x.shape[:-1], layer.out_features)
    rows = cp.ascontiguousarray(x.reshape(-1, x.shape[-1])).astype(np.float16)
    out = cp.empty((len(rows), layer.out_features), dtype)
    return multiply(rows, layer, out, cp.cuda.get_current_stream(), gathered=gathered).reshape(shape)
