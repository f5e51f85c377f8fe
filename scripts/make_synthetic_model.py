"""Write a GPTQ folder in the shape of a LLaMA with plausible random weights: for sizes, memory and speed without a model.

    python scripts/make_synthetic_model.py OUT [--branch main] [--layers 32] [--seed 0]        (LLaMA-7B, vocabulary 32001)
    python scripts/make_synthetic_model.py OUT --config config.json [--tokenizer FOLDER]       (the shape of any LLaMA)

Codes are distributed as those of a quantised Gaussian, scales are what its groups' largest values give, zero points are
symmetric, and with act-order the groups are those of a random order, the same for linears that share an input. Activations
stay finite; the text is noise. The folder is written tensor by tensor and appears whole or not at all. A tensor depends on
the seed and its name alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinygptq.branches import BRANCHES
from tinygptq.config import LlamaConfig, QuantizeConfig, read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import copy_companions, new_folder, require_packable, tensor_layout, write_json
from tinygptq.folders.tensorfile import TensorFileWriter
from tinygptq.packing import pack
from tinygptq.release.facts import made_by

LLAMA_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 32001,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
INPUT_OF = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # linears that share another's input
ROWS_AT_ONCE = 1024  # of codes drawn and packed together; whole turns of every width
DRAWS = 1 << 16


def write_model(
    out: Path, raw: dict[str, Any], quantization: QuantizeConfig, seed: int, tokenizer: Path | None = None
) -> int:
    """Write the folder of a model config's dict; returns the bytes of its weights file.

    Raises:
        TinyGPTQError: no LLaMA's config, sizes that do not fill 32-bit words, or a folder that cannot be written.
    """
    config = LlamaConfig.from_dict(raw)
    require_packable(config, quantization)
    layout = tensor_layout(config, quantization)
    facts = quantization.to_dict(model_name="synthetic") | {"meta": {**made_by(), "dataset": "none: random weights"}}
    with new_folder(out) as folder:
        path = folder / "model.safetensors"
        write_json(folder / "config.json", {**raw, "quantization_config": facts})
        write_json(folder / "quantize_config.json", facts)
        if tokenizer is not None:
            copy_companions(tokenizer, folder)
        with TensorFileWriter(path, layout) as file:
            for name, (_, shape) in tqdm(layout.items(), desc="write", unit="tensor", disable=None):
                file.write(name, random_tensor(name, shape, quantization, seed))
        size = path.stat().st_size
    return size


def random_tensor(name: str, shape: tuple[int, ...], quantization: QuantizeConfig, seed: int) -> np.ndarray:
    """One tensor of :func:`tinygptq.folders.export.tensor_layout`, of the dtype and shape given there."""
    owner, _, part = name.rpartition(".")
    rng = generator(seed, name)
    if part == "qweight":
        return random_words(rng, shape, quantization)
    if part == "qzeros":
        stored = 2 ** (quantization.bits - 1) - (quantization.checkpoint_format == "gptq")
        column = pack(np.full((shape[1] * 32 // quantization.bits, 1), stored), quantization.bits)  # (N*bits/32, 1)
        return np.repeat(column.T, shape[0], axis=0).view(np.int32)  # (G, N*bits/32)
    if part == "scales":
        width = 1 / np.sqrt(4096)  # of a weight: what keeps a LLaMA-7B's activations as they are
        step = 2 * reach(quantization) * width / quantization.max_code
        return (step * rng.uniform(0.8, 1.2, shape)).astype(np.float16)
    if part == "g_idx":
        prefix, _, linear = owner.rpartition(".")
        return random_groups(generator(seed, f"{prefix}.{INPUT_OF.get(linear, linear)}"), shape[0], quantization)
    if part == "bias":
        return np.zeros(shape, np.float16)
    if "norm" in owner:
        return (1 + 0.1 * rng.standard_normal(shape, np.float32)).astype(np.float16)
    values = rng.standard_normal(shape, np.float32)  # the embedding, the head
    values *= 1 / np.sqrt(np.float32(shape[1]))
    return values.astype(np.float16)


def generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def reach(quantization: QuantizeConfig) -> float:
    """The largest of a group's values, in standard deviations: sqrt(2 ln n) of n Gaussian ones."""
    return float(np.sqrt(2 * np.log(4096 if quantization.group_size == -1 else max(quantization.group_size, 8))))


def random_words(rng: np.random.Generator, shape: tuple[int, int], quantization: QuantizeConfig) -> np.ndarray:
    """Packed codes int32 [K*bits/32, N] of a Gaussian whose group's largest value is the outermost code."""
    bits, most = quantization.bits, quantization.max_code
    draws = rng.standard_normal(DRAWS) * most / (2 * reach(quantization)) + 2 ** (bits - 1)
    table = np.clip(np.rint(draws), 0, most).astype(np.uint8)
    words, step = np.empty(shape, np.uint32), ROWS_AT_ONCE * bits // 32
    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        picked = rng.integers(0, DRAWS, (count * 32 // bits, shape[1]), np.uint16)
        words[first : first + count] = pack(table[picked], bits)
    return words.view(np.int32)


def random_groups(rng: np.random.Generator, inputs: int, quantization: QuantizeConfig) -> np.ndarray:
    """The group of each input row, int32 [K]: in order, or by rank in a random order with act-order."""
    ranks = np.arange(inputs)
    if quantization.desc_act and not quantization.static_groups:
        ranks = rng.permutation(inputs)
    return (ranks // quantization.rows_per_group(inputs)).astype(np.int32)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--branch", choices=BRANCHES, default="main")
    parser.add_argument("--config", type=Path, help="a config.json with the shape, instead of LLaMA-7B's")
    parser.add_argument("--layers", type=int, help="blocks, instead of the config's")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer files are copied")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    try:
        raw = dict(LLAMA_7B) if args.config is None else read_json(args.config)
        raw.pop("quantization_config", None)
        if args.layers is not None:
            raw["num_hidden_layers"] = args.layers
        size = write_model(args.out, raw, BRANCHES[args.branch], args.seed, args.tokenizer)
    except TinyGPTQError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"folder": str(args.out), "branch": args.branch, "weights_file_bytes": size}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
