"""Folders to weights: every layout that is read, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import FLOAT_DTYPES, random_llama_folder, save_safetensors, small_config

from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders import tensorfile
from tinygptq.folders.checkpoint import find_quantize_config, from_gptq, load_checkpoint
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.packing import pack
from tinygptq.weights import DenseLinear

Q_PROJ = "model.layers.0.self_attn.q_proj"


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(TinyGPTQError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in parts:
        assert part in message


def rewrite(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Replace tensors of a one-file folder, or take them out (None)."""
    path = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in TensorFile(path).items()} | changes
    save_safetensors({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def backing(array: np.ndarray) -> np.memmap | None:
    """The memory-mapped file an array is a view of."""
    while array is not None and type(array.base) is not None:
        if isinstance(array, np.memmap) and not isinstance(array.base, np.ndarray):
            return array
        array = array.base if isinstance(array.base, np.ndarray) else None
    return None


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_every_layout_bit_for_bit(tmp_path: Path, dtype, sharded, tied):
    stored = random_llama_folder(tmp_path, dtype=dtype, sharded=sharded, tied=tied)
    checkpoint = load_checkpoint(tmp_path)
    weights = checkpoint.weights
    read = {"model.embed_tokens.weight": weights.embedding}
    read |= {f"{name}.weight": norm for name, norm in weights.norms.items()}
    read |= {f"{name}.weight": linear.weight for name, linear in weights.linears.items()}
    if tied:
        assert weights.head is weights.embedding
    else:
        read["lm_head.weight"] = weights.head
    assert read.keys() == stored.keys()
    for name, array in read.items():
        assert array.dtype == FLOAT_DTYPES[dtype]
        assert array.shape == stored[name].shape
        assert array.tobytes() == stored[name].tobytes(), name
    assert checkpoint.quantization is None
    assert checkpoint.config.tie_word_embeddings is tied
    assert all(isinstance(linear, DenseLinear) and linear.bias is None for linear in weights.linears.values())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_is_copied(tmp_path: Path, dtype, sharded):
    random_llama_folder(tmp_path, dtype=dtype, sharded=sharded)
    weights = load_checkpoint(tmp_path).weights
    arrays = [weights.embedding, weights.head, *weights.norms.values(), *(x.weight for x in weights.linears.values())]
    for array in arrays:
        file = backing(array)
        assert isinstance(file, np.memmap)
        assert np.shares_memory(array, file)
        assert not array.flags.writeable
    assert len({id(backing(array)) for array in arrays}) == (2 if sharded else 1)


def test_vocabulary_rows_beyond_the_tokenizer(tmp_path: Path):
    """A padded embedding is what config.json says; the tokenizer is not asked."""
    random_llama_folder(tmp_path, vocab_size=131)
    weights = load_checkpoint(tmp_path).weights
    assert weights.embedding.shape == weights.head.shape == (131, 96)


def test_a_tied_folder_may_still_hold_a_head(tmp_path: Path):
    random_llama_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config(tie_word_embeddings=True)))
    weights = load_checkpoint(tmp_path).weights
    assert weights.head is weights.embedding


def test_inverse_frequencies_of_old_folders_are_ignored(tmp_path: Path):
    random_llama_folder(tmp_path)
    rewrite(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    assert len(load_checkpoint(tmp_path).weights.linears) == 14


def test_any_single_file_will_do(tmp_path: Path):
    random_llama_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    assert load_checkpoint(tmp_path).weights.embedding.shape == (120, 96)


def test_model_safetensors_is_preferred_among_several(tmp_path: Path):
    random_llama_folder(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not looked at")
    assert load_checkpoint(tmp_path).weights.embedding.shape == (120, 96)


def test_biases(tmp_path: Path):
    stored = random_llama_folder(tmp_path, attention_bias=True, dtype="float16")
    linears = load_checkpoint(tmp_path).weights.linears
    bias = linears[Q_PROJ].bias
    assert bias.dtype == np.float32
    assert np.array_equal(bias, stored[f"{Q_PROJ}.bias"].astype(np.float32))
    assert linears["model.layers.0.mlp.up_proj"].bias is None
    rewrite(tmp_path, {f"{Q_PROJ}.bias": None})
    refused(tmp_path, f"tensor {Q_PROJ}.bias is missing", "[96]")


def test_zero_biases_that_no_config_asks_for_are_dropped(tmp_path: Path):
    random_llama_folder(tmp_path)
    rewrite(tmp_path, {f"{Q_PROJ}.bias": np.zeros(96, np.float16)})
    assert load_checkpoint(tmp_path).weights.linears[Q_PROJ].bias is None


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", f"{Q_PROJ}.weight",
             "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"]
)  # fmt: skip
def test_missing_tensor(tmp_path: Path, name):
    stored = random_llama_folder(tmp_path)
    rewrite(tmp_path, {name: None})
    refused(tmp_path, f"tensor {name} is missing", f"expected shape {list(stored[name].shape)}")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (119, 96), [120, 96]),
        (f"{Q_PROJ}.weight", (96, 95), [96, 96]),
        ("model.layers.1.self_attn.k_proj.weight", (96, 32), [32, 96]),  # transposed
        ("model.norm.weight", (96, 1), [96]),
        ("model.layers.0.mlp.gate_proj.weight", (0, 96), [160, 96]),
        ("lm_head.weight", (), [120, 96]),
    ],
)
def test_wrong_shape(tmp_path: Path, name, shape, expected):
    random_llama_folder(tmp_path)
    rewrite(tmp_path, {name: np.zeros(shape, np.float32)})
    refused(tmp_path, f"tensor {name} has shape {list(shape)}, expected {expected}")


