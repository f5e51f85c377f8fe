"""A prompt through the model on the GPU, in chunks of tokens: the forward pass of model.py with kernels for many rows.

Activations between the linears are fp16, the residual stream float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygptq import ops
from tinygptq.config import LlamaConfig
from tinygptq.cuda.memory import CHUNK, allocate, prefill_plan, qkv_width
from tinygptq.cuda.weights import DeviceWeights, Product, multiply
from tinygptq.kernels.cuda import dense, rows
from tinygptq.kernels.cuda.block_sums import store
from tinygptq.kernels.cuda.cache_codec import FILL_TOKENS, FILL_WARPS, expand_kernel, fill_kernel
from tinygptq.kernels.cuda.dispatch import gather
from tinygptq.kernels.cuda.layout import cache_width
from tinygptq.kernels.cuda.prefill_attention import QUERIES, THREADS, prefill_attention_kernel
from tinygptq.kernels.cuda.runtime import cupy


class Prefill:
    """Buffers for a chunk of tokens, and the pass over them.

    Args: cache: as in :class:`tinygptq.cuda.decode.DecodeStep`; orders: where each product wants its input's elements.
    """

    def __init__(
        self, config: LlamaConfig, weights: DeviceWeights, orders: list[dict[str, Any]], cache: Any, capacity: int,
        stream: Any,
    ) -> None:  # fmt: skip
        cp, self.config, self.weights, self.orders, self.cache, self.stream = cupy(), config, weights, orders, cache, stream
        self.chunk = min(CHUNK, capacity)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.bits = 16 if cache[0].dtype == np.float16 else 8
        self.at = allocate(prefill_plan(config, capacity, self.bits), cp)  # activations
        self.attention = prefill_attention_kernel(heads, groups, dim, cache_width(dim))
        self.fill = fill_kernel(heads, groups, dim, self.bits)

    def run(self, ids: np.ndarray, start: int, row: int, logits: Any) -> None:
        """Append tokens int [T] at position ``start`` of sequence ``row``; ``logits`` float32 [1, vocab] of the last."""
        frequencies = ops.rope_frequencies(self.config, start + len(ids))
        cos, sin = (cupy().asarray(table) for table in ops.rope_tables(frequencies, 0, start + len(ids)))
        cupy().cuda.get_current_stream().synchronize()
        for first in range(0, len(ids), self.chunk):
            part = ids[first : first + self.chunk]
            self._embed(part)
            for layer in range(self.config.num_hidden_layers):
                self._block(layer, len(part), start + first, row, cos, sin)
        last = self.at.x[len(part) - 1 : len(part)]
        head = self.weights.head
        kernel, grid = dense.dense_kernel(1, store), -(-head.out_features // dense.STRIP)
        kernel(grid, 32 * dense.WARPS, self.stream, last, head.weight, logits, ())

    def _embed(self, ids: np.ndarray) -> None:
        with self.stream:
            self.at.h[: len(ids)] = self.weights.embedding[cupy().asarray(ids)]
        first = self.weights.blocks[0].input_norm
        self._norm(len(ids), first, self.orders[0]["qkv"], self.weights.blocks[0].qkv, add=False)

    def _block(self, layer: int, tokens: int, start: int, row: int, cos: Any, sin: Any) -> None:
        config, block, order, stream = self.config, self.weights.blocks[layer], self.orders[layer], self.stream
        qkv = self._linear(self.at.x[:tokens], block.qkv, self.at.wide, qkv_width(config))
        cache = tuple(array[layer] for array in self.cache)
        grid = -(-tokens // FILL_TOKENS), config.num_key_value_heads
        self.fill(grid, 32 * FILL_WARPS, stream, qkv, cos, sin, start, row, cache)
        keys, values = self._keys_values(cache, row, start + tokens)
        mixed = self._rows(self.at.z, tokens, config.num_attention_heads * config.head_dim)
        grid = config.num_attention_heads, -(-tokens // QUERIES)
        self.attention(grid, THREADS, stream, qkv, cos, sin, keys, values, start, mixed)
        if block.o.perm is not None:  # into a buffer that nobody reads now, not a workspace beside what `size` predicts
            mixed = gather(mixed, block.o.perm, self._rows(self.at.wide, *mixed.shape), stream)
        self._linear(mixed, block.o, self.at.y, config.hidden_size)
        self._norm(tokens, block.post_norm, order["gate_up"], block.gate_up)
        gate_up = self._linear(self.at.x[:tokens], block.gate_up, self.at.wide, 2 * config.intermediate_size)
        z = self._rows(self.at.z, tokens, config.intermediate_size)
        rows.swiglu((-(-z.shape[1] // (8 * rows.THREADS)), tokens), rows.THREADS, stream, gate_up, z)
        self._linear(z, block.down, self.at.y, config.hidden_size)
        last = layer + 1 == config.num_hidden_layers
        after = None if last else self.weights.blocks[layer + 1]
        norm, following = (after.input_norm, after.qkv) if after else (self.weights.norm, self.weights.head)
        self._norm(tokens, norm, self.orders[layer + 1]["qkv"], following)

    def _keys_values(self, cache: tuple, row: int, tokens: int) -> tuple[Any, Any]:
        """One sequence's keys and values of one layer as fp16 [groups, capacity, width]."""
        keys, values, key_scales, value_scales = cache
        if self.bits == 16:
            return keys[row], values[row]
        size = key_scales.size // len(keys)
        expanded = self.at.expanded_keys, self.at.expanded_values
        for array, scales, out in zip((keys, values), (key_scales, value_scales), expanded, strict=True):
            part = scales[row * size : (row + 1) * size]
            expand_kernel((tokens, len(keys[row])), 32, self.stream, array[row], part, out)
        return expanded

    def _norm(self, tokens: int, weight: Any, order: Any, following: Product, add: bool = True) -> None:
        """Add y to the residual stream, and norm it for the product that follows."""
        config, at = self.config, self.at
        kernel = rows.add_norm_kernel(config.hidden_size, config.rms_norm_eps, add, following.perm is None)
        kernel(tokens, rows.THREADS, self.stream, at.h[:tokens], at.y[:tokens], weight, order, at.x[:tokens])

    def _linear(self, x: Any, product: Product, buffer: Any, width: int) -> Any:
        return multiply(x, product, self._rows(buffer, len(x), width), self.stream, gathered=True)

    def _rows(self, buffer: Any, tokens: int, width: int) -> Any:
        """The beginning of a buffer as [tokens, width], C-contiguous."""
        return buffer.ravel()[: tokens * width].reshape(tokens, width)
