"""One decoding step on the GPU: five kernels a block, recorded once as a CUDA graph and replayed for each token.

What changes from token to token, the token's id and its position, lives in device memory; a replay takes no arguments. The
small layers run inside the products (:mod:`tinygptq.kernels.cuda.epilogues`), so that a block is::

    qkv = x @ Wqkv / rms        mixed = attention(qkv), with RoPE and the cache write        h += mixed @ Wo, and its norm
    z = swiglu(x @ Wgate_up / rms)        h += z @ Wdown, and the norm for the next block
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.cuda.memory import allocate, decode_plan
from tinygptq.cuda.weights import DeviceDense, DeviceWeights, Product, input_order
from tinygptq.kernels.cuda import decode_attention, dense, dispatch, epilogues, rows
from tinygptq.kernels.cuda.draw import draw
from tinygptq.kernels.cuda.runtime import capability, cupy, multiprocessors

DEPENDENT_LAUNCH = (9, 0)  # first capability on which a kernel may begin before the last one has ended
STRIP = 32  # columns of an epilogue's call


class DecodeStep:
    """The kernels of one step for R sequences, and their graphs.

    Args:
        sequences: arrays of :func:`tinygptq.cuda.memory.sequences_plan`, all that a step reads beside weights and cache.
        cache: keys, values float16 or int8 [layers, R, G, capacity, W], and their scales float16 [layers, R * G * capacity].
        cos, sin: float32 [capacity, D / 2].
    """

    def __init__(
        self, config: LlamaConfig, weights: DeviceWeights, orders: list[dict[str, Any]], sequences: Any, cache: Any,
        cos: Any, sin: Any, stream: Any,
    ) -> None:  # fmt: skip
        self.config, self.weights, self.orders, self.stream = config, weights, orders, stream
        self.sequences, self.cache, self.cos, self.sin = sequences, cache, cos, sin
        self.dependent = capability() >= DEPENDENT_LAUNCH
        cp, count = cupy(), len(sequences.tokens)
        heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.at = allocate(decode_plan(config, count), cp)  # activations
        tiling, bits = decode_attention.Heads.of(heads, groups), 16 if cache[0].dtype == np.float16 else 8
        splits = splits_of(tiling.tiles * count, multiprocessors())
        self.sums = cp.zeros(count * heads * splits * decode_attention.record_of(dim), np.float32)
        self.arrived = cp.zeros(count * tiling.tiles, np.int32)
        self.attention = decode_attention.decode_attention_kernel(heads, groups, dim, bits, splits)
        self.attention_grid, self.attention_block = (splits, tiling.tiles, count), 32 * decode_attention.warps_of(dim)
        self._graphs: dict[bool, Any] = {}

    def launch(self, only: str | None = None) -> None:
        """Put the kernels of one step on the stream, up to the logits; ``only``: those of one kind, to time them."""
        for name, run in self.kernels():
            if only is None or name == only:
                run()

    def kernels(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The kind of each kernel of a step, and what launches it, in order."""
        weights, now, at, (attn, mlp) = self.weights, self.sequences, self.at, self.at.squares
        yield "embedding", self._embed
        for layer, block in enumerate(weights.blocks):
            order = self.orders[layer]
            yield "qkv", self._product(block.qkv, at.x, epilogues.normed, at.qkv, (attn, mlp), ())
            cache = tuple(array[layer] for array in self.cache)
            given = (at.qkv, self.cos, self.sin, now.positions, cache, order["o"], self.sums, self.arrived, at.mixed)
            yield "attention", partial(self._attend, given)
            after = (block.post_norm, order["gate_up"], at.x_mlp, mlp)
            yield "o", self._product(block.o, at.mixed, epilogues.residual, at.h, (attn,), after)
            yield "gate, up", self._product(block.gate_up, at.x_mlp, epilogues.swiglu, at.z, (mlp, attn), ())
            last = layer + 1 == len(weights.blocks)
            norm = weights.norm if last else weights.blocks[layer + 1].input_norm
            after = (norm, self.orders[layer + 1]["qkv"], at.x, attn)
            yield "down", self._product(block.down, at.z, epilogues.residual, at.h, (mlp,), after)
        yield "head", self._product(weights.head, at.x, epilogues.normed, now.logits, (attn, mlp), ())

    def _embed(self) -> None:
        weights, now, order = self.weights, self.sequences, self.orders[0]["qkv"]
        kernel, weight = rows.embed_kernel(self.config.hidden_size, self.config.rms_norm_eps), weights.blocks[0].input_norm
        at = self.at
        given = (weights.embedding, now.tokens, weight, order, at.h, at.x, at.squares)
        # not dependent: what follows may count on the last step's draw, and on the cache, before it waits
        kernel(len(now.tokens), rows.EMBED_THREADS, self.stream, *given)

    def _attend(self, given: tuple) -> None:
        self.attention(self.attention_grid, self.attention_block, self.stream, *given, dependent=self.dependent)

    def _product(self, product: Product, x: Any, epilogue: Any, y: Any, before: tuple, after: tuple) -> Callable[[], None]:
        """What computes ``x @ W`` into an epilogue whose extra arrays are ``before``, the bias, and ``after``."""
        bias = self.at.no_bias if product.bias is None else product.bias
        made = epilogue(self.config.hidden_size, self.config.rms_norm_eps, product.bias is not None)
        return partial(multiply, product, x, made, y, (*before, bias, *after), self.stream, self.dependent)

    def launch_draw(self) -> None:
        """Put the draw of each sequence's next token on the stream; its logits are overwritten."""
        now = self.sequences
        draw(len(now.tokens), 1024, self.stream, now.logits, now.settings, now.top_ks, now.minima, now.ends, now.seen,
             now.uniforms, now.drawn, now.tokens, now.positions, now.history, len(self.cos) - 1,
             dependent=self.dependent)  # fmt: skip

    def replay(self, drawing: bool) -> None:
        """Run one step, with or without the draw at its end; the first time records it."""
        if drawing not in self._graphs:
            self._graphs[drawing] = self._record(drawing)
        self._graphs[drawing].launch(self.stream)

    def _record(self, drawing: bool) -> Any:
        """A kernel's first launch loads it, which cannot be recorded: so each is prepared by a run on saved state."""
        now = self.sequences
        changed = now.tokens, now.positions, now.drawn, now.seen, now.history, now.logits
        with self.stream:
            kept = [array.copy() for array in changed]
            self._launch_all(drawing)
            for array, old in zip(changed, kept, strict=True):
                array[...] = old
        self.stream.synchronize()
        self.stream.begin_capture()
        self._launch_all(drawing)
        return self.stream.end_capture()

    def _launch_all(self, drawing: bool) -> None:
        self.launch()
        if drawing:
            self.launch_draw()


