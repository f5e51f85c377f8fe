"""GGUF files of LLaMAs to Hugging Face folders: names, row order and configuration; the ``gguf`` package dequantises.

What a straight copy of the tensors would get wrong:

- llama.cpp reorders the rows of q and k: rotary pairs are neighbouring rows there, and halves of a head in Hugging Face;
- a tied output head is simply absent from the file;
- the frequency scaling of LLaMA 3.1 is a tensor of factors (``rope_freqs.weight``), not metadata.

Format: GGUF version 2 and 3, as llama.cpp's convert_hf_to_gguf writes it for architecture "llama".
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig, RopeScaling
from tinygptq.convert.gguf_tokenizer import special_ids, write_tokenizer
from tinygptq.convert.source import missing_biases
from tinygptq.convert.writers import to_dtype
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import write_json
from tinygptq.folders.shards import ShardedWriter
from tinygptq.folders.sizes import dense_layout
from tinygptq.folders.tensorfile import Layout
from tinygptq.ops import rope_frequencies

log = logging.getLogger(__name__)

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
WEIGHTS_AT_ONCE = 2**23  # dequantised together: 32 MB in float32


def hugging_face_name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; an unknown name is a TinyGPTQError."""
    if gguf_name in OTHER_NAMES:
        return OTHER_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    raise TinyGPTQError(f"the GGUF file holds a tensor that a LLaMA has no place for: {gguf_name}")


