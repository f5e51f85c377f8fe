"""Tokenizers against transformers: LLaMA's own, and SmolLM2's."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tinygptq.templates import render_chat
from tinygptq.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

PARTS = ["a", "B", " ", "  ", "\n", "é", "日", "😀", "the cat", "s", "123", "\t", ".", "<x>", "1 2", "  \n ", "'s"]


def texts(specials: list[str], count: int = 400) -> list[str]:
    """Random texts, the same in every run, of ordinary parts and (one in five) special tokens."""
    rng = random.Random(1)
    return [
        "".join(rng.choice(PARTS if rng.random() < 0.8 else specials) for _ in range(rng.randint(0, 9)))
        for _ in range(count)
    ]


def llama_merges(model, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """BPE merges of a sentencepiece model: every split of a piece into two pieces, best scored pieces first."""
    merges = []
    for piece, id in vocab.items():
        if not (model.is_control(id) or model.is_unknown(id) or model.is_byte(id)):
            splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            merges += [(-model.get_score(id), vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab]
    return [(a, b) for *_, a, b in sorted(merges)]


@pytest.fixture(scope="module")
def llama(data_dir):
    """transformers' LlamaTokenizer over the pieces of tokenizer.model (its own reader would need protobuf)."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(data_dir / "llama-tokenizer" / "tokenizer.model"))
    vocab = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    try:
        return transformers.LlamaTokenizer(vocab=vocab, merges=llama_merges(model, vocab), add_bos_token=True)
    except TypeError:
        pytest.skip(f"transformers {transformers.__version__} builds LlamaTokenizer from a file only")


@pytest.fixture
def folder(data_dir, tmp_path) -> Path:
    """LLaMA's tokenizer.model, not legacy: what transformers 5 always does."""
    shutil.copy(data_dir / "llama-tokenizer" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    return tmp_path


def test_llama_equals_transformers(llama, folder):
    ours = Tokenizer.from_folder(folder)
    assert isinstance(ours, SentencePieceTokenizer)
    for text in texts(["<s>", "</s>", "<unk>"]):
        if text.startswith(" "):  # transformers 5 then adds no space of its own; sentencepiece and transformers 4 do
            continue
        ids = llama.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, bos=False) == llama.encode(text, add_special_tokens=False), text
        assert ours.decode(ids) == llama.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == llama.decode(ids), text


def test_llama_as_tokenizer_json(llama, tmp_path):
    """The folder transformers itself writes (tokenizer.json with byte fallback)."""
    llama.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert isinstance(ours, JsonTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)
    for text in texts(["<s>", "</s>", "<unk>"]):
        ids = llama.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == llama.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == llama.decode(ids), text


@pytest.mark.slow
def test_byte_level_equals_transformers(smollm2):
    ours, theirs = Tokenizer.from_folder(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == set(range(17))
    for text in texts(["<|im_start|>", "<|im_end|>", "<repo_name>"]):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text


@pytest.mark.slow
def test_any_byte_level_ids_decode_as_in_transformers(smollm2):
    """Broken UTF-8 and special tokens included."""
    ours, theirs = Tokenizer.from_folder(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(rng.choice((300, 49152))) for _ in range(rng.randint(0, 12))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), ids


@pytest.mark.slow
def test_chat_template_equals_transformers(smollm2):
    ours, theirs = Tokenizer.from_folder(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    messages = [
        {"role": "user", "content": "Hi <b>"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?\n"},
    ]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert render_chat(ours.chat_template, messages, theirs.bos_token, theirs.eos_token, prompt) == expected