def multiply(product: Product, x: Any, epilogue: Any, y: Any, extra: tuple, stream: Any, dependent: bool) -> None:
    """``x @ W`` for 1 to 16 rows, handed to an epilogue."""
    if isinstance(product, DeviceDense):
        kernel = dense.dense_kernel(1 if x.shape[0] <= 8 else 2, epilogue)
        grid = -(-product.out_features // dense.STRIP)
        kernel(grid, 32 * dense.WARPS, stream, x, product.weight, y, extra, dependent=dependent)
    else:
        dispatch.multiply_rows(x, product, y, stream, epilogue=epilogue, extra=extra, dependent=dependent)


def splits_of(tiles: int, multiprocessors: int) -> int:
    """Blocks among which a sequence's tokens are divided: at most two for each multiprocessor in all, which run at once."""
    return min(decode_attention.MOST_SPLITS, max(1, 2 * multiprocessors // tiles))


def orders_of(weights: DeviceWeights) -> list[dict[str, Any]]:
    """For each block the order in which its products want their inputs, int32 on the device, and one entry for the head.

    (``down``'s come in that order: see :func:`tinygptq.cuda.weights.upload`.)
    """
    cp = cupy()
    names = ("qkv", "o", "gate_up")
    found = [{name: cp.asarray(input_order(getattr(block, name))) for name in names} for block in weights.blocks]
    return [*found, {"qkv": cp.asarray(input_order(weights.head))}]
