"""GGUF to a Hugging Face folder: every type of tensor by its format, row order, configuration, refusals."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tinygptq.cli import main
from tinygptq.config import LlamaConfig, RopeScaling
from tinygptq.convert import convert
from tinygptq.convert.gguf_model import halves_from_pairs, hugging_face_name
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.model import Llama
from tinygptq.ops import rope_frequencies

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
from gguf_files import write_gguf  # after the skips: it imports gguf


def in_halves(rows: np.ndarray, head_dim: int = 32) -> np.ndarray:
    """llama.cpp keeps the two rows of rotary pair i side by side, at 2i and 2i + 1 of their head."""
    out = np.empty_like(rows)
    for head in range(len(rows) // head_dim):
        for i in range(head_dim // 2):
            out[head * head_dim + i] = rows[head * head_dim + 2 * i]
            out[head * head_dim + i + head_dim // 2] = rows[head * head_dim + 2 * i + 1]
    return out


def expected(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: in_halves(v) if ".q_proj." in name or ".k_proj." in name else v for name, v in values.items()}


def read(folder: Path) -> dict[str, np.ndarray]:
    return dict(TensorFile(folder / "model.safetensors"))


# -------------------------------------------------------------------------------------------------------------- tensors

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_tensor(tmp_path: Path, kind):
    wanted = expected(write_gguf(tmp_path / "model.gguf", kind))
    convert(tmp_path / "model.gguf", tmp_path / "fp32", "fp32")
    convert(tmp_path / "model.gguf", tmp_path / "fp16")
    single, half = read(tmp_path / "fp32"), read(tmp_path / "fp16")
    assert single.keys() == half.keys() == wanted.keys()
    for name, values in wanted.items():
        assert single[name].dtype == np.float32
        assert half[name].dtype == np.float16
        scale = np.abs(values).max()  # a value may be the small difference of two products
        np.testing.assert_allclose(single[name], values, rtol=1e-6, atol=1e-7 * scale, err_msg=name)
        np.testing.assert_array_equal(half[name], single[name].astype(np.float16), err_msg=name)
    loaded = load_checkpoint(tmp_path / "fp16")
    logits = Llama(loaded.config, loaded.weights).forward(np.array([[1, 2, 3]]))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (2, 6), (3, 8)])
def test_rows_of_q_and_k_return_to_hugging_face_order(heads, head_dim):
    rows = np.random.default_rng(0).standard_normal((heads * head_dim, 5)).astype(np.float32)
    restored = halves_from_pairs(rows, heads)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored, in_halves(rows, head_dim))
    np.testing.assert_array_equal(halves_from_pairs(rows[:, 0], heads), in_halves(rows[:, 0], head_dim))


def test_names():
    assert hugging_face_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert hugging_face_name("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    assert hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hugging_face_name("output.weight") == "lm_head.weight"
    for name in ("blk.0.attn_q_norm.weight", "blk.0.attn_q.scale", "rope_freqs.weight"):
        with pytest.raises(TinyGPTQError, match=name):
            hugging_face_name(name)


def test_rows_are_dequantised_a_few_at_a_time(tmp_path: Path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", "Q4_0")
    convert(tmp_path / "model.gguf", tmp_path / "whole")
    monkeypatch.setattr("tinygptq.convert.gguf_model.WEIGHTS_AT_ONCE", 1000)  # three rows; 262 is no multiple
    convert(tmp_path / "model.gguf", tmp_path / "parts")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()


def test_shards(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "one")
    convert(tmp_path / "model.gguf", tmp_path / "many", max_shard_size=300_000)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 2
    one, many = (load_checkpoint(tmp_path / name).weights for name in ("one", "many"))
    assert np.array_equal(one.head, many.head)
    for name, linear in one.linears.items():
        assert np.array_equal(linear.weight, many.linears[name].weight)


def test_a_tied_head_and_biases(tmp_path: Path):
    """Only q has a bias in the file; transformers gives all four linears one or none, so the others are zero."""
    bias = np.random.default_rng(1).normal(size=256)
    values = write_gguf(tmp_path / "model.gguf", drop=("output",), extra={"blk.0.attn_q.bias": bias})
    assert "lm_head.weight" not in values
    convert(tmp_path / "model.gguf", tmp_path / "out", "fp32")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["tie_word_embeddings"], raw["attention_bias"], raw["mlp_bias"]) == (True, True, False)
    loaded = load_checkpoint(tmp_path / "out")
    linears = {name.split(".")[-1]: linear for name, linear in loaded.weights.linears.items()}
    np.testing.assert_array_equal(linears["q_proj"].bias, in_halves(bias.astype(np.float32)))
    assert not linears["k_proj"].bias.any() and linears["k_proj"].bias.shape == (64,)
    assert linears["up_proj"].bias is None


# -------------------------------------------------------------------------------------------------------- configuration


def test_configuration(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", changes={"llama.attention.head_count_kv": [2, 2], "llama.attention.key_length": 32})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    config = LlamaConfig.from_folder(tmp_path / "out")
    assert config == LlamaConfig(262, 256, 512, 1, 8, 2, 32, 64, 1e-5, 10000.0, bos_token_id=258, eos_token_ids=(259,))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rms_norm_eps"] == 1e-5  # not 9.99999974e-06, which is what 32 bits hold
    assert raw["torch_dtype"] == "float16"


LLAMA3 = {"llama.rope.freq_base": 500000.0, "llama.context_length": 131072}


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 4096)])
def test_llama3_scaling_is_found_in_the_factors(tmp_path: Path, factor, original):
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, original)
    plain = LlamaConfig(262, 256, 512, 1, 8, 2, 32, 131072, rope_theta=500000.0)
    scaled = LlamaConfig(262, 256, 512, 1, 8, 2, 32, 131072, rope_theta=500000.0, rope_scaling=scaling)
    factors = rope_frequencies(plain, 1) / rope_frequencies(scaled, 1)
    write_gguf(tmp_path / "model.gguf", changes=LLAMA3, extra={"rope_freqs.weight": factors})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert LlamaConfig.from_folder(tmp_path / "out").rope_scaling == scaling


def test_factors_of_one_scale_nothing(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", extra={"rope_freqs.weight": np.ones(16)})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert LlamaConfig.from_folder(tmp_path / "out").rope_scaling is None


@pytest.mark.parametrize(
    "changes",
    [{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {"llama.rope.scale_linear": 4.0}],
)
def test_linear_scaling(tmp_path: Path, changes):
    write_gguf(tmp_path / "model.gguf", changes=changes)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    scaling = LlamaConfig.from_folder(tmp_path / "out").rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


# -------------------------------------------------------------------------------------------------------------- refusals


def refusal(tmp_path: Path, capsys, *words: str) -> str:
    """Convert model.gguf; returns the command's one line, and checks that nothing was left behind."""
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("tinygptq: error: ")
    assert sorted(tmp_path.iterdir()) == before
    return error[0]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"llama.block_count": None}, ["llama.block_count", "nothing"]),
        ({"llama.attention.head_count_kv": [2, 4]}, ["llama.attention.head_count_kv", "[2, 4]"]),
        ({"llama.embedding_length": 288}, ["head dimension 36"]),
        ({"llama.feed_forward_length": 544}, ["mlp.gate_proj.weight has shape [512, 256], expected [544, 256]"]),
        ({"llama.block_count": 2}, ["tensor model.layers.1.input_layernorm.weight is missing"]),
        ({"llama.rope.dimension_count": 16}, ["llama.rope.dimension_count is 16, expected the head dimension 32"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope scaling of type 'yarn'"]),
        ({"llama.expert_count": 8}, ["mixture of experts"]),
        ({"split.count": 3}, ["one of 3 parts"]),
        ({"tokenizer.ggml.model": "bert"}, ["tokenizer model is 'bert'", "'gpt2' and 'llama'"]),
        ({"tokenizer.ggml.pre": "tekken"}, ["pre-tokeniser 'tekken' is not known", "llama-bpe", "smollm"]),
        ({"tokenizer.ggml.merges": ["t zzz"]}, ["merges do not fit"]),
        ({"tokenizer.ggml.tokens": None}, ["tokenizer.ggml.tokens is missing"]),
        ({"tokenizer.ggml.token_type": [1, 1]}, ["token_type has 2 entries, expected 262"]),
        ({"tokenizer.ggml.tokens": ["a"] * 262}, ["261 tokens occur twice"]),
        ({"tokenizer.ggml.eos_token_id": 999}, ["id 999 is outside the 262 tokens"]),
        ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.scores is missing"]),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"] * 262, "tokenizer.ggml.scores": [0.0] * 262},
         ["no sentencepiece model"]),
    ],
)  # fmt: skip
def test_refused_metadata(tmp_path: Path, capsys, changes, parts):
    write_gguf(tmp_path / "model.gguf", changes=changes)
    message = refusal(tmp_path, capsys)
    for part in [str(tmp_path / "model.gguf"), *parts]:
        assert part in message