def test_wrong_dtype(tmp_path: Path):
    random_llama_folder(tmp_path)
    rewrite(tmp_path, {"model.norm.weight": np.ones(96, np.int32)})
    refused(tmp_path, "tensor model.norm.weight has dtype int32", "float32 or float16 or bfloat16")


def test_unknown_tensor(tmp_path: Path):
    random_llama_folder(tmp_path)
    rewrite(tmp_path, {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)})
    refused(tmp_path, "tensor model.layers.0.self_attn.q_norm.weight has no place in this LLaMA")


def test_more_layers_than_the_config_says(tmp_path: Path):
    random_llama_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small_config(num_hidden_layers=1)))
    refused(tmp_path, "tensor model.layers.1.", "has no place", "9 such tensors")


def test_missing_folder_and_missing_config(tmp_path: Path):
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, "config.json: no such file")


def test_not_a_llama(tmp_path: Path):
    random_llama_folder(tmp_path, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    refused(tmp_path, "config.json: architectures is ['GPT2LMHeadModel']")


def test_pickle_only_folder(tmp_path: Path):
    random_llama_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no .safetensors file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(tmp_path, "no .safetensors file", "pytorch_model.bin is a PyTorch pickle", "save it as safetensors")


def test_several_files_without_an_index(tmp_path: Path):
    random_llama_folder(tmp_path, sharded=True)
    (tmp_path / "model.safetensors.index.json").unlink()
    refused(tmp_path, "several .safetensors files and no index", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ({}, ["'weight_map' should map tensor names to file names"]),
        ({"weight_map": ["a"]}, ["'weight_map'"]),
        ({"weight_map": {"a": 1}}, ["'weight_map'"]),
        ({"weight_map": {"a": "../other/model.safetensors"}}, ["'../other/model.safetensors' is not the plain name"]),
        ({"weight_map": {"a": "/etc/passwd"}}, ["'/etc/passwd' is not the plain name"]),
        ({"weight_map": {"a": ".."}}, ["'..' is not the plain name"]),
        ({"weight_map": {"a": ""}}, ["'' is not the plain name"]),
        ({"weight_map": {"a": "model-00009.safetensors"}}, ["model-00009.safetensors: no such file"]),
        ({"weight_map": {"a": "a\0.safetensors"}}, ["no such file"]),
        ({"weight_map": {}}, ["tensor model.embed_tokens.weight is missing"]),
    ],
)
def test_bad_index(tmp_path: Path, index, parts):
    random_llama_folder(tmp_path, sharded=True)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, *parts)


def test_weights_that_may_not_be_read(tmp_path: Path, monkeypatch):
    """As root anything may be read, so that the system's refusal is played."""

    def refusing(path, *arguments):
        raise PermissionError(13, "Permission denied")

    random_llama_folder(tmp_path)
    monkeypatch.setattr(tensorfile, "open", refusing, raising=False)
    refused(tmp_path, "model.safetensors: may not be read (its permissions)")


def test_one_tensor_in_two_shards(tmp_path: Path):
    tensors = random_llama_folder(tmp_path, sharded=True)
    for shard in sorted(tmp_path.glob("*.safetensors")):
        save_safetensors(tensors, shard)
    refused(tmp_path, "is in both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file(tmp_path: Path, keep):
    random_llama_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "model.safetensors: not a valid safetensors file")


def test_a_dtype_this_package_does_not_know(tmp_path: Path):
    random_llama_folder(tmp_path)
    rewrite(tmp_path, {"model.norm.weight": np.ones(96, ml_dtypes.float8_e4m3fn)})
    refused(tmp_path, "tensor model.norm.weight has dtype F8_E4M3")


