"""Tokenizers: the folder's rules, added tokens, and streaming that joins to decoding."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinygptq.errors import TinyGPTQError
from tinygptq.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, byte_level_alphabet

TEXTS = [
    "",
    " ",
    "a",
    "  two  spaces  ",
    "\n\nlines\n",
    "\t",
    "émigré naïve",
    "日本語のテキスト",
    "👩‍👩‍👧 and 🇫🇷",
    "x\u0000y",
    "▁underline▁",
    "12345 67",
    "the letter s ends words: cats",
    "mixed 漢字 and\r\nCRLF ",
    "<0x41> <unkn> </ s>",
]


def joined(tokenizer: Tokenizer, ids: list[int], **options) -> str:
    decoder = tokenizer.stream(**options)
    return "".join(decoder.push(id) for id in ids) + decoder.flush()


def write(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def llama(data_dir, tmp_path) -> Path:
    """A folder with LLaMA's tokenizer.model and nothing else."""
    shutil.copy(data_dir / "llama-tokenizer" / "tokenizer.model", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory) -> Path:
    """A folder with a small byte-level BPE tokenizer.json, its special token <|end|> the last id."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the cats sat"] * 4, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    return folder


@pytest.fixture(scope="session", params=["sentencepiece", "byte_level"])
def either(request, data_dir, byte_level) -> Tokenizer:
    if request.param == "byte_level":
        return Tokenizer.from_folder(byte_level)
    return SentencePieceTokenizer(data_dir / "llama-tokenizer" / "tokenizer.model")


# ------------------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(either, text):
    ids = either.encode(text)
    assert all(type(id) is int for id in ids)
    expected = text.replace("▁", " ") if isinstance(either, SentencePieceTokenizer) else text
    assert either.decode(ids) == joined(either, ids) == expected


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<" not in text))
def test_any_text_comes_back(either, text):
    ids = either.encode(text)
    if isinstance(either, SentencePieceTokenizer):
        text = text.replace("▁", " ")
    assert either.decode(ids) == joined(either, ids) == text


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip_special=st.booleans())
def test_streaming_any_ids_joins_to_decoding_them(either, data, skip_special):
    """Bytes in any order, truncated characters, special tokens and unknown ids included."""
    some_id = st.one_of(st.integers(0, 300), st.integers(-1, either.vocab_size + 3))
    ids = data.draw(st.lists(some_id, max_size=30))
    assert joined(either, ids, skip_special=skip_special) == either.decode(ids, skip_special)


@pytest.fixture(scope="session")
def llama_models(data_dir):
    """LLaMA's tokenizer, and the sentencepiece model it is made from."""
    path = data_dir / "llama-tokenizer" / "tokenizer.model"
    return SentencePieceTokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(259, 31999)), max_size=30))
def test_decoding_equals_sentencepiece(llama_models, ids):
    """For every id but the control ones. (Of a leading byte piece 0x20 sentencepiece keeps the space.)"""
    ours, model = llama_models
    ids = [259, *ids] if ids[:1] == [3 + 0x20] else ids
    assert ours.decode(ids) == model.decode(ids)


def test_a_character_is_never_broken(either):
    ids = either.encode("日😀")
    decoder = either.stream()
    pieces = [decoder.push(id) for id in ids] + [decoder.flush()]
    assert [piece for piece in pieces if piece] == ["日", "😀"]
    half = either.stream()
    given = "".join(half.push(id) for id in ids[:-1])
    assert given == "日" and set(half.flush()) == {"\ufffd"}


def test_a_stream_that_continues_a_prompt_keeps_its_first_space(data_dir):
    tokenizer = SentencePieceTokenizer(data_dir / "llama-tokenizer" / "tokenizer.model")
    ids = tokenizer.encode("Paris", bos=False)
    assert joined(tokenizer, ids) == "Paris"
    assert joined(tokenizer, ids, continues=True) == " Paris"


def test_byte_level_alphabet_is_one_to_one():
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["a"], alphabet["Ġ"], alphabet["Ċ"]) == (0x61, 0x20, 0x0A)


# ------------------------------------------------------------------------------------------------ sentencepiece folders