def test_refused_tensors(tmp_path: Path, capsys):
    path = tmp_path / "model.gguf"
    write_gguf(path, drop=("blk.0.attn_k",))
    assert "tensor model.layers.0.self_attn.k_proj.weight is missing (expected shape [64, 256])" in refusal(tmp_path, capsys)
    write_gguf(path, drop=("token_embd",))
    assert "token_embd.weight is missing" in refusal(tmp_path, capsys)
    write_gguf(path, extra={"blk.0.attn_q_norm.weight": np.ones(32)})
    assert "no place for: blk.0.attn_q_norm.weight" in refusal(tmp_path, capsys)
    write_gguf(path, extra={"blk.1.attn_norm.weight": np.ones(256)})
    assert "tensor model.layers.1.input_layernorm.weight has no place" in refusal(tmp_path, capsys)
    write_gguf(path, extra={"rope_freqs.weight": np.linspace(1, 3, 16)})
    assert "no llama3 scaling" in refusal(tmp_path, capsys)
    write_gguf(path, drop=("output_norm",), extra={"output_norm.weight": np.full(256, 1e6)})
    assert "model.norm.weight holds values that fp16 cannot" in refusal(tmp_path, capsys)
    assert main(["convert", str(path), str(tmp_path / "fp32"), "--to", "fp32"]) == 0
    write_gguf(path, architecture="qwen2")
    assert "architecture is 'qwen2', only 'llama'" in refusal(tmp_path, capsys)


def test_damaged_files(tmp_path: Path, capsys):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    data = path.read_bytes()
    future = b"GGUF" + struct.pack("<IQQ", 99, 1, 1)
    for broken in (b"", b"GGUF", data[:100], data[:5000], data[:-1000], future, b"x" * 1000):
        path.write_bytes(broken)
        assert "not a readable GGUF file" in refusal(tmp_path, capsys)


def test_gguf_becomes_floats_only(tmp_path: Path, capsys):
    write_gguf(tmp_path / "model.gguf")
    assert "GGUF becomes fp16 or fp32; tinygptq quantize makes gptq from that" in refusal(tmp_path, capsys, "--to", "gptq")


def test_a_folder_with_one_gguf_file(tmp_path: Path, capsys):
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "a.gguf")
    assert main(["convert", str(tmp_path / "models"), str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"folder": str(tmp_path / "out"), "from": "gguf", "to": "fp16", "note": ""}
    write_gguf(tmp_path / "models" / "b.gguf")
    assert main(["convert", str(tmp_path / "models"), str(tmp_path / "out2")]) == 2
    assert "several GGUF files (a.gguf, b.gguf)" in capsys.readouterr().err
