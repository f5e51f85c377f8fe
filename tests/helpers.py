"""What several test files need: small random LLaMA folders, written without tinygptq's own writer, and quantised ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tinygptq.config import QuantizeConfig
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.folders.export import QuantizedFolderWriter, new_folder
from tinygptq.gptq import Hessian, Solution, solve
from tinygptq.quantization.report import LOG_NAME

FLOAT_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

SMALL: dict[str, Any] = {  # grouped-query attention; every size is a multiple of 32, so that all four widths pack
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 120,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small_config(**overrides: Any) -> dict[str, Any]:
    """The dict of a small ``config.json``; an override of None takes the field out."""
    return {key: value for key, value in {**SMALL, **overrides}.items() if value is not None}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights under Hugging Face's names, spread so that activations stay near 1 and attention is no average."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    q, kv = heads * dim, config.get("num_key_value_heads", heads) * dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    tensors = {"model.embed_tokens.weight": rng.normal(size=(vocab, hidden))}
    for i in range(config["num_hidden_layers"]):
        for part, shapes in (("self_attn", attention), ("mlp", mlp)):
            for name, (rows, columns) in shapes.items():
                full = f"model.layers.{i}.{part}.{name}"
                tensors[f"{full}.weight"] = rng.normal(size=(rows, columns)) / np.sqrt(columns)
                if config.get(f"{'attention' if part == 'self_attn' else 'mlp'}_bias"):
                    tensors[f"{full}.bias"] = 0.2 * rng.normal(size=rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = 1 + 0.2 * rng.normal(size=hidden)
    tensors["model.norm.weight"] = 1 + 0.2 * rng.normal(size=hidden)
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = rng.normal(size=(vocab, hidden)) / np.sqrt(hidden)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def save_safetensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Through the safetensors library, bfloat16 included."""
    save_file({name: np.array(array, order="C") for name, array in tensors.items()}, path, {"format": "pt"})


def random_llama_folder(
    path: Path, *, seed: int = 0, dtype: str = "float32", sharded: bool = False, tied: bool = False, **overrides: Any
) -> dict[str, np.ndarray]:
    """Write a small random Hugging Face LLaMA folder; the same arguments give the same folder.

    Args:
        dtype: of the tensors, a key of FLOAT_DTYPES. sharded: two files and an index. tied: no lm_head.weight.
        overrides: fields of config.json, None to leave one out.
    Returns:
        The tensors as stored, by name.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = small_config(tie_word_embeddings=tied, torch_dtype=dtype, **overrides)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: array.astype(FLOAT_DTYPES[dtype]) for name, array in random_tensors(config, seed).items()}
    if not sharded:
        save_safetensors(tensors, path / "model.safetensors")
        return tensors
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_safetensors({name: tensors[name] for name in members}, path / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tensors


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer.json in which every byte is one token (ids 3 .. 258, after <unk>, <s> and </s>); no BOS is added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def contents(folder: Path) -> dict[str, bytes]:
    """A quantised folder's files, without the last column of quantize_log.csv, which is seconds."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if LOG_NAME in files:
        files[LOG_NAME] = b"\n".join(line.rpartition(b",")[0] for line in files[LOG_NAME].splitlines())
    return files


def solve_all(source: Checkpoint, config: QuantizeConfig, seed: int = 0) -> dict[str, Solution]:
    """Solve every linear by GPTQ's definition, on correlated random activations of its own."""
    rng = np.random.default_rng(seed)
    solutions = {}
    for name, linear in source.weights.linears.items():
        hessian = Hessian(linear.in_features)
        mixing = rng.normal(size=(linear.in_features, linear.in_features)) / np.sqrt(linear.in_features)
        hessian.add((rng.normal(size=(256, linear.in_features)) @ mixing).astype(np.float32))
        W = np.asarray(linear.weight, np.float32)
        solutions[name] = solve(W, hessian.H, config, method="definition", name=name)
    return solutions


def random_solutions(source: Checkpoint, config: QuantizeConfig, seed: int = 0) -> dict[str, Solution]:
    """Solutions that are none, but of the solver's form: random codes, scales, zeros and, for act-order, groups."""
    rng = np.random.default_rng(seed)
    least, most = 1 if config.checkpoint_format == "gptq" else 0, config.max_code
    solutions = {}
    for name, linear in source.weights.linears.items():
        rows, columns = linear.out_features, linear.in_features
        groups = config.num_groups(columns)
        g_idx = (np.arange(columns) // config.rows_per_group(columns)).astype(np.int32)
        middle = np.full((rows, groups), 2 ** (config.bits - 1))
        zeros = middle if config.sym else rng.integers(least, most + 1, (rows, groups))
        solutions[name] = Solution(
            codes=rng.integers(0, 2**config.bits, (rows, columns)).astype(np.uint8),
            scales=(rng.uniform(0.1, 0.5, (rows, groups)) / 2**config.bits).astype(np.float16),  # weights of 0.1 or so
            zeros=zeros.astype(np.uint16),
            g_idx=rng.permutation(g_idx) if config.desc_act and not config.static_groups else g_idx,
            loss=0.0,
            damp=config.damp_percent,
        )
    return solutions


def write_quantized(
    source: Path,
    out: Path,
    config: QuantizeConfig,
    solve: Callable[[Checkpoint, QuantizeConfig, int], dict[str, Solution]] = solve_all,
    seed: int = 0,
) -> dict[str, Solution]:
    """Quantise a folder into a new one; returns the solutions that were written."""
    checkpoint = load_checkpoint(source)
    solutions = solve(checkpoint, config, seed)
    with new_folder(out) as folder, QuantizedFolderWriter(folder, checkpoint, config) as writer:
        for name, solution in solutions.items():
            writer.write(name, solution)
    return solutions