def test_llama_alone(llama):
    tokenizer = Tokenizer.from_folder(llama)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)
    assert tokenizer.special_ids == {0, 1, 2} and tokenizer.chat_template is None
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]
    assert tokenizer.encode("Hello this is a test", bos=False) == [15043, 445, 338, 263, 1243]
    assert tokenizer.decode([1, 15043, 2], skip_special=False) == "<s> Hello</s>"


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [
        ({}, 1, 1243),
        ({"add_bos_token": False}, 15043, 1243),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 2),
        ({"tokenizer_class": "LlamaTokenizer"}, 1, 1243),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}, 15043, 2),
        ({"bos_token": "", "eos_token": ""}, 1, 1243),  # early conversions left them empty
    ],
)
def test_bos_and_eos_as_the_folder_says(llama, config, first, last):
    write(llama, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(llama)
    ids = tokenizer.encode("Hello this is a test")
    assert (ids[0], ids[-1]) == (first, last)
    assert tokenizer.encode("Hello", bos=True) == [1, 15043]
    assert tokenizer.encode("Hello", bos=False) == [15043]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<pad>": 32000}, "special_tokens_map.json": {"pad_token": "<pad>"}},
        {
            "tokenizer_config.json": {
                "pad_token": "<pad>",
                "added_tokens_decoder": {
                    "0": {"content": "<unk>", "special": True},
                    "1": {"content": "<s>", "special": True},
                    "2": {"content": "</s>", "special": True},
                    "32000": {"content": "<pad>", "special": True},
                },
            }
        },
        {"tokenizer_config.json": {"pad_token": {"__type": "AddedToken", "content": "<pad>"}}},  # the next free id
        {"tokenizer_config.json": {"pad_token": "<pad>", "added_tokens_decoder": {"32000": {"content": "<pad>"}}}},
    ],
)
def test_tokens_beyond_the_model(llama, files):
    for name, content in files.items():
        write(llama, name, content)
    tokenizer = Tokenizer.from_folder(llama)
    assert tokenizer.vocab_size == 32001 and tokenizer.special_ids == {0, 1, 2, 32000}
    assert tokenizer.encode("<pad>", bos=False) == [32000]
    assert tokenizer.decode([15043, 32000]) == "Hello"
    assert tokenizer.decode([15043, 32000], skip_special=False) == "Hello<pad>"


def test_an_added_token_that_is_not_special_is_text(llama):
    write(llama, "added_tokens.json", {"wordpiece": 32003})
    tokenizer = Tokenizer.from_folder(llama)
    assert tokenizer.encode("a wordpiece", bos=False)[-1] == 32003
    assert tokenizer.decode([32003]) == "wordpiece"
    assert tokenizer.vocab_size == 32004
    assert tokenizer.decode([32001, 32002]) == ""  # a gap


@pytest.mark.parametrize(("legacy", "after"), [(None, [29871, 13]), (True, [29871, 13]), (False, [13])])
def test_special_tokens_in_a_text(llama, legacy, after):
    """Legacy puts a space (29871) before the text behind a special token, too."""
    write(llama, "tokenizer_config.json", {"legacy": legacy})
    tokenizer = Tokenizer.from_folder(llama)
    assert tokenizer.encode("Hello</s>\n", bos=False) == [15043, 2, *after]
    assert tokenizer.encode("</s>\n", bos=False) == [2, *after]


def test_an_added_token_eats_the_spaces_it_says(llama):
    write(
        llama,
        "tokenizer_config.json",
        {
            "legacy": False,
            "added_tokens_decoder": {"32000": {"content": "<sep>", "lstrip": True, "rstrip": True, "special": True}},
        },
    )
    tokenizer = Tokenizer.from_folder(llama)
    assert tokenizer.encode("a  <sep>  a", bos=False) == tokenizer.encode("a<sep>a", bos=False)


def test_chat_template(llama):
    write(llama, "tokenizer_config.json", {"chat_template": "T"})
    assert Tokenizer.from_folder(llama).chat_template == "T"
    write(
        llama,
        "tokenizer_config.json",
        {"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]},
    )
    assert Tokenizer.from_folder(llama).chat_template == "D"
    (llama / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(llama).chat_template == "J"


# ------------------------------------------------------------------------------------------------ tokenizers folders


def test_byte_level_folder(byte_level):
    tokenizer = Tokenizer.from_folder(byte_level)
    assert isinstance(tokenizer, JsonTokenizer)
    end = tokenizer.vocab_size - 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_ids) == (None, end, {end})
    assert tokenizer.encode("the cat<|end|>")[-1] == end
    assert tokenizer.decode(tokenizer.encode("the cat<|end|>")) == "the cat"
    with pytest.raises(TinyGPTQError, match="no BOS"):
        tokenizer.encode("the", bos=True)


@pytest.mark.parametrize("how", ["post-processor", "add_bos_token"])
def test_bos_of_a_tokenizers_folder(byte_level, tmp_path, how):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    end = plain.token_to_id("<|end|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|end|>"}
    if how == "post-processor":
        plain.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", end)]
        )
    else:
        config["add_bos_token"] = True
    plain.enable_truncation(2)  # what was left from training must not cut a text
    plain.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("the cats sat on the mat")
    assert ids[0] == end and len(ids) > 3
    assert tokenizer.encode("the cats sat on the mat", bos=False) == ids[1:]
    assert tokenizer.encode("the cats sat on the mat", bos=True) == ids