def test_unaligned_data_is_still_read(tmp_path: Path):
    """A header whose length is no multiple of the element size is legal; such views have to be copies."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    header += b" " * (5 - len(header) % 4)
    assert len(header) % 4
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    assert np.array_equal(TensorFile(tmp_path / "x.safetensors")["x"], values)


# ---------------------------------------------------------------------------------------------------- quantised folders


def test_quantize_config_is_looked_up_in_order(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(small_config(quantization_config={"bits": 2})))
    assert find_quantize_config(tmp_path) == QuantizeConfig(bits=2)
    (tmp_path / "quant_config.json").write_text('{"w_bit": 3}')
    assert find_quantize_config(tmp_path) == QuantizeConfig(bits=3)
    (tmp_path / "quantize_config.json").write_text('{"bits": 8}')
    assert find_quantize_config(tmp_path) == QuantizeConfig(bits=8)


def test_quantization_config_of_another_type(tmp_path: Path):
    random_llama_folder(tmp_path, quantization_config="gptq")
    refused(tmp_path, "quantization_config", "expected a JSON object, found str")


def test_a_folder_that_only_says_it_is_quantised(tmp_path: Path):
    random_llama_folder(tmp_path, quantization_config={"bits": 4})
    rewrite(tmp_path, {f"{Q_PROJ}.weight": None})
    refused(tmp_path, f"tensor {Q_PROJ}.qweight is missing", "says it is quantised")


def parts_of(in_features: int = 64, out_features: int = 32, group: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = -(-in_features // group)
    return {
        "qweight": pack(rng.integers(0, 16, (in_features, out_features)), 4).view(np.int32),
        "qzeros": np.ascontiguousarray(pack(rng.integers(0, 15, (out_features, groups)), 4).T).view(np.int32),
        "scales": rng.uniform(0.01, 1, (groups, out_features)).astype(np.float16),
        "g_idx": (np.arange(in_features) // group).astype(np.int32),
    }


def dequantized(parts: dict[str, np.ndarray], g_idx: np.ndarray, offset: int) -> np.ndarray:
    """FORMATS: W[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n]), element by element."""
    words, zero_words = parts["qweight"].view(np.uint32), parts["qzeros"].view(np.uint32)
    k, n = np.indices((words.shape[0] * 8, words.shape[1]))
    g = g_idx[k]
    code = (words[k // 8, n] >> (4 * (k % 8)).astype(np.uint32) & 15).astype(np.float32)
    zero = (zero_words[g, n // 8] >> (4 * (n % 8)).astype(np.uint32) & 15).astype(np.float32) + offset
    return parts["scales"].astype(np.float32)[g, n] * (code - zero)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["in order", "absent", "act-order", "all zero"])
@pytest.mark.parametrize("in_features", [64, 80])  # 80: the last group is short
def test_from_gptq_by_the_format(form, order, in_features):
    parts = parts_of(in_features)
    g_idx = parts["g_idx"]
    if order == "act-order":
        g_idx = np.random.default_rng(1).permutation(g_idx).astype(np.int32)
        parts["g_idx"] = g_idx
    elif order == "all zero":  # with several groups: what ExLlama takes for "no act-order"
        parts["g_idx"] = np.zeros_like(g_idx)
    elif order == "absent":
        del parts["g_idx"]
    layer = from_gptq(parts, QuantizeConfig(group_size=32, checkpoint_format=form))
    assert (layer.perm is None) == (order != "act-order")
    assert layer.zeros.dtype == np.uint16
    assert layer.qweight.dtype == np.uint32
    assert np.array_equal(layer.dequantize(), dequantized(parts, g_idx, form == "gptq"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_idx": np.r_[np.zeros(63, np.int32), 2].astype(np.int32)}, "g_idx holds values from 0 to 2, expected 0 to 1"),
        ({"g_idx": np.r_[np.zeros(63, np.int32), -1].astype(np.int32)}, "g_idx holds values from -1 to 0"),
        ({"scales": np.full((2, 32), np.nan, np.float16)}, "scales hold NaN or infinity"),
        ({"scales": np.full((2, 32), np.inf, np.float32)}, "scales hold NaN or infinity"),
    ],
)
def test_from_gptq_refuses(change, message):
    with pytest.raises(TinyGPTQError) as caught:
        from_gptq({**parts_of(), **change}, QuantizeConfig(group_size=32))
    assert message in str(caught.value)


def test_bfloat16_scales_become_float32_without_loss():
    parts = parts_of()
    parts["scales"] = parts["scales"].astype(ml_dtypes.bfloat16)
    layer = from_gptq(parts, QuantizeConfig(group_size=32))
    assert layer.scales.dtype == np.float32
    assert np.array_equal(layer.scales, parts["scales"].astype(np.float32))
