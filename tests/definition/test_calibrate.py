"""Calibration windows: files, named sets (copies in the sets' own schema), and every way to have too little."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest

from tinygptq.calibrate import (
    NAMED_SETS,
    calibration_windows,
    draw_windows,
    evaluation_text,
    parse_dataset,
    wikitext_rows_joined,
)
from tinygptq.errors import TinyGPTQError
from tinygptq.records import conversations
from tinygptq.tokenizer import Tokenizer


class Bytes(Tokenizer):
    """One id a byte, shifted by 2; BOS 0 (when asked for) and EOS 1, written </s>."""

    eos_id, vocab_size, special_ids, chat_template = 1, 258, frozenset({0, 1}), None
    strips_space, utf8_errors = False, "replace"

    def __init__(self, bos_id: int | None = None, chat_template: str | None = None):
        self.bos_id, self.chat_template = bos_id, chat_template

    def _encode_text(self, text):
        first, *rest = text.split("</s>")
        return [byte + 2 for byte in first.encode()] + [
            id for part in rest for id in (1, *(byte + 2 for byte in part.encode()))
        ]

    def _encode_by_rule(self, text):
        return ([] if self.bos_id is None else [self.bos_id]) + self._encode_text(text)

    def _piece(self, id):
        return (b"<s>", b"</s>")[id] if id < 2 else bytes([id - 2])


class Table(list):
    """A list of rows with `datasets`' access to one column; counts the rows read one by one."""

    reads = 0

    def __getitem__(self, key):
        if not isinstance(key, str):
            Table.reads += 1
            return list.__getitem__(self, key)
        if key not in list.__getitem__(self, 0):
            raise KeyError(key)
        return [row[key] for row in self]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: ``hub.tables[path]`` is what load_dataset gives, ``hub.calls`` how."""
    hub = SimpleNamespace(tables={}, calls=[])

    def load_dataset(path, *config, **options):
        hub.calls.append((path, *config, options))
        if path not in hub.tables:
            raise ConnectionError(f"Couldn't reach {path}\non the hub")
        return Table(hub.tables[path])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return hub


def text_of(windows: np.ndarray) -> str:
    return Bytes().decode(windows.ravel(), skip_special=False)


def jsonl(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ files


def test_a_file_gives_consecutive_windows_from_its_start(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcdefghijkl\r\nmno")
    windows = calibration_windows(path, Bytes(), 3, 4, seed=5)
    assert windows.shape == (3, 4) and windows.dtype == np.int32
    assert text_of(windows) == "abcdefghijkl"
    assert text_of(calibration_windows(str(path), Bytes(), 2, 8)) == "abcdefghijkl\r\nmn"  # line ends as they are


def test_bos_as_the_folder_says_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg")
    assert text_of(calibration_windows(path, Bytes(bos_id=0), 2, 4)) == "<s>abcdefg"


def test_a_long_file_is_cut_without_changing_ids(tmp_path, monkeypatch):
    """Also where a token stands for many more characters than the first guess allows."""

    class Wide(Bytes):
        longest = 0

        def _encode_text(self, text):
            Wide.longest = max(Wide.longest, len(text))
            return [crc32(text[i : i + 20].encode()) % 256 for i in range(0, len(text), 20)]

    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i} " for i in range(40_000)))
    whole = Wide().encode(path.read_text())
    Wide.longest = 0
    windows = calibration_windows(path, Wide(), 4, 50)
    np.testing.assert_array_equal(windows.ravel(), whole[:200])
    assert 0 < Wide.longest < len(path.read_text()) / 4


@pytest.mark.slow
def test_smollm2_windows_are_the_reference(smollm2, data_dir):
    reference = np.load(data_dir / "reference" / "smollm2_ids.npz")["calibration"]
    text = data_dir / "wikitext-2" / "valid.joined.txt"
    np.testing.assert_array_equal(calibration_windows(text, Tokenizer.from_folder(smollm2), 32, 512), reference)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "plain"}, "plain\n\n"),
        ({"prompt": "P", "response": "R"}, "<|user|>\nP\n<|assistant|>\nR</s>\n"),
        ({"instruction": "I", "input": "", "output": "O"}, "<|user|>\nI\n<|assistant|>\nO</s>\n"),
        ({"instruction": "I", "input": "X", "output": "O"}, "<|user|>\nI\n\nX\n<|assistant|>\nO</s>\n"),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "P"},
                    {"role": "assistant", "content": "R"},
                ]
            },
            "<|system|>\nS\n<|user|>\nP\n<|assistant|>\nR</s>\n",
        ),
    ],
)
def test_jsonl_fields(tmp_path, record, text):
    path = jsonl(tmp_path / "a.jsonl", record, record)
    length = len(Bytes().encode(text))
    windows = calibration_windows(path, Bytes(), 2, length)
    assert [text_of(window) for window in windows] == [text, text]


def test_jsonl_through_other_templates(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "P", "response": "R"})
    assert text_of(calibration_windows(path, Bytes(), 1, 5, template="none")) == "P\nR\n\n"
    assert text_of(calibration_windows(path, Bytes(), 1, 13, template="llama-2-chat")) == "[INST] P [/INST] R </s>"[:13]


def test_the_folder_s_chat_template(tmp_path):
    pytest.importorskip("jinja2")
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "P", "response": "R"})
    tokenizer = Bytes(chat_template="{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    assert text_of(calibration_windows(path, tokenizer, 1, 19, template="chat")) == "user:P;assistant:R;"
    with pytest.raises(TinyGPTQError, match="no chat template"):
        calibration_windows(path, Bytes(), 1, 4, template="chat")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "Q", "answer": "A"}', r"line 2: found the fields question, answer; expected text, or prompt"),
        ('{"text": 5}', r"line 2: the field 'text' should be text, found int"),
        ('{"messages": "hi"}', r"line 2: the field 'messages' should be a list"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', r"line 2: message 1 .* found role 'tool'"),
        ("{oops}", r"line 2: not JSON"),
        ("[1]", r"line 2: expected a JSON object, found list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(TinyGPTQError, match=says) as caught:
        calibration_windows(path, Bytes(), 1, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nsamples", "seqlen", "says"),
    [
        ("", 1, 2, r"holds no text; 1 window of 2 needs 2 tokens: give more text"),
        ("x", 1, 2, r"holds 1 token; .*: give more text"),
        ("x" * 10, 4, 5, r"holds 10 tokens; 4 windows of 5 need 20 tokens: --nsamples 2 or --seqlen 2 would fit"),
        ("x" * 10, 20, 4, r"need 80 tokens: --nsamples 2 would fit"),
        ("x" * 10, 2, 100, r"need 200 tokens: --seqlen 5 would fit"),
        ("x" * 10, 0, 100, r"nsamples >= 1"),
        ("x" * 10, 1, 1, r"seqlen >= 2"),
    ],
)
def test_too_little_text_is_never_repeated(tmp_path, text, nsamples, seqlen, says):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(TinyGPTQError, match=says):
        calibration_windows(path, Bytes(), nsamples, seqlen)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(TinyGPTQError, match=r"not UTF-8 text \(byte 3\)"):
        calibration_windows(tmp_path / "a.txt", Bytes(), 1, 2)
    with pytest.raises(TinyGPTQError, match=r"expected a \.txt or \.jsonl file, found \.parquet"):
        calibration_windows(tmp_path / "a.parquet", Bytes(), 1, 2)


# ------------------------------------------------------------------------------------------------ --dataset


def test_parse_dataset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    assert parse_dataset(str(path)).path == path
    assert (parse_dataset("wikitext2").name, parse_dataset("wikitext2").split) == ("wikitext2", "train")
    assert parse_dataset("wikitext2:test").split == "test"
    for text, says in (
        ("wikitext2:dev", "no split 'dev'; it has train, validation, test"),
        ("nosuch.txt", "'nosuch.txt' is neither a file nor one of wikitext2, c4, ptb"),
    ):
        with pytest.raises(TinyGPTQError, match=says):
            parse_dataset(text)


# ------------------------------------------------------------------------------------------------ named sets


def test_draw_windows_never_overlap():
    ids = np.arange(100)
    for spare in (0, 1, 60):
        windows = draw_windows(ids[: 40 + spare], 10, 4, np.random.default_rng(0))
        assert len(np.unique(windows)) == 40
        assert (np.diff(windows, axis=1) == 1).all()
        assert (np.diff(windows[:, 0]) < 0).any()  # nor do they keep the text's order
    assert not np.array_equal(*(draw_windows(ids, 10, 4, np.random.default_rng(seed)) for seed in (0, 1)))


@pytest.mark.parametrize(
    ("name", "path", "config", "column"),
    [
        ("wikitext2", "Salesforce/wikitext", ("wikitext-2-raw-v1",), "text"),
        ("ptb", "ptb-text-only/ptb_text_only", ("penn_treebank",), "sentence"),
    ],
)
def test_running_text_is_joined_as_the_papers_do(hub, name, path, config, column):
    hub.tables[path] = [{column: text} for text in ("", " = Title = \n", " The cat sat . \n", "")]
    stream = "\n\n = Title = \n\n\n The cat sat . \n\n\n"
    windows = calibration_windows(f"{name}:validation", Bytes(), 2, 10, seed=3)
    assert all(text_of(window) in stream for window in windows)
    assert text_of(calibration_windows(name, Bytes(), 1, len(stream))) == stream
    assert hub.calls[0][:-1] == (path, *config)
    assert [call[-1]["split"] for call in hub.calls] == ["validation", "train"]
    same, again, other = (calibration_windows(name, Bytes(), 2, 10, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, other)


def test_c4_reads_one_file_and_no_more_documents_than_needed(hub):
    hub.tables["allenai/c4"] = [{"text": f"document {i}", "url": "u", "timestamp": "t"} for i in range(10_000)]
    Table.reads = 0
    windows = calibration_windows("c4", Bytes(), 4, 30)
    assert 0 < Table.reads < 1000
    assert windows.shape == (4, 30)
    assert hub.calls[0][-1] == {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}
    numbers = [int(word) for word in text_of(windows).split() if word.isdecimal()]
    assert max(numbers) > 1000  # not only the first documents


def test_instruction_sets_go_through_the_template(hub):
    hub.tables["databricks/databricks-dolly-15k"] = [
        {"instruction": "I", "context": "", "response": "R", "category": "open_qa"}
    ]
    hub.tables["sahil2801/CodeAlpaca-20k"] = [{"instruction": "I", "input": "X", "output": "O"}]
    dolly, alpaca = "<|user|>\nI\n<|assistant|>\nR</s>\n", "<|user|>\nI\n\nX\n<|assistant|>\nO</s>\n"
    for name, text in (("databricks-dolly-15k", dolly), ("CodeAlpaca-20k", alpaca)):
        assert text_of(calibration_windows(name, Bytes(), 1, len(Bytes().encode(text)))) == text


def row(id, parent, role, text, rank=None, lang="en", deleted=False):
    return {
        "message_id": id,
        "parent_id": parent,
        "role": role,
        "text": text,
        "rank": rank,
        "lang": lang,
        "deleted": deleted,
        "message_tree_id": "t",
        "tree_state": "ready_for_export",
    }


OASST = [
    row("a", None, "prompter", "Q1"),
    row("a1", "a", "assistant", "worse", rank=1),
    row("a0", "a", "assistant", "best", rank=0),
    row("an", "a", "assistant", "unranked"),
    row("a00", "a0", "prompter", "Q2"),
    row("a000", "a00", "assistant", "A2", rank=0),
    row("a0000", "a000", "prompter", "unanswered"),
    row("b", None, "prompter", "Pregunta", lang="es"),
    row("b0", "b", "assistant", "Respuesta", rank=0, lang="es"),
    row("c", None, "prompter", "only a question"),
    row("c0", "c", "assistant", "gone", rank=0, deleted=True),
]


def test_oasst1_walks_from_the_root_along_the_best_replies(hub):
    assert conversations(OASST) == [
        [
            {"role": "user", "content": "Q1"},
            {"role": "assistant", "content": "best"},
            {"role": "user", "content": "Q2"},
            {"role": "assistant", "content": "A2"},
        ]
    ]
    hub.tables["OpenAssistant/oasst1"] = OASST
    text = "<|user|>\nQ1\n<|assistant|>\nbest</s>\n<|user|>\nQ2\n<|assistant|>\nA2</s>\n"
    assert text_of(calibration_windows("oasst1", Bytes(), 1, len(Bytes().encode(text)))) == text


@pytest.mark.parametrize("name", NAMED_SETS)
def test_without_a_network_one_line_names_the_alternative(hub, name):
    with pytest.raises(TinyGPTQError, match=r"ConnectionError: Couldn't reach .*--dataset FILE\.txt") as caught:
        calibration_windows(name, Bytes(), 1, 2)
    assert "\n" not in str(caught.value)


def test_without_the_datasets_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TinyGPTQError, match=r"pip install tinygptq\[data\]\); a local file .*--dataset FILE\.txt"):
        calibration_windows("c4", Bytes(), 1, 2)


def test_a_set_whose_schema_changed(hub):
    hub.tables["Salesforce/wikitext"] = [{"page": "x"}]
    with pytest.raises(TinyGPTQError, match="the field 'text' is missing"):
        calibration_windows("wikitext2", Bytes(), 1, 2)


def test_too_little_in_a_named_set(hub):
    hub.tables["Salesforce/wikitext"] = [{"text": "ten bytes!"}]
    with pytest.raises(TinyGPTQError, match=r"wikitext2:train holds 10 tokens; .*--nsamples 2 would fit"):
        calibration_windows("wikitext2", Bytes(), 9, 4)


def test_an_unknown_template_does_not_wait_for_a_download(hub):
    with pytest.raises(TinyGPTQError, match="unknown prompt template"):
        calibration_windows("oasst1", Bytes(), 1, 2, template="nope")
    assert not hub.calls


# ------------------------------------------------------------------------------------------------ texts to evaluate on


def test_a_file_is_evaluated_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" one\r\n\ttwo \n")
    assert evaluation_text(tmp_path / "a.txt", Bytes()) == " one\r\n\ttwo \n"


def test_the_published_texts_of_named_sets(hub):
    hub.tables["Salesforce/wikitext"] = [{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " b \n"}]
    assert evaluation_text("wikitext2", Bytes()) == "\n\n = A = \n\n\n\n\n b \n"
    hub.tables["ptb-text-only/ptb_text_only"] = [{"sentence": "a b"}, {"sentence": "c"}]
    assert evaluation_text("ptb", Bytes()) == "a b c"
    hub.tables["allenai/c4"] = [{"text": str(i)} for i in range(1200)]
    assert evaluation_text("c4", Bytes()) == " ".join(map(str, range(1100)))
    splits = {call[0]: call[-1]["split"] for call in hub.calls}
    assert splits == {"Salesforce/wikitext": "test", "ptb-text-only/ptb_text_only": "test", "allenai/c4": "validation"}
    evaluation_text("wikitext2:validation", Bytes())
    assert hub.calls[-1][-1]["split"] == "validation"


def test_a_set_of_conversations_is_no_text_to_evaluate_on(hub):
    with pytest.raises(TinyGPTQError, match="oasst1 is a set of documents, not one text"):
        evaluation_text("oasst1", Bytes())
    hub.tables["allenai/c4"] = [{"page": "x"}]
    with pytest.raises(TinyGPTQError, match="the field 'text' is missing"):
        evaluation_text("c4", Bytes())


def test_the_published_wikitext_of_a_raw_file_is_the_joined_one(data_dir):
    """The same text as the papers' code makes of the split, of which the data hold the token version both ways."""
    folder = data_dir / "wikitext-2"
    expected = (folder / "test.joined.txt").read_bytes().decode()
    rows = (folder / "test.txt").read_bytes().decode()
    assert wikitext_rows_joined(rows) == expected
    assert wikitext_rows_joined(rows.replace("\n", "\r\n")) == expected
    assert evaluation_text(folder / "test.txt", Bytes(), protocol="wikitext2") == expected


def test_lost_empty_lines_are_put_back_around_headings(data_dir):
    rows = (data_dir / "wikitext-2" / "test.txt").read_bytes().decode()
    without = "".join(line for line in rows.splitlines(keepends=True) if line.strip())
    found, expected = wikitext_rows_joined(without), wikitext_rows_joined(rows)
    assert found.replace("\n", "") == expected.replace("\n", "")
    lost = (len(expected) - len(found)) / len("\n\n")
    assert lost == 59 - 4  # those between paragraphs; two lines of formulas look like headings and get four
