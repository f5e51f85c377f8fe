"""AWQ folders to GPTQ: every code, zero point and scale is kept; what is not AWQ's gemm version is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conversions import Q_PROJ, edit, refused, rewrite, run, tensors
from helpers import random_llama_folder, save_byte_tokenizer, save_safetensors

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.convert import convert
from tinygptq.folders.checkpoint import linear_names, load_checkpoint
from tinygptq.packing import PackedLinear, pack, unpack


def awq_words(codes: np.ndarray) -> np.ndarray:
    """[R, N] -> int32 [R, N/8], field by field: the i-th of word w is output 8w + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for w in range(words.shape[1]):
        for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words[:, w] |= codes[:, 8 * w + output].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def awq_folder(path: Path, least: int = 1, group_size: int = 32, **facts) -> dict[str, tuple]:
    """An AWQ folder as AutoAWQ writes it; returns (codes [K, N], zeros [G, N], scales [G, N]) of each linear."""
    dense = random_llama_folder(path, dtype="float16")
    save_byte_tokenizer(path)
    rng, known = np.random.default_rng(1), {}
    for name, (inputs, outputs) in linear_names(LlamaConfig.from_folder(path)):
        groups = 1 if group_size == -1 else inputs // group_size
        codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(least, 16, (groups, outputs))
        scales = rng.uniform(0.005, 0.05, (groups, outputs)).astype(np.float16)
        known[name] = codes, zeros, scales
        del dense[f"{name}.weight"]
        dense |= {f"{name}.qweight": awq_words(codes), f"{name}.qzeros": awq_words(zeros), f"{name}.scales": scales}
    save_safetensors(dense, path / "model.safetensors")
    written = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": True, **facts}
    edit(path / "config.json", quantization_config={key: value for key, value in written.items() if value is not None})
    return known


def dequantized(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    group = np.arange(len(codes)) // (len(codes) // len(scales))
    return (scales.astype(np.float32)[group] * (codes - zeros[group]).astype(np.float32)).astype(np.float32)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("least", [0, 1])
def test_awq(tmp_path: Path, capsys, least, group_size):
    known = awq_folder(tmp_path / "awq", least, group_size)
    code, out, err = run(capsys, tmp_path / "awq", tmp_path / "out")
    form = "gptq" if least else "gptq_v2"
    assert (code, out) == (0, f"{tmp_path / 'out'}: awq to {form}\n")
    assert ("a zero point of 0, which format gptq cannot hold, asks for gptq_v2" in err) == (least == 0)
    loaded, after = load_checkpoint(tmp_path / "out"), tensors(tmp_path / "out")
    assert loaded.quantization == QuantizeConfig(4, group_size, sym=False, checkpoint_format=form)
    for name, (codes, zeros, scales) in known.items():
        linear = loaded.weights.linears[name]
        assert isinstance(linear, PackedLinear)
        assert np.array_equal(unpack(after[f"{name}.qweight"], 4, len(codes)), codes), name
        assert np.array_equal(linear.zeros, zeros), name
        assert np.array_equal(after[f"{name}.scales"], scales), name
        assert np.array_equal(linear.dequantize(), dequantized(codes, zeros, scales)), name
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_awq_to_floats_and_to_a_format_it_does_not_fit(tmp_path: Path, capsys):
    known = awq_folder(tmp_path / "awq", least=0)
    assert run(capsys, tmp_path / "awq", tmp_path / "fp16", "--to", "fp16")[0] == 0
    linears = load_checkpoint(tmp_path / "fp16").weights.linears
    for name, parts in known.items():
        assert np.array_equal(linears[name].weight, dequantized(*parts).T.astype(np.float16)), name
    message = refused(capsys, tmp_path / "awq", tmp_path / "out", "--to", "gptq")
    assert "has a zero point of 0, which format 'gptq' cannot hold" in message


def test_awq_with_the_older_config_file(tmp_path: Path):
    known = awq_folder(tmp_path / "awq")
    edit(tmp_path / "awq" / "config.json", quantization_config=None)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "awq" / "quant_config.json").write_text(json.dumps(old))
    convert(tmp_path / "awq", tmp_path / "out")
    linear = load_checkpoint(tmp_path / "out").weights.linears[Q_PROJ]
    assert np.array_equal(linear.dequantize(), dequantized(*known[Q_PROJ]))


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"version": "gemv"}, "AWQ version is 'gemv', only 'gemm'"),
        ({"bits": 3}, "AWQ bits is 3, expected 4"),
        ({"zero_point": False}, "AWQ without zero points"),
        ({"group_size": "32"}, "AWQ group_size is '32'"),
        ({"group_size": 64}, "[96, 96] is no whole number of groups of 64"),
        ({"group_size": 16}, f"tensor {Q_PROJ}.qzeros has shape [3, 12], expected [6, 12]"),
    ],
)
def test_refused_awq(tmp_path: Path, capsys, facts, part):
    awq_folder(tmp_path / "awq")
    raw = json.loads((tmp_path / "awq" / "config.json").read_text())
    edit(tmp_path / "awq" / "config.json", quantization_config=raw["quantization_config"] | facts)
    assert part in refused(capsys, tmp_path / "awq", tmp_path / "out")


def test_refused_awq_tensors(tmp_path: Path, capsys):
    awq_folder(tmp_path / "awq")
    rewrite(tmp_path / "awq", {f"{Q_PROJ}.qzeros": None})
    assert f"tensor {Q_PROJ}.qzeros is missing" in refused(capsys, tmp_path / "awq", tmp_path / "out")


def test_packing_of_the_test_itself():
    """The definition above against packing along the other axis."""
    codes = np.random.default_rng(0).integers(0, 16, (3, 16))
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    columns = np.concatenate([order, order + 8])
    assert np.array_equal(awq_words(codes), pack(codes[:, columns].T, 4).T.view(np.int32))
