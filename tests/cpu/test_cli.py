"""The command line: what each mistake says, what --json prints, and the whole road on the embedded model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder, save_byte_tokenizer

from tinygptq import __version__
from tinygptq.cli import main
from tinygptq.config import RECIPES

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the quick brown fox jumps over the lazy dog. " * 40  # a byte is a token: 1,800 of them


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Small folders that share a byte tokenizer: ``model``, ``gpt2``, ``no-tokenizer``, ``narrow``, and texts."""
    root = tmp_path_factory.mktemp("cli")
    kinds = {
        "model": {},
        "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        "no-tokenizer": {},
        "narrow": {"intermediate_size": 100},
        "few-rows": {"vocab_size": 100},
    }
    for name, overrides in kinds.items():
        random_llama_folder(root / name, **{"vocab_size": 260, "num_hidden_layers": 1, **overrides})
        if name != "no-tokenizer":
            save_byte_tokenizer(root / name)
    (root / "text.txt").write_text(TEXT)
    (root / "empty.txt").write_text("")
    (root / "short.txt").write_text("too little")
    (root / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    (root / "taken").mkdir()
    (root / "taken" / "file").touch()
    return root


@pytest.fixture
def tinygptq(folders, capsys):
    """Run a command line in this process; words that name a file of ``folders`` become its path."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        known = {path.name for path in folders.iterdir()}
        argv = [str(folders / word) if word in known else str(word) for word in words]
        try:
            code = main(argv)
        except SystemExit as end:  # argparse
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


GENERATE = ("generate", "model", "--prompt", "hello")
PERPLEXITY = ("perplexity", "model", "--dataset", "text.txt", "--seqlen", "64")
QUANTIZE = ("quantize", "model", "{new}", "--dataset", "text.txt", "--nsamples", "4", "--seqlen", "32", "--group-size", "32")


def changed(command: tuple[str, ...], *words: str, **places: str) -> tuple[str, ...]:
    """A command with more words (the last of an option counts), or with another word at a place."""
    swapped = [places.get(f"at{i}", word) for i, word in enumerate(command)]
    return (*swapped, *words)


MISTAKES = {
    "no such folder": (changed(GENERATE, at1="nowhere"), "nowhere: no such folder"),
    "a file for a folder": (changed(GENERATE, at1="text.txt"), "text.txt: no such folder"),
    "no LLaMA": (changed(GENERATE, at1="gpt2"), "architectures is ['GPT2LMHeadModel']"),
    "no tokenizer": (changed(GENERATE, at1="no-tokenizer"), "no tokenizer found"),
    "a tokenizer larger than the model": (changed(GENERATE, at1="few-rows", at3="\u00ff"), "outside the vocabulary of 100"),
    "empty prompt": (changed(GENERATE, at3=""), "the prompt holds no tokens"),
    "prompt too long": (changed(GENERATE, "--context", "5"), "the prompt's 5 tokens fill the context of 5"),
    "no context": (changed(GENERATE, "--context", "0"), "context is 0"),
    "greedy and warm": (changed(GENERATE, "--greedy", "--temperature", "1"), "--greedy and --temperature contradict"),
    "below zero degrees": (changed(GENERATE, "--temperature", "-1"), "temperature is -1.0"),
    "top-p above 1": (changed(GENERATE, "--top-p", "1.5"), "top_p is 1.5"),
    "negative top-k": (changed(GENERATE, "--top-k", "-1"), "top_k is -1"),
    "penalty of 0": (changed(GENERATE, "--repetition-penalty", "0"), "repetition_penalty is 0.0"),
    "fewer than no tokens": (changed(GENERATE, "--max-new-tokens", "-1"), "max_new_tokens is -1"),
    "negative minimum": (changed(GENERATE, "--min-new-tokens", "-2"), "min_new_tokens is -2"),
    "negative seed": (changed(GENERATE, "--temperature", "1", "--seed", "-1"), "seed is -1, expected at least 0"),
    "unknown template": (changed(GENERATE, "--template", "nonsense"), "'nonsense'"),
    "no template in the folder": (changed(GENERATE, "--template", "folder"), "the folder has no chat template"),
    "8-bit cache without a GPU": (changed(GENERATE, "--cache-bits", "8"), "an 8-bit cache, are the GPU engine's"),
    "a chat's, too": (("chat", "model", "--cache-bits", "8"), "an 8-bit cache, are the GPU engine's"),
    "text is no number": (changed(GENERATE, "--top-k", "many"), "--top-k"),
    "no prompt": (GENERATE[:2], "--prompt"),
    "unknown command": (("dance",), "'dance'"),
    "no command": ((), "COMMAND"),
    "device not there": (changed(GENERATE, "--device", "abacus"), "'abacus'"),
    "no such dataset": (changed(PERPLEXITY, at3="nothing.txt"), "'nothing.txt' is neither a file nor one of"),
    "a folder for a dataset": (changed(PERPLEXITY, at3="taken"), "neither a file nor one of"),
    "empty dataset": (changed(PERPLEXITY, at3="empty.txt"), "the text holds 0 token(s)"),
    "not UTF-8": (changed(PERPLEXITY, at3="latin1.txt"), "latin1.txt: not UTF-8 text (byte 3)"),
    "windows of one token": (changed(PERPLEXITY, "--seqlen", "1"), "--seqlen is 1"),
    "no windows": (changed(PERPLEXITY, "--max-windows", "0"), "--max-windows is 0"),
    "a stride beyond the window": (changed(PERPLEXITY, "--stride", "65"), "--stride is 65, expected 1 to --seqlen"),
    "a protocol for a named set": (changed(PERPLEXITY, "--protocol", "wikitext2", at3="ptb"), "--protocol says how to read"),
    "instructions are no text": (changed(PERPLEXITY, at3="oasst1"), "oasst1 is a set of documents"),
    "perplexity of no folder": (changed(PERPLEXITY, at1="nowhere"), "no such folder"),
    "output exists": (changed(QUANTIZE, at2="taken"), "already exists and is not an empty folder"),
    "output is a file": (changed(QUANTIZE, at2="text.txt"), "already exists and is not an empty folder"),
    "source is missing": (changed(QUANTIZE, at1="nowhere"), "no such folder"),
    "source is no LLaMA": (changed(QUANTIZE, at1="gpt2"), "architectures"),
    "sizes do not pack": (changed(QUANTIZE, at1="narrow"), "100 output features of 4 bits do not fill 32-bit words"),
    "calibration text missing": (changed(QUANTIZE, at4="nothing.txt"), "'nothing.txt' is neither a file"),
    "calibration text short": (changed(QUANTIZE, at4="short.txt"), "short.txt holds 10 tokens"),
    "no samples": (changed(QUANTIZE, "--nsamples", "0"), "nsamples"),
    "five bits": (changed(QUANTIZE, "--bits", "5"), "--bits"),
    "group of none": (changed(QUANTIZE, "--group-size", "0"), "group_size is 0"),
    "negative calibration seed": (changed(QUANTIZE, "--seed", "-1"), "seed is -1, expected at least 0"),
    "damping of 1": (changed(QUANTIZE, "--damp-percent", "1"), "damp_percent is 1.0"),
    "unknown method": (changed(QUANTIZE, "--method", "magic"), "'magic'"),
}


def test_a_prompt_in_the_folders_own_template(tinygptq, folders, tmp_path):
    pytest.importorskip("jinja2")
    folder = tmp_path / "templated"
    shutil.copytree(folders / "model", folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>")
    options = "--greedy", "--max-new-tokens", "6"
    rendered = tinygptq("generate", folder, "--prompt", "<user>hello<answer>", *options)
    assert rendered[0] == 0
    assert tinygptq("generate", folder, "--prompt", "hello", "--template", "folder", *options) == rendered
    assert tinygptq("generate", folder, "--prompt", "hello", *options) != rendered


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(tinygptq, folders, tmp_path, name):
    words, part = MISTAKES[name]
    before = {path.name for path in folders.iterdir()}
    code, out, err = tinygptq(*(word.replace("{new}", str(tmp_path / "out")) for word in words))
    assert code == 2
    assert out == ""
    assert err.startswith("tinygptq: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert part in err
    assert {path.name for path in folders.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "tinygptq.cli", "generate", str(tmp_path / "a\nb"), "--prompt", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tinygptq: error: {tmp_path}/a b: no such folder\n"


def test_version_and_help(tinygptq):
    assert tinygptq("--version") == (0, f"tinygptq {__version__}\n", "")
    code, out, err = tinygptq("--help")
    assert (code, err) == (0, "")
    for command in ("demo", "quantize", "generate", "perplexity"):
        assert command in out
        assert tinygptq(command, "--help")[0] == 0


# ------------------------------------------------------------------------------------------------ a small random model


def one_object(out: str) -> dict:
    """``--json`` prints one JSON object, on one line, with nothing that JSON does not know."""
    assert out.count("\n") == 1

    def unknown(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    value = json.loads(out, parse_constant=unknown)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_quantize_json(tinygptq, tmp_path, method):
    out = tmp_path / "out"
    words = [word.replace("{new}", str(out)) for word in changed(QUANTIZE, "--method", method, "--json", "--asym")]
    code, text, _ = tinygptq(*words)
    assert code == 0
    report = one_object(text)
    assert report["folder"] == str(out)
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    assert report["seconds"] > 0
    assert len(report["linears"]) == 7
    for linear in report["linears"]:
        assert linear.keys() == {"name", "loss", "rtn_loss", "damp", "dead", "seconds"}
        assert linear["dead"] == 0
        assert linear["loss"] is None if method == "rtn" else linear["rtn_loss"] > linear["loss"] > 0
    written = json.loads((out / "quantize_config.json").read_text())
    assert (written["bits"], written["group_size"], written["sym"], written["desc_act"]) == (4, 32, False, False)


def test_every_option_of_quantize_arrives(tinygptq, tmp_path):
    out = tmp_path / "out"
    words = changed(QUANTIZE, "--bits", "3", "--group-size", "-1", "--desc-act", "--static-groups", "--damp-percent", "0.05",
                    "--no-true-sequential", "--checkpoint-format", "gptq_v2", "--recipe", "plain")  # fmt: skip
    code, text, _ = tinygptq(*(word.replace("{new}", str(out)) for word in words))
    assert code == 0
    size = (out / "model.safetensors").stat().st_size
    assert text.startswith(f"{out}: {size:,} bytes, 7 linears in ")
    written = json.loads((out / "quantize_config.json").read_text())
    assert {key: written[key] for key in ("bits", "group_size", "desc_act", "sym", "static_groups", "damp_percent",
                                          "true_sequential", "checkpoint_format")} == {
        "bits": 3, "group_size": -1, "desc_act": True, "sym": True, "static_groups": True, "damp_percent": 0.05,
        "true_sequential": False, "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    assert written["meta"]["recipe"] == asdict(RECIPES["plain"])
    code, _, err = tinygptq("quantize", out, tmp_path / "again", "--dataset", "text.txt")
    assert code == 2
    assert "is quantised already (3 bits)" in err


def test_perplexity_json(tinygptq):
    code, text, _ = tinygptq(*PERPLEXITY, "--json")
    assert code == 0
    result = one_object(text)
    assert result.keys() == {"perplexity", "tokens", "windows", "seqlen", "stride", "protocol"}
    assert (result["tokens"], result["windows"], result["seqlen"]) == (28 * 63, 28, 64)
    assert (result["stride"], result["protocol"]) == (64, None)
    assert 1 < result["perplexity"] < 1e6
    code, text, _ = tinygptq(*PERPLEXITY, "--max-windows", "2")
    assert code == 0
    assert text.startswith("perplexity ")
    assert "over 126 tokens (2 x 64)" in text
    code, text, _ = tinygptq(*PERPLEXITY, "--stride", "16", "--protocol", "wikitext2", "--json")
    strided = one_object(text)
    assert (strided["stride"], strided["protocol"], strided["tokens"]) == (16, "wikitext2", 1799)
    assert "raw test split" in tinygptq(*PERPLEXITY, "--stride", "16", "--protocol", "wikitext2")[1]


def test_generate_prints_the_continuation_and_a_newline(tinygptq):
    code, first, _ = tinygptq(*GENERATE, "--max-new-tokens", "20", "--greedy")
    assert code == 0
    assert first.endswith("\n")
    assert tinygptq(*GENERATE, "--max-new-tokens", "20", "--temperature", "0")[1] == first
    assert tinygptq(*GENERATE, "--max-new-tokens", "0")[1] == "\n"
    warm = (*GENERATE, "--max-new-tokens", "20", "--temperature", "1", "--seed")
    sampled = [tinygptq(*warm, seed)[1] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_reads_its_prompt_from_standard_input(tinygptq, monkeypatch):
    import io

    expected = tinygptq(*GENERATE, "--max-new-tokens", "8")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert tinygptq(*changed(GENERATE, "--max-new-tokens", "8", at3="-"))[1] == expected


def test_generate_stops_at_a_stop_string_and_at_the_context(tinygptq, folders):
    from tinygptq import load

    text = tinygptq(*GENERATE, "--max-new-tokens", "30")[1][:-1]
    stop = text[10:12]
    assert tinygptq(*GENERATE, "--max-new-tokens", "30", "--stop", stop)[1] == text[: text.index(stop)] + "\n"
    assert len(list(load(folders / "model", context=12).stream("hello", max_new_tokens=500, min_new_tokens=500))) == 12 - 5


@pytest.mark.parametrize("stop", [(), ("\x00\x00",), ("e", "o"), "e"])
def test_streaming_gives_one_piece_a_token_and_the_same_text(folders, stop):
    from tinygptq import load
    from tinygptq.generate import generate_ids
    from tinygptq.sampling import Sampler, SamplingParams

    model = load(folders / "model", context=64)
    for seed in range(5):
        sampler = Sampler(SamplingParams(temperature=2.0, min_new_tokens=40), 260, (2,), seed)
        ids = list(generate_ids(model.engine, model.tokenizer.encode("hello"), sampler, 40, (2,)))
        text = model.tokenizer.decode(ids)  # random bytes: many are no UTF-8, and the last may be half a character
        stops = (stop,) if isinstance(stop, str) else stop
        end = min((text.find(one) for one in stops if one in text), default=len(text))
        settings = {"max_new_tokens": 40, "min_new_tokens": 40, "temperature": 2.0, "seed": seed}
        pieces = list(model.stream("hello", stop=stop, **settings))
        assert "".join(pieces) == text[:end]
        assert len(pieces) == 40 if end == len(text) else len(pieces) <= 40


def test_the_forward_pass_of_a_loaded_model_is_the_definition(folders):
    from tinygptq import load
    from tinygptq.folders.checkpoint import load_checkpoint
    from tinygptq.model import Llama

    checkpoint = load_checkpoint(folders / "model")
    ids = np.random.default_rng(0).integers(0, 260, (2, 17))
    expected = Llama(checkpoint.config, checkpoint.weights).forward(ids)
    found = load(folders / "model").forward(ids)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4


# ------------------------------------------------------------------------------------------------ the embedded model


def test_the_whole_road_on_the_embedded_model(embedded: Path, tinygptq, tmp_path):
    out, text = tmp_path / "4bit", embedded / "heldout.txt"
    calibration = embedded / "calibration.txt"
    if not (text.is_file() and calibration.is_file()):
        pytest.skip("the embedded model has no texts beside it")
    code, report, _ = tinygptq("quantize", embedded, out, "--dataset", calibration, "--nsamples", "8", "--seqlen", "128",
                               "--group-size", "64", "--json")  # fmt: skip
    assert code == 0
    assert one_object(report)["bytes"] < (embedded / "model.safetensors").stat().st_size
    figures = {}
    for folder in (embedded, out):
        code, line, _ = tinygptq("perplexity", folder, "--dataset", text, "--seqlen", "128", "--max-windows", "8", "--json")
        assert code == 0
        figures[folder] = one_object(line)["perplexity"]
    assert figures[embedded] < figures[out] < 1.3 * figures[embedded]
    words = ("--prompt", "Once upon a time", "--max-new-tokens", "40", "--temperature", "0.7", "--seed", "1")
    code, story, _ = tinygptq("generate", out, *words)
    assert code == 0
    assert len(story.split()) > 10