def test_tokens_that_only_the_other_files_name(byte_level, tmp_path):
    shutil.copy(byte_level / "tokenizer.json", tmp_path)
    write(tmp_path, "tokenizer_config.json", {"pad_token": "<pad>"})
    old, tokenizer = Tokenizer.from_folder(byte_level), Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("the<pad>") == [*old.encode("the"), old.vocab_size]
    assert old.vocab_size in tokenizer.special_ids
    write(tmp_path, "added_tokens.json", {"<pad>": old.vocab_size + 5})
    with pytest.raises(TinyGPTQError, match="'<pad>' should have id"):
        Tokenizer.from_folder(tmp_path)


def test_pieces_with_byte_fallback(tmp_path):
    """A tokenizer.json made from a sentencepiece model decodes as the model does."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "▁": 1, "▁a": 2, "s": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_folder(tmp_path)
    smile = [4 + byte for byte in "😀".encode()]
    assert ours.decode([2, 3, *smile, 1, 3]) == tokenizer.decode([2, 3, *smile, 1, 3]) == "as😀 s"
    assert ours.decode([2, smile[0], smile[1], 3]) == "a\ufffd\ufffds"


@pytest.mark.slow
def test_smollm2_ids_equal_llama_cpp(smollm2, data_dir):
    reference = np.load(data_dir / "reference" / "smollm2_ids.npz")
    tokenizer = Tokenizer.from_folder(smollm2)
    for name, key, chars in (("valid", "calibration", 90_000), ("test", "evaluation", 140_000)):
        text = (data_dir / "wikitext-2" / f"{name}.joined.txt").read_bytes().decode()
        expected = reference[key].ravel()
        ids = tokenizer.encode(text[:chars])
        assert len(ids) > len(expected)
        np.testing.assert_array_equal(ids[: len(expected)], expected)
        assert text.startswith(tokenizer.decode(ids[:1000]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.encode("<|im_start|>user 12") == [1, 4093, 216, 33, 34]


# ------------------------------------------------------------------------------------------------ which file; errors


def test_both_files(llama, byte_level):
    """tokenizer.model, unless the class is one that reads tokenizer.json alone."""
    shutil.copy(byte_level / "tokenizer.json", llama)
    assert isinstance(Tokenizer.from_folder(llama), SentencePieceTokenizer)
    write(llama, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert isinstance(Tokenizer.from_folder(llama), JsonTokenizer)


def test_without_the_tokenizers_package(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TinyGPTQError, match=r"pip install tinygptq\[hf\]"):
        Tokenizer.from_folder(byte_level)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nothing", b"", "no tokenizer found"),
        ("tokenizer.model", b"not a model", "not a sentencepiece model"),
        ("tokenizer.json", b"{}", "not readable by tokenizers"),
        ("tokenizer.json", b"[", "not readable as JSON"),
        ("tokenizer_config.json", b'{"add_bos_token": "yes"}', "'add_bos_token' should be true or false"),
        ("tokenizer_config.json", b'{"bos_token": 1}', "'bos_token' should be a token's text"),
        ("added_tokens.json", b'{"<pad>": "x"}', "id should be a number"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "'chat_template' should be text"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TinyGPTQError, match=says) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_decoder_is_refused(byte_level, tmp_path):
    content = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    write(tmp_path, "tokenizer.json", content)
    with pytest.raises(TinyGPTQError, match=r"decoder .*WordPiece"):
        Tokenizer.from_folder(tmp_path)


def test_a_lone_surrogate_is_refused(either):
    with pytest.raises(TinyGPTQError, match="lone surrogate at position 2"):
        either.encode("ab\ud800")
