"""What the engine keeps in device memory, written down once: what is allocated from it, and what is predicted from it.

A *plan* is ``{name: (shape, dtype)}``. Weights are predicted from the config alone, as :mod:`tinygptq.kernels.cuda.layout`
lays them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda.layout import COLUMNS, ROWS, cache_width
from tinygptq.packing import PackedLinear
from tinygptq.weights import Weights

Plan = dict[str, tuple[tuple[int, ...], Any]]

CHUNK = 2048  # tokens of a prompt that go through the model together, at most
WORKSPACES = (32 << 20) + (64 << 20)  # cuBLAS's, and weights that are fp16 for the length of a product
HALF, FLOAT, INT = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int32)


def cache_plan(config: LlamaConfig, rows: int, capacity: int, bits: int) -> Plan:
    """Keys, values and (for 8 bits) one scale for each token and head."""
    layers, groups, width = config.num_hidden_layers, config.num_key_value_heads, cache_width(config.head_dim)
    numbers = (layers, rows, groups, capacity, width), HALF if bits == 16 else np.dtype(np.int8)
    scales = (layers, rows * groups * capacity if bits == 8 else 1), HALF
    return {"keys": numbers, "values": numbers, "key_scales": scales, "value_scales": scales}


def sequences_plan(config: LlamaConfig, rows: int, capacity: int) -> Plan:
    """Where each sequence stands, and what its draws depend on (see :mod:`tinygptq.kernels.cuda.draw`)."""
    vocab, steps, flag = config.vocab_size, capacity + 1, np.dtype(np.bool_)
    return {
        "tokens": ((rows,), INT), "positions": ((rows,), INT), "drawn": ((rows,), INT), "top_ks": ((rows,), INT),
        "minima": ((rows,), INT), "settings": ((rows, 3), FLOAT), "logits": ((rows, vocab), FLOAT),
        "ends": ((vocab,), flag), "seen": ((rows, vocab), flag),
        "uniforms": ((rows, steps), np.dtype(np.float64)),
    }  # fmt: skip


def decode_plan(config: LlamaConfig, rows: int) -> Plan:
    """Activations of one step."""
    hidden, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
    return {
        "h": ((rows, hidden), FLOAT), "x": ((rows, hidden), HALF), "x_mlp": ((rows, hidden), HALF),
        "qkv": ((rows, qkv_width(config)), FLOAT), "mixed": ((rows, heads * dim), HALF),
        "z": ((rows, config.intermediate_size), HALF), "squares": ((2, rows, -(-hidden // COLUMNS)), FLOAT),
        "no_bias": ((1,), FLOAT),
    }  # fmt: skip


def prefill_plan(config: LlamaConfig, capacity: int, bits: int) -> Plan:
    """Activations of a chunk of a prompt."""
    tokens, hidden = min(CHUNK, capacity), config.hidden_size
    inner, mixed = config.intermediate_size, config.num_attention_heads * config.head_dim
    plan: Plan = {
        "h": ((tokens, hidden), FLOAT), "x": ((tokens, hidden), HALF), "y": ((tokens, hidden), HALF),
        "wide": ((tokens, max(qkv_width(config), 2 * inner)), HALF),  # q, k and v; then gate and up
        "z": ((tokens, max(inner, mixed)), HALF),  # the mixture; then SwiGLU's result
    }  # fmt: skip
    if bits == 8:  # attention over many tokens reads fp16: one layer of one sequence, expanded
        expanded = (config.num_key_value_heads, capacity, cache_width(config.head_dim)), HALF
        plan |= {"expanded_keys": expanded, "expanded_values": expanded}
    return plan


def qkv_width(config: LlamaConfig) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


def allocate(plan: Plan, xp: Any) -> SimpleNamespace:
    """Arrays of zeros under the plan's names."""
    return SimpleNamespace(**{name: xp.zeros(shape, dtype) for name, (shape, dtype) in plan.items()})


def bytes_of(plan: Plan) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in plan.values())


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the device: weights, keys and values, and everything else (activations, workspaces)."""

    weights: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers


def predict(
    config: LlamaConfig, weights: QuantizeConfig | Weights | None, context: int, rows: int = 1, cache_bits: int = 16
) -> DeviceMemory:
    """What an engine for this model takes; the CUDA context itself is not counted.

    Args: weights: the weights, or how they are to be quantised; None is fp16.
    """
    cache = bytes_of(cache_plan(config, rows, context, cache_bits))
    activations = sequences_plan(config, rows, context), decode_plan(config, rows), prefill_plan(config, context, cache_bits)
    tables = 2 * context * (config.head_dim // 2) * FLOAT.itemsize  # cos and sin
    return DeviceMemory(weights_bytes(config, weights), cache, sum(map(bytes_of, activations)) + tables + WORKSPACES)


def weights_bytes(config: LlamaConfig, weights: QuantizeConfig | Weights | None) -> int:
    """The head (with tied embeddings the embedding too; else that stays on the host), norms, linears and their orders."""
    hidden = config.hidden_size
    total = config.vocab_size * hidden * HALF.itemsize + (2 * config.num_hidden_layers + 1) * hidden * FLOAT.itemsize
    orders = 2 * hidden + config.num_attention_heads * config.head_dim
    total += config.num_hidden_layers * orders * INT.itemsize
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in config.linear_shapes().items():
            if isinstance(weights, QuantizeConfig):
                form = weights.bits, weights.rows_per_group(inputs), weights.sym
                total += packed_bytes(inputs, outputs, *form)
            elif weights and isinstance(linear := weights.linears[f"model.layers.{layer}.{name}"], PackedLinear):
                equal = bool((linear.zeros == linear.zeros.flat[0]).all())
                total += packed_bytes(inputs, outputs, linear.bits, linear.group_size, equal)
            else:
                total += inputs * outputs * HALF.itemsize
    return total


def packed_bytes(inputs: int, outputs: int, bits: int, group_size: int, equal_zeros: bool) -> int:
    """One linear as the kernels read it: codes, fp16 scales, and zero points unless they are all equal."""
    rows, columns = -(-inputs // ROWS) * ROWS, -(-outputs // COLUMNS) * COLUMNS
    zeros = 0 if equal_zeros else 2 if bits == 8 else 1
    return rows * columns * bits // 8 + -(-rows // group_size) * columns * (HALF.itemsize + zeros)


def require_room(wanted: DeviceMemory, free: int, config: LlamaConfig, rows: int, cache_bits: int) -> None:
    """Raise unless it fits, saying by how much it does not and what would.

    Args: free: bytes that the device has left.
    """
    if wanted.total <= free:
        return
    missing = f"the model needs {_gb(wanted.total)} of device memory and {_gb(free)} are free"
    left = free - wanted.weights - wanted.buffers
    token = bytes_of(cache_plan(config, rows, 1000, cache_bits)) / 1000
    if left > 256 * token:
        raise TinyGPTQError(f"{missing}: a context of {int(left / token) // 64 * 64} tokens would fit (--context)")
    smaller = " --cache-bits 8 and a shorter --context help;" if cache_bits == 16 else ""
    raise TinyGPTQError(f"{missing}, {_gb(wanted.weights)} of it for weights alone:{smaller} or use --device cpu")


def _gb(count: int) -> str:
    return f"{count * 1e-9:.2f} GB"
