"""Sizes in bytes, on disk and in memory, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.folders.checkpoint import linear_names, norm_names
from tinygptq.folders.export import require_packable, tensor_layout
from tinygptq.folders.tensorfile import Layout, plan_file

KV_TOKENS = 1000


@dataclass(frozen=True)
class Sizes:
    """All in bytes. file: the weights file, header included. weights: its tensors, which loading brings into memory.

    kv_per_1000_tokens: keys and values of 1,000 tokens of one sequence in float32, as the CPU engine keeps them.
    """

    file: int
    weights: int
    kv_per_1000_tokens: int


def sizes(config: LlamaConfig, quantization: QuantizeConfig | None) -> Sizes:
    """Sizes of a quantised folder, or of the fp16 one for None.

    Raises:
        TinyGPTQError: a linear whose sizes do not fill whole 32-bit words at this width.
    """
    if quantization is not None:
        require_packable(config, quantization)
    layout = dense_layout(config) if quantization is None else tensor_layout(config, quantization)
    weights = sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4 * KV_TOKENS
    return Sizes(plan_file(layout)[2], weights, kv)


def dense_layout(config: LlamaConfig) -> Layout:
    """``{name: (dtype, shape)}`` of an unquantised fp16 folder."""
    half, table = np.dtype(np.float16), (config.vocab_size, config.hidden_size)
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {"model.embed_tokens.weight": (half, table)}
    layout |= {f"{name}.weight": (half, (config.hidden_size,)) for name in norm_names(config)}
    layout |= {f"{name}.weight": (half, (out, inputs)) for name, (inputs, out) in linear_names(config)}
    if not config.tie_word_embeddings:
        layout["lm_head.weight"] = (half, table)
    return layout