def halves_from_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order in a q or k projection.

    Within a head of dimension D, llama.cpp stores rotary pair i in rows (2i, 2i+1), Hugging Face in rows (i, i + D/2).

    weight: [num_heads * D, in_features], or a bias [num_heads * D] -> the same shape, rows in Hugging Face's order.
    """
    paired = weight.reshape(num_heads, len(weight) // num_heads // 2, 2, *weight.shape[1:])  # (H, D/2, 2, in)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weight.shape)  # (H * D, in)


# ------------------------------------------------------------------------------------------------------ the file


class GgufFile:
    """An open GGUF file: metadata as plain values, tensors by their Hugging Face names, all memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise TinyGPTQError(f"{path}: reading GGUF needs the package gguf: pip install tinygptq[hf]") from None
        self.path = path
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package lets whatever a broken header causes come through
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise TinyGPTQError(f"{path}: not a readable GGUF file ({reason})") from None
        self._require_llama()
        raw = {tensor.name: tensor for tensor in reader.tensors}
        self.rope_factors = self._dequantize(raw.pop(ROPE_FACTORS)) if ROPE_FACTORS in raw else None
        self.tensors = {hugging_face_name(name): tensor for name, tensor in raw.items()}

    def number(self, key: str, kind: type = int, default: float | None = None):
        """A number of the metadata, under its name without ``llama.``; a list of equal numbers counts as one."""
        value = self.metadata.get(f"llama.{key}", default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TinyGPTQError(f"{self.path}: metadata llama.{key} should be one number, found {_short(value)}")
        # GGUF holds floats in 32 bits; the shortest decimal that gives them is what was meant (1e-5, not 9.99999975e-06)
        return int(value) if kind is int else float(str(np.float32(value)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, rows first (the file has it the other way round)."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A tensor dequantised to float16 or float32, in the file's row order, a few rows in float32 at a time."""
        tensor, shape = self.tensors[name], self.shape(name)
        rows = max(1, WEIGHTS_AT_ONCE // int(np.prod(shape[1:])))
        out = np.empty(shape, dtype)
        for start in range(0, shape[0], rows):
            out[start : start + rows] = to_dtype(self._dequantize(tensor, start, start + rows), dtype, name)
        return out

    def _dequantize(self, tensor: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 rows ``start:stop`` of a tensor of the reader."""
        from gguf.quants import dequantize

        try:
            return dequantize(tensor.data[start:stop], tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            kind = getattr(tensor.tensor_type, "name", tensor.tensor_type)
            raise TinyGPTQError(f"{self.path}: {tensor.name} is of type {kind}, which is not supported") from None

    def _require_llama(self) -> None:
        """Refuse other architectures, mixtures of experts and files that are one part of several."""
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise TinyGPTQError(f"{self.path}: architecture is {_short(architecture)}, only 'llama' is supported")
        if self.number("expert_count", default=0):
            raise TinyGPTQError(f"{self.path}: is a mixture of experts, which is not supported")
        parts = self.metadata.get("split.count", 1)
        if parts != 1:
            raise TinyGPTQError(f"{self.path}: is one of {parts} parts; join them first (llama-gguf-split --merge)")


def _short(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]


# -------------------------------------------------------------------------------------------------- configuration


def model_config(file: GgufFile, dtype: str) -> dict[str, Any]:
    """config.json as transformers' LlamaForCausalLM reads it."""
    heads, hidden = file.number("attention.head_count"), file.number("embedding_length")
    if "model.embed_tokens.weight" not in file.tensors:
        raise TinyGPTQError(f"{file.path}: tensor token_embd.weight is missing")
    head_dim = file.number("attention.key_length", default=hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.number(key, default=head_dim) != head_dim:
            raise TinyGPTQError(f"{file.path}: llama.{key} is {file.number(key)}, expected the head dimension {head_dim}")
    ids = special_ids(file.metadata)
    flags, _ = missing_biases(_shape_only(file, heads, head_dim), file.tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.shape("model.embed_tokens.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": file.number("feed_forward_length"),
        "num_hidden_layers": file.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.number("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.number("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.number("rope.freq_base", float, 10000.0),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": "lm_head.weight" not in file.tensors,
        "use_cache": True,
        **{f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")},
        "torch_dtype": dtype,
        **flags,
    }
    config["rope_scaling"] = rope_scaling(file, LlamaConfig.from_dict(config, str(file.path)))
    return config


def _shape_only(file: GgufFile, heads: int, head_dim: int) -> LlamaConfig:
    """Enough of a configuration to name the linears."""
    return LlamaConfig(1, 1, 1, file.number("block_count"), heads, heads, head_dim)


def rope_scaling(file: GgufFile, config: LlamaConfig) -> dict[str, Any] | None:
    """``rope_scaling`` of config.json, from ``rope_freqs.weight`` or from the metadata; None for unscaled frequencies."""
    if file.rope_factors is not None:
        return llama3_scaling(file.rope_factors, config, file.path)
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    factor = file.number("rope.scaling.factor", float, file.number("rope.scale_linear", float, 1.0))  # older name
    if kind not in ("none", "linear"):
        raise TinyGPTQError(f"{file.path}: rope scaling of type {_short(kind)} is not supported (linear, llama3)")
    return None if factor in (0.0, 1.0) else {"rope_type": "linear", "type": "linear", "factor": factor}


def llama3_scaling(factors: np.ndarray, config: LlamaConfig, where: Path) -> dict[str, Any] | None:
    """The llama3 parameters that give these divisors of the frequencies, float32 [D/2].

    The longest wavelength is divided by the whole factor; the two bounds are 1 and 4 in every published model, and the
    trained context is a power of two. What is found must reproduce every divisor, or the file is refused.
    """
    if (factors == 1).all():
        return None
    plain = rope_frequencies(config, 1)
    factor = float(str(np.float32(factors.max())))
    for power in range(10, 21):
        scaling = RopeScaling("llama3", factor, 1.0, 4.0, 2**power)
        scaled = rope_frequencies(replace(config, rope_scaling=scaling), 1)
        if factors.shape == plain.shape and np.allclose(plain / scaled, factors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 2**power,
            }
    raise TinyGPTQError(f"{where}: {ROPE_FACTORS} is no llama3 scaling with the published bounds (1 and 4)")


# ------------------------------------------------------------------------------------------------------- the folder


def convert_gguf(path: Path, folder: Path, dtype: str = "float16", max_shard_size: int | None = None) -> None:
    """Write the Hugging Face folder of a GGUF file into an existing ``folder``, tensor by tensor.

    Args:
        dtype: float16 or float32, of the weights.

    Raises:
        TinyGPTQError: not a GGUF file of a LLaMA; a tensor that is missing, of another shape than the metadata asks for, of
            a type that is not supported or with values that ``dtype`` cannot hold; a tokenizer that is not known.
    """
    file, kind = GgufFile(path), np.dtype(dtype)
    raw = model_config(file, dtype)
    config = LlamaConfig.from_dict(raw, str(path))
    layout = {name: (kind, shape) for name, (_, shape) in dense_layout(config).items()}
    _, absent = missing_biases(config, file.tensors)
    biases = {name: file.shape(name) for name in file.tensors if name.endswith(".bias")}
    layout |= {name: (kind, shape) for name, shape in (biases | absent).items()}
    _require_shapes(file, {name: entry for name, entry in layout.items() if name not in absent})
    write_tokenizer(file.metadata, folder, raw["max_position_embeddings"], path)
    write_json(folder / "config.json", raw)
    with ShardedWriter(folder, layout, max_shard_size) as out:
        for name, shape in absent.items():
            out.write(name, np.zeros(shape, kind))
        for name in file.tensors:
            weight = file.read(name, kind)
            if ".q_proj." in name:
                weight = halves_from_pairs(weight, config.num_attention_heads)
            elif ".k_proj." in name:
                weight = halves_from_pairs(weight, config.num_key_value_heads)
            out.write(name, weight)
    log.info("%s: %d tensors to %s", path, len(file.tensors), dtype)


def _require_shapes(file: GgufFile, layout: Layout) -> None:
    """Raise unless the file holds exactly these tensors in these shapes."""
    for name, (_, shape) in layout.items():
        if name not in file.tensors:
            raise TinyGPTQError(f"{file.path}: tensor {name} is missing (expected shape {list(shape)})")
        found = file.shape(name)
        if found != tuple(shape):
            raise TinyGPTQError(f"{file.path}: tensor {name} has shape {list(found)}, expected {list(shape)}")
    unknown = sorted(file.tensors.keys() - layout.keys())
    if unknown:
        raise TinyGPTQError(f"{file.path}: tensor {unknown[0]} has no place in this LLaMA ({len(unknown)} such tensors)")
