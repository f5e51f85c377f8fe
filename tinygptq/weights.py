"""What a model is made of once its folder has been read: dense and packed linears, and the whole set by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tinygptq.packing import PackedLinear


@dataclass(frozen=True, eq=False)
class DenseLinear:
    """A linear that is not quantised, as Hugging Face folders store it: ``y = x @ weight.T + bias``.

    Shapes: weight float16, bfloat16 or float32 [N, K], often memory-mapped; bias float32 [N] or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None = None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def dequantize(self) -> np.ndarray:
        """float32 [K, N], the same orientation as :meth:`PackedLinear.dequantize`."""
        return self.weight.T.astype(np.float32)


Linear = PackedLinear | DenseLinear


@dataclass(frozen=True)
class Weights:
    """All weights of a LLaMA, under the names Hugging Face folders use (without their ``.weight``).

    embedding: [vocab, C]; head: [vocab, C], the embedding itself when tied; fp16, bf16 or fp32, often memory-mapped.
    norms: ``model.norm``, ``model.layers.{i}.input_layernorm``, ``model.layers.{i}.post_attention_layernorm`` -> [C].
    linears: ``model.layers.{i}.self_attn.q_proj`` and so on.
    """

    embedding: np.ndarray
    head: np.ndarray
    norms: Mapping[str, np.ndarray]
    linears: dict[str, Linear]


def dense(linear: Linear) -> DenseLinear:
    """A linear of which it is known that nobody has quantised it yet."""
    assert isinstance(linear, DenseLinear)
    return linear
