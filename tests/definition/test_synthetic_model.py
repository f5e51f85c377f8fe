"""scripts/make_synthetic_model.py: every branch loads, has the size that `size` predicts, and is a model, not noise."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

import tinygptq
from tinygptq.branches import BRANCHES
from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.sizes import sizes
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.packing import unpack
from tinygptq.release.inspect_folder import inspect_folder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_synthetic_model.py"
TINY = small_config(hidden_size=128, intermediate_size=352, num_attention_heads=4, vocab_size=101)  # 352 = 2.75 * 128


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_synthetic_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.mark.parametrize("branch", BRANCHES)
def test_every_branch_loads_and_has_the_predicted_size(tmp_path: Path, script, shape, capsys, branch):
    out = tmp_path / "out"
    assert script.main([str(out), "--branch", branch, "--config", str(shape)]) == 0
    checkpoint = load_checkpoint(out)
    assert checkpoint.quantization == BRANCHES[branch]
    assert checkpoint.facts.warnings() == []
    predicted = sizes(LlamaConfig.from_dict(TINY), BRANCHES[branch]).file
    assert (out / "model.safetensors").stat().st_size == predicted
    assert json.loads(capsys.readouterr().out)["weights_file_bytes"] == predicted
    found = inspect_folder(out)
    assert found.problems == [] and found.loaders["GPTQModel"] == []
    logits = tinygptq.load(out).forward(np.arange(32)[None])
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10


@pytest.mark.parametrize(
    "config", [*BRANCHES.values(), QuantizeConfig(3, 32), QuantizeConfig(2, 32, checkpoint_format="gptq_v2")]
)
def test_tensors_are_plausible(script, config):
    shape = (1024 * config.bits // 32, 96)
    codes = unpack(script.random_tensor("model.layers.0.self_attn.q_proj.qweight", shape, config, 0), config.bits, 1024)
    middle = 2 ** (config.bits - 1)
    assert abs(codes.mean() - middle) < 0.05 * middle
    assert codes.max() == config.max_code and codes.min() <= 1 + config.max_code // 10
    zeros = script.random_tensor("model.layers.0.self_attn.q_proj.qzeros", (3, 96 * config.bits // 32), config, 0)
    stored = unpack(np.ascontiguousarray(zeros.T), config.bits, 96)
    assert (stored == middle - (config.checkpoint_format == "gptq")).all()
    scales = script.random_tensor("model.layers.0.self_attn.q_proj.scales", (3, 96), config, 0)
    assert (scales > 0).all()
    weight = (codes.astype(np.float32) - middle) * scales.mean(dtype=np.float32)
    assert 0.5 / 64 < weight.std() < 2 / 64


def test_act_order_is_shared_by_linears_of_one_input(tmp_path: Path, script):
    config = BRANCHES["gptq-4bit-32g-actorder_True"]
    script.write_model(tmp_path / "out", TINY, config, seed=0)
    tensors = TensorFile(tmp_path / "out" / "model.safetensors")
    groups = {name: np.array(tensors[name]) for name in tensors if name.endswith("g_idx")}
    for layer in range(TINY["num_hidden_layers"]):
        block = {name.split(".")[-2]: g_idx for name, g_idx in groups.items() if f"layers.{layer}." in name}
        for name, other in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert np.array_equal(block[name], block[other])
        assert not np.array_equal(block["q_proj"], block["gate_proj"])
        assert np.array_equal(np.bincount(block["q_proj"]), [32] * 4)
    loaders = inspect_folder(tmp_path / "out").loaders
    assert not any("g_idx differs" in reason for reasons in loaders.values() for reason in reasons)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, script):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.write_model(tmp_path / name, TINY, BRANCHES["main"], seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_nothing_stays_of_a_failure(tmp_path: Path, script, monkeypatch):
    written = []

    def fail(name, *rest):
        written.append(name)
        if len(written) > 5:
            raise KeyboardInterrupt
        return original(name, *rest)

    original = script.random_tensor
    monkeypatch.setattr(script, "random_tensor", fail)
    with pytest.raises(KeyboardInterrupt):
        script.write_model(tmp_path / "out", TINY, BRANCHES["main"], 0)
    assert list(tmp_path.iterdir()) == []


def test_refusals_are_one_line(tmp_path: Path, script, shape, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    for words, part in (
        ((tmp_path / "taken", "--config", shape), "already exists"),
        ((tmp_path / "out", "--config", tmp_path / "none.json"), "no such file"),
        ((tmp_path / "out", "--config", shape, "--layers", 0), "'num_hidden_layers' should be at least 1"),
    ):
        assert script.main([str(word) for word in words]) == 2
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
