"""The embedded model's folder: complete, consistent, small, licensed; and its two texts do not overlap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from safetensors.numpy import load_file

import tinygptq

FOLDER = Path(tinygptq.__file__).parent / "assets" / "storyteller"


def read_json(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def stories(name: str) -> list[str]:
    return (FOLDER / name).read_text(encoding="utf-8").strip().split("\n\n")


def expected_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of a LlamaForCausalLM with tied embeddings, from its config alone."""
    hidden, inter = c["hidden_size"], c["intermediate_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        shapes |= {p + f"self_attn.{x}_proj.weight": (n, hidden) for x, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {p + "self_attn.o_proj.weight": (hidden, q), p + "mlp.down_proj.weight": (hidden, inter)}
        shapes |= {p + f"mlp.{x}_proj.weight": (inter, hidden) for x in ("gate", "up")}
    return shapes


@pytest.fixture(scope="module")
def tokenizer() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


def test_tensors_agree_with_the_config():
    tensors = load_file(FOLDER / "model.safetensors")
    assert {k: v.shape for k, v in tensors.items()} == expected_shapes(read_json("config.json"))
    assert {v.dtype for v in tensors.values()} == {np.dtype(np.float16)}
    assert all(np.isfinite(v).all() and v.std() > 0 for v in tensors.values())


def test_linear_sizes_suit_groups_of_128():
    for name, shape in expected_shapes(read_json("config.json")).items():
        if name.endswith("proj.weight"):
            assert shape[1] % 128 == 0 and shape[0] % 32 == 0, name


def test_weights_fit_in_5_mb_and_say_their_format():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 5_000_000
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    assert header["__metadata__"]["format"] == "pt"


def test_it_exercises_grouped_queries_and_tied_embeddings():
    config = read_json("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True


def test_tokenizer_follows_llama_conventions(tokenizer):
    config, generation = read_json("config.json"), read_json("generation_config.json")
    assert tokenizer.vocab_size() == config["vocab_size"]
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.id_to_piece(3) == "<0x00>" and tokenizer.is_byte(3)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert tokenizer.encode("fox", out_type=str)[0].startswith("\u2581")
    settings = read_json("tokenizer_config.json")
    assert settings["add_bos_token"] is True and settings["add_eos_token"] is False


@pytest.mark.parametrize(
    "text",
    ["Once upon a time, there was a little fox named Pip.", " two  spaces and a\ttab\n\nnew line ", "2 + 2 = 4; 1995",
     "na\u00efve caf\u00e9, \u4f60\u597d \U0001f98a", "\uff21\ufb01 stays as it is"],
)  # fmt: skip
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids  # byte fallback: nothing is unknown


def test_digits_are_split(tokenizer):
    assert [p.strip("\u2581") for p in tokenizer.encode("1995", out_type=str)][-4:] == ["1", "9", "9", "5"]


def test_texts_are_stories_and_do_not_overlap():
    calibration, heldout = stories("calibration.txt"), stories("heldout.txt")
    for part in (calibration, heldout):
        assert len(part) == len(set(part)) >= 50
        assert all(s.isascii() and len(s) > 200 and "\n" not in s for s in part)
    assert not set(calibration) & set(heldout)
    # Openings come from templates and may recur; beyond them nothing does.
    width = 100
    seen = {s[i : i + width] for s in calibration for i in range(len(s) - width + 1)}
    assert not [s for s in heldout if any(s[i : i + width] in seen for i in range(len(s) - width + 1))]


def test_licence_and_origin_are_stated():
    assert "Apache License" in (FOLDER / "LICENSE").read_text(encoding="utf-8")
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "SmolLM2-135M-Instruct" in card
