"""Runs a model for one sequence on the CPU: the prompt through model.py with fast parts, each new token in one call."""

from __future__ import annotations

import numba
import numpy as np

from tinygptq import ops
from tinygptq.config import LlamaConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels import cpu, cpu_plan
from tinygptq.kvcache import KVCache
from tinygptq.model import Llama
from tinygptq.weights import DenseLinear, Weights


class CpuEngine:
    """One sequence at a time; the KV cache owns its position.

    Attributes:
        model: the definition of the forward pass, with the CPU kernels plugged in. capacity: tokens that fit.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, context: int | None = None) -> None:
        """``context``: tokens to make room for; None is the model's own maximum."""
        self.config, self.capacity = config, context or config.max_position_embeddings
        cpu.warm_up()
        self.model = Llama(config, weights, cpu)
        self.cache = KVCache(config, batch=1, capacity=self.capacity)
        self._plan: cpu_plan.Plan | None = None

    def reset(self) -> None:
        """Forget the sequence."""
        self.cache.truncate(0)

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        self.cache.truncate(length)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Append tokens int [T], T >= 1; return the logits after the last one, float32 [vocab]."""
        ids = np.asarray(ids)
        return self.model.forward(ids[None], self.cache, last_only=True)[0, -1]

    def decode(self, token: int) -> np.ndarray:
        """Append one token; return the logits after it, float32 [vocab], overwritten by the next call.

        Raises:
            TinyGPTQError: the context is full, or the token is outside the vocabulary.
        """
        self.cache.require(1)
        if not 0 <= token < self.config.vocab_size:
            raise TinyGPTQError(f"token id {token} is outside the vocabulary of {self.config.vocab_size}")
        position = self.cache.length
        cos, sin = ops.rope_tables(ops.rope_frequencies(self.config, position + 1), position, 1)  # (1, D/2)
        plan = self._plan = self._plan or self._make_plan()
        eps = self.config.rms_norm_eps
        logits = plan.step(int(token), position, self.cache.keys, self.cache.values, cos, sin, eps)
        self.cache.advance(1)
        return logits

    def _make_plan(self) -> cpu_plan.Plan:
        """The decode step over the same prepared linears that prefill uses."""
        config, weights = self.config, self.model.weights
        blocks = [
            [cpu.prepared(weights.linears[f"model.layers.{layer}.{name}"]) for name in config.linear_shapes()]
            for layer in range(config.num_hidden_layers)
        ]
        names = [
            f"model.layers.{layer}.{name}"
            for layer in range(config.num_hidden_layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        norms = np.stack([np.asarray(weights.norms[name], np.float32) for name in [*names, "model.norm"]])
        embedding, head = cpu.prepare(DenseLinear(weights.embedding)), cpu.prepare(DenseLinear(weights.head))
        return cpu_plan.make_plan(config, embedding, blocks, head, norms, self.capacity, numba.get_num_threads())
