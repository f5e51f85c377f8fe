"""``validate`` against transformers: a sound model passes, and one changed word is found where it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder, save_byte_tokenizer, write_quantized

from tinygptq.cli import main
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.measure.validate import DECODERS, ENGINES, Difference, validate

pytest.importorskip("torch")
pytest.importorskip("transformers")
IDS = np.random.default_rng(0).integers(3, 120, 20)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "dense"
    random_llama_folder(folder, attention_bias=True)
    return folder


@pytest.fixture(scope="module")
def quantized(dense) -> Path:
    folder = dense.parent / "quantized"
    write_quantized(dense, folder, QuantizeConfig(bits=4, group_size=32, desc_act=True))
    return folder


def flip(folder: Path, copy: Path, tensor: str, word: int) -> Path:
    """A copy of a folder with one word of one tensor changed: a float gets the other sign, of packed codes two change."""
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + size])[tensor]
    width = {"F32": 4, "I32": 4, "F16": 2}[entry["dtype"]]
    start = 8 + size + entry["data_offsets"][0] + width * word
    data[start + width - 1] ^= 0x80 if entry["dtype"] != "I32" else 0x77
    path.write_bytes(data)
    return copy


@pytest.mark.parametrize("kind", ["dense", "quantized"])
def test_a_sound_model_passes_part_by_part(kind, request):
    folder = request.getfixturevalue(kind)
    found = validate(folder, IDS)
    assert found.passed
    assert found.first == dict.fromkeys([*ENGINES, *DECODERS])
    layer = [f"model.layers.0.{name}" for name in load_checkpoint(folder).config.linear_shapes()]
    assert [row.part for row in found.rows[:9]] == [*layer, "model.layers.0", "after block 0"]
    assert len(found.rows) == 2 * 9 + 1
    assert all(0 <= one.relative < 1e-4 for row in found.rows for one in row.differences.values())
    assert any(one.largest > 0 for one in found.rows[-1].differences.values())


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [
        ("dense", "model.layers.1.mlp.up_proj", "weight"),
        ("dense", "model.layers.0.self_attn.o_proj", "weight"),
        ("quantized", "model.layers.1.self_attn.k_proj", "qweight"),
        ("quantized", "model.layers.0.mlp.down_proj", "qweight"),
    ],
)
def test_one_changed_word_is_found_in_its_linear(kind, name, part, request, tmp_path):
    folder = request.getfixturevalue(kind)
    copy = flip(folder, tmp_path / "copy", f"{name}.{part}", word=37)
    found = validate(copy, IDS, reference=folder)
    assert not found.passed
    assert found.first == {**dict.fromkeys(ENGINES, name), **dict.fromkeys(DECODERS, "logits")}
    beyond = {row.part for row in found.rows if row.differences["cpu"].relative > found.tolerance}
    block = name.split(".")[2]
    assert f"model.layers.{block}" in beyond
    assert not any(part.startswith("model.layers.") and part not in (name, f"model.layers.{block}") for part in beyond)


def test_the_command_and_its_exit_code(dense, tmp_path, capsys):
    save_byte_tokenizer(dense)
    vocab = ["validate", str(dense), "--text", "()*+,-./0123456789", "--tokens", "18"]
    assert main([*vocab, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["rows"][0]["differences"]["definition"]["relative"] < 1e-4
    copy = flip(dense, tmp_path / "copy", "model.layers.1.mlp.gate_proj.weight", word=5)
    assert main([*vocab[:1], str(copy), *vocab[2:], "--reference", str(dense)]) == 2
    printed = capsys.readouterr()
    assert "first: definition at model.layers.1.mlp.gate_proj; cpu at model.layers.1.mlp.gate_proj;" in printed.err
    marked = [line.split()[0] for line in printed.out.splitlines() if "*" in line]
    assert marked[0] == "model.layers.1.mlp.gate_proj"


def test_refusals(dense, tmp_path):
    random_llama_folder(tmp_path / "other", hidden_size=48)
    with pytest.raises(TinyGPTQError, match="different models: hidden_size is 96 and 48"):
        validate(dense, IDS, reference=tmp_path / "other")


def test_what_is_no_number_is_an_infinite_difference():
    ours, theirs = np.array([1.0, np.nan]), np.array([1.0, 2.0])
    assert Difference.between(ours, theirs) == Difference(np.inf, np.inf)
    assert Difference.between(np.array([1.0, 5.0]), np.array([1.0, 1.0])) == Difference(4.0, 4.0)
    with pytest.raises(TinyGPTQError, match="shapes differ"):
        Difference.between(ours, theirs[:1])


def test_the_embedded_model_passes(embedded):
    found = validate(embedded, np.random.default_rng(1).integers(3, 2000, 24))
    assert found.passed


@pytest.mark.slow
def test_smollm2_passes_and_one_changed_word_is_found(smollm2, data_dir, tmp_path):
    ids = np.load(data_dir / "reference" / "smollm2_ids.npz")["evaluation"][0, :32].astype(np.int64)
    assert validate(smollm2, ids).passed
    name = "model.layers.17.self_attn.v_proj"
    copy = flip(smollm2, tmp_path / "copy", f"{name}.weight", word=1234)
    assert validate(copy, ids, reference=smollm2, tolerance=1e-4, engines={"cpu": ENGINES["cpu"]}).first == {"cpu": name}
