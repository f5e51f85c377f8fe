"""Small GGUF files of a one-block LLaMA, with the values that each type of block stands for by its format."""

from __future__ import annotations

from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from helpers import random_tensors, small_config

from tinygptq.convert.gguf_model import BLOCK_NAMES
from tinygptq.tokenizer import byte_level_alphabet

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 262,
         "num_hidden_layers": 1}  # fmt: skip
GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


# ------------------------------------------------------------------------------------- blocks, by the format of each type


def fp16_bytes(values: np.ndarray) -> np.ndarray:
    return values.astype("<f2").view(np.uint8).reshape(len(values), 2)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """[B, 32] -> [B, 16]: byte j holds element j and, above it, element j + 16."""
    return (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)


def high_bits(codes: np.ndarray) -> np.ndarray:
    """[B, 32] -> [B, 4]: bit j of a little-endian word is the fifth bit of element j."""
    return np.packbits(codes >> 4 & 1, axis=1, bitorder="little")


def legacy_blocks(rng, blocks: int, bits: int, with_minimum: bool) -> tuple[np.ndarray, np.ndarray]:
    """Q4_0, Q4_1, Q5_0, Q5_1 (32 values): values [B, 32] and bytes [B, ...]."""
    d, m = (rng.uniform(0.001, 0.01, blocks).astype(np.float16) for _ in range(2))
    codes = rng.integers(0, 2**bits, (blocks, 32))
    parts = [fp16_bytes(d), fp16_bytes(m)] if with_minimum else [fp16_bytes(d)]
    parts += [high_bits(codes)] if bits == 5 else []
    d, m = d.astype(np.float64)[:, None], m.astype(np.float64)[:, None]
    values = d * codes + m if with_minimum else d * (codes - 2 ** (bits - 1))
    return values, np.concatenate([*parts, nibbles(codes & 15)], axis=1)


def q8_0(rng, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    d, codes = rng.uniform(0.001, 0.01, blocks).astype(np.float16), rng.integers(-128, 128, (blocks, 32)).astype(np.int8)
    return d.astype(np.float64)[:, None] * codes, np.concatenate([fp16_bytes(d), codes.view(np.uint8)], axis=1)


def q4_k(rng, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """256 values: d, dmin, eight 6-bit scales and minima in 12 bytes, then nibbles in stretches of 64."""
    d, dmin = (rng.uniform(0.0001, 0.001, blocks).astype(np.float16) for _ in range(2))
    scales, minima = (rng.integers(0, 64, (blocks, 8)) for _ in range(2))
    codes = rng.integers(0, 16, (blocks, 8, 32))
    low = np.concatenate([scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6], axis=1)
    packed = np.concatenate([low, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=1).astype(np.uint8)
    quants = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).reshape(blocks, 128)
    d, dmin = d.astype(np.float64), dmin.astype(np.float64)
    values = (d[:, None] * scales)[..., None] * codes - (dmin[:, None] * minima)[..., None]
    headers = [fp16_bytes(d.astype(np.float16)), fp16_bytes(dmin.astype(np.float16))]
    return values.reshape(blocks, 256), np.concatenate([*headers, packed, quants], axis=1)


def q6_k(rng, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """256 values in two halves of four stretches of 32: low nibbles, pairs of high bits, 16 signed scales, d."""
    d, scales = rng.uniform(0.0001, 0.001, blocks).astype(np.float16), rng.integers(-64, 64, (blocks, 16)).astype(np.int8)
    codes = rng.integers(0, 64, (blocks, 2, 4, 32))
    low = codes & 15
    ql = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)  # (B, 2, 64)
    qh = sum((codes[:, :, i] >> 4) << 2 * i for i in range(4))  # (B, 2, 32)
    parts = [ql.reshape(blocks, 128).astype(np.uint8), qh.reshape(blocks, 64).astype(np.uint8), scales.view(np.uint8)]
    steps = np.repeat(scales.astype(np.float64), 16, axis=1)  # (B, 256)
    values = d.astype(np.float64)[:, None] * steps * (codes.reshape(blocks, 256) - 32)
    return values, np.concatenate([*parts, fp16_bytes(d)], axis=1)


def stored(kind: str, shape: tuple[int, int], rng) -> tuple[np.ndarray, np.ndarray]:
    """Random values float64 [rows, columns] and what a GGUF file of this type holds for them."""
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
        array = (0.05 * rng.normal(size=shape)).astype(dtype)
        return array.astype(np.float64), array.view(np.uint8) if kind == "BF16" else array
    per_block = 256 if kind.endswith("K") else 32
    blocks = shape[0] * shape[1] // per_block
    if kind in ("Q8_0", "Q4_K", "Q6_K"):
        values, data = {"Q8_0": q8_0, "Q4_K": q4_k, "Q6_K": q6_k}[kind](rng, blocks)
    else:
        values, data = legacy_blocks(rng, blocks, int(kind[1]), kind.endswith("1"))
    return values.reshape(shape), data.reshape(shape[0], -1)


# --------------------------------------------------------------------------------------------------------- small files


def byte_vocabulary() -> tuple[list[str], list[int]]:
    """Every byte, one merge of two letters, three special tokens and one that is added: 262 tokens and their kinds."""
    tokens = [*byte_level_alphabet(), "th", "<|unk|>", "<|bos|>", "<|eos|>", "<|eot|>", "[tool]"]
    return tokens, [1] * 257 + [3, 3, 3, 3, 4]


def default_metadata() -> dict:
    tokens, kinds = byte_vocabulary()
    model = {"context_length": 64, "embedding_length": 256, "feed_forward_length": 512, "block_count": 1,
             "attention.head_count": 8, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
             "rope.freq_base": 10000.0, "rope.dimension_count": 32, "vocab_size": 262}  # fmt: skip
    tokenizer = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": ["t h"],
                 "bos_token_id": 258, "eos_token_id": 259, "unknown_token_id": 257}  # fmt: skip
    return {f"llama.{key}": value for key, value in model.items()} | {
        f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()
    }


def write_gguf(
    path: Path,
    kind: str = "F32",
    changes: dict | None = None,
    extra: dict | None = None,
    drop: tuple[str, ...] = (),
    architecture: str = "llama",
) -> dict[str, np.ndarray]:
    """A one-block file; returns its weights under Hugging Face's names, rows of q and k as the file has them.

    changes: of the metadata, None takes one out. extra: more tensors, float32. drop: tensors left out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in (default_metadata() | (changes or {})).items():
        if value is not None:
            add[type(value)](key, value)
    rng, values = np.random.default_rng(0), {}
    shapes = {name: array.shape for name, array in random_tensors(small_config(**SIZES)).items()}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if stem in GGUF_NAMES:
            gguf_name = GGUF_NAMES[stem]
        else:
            block = {long: short for short, long in BLOCK_NAMES.items()}
            gguf_name = f"blk.0.{block[stem.split('.', 3)[3]]}"
        if gguf_name in drop:
            continue
        values[name], data = stored(kind if len(shape) == 2 else "F32", shape, rng)
        dtype = None if data.dtype != np.uint8 else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{gguf_name}.weight", data, raw_dtype=dtype)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
