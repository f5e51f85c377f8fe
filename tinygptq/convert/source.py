"""What is converted: the tensors of a quantised folder that stay as they are, and its linears in the one clean form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.folders.checkpoint import Checkpoint, linear_names
from tinygptq.packing import PackedLinear

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A folder opened for conversion.

    dense: every tensor that is not part of a quantised linear, under its full name (embedding, norms, head unless tied,
    linears left in floats, biases); float16, bfloat16 or float32, usually memory-mapped.
    linears: the quantised linears by name; a mapping may make each when it is asked for, so that one is in memory at a time.
    zeros: gives ``(name, true zero points [G, N])`` of each, without making the linear.
    """

    folder: Path
    config: LlamaConfig
    quantization: QuantizeConfig | None
    dense: Mapping[str, np.ndarray]
    linears: Mapping[str, PackedLinear]
    zeros: Callable[[], Iterable[tuple[str, np.ndarray]]]


def source_of(checkpoint: Checkpoint) -> Source:
    """A checkpoint as a Source; act-order is what the linears show, whatever the folder's config says."""
    weights, config, quantization = checkpoint.weights, checkpoint.config, checkpoint.quantization
    dense = {"model.embed_tokens.weight": weights.embedding}
    dense |= {f"{name}.weight": norm for name, norm in weights.norms.items()}
    if not config.tie_word_embeddings:
        dense["lm_head.weight"] = weights.head
    packed = {}
    for name, linear in weights.linears.items():
        if isinstance(linear, PackedLinear):
            packed[name] = linear
        else:
            dense[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            dense[f"{name}.bias"] = linear.bias
    if quantization is not None:
        act_order = any(linear.perm is not None for linear in packed.values())
        quantization = replace(quantization, desc_act=quantization.desc_act or act_order)
        if any(linear.group_size != quantization.rows_per_group(linear.in_features) for linear in packed.values()):
            size = gcd(*(linear.group_size for linear in packed.values()))
            quantization = replace(quantization, group_size=size)
            packed = {name: with_groups_of(linear, size) for name, linear in packed.items()}
            log.warning("%s: groups of several sizes, cut into groups of %d with the same values", checkpoint.folder, size)
    zeros = [(name, linear.zeros) for name, linear in packed.items()]
    return Source(checkpoint.folder, config, quantization, dense, packed, lambda: zeros)


def with_groups_of(linear: PackedLinear, size: int) -> PackedLinear:
    """The same linear with finer groups that repeat their group's scales and zeros; ``size`` divides its group size."""
    rows = np.arange(0, linear.in_features, size)  # the first of each new group
    old = rows // linear.group_size
    return replace(linear, scales=linear.scales[old], zeros=linear.zeros[old], group_size=size)


def missing_biases(config: LlamaConfig, names: Iterable[str]) -> tuple[dict[str, bool], dict[str, tuple[int, ...]]]:
    """What must be added so that a folder with these tensors honours its biases.

    transformers gives a bias to all of a block's attention (or MLP) linears or to none, by two flags of config.json.

    Returns:
        The flags that have to be true, and ``{name: shape}`` of the biases that are not there and so are zero.
    """
    biased = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
    flags: dict[str, bool] = {}
    absent: dict[str, tuple[int, ...]] = {}
    for part, flag in (("self_attn.", "attention_bias"), ("mlp.", "mlp_bias")):
        if any(part in name for name in biased):
            flags[flag] = True
            for name, (_, out_features) in linear_names(config):
                if part in name and name not in biased:
                    absent[f"{name}.bias"] = (out_features,)
    return flags, absent
