"""Tokenizers inside GGUF files: byte-level BPE with each word rule, and sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from tinygptq.convert import convert
from tinygptq.convert.gguf_tokenizer import write_tokenizer
from tinygptq.tokenizer import Tokenizer

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
from gguf_files import byte_vocabulary, write_gguf  # after the skips: it imports gguf


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_byte_level_tokenizer(tmp_path: Path):
    template = "{% for m in messages %}{{ m.content }}é{% endfor %}"
    changes = {"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.eot_token_id": 260}
    write_gguf(tmp_path / "model.gguf", changes=changes)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    tokens, _ = byte_vocabulary()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (258, 259, template)
    assert tokenizer.special_ids == {257, 258, 259, 260}
    assert tokenizer.encode("the<|eot|>e[tool]") == [258, 256, tokens.index("e"), 260, tokens.index("e"), 261]
    text = "naïve 日本 123\n"
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert generation == {"bos_token_id": 258, "eos_token_id": [259, 260]}
    assert read_json(tmp_path / "out" / "special_tokens_map.json")["unk_token"] == "<|unk|>"


def test_bos_is_in_tokenizer_json_too(tmp_path: Path):
    from tokenizers import Tokenizer as Fast

    write_gguf(tmp_path / "model.gguf", changes={"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_eos_token": True})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert Fast.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("th").ids == [258, 256, 259]
    assert Tokenizer.from_folder(tmp_path / "out").encode("th") == [258, 256, 259]


WORDS = {  # of "I'LL pay 12345, ok?!\n\n  so\nwe" by the rule of each name, spaces as Ġ and line ends as Ċ
    "gpt-2": "I ' LL Ġpay Ġ12345 , Ġok ?! ĊĊĠ Ġso Ċ we",
    "smollm": "I ' LL Ġpay Ġ 1 2 3 4 5 , Ġok ?! ĊĊĠ Ġso Ċ we",
    "llama-bpe": "I 'LL Ġpay Ġ 123 45 , Ġok ?!ĊĊ Ġ Ġso Ċ we",
    "qwen2": "I 'LL Ġpay Ġ 1 2 3 4 5 , Ġok ?!ĊĊ Ġ Ġso Ċ we",
    "default": "I ' LL Ġpay Ġ 123 45 , Ġok ?! ĊĊĠ Ġso Ċ we",
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_cut_by_the_rule_the_file_names(tmp_path: Path, pre):
    from tokenizers import Tokenizer as Fast

    write_gguf(tmp_path / "model.gguf", changes={"tokenizer.ggml.pre": pre})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    rule = Fast.from_file(str(tmp_path / "out" / "tokenizer.json")).pre_tokenizer
    words = [word for word, _ in rule.pre_tokenize_str("I'LL pay 12345, ok?!\n\n  so\nwe")]
    assert words == WORDS[pre].split(" ")


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("gpt-2", False)])
def test_a_word_that_is_a_token_needs_no_merges(tmp_path: Path, pre, whole):
    """LLaMA 3 takes it as it is; elsewhere merges alone make tokens."""
    tokens, _ = byte_vocabulary()
    tokens[260] = "cat"
    kinds = [1] * 257 + [3, 3, 3, 1, 4]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.pre": pre}
    write_gguf(tmp_path / "model.gguf", changes=changes)
    convert(tmp_path / "model.gguf", tmp_path / "out")
    ids = Tokenizer.from_folder(tmp_path / "out").encode("cat", bos=False)
    assert ids == ([260] if whole else [tokens.index(letter) for letter in "cat"])


def test_a_file_that_names_no_rule_gets_the_default_one_and_a_warning(tmp_path: Path, caplog):
    write_gguf(tmp_path / "model.gguf", changes={"tokenizer.ggml.pre": None})
    convert(tmp_path / "model.gguf", tmp_path / "out")
    assert "names no pre-tokeniser" in caplog.text


def llama_pieces(model) -> dict:
    """The metadata that a sentencepiece model becomes."""
    count = model.vocab_size()
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in range(count)]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None, "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


@pytest.fixture(scope="session")
def small_pieces(tmp_path_factory) -> Path:
    """The folder of a small sentencepiece model of LLaMA's kind: BPE, byte fallback, nothing normalised."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("the cat sat on the mat and the hat of the cat\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=290,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder


TEXTS = ["", "the cat", "  two  spaces ", "naïve 日本\n", "</s>a<s> b", "\t1"]


@pytest.mark.parametrize("source", ["small", "llama"])
def test_sentencepiece_tokenizer(tmp_path: Path, source, request):
    folder = request.getfixturevalue("small_pieces") if source == "small" else (
        request.getfixturevalue("data_dir") / "llama-tokenizer")  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    write_tokenizer(llama_pieces(model), tmp_path, 64, Path("model.gguf"))
    ours, original = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text)), text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, original.vocab_size)
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for id in range(again.vocab_size()):
        assert (again.id_to_piece(id), again.get_score(id)) == (model.id_to_piece(id), model.get_score(id))
        assert again.is_byte(id) == model.is_byte(id) and again.is_control(id) == model.is_control(id)


def test_sentencepiece_without_the_leading_space_and_with_an_added_token(tmp_path: Path, small_pieces):
    metadata = llama_pieces(sentencepiece.SentencePieceProcessor(model_file=str(small_pieces / "tokenizer.model")))
    for key, value in (("tokens", "[PAD]"), ("scores", -1000.0), ("token_type", 3)):
        metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], value]
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    changes = {"padding_token_id": last, "add_space_prefix": False, "add_bos_token": False}
    write_tokenizer(metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}, tmp_path, 64, Path("model.gguf"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("the[PAD]")
    assert ids[-1] == last and tokenizer.decode(ids) == "the" and tokenizer.decode(ids, skip_special=False) == "the[PAD]"
    assert not tokenizer._model.id_to_piece(ids[0]).startswith("\u2581")
