"""Bad input of every kind ends in one line on stderr, exit code 2 and no traceback, whichever command meets it."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import writers
from golden.writers import random_model
from helpers import random_llama_folder, save_byte_tokenizer

from tinygptq.cli import main

ROOT = Path(__file__).resolve().parents[2]
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A 4-bit folder, act-order, with a tokenizer."""
    path = tmp_path / "model"
    writers.autogptq_03(random_model(4, 32, desc_act=True), path)
    save_byte_tokenizer(path)
    return path


def refused(capsys, *words: object, said: str) -> None:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("tinygptq: error: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert said in captured.err


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def with_header(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrite the header as it is after ``change``, the data as they are."""
    data = weights(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def with_tensors(folder: Path, **parts: np.ndarray) -> None:
    """Replace parts of the first q_proj."""
    tensors = writers.tensors_of(random_model(4, 32, desc_act=True))
    tensors |= {f"{Q_PROJ}.{part}": array for part, array in parts.items()}
    writers.save(weights(folder), tensors)


def in_config(folder: Path, name: str, **fields: object) -> None:
    raw = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(raw | fields))


def g_idx(*last: int) -> np.ndarray:
    rows = np.arange(96, dtype=np.int32) // 32
    rows[96 - len(last) :] = last
    return rows


def truncate(folder: Path, size: int) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:size])


def header_says(folder: Path, length: int) -> None:
    data = weights(folder).read_bytes()
    weights(folder).write_bytes(struct.pack("<Q", length) + data[8:])


def offsets(folder: Path, *values: int) -> None:
    with_header(folder, lambda header: header[f"{Q_PROJ}.scales"].update(data_offsets=list(values)))


def overlap(folder: Path) -> None:
    with_header(
        folder, lambda header: header[f"{Q_PROJ}.g_idx"].update(data_offsets=header["model.norm.weight"]["data_offsets"])
    )


def leave_the_folder(folder: Path) -> None:
    weights(folder).rename(folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "header cut short": (lambda f: truncate(f, 100), "not a valid safetensors file"),
    "length cut short": (lambda f: truncate(f, 5), "not a valid safetensors file"),
    "empty file": (lambda f: truncate(f, 0), "not a valid safetensors file"),
    "data cut short": (lambda f: truncate(f, -10), "not a valid safetensors file"),
    "header larger than the file": (lambda f: header_says(f, 10**6), "not a valid safetensors file"),
    "header of 2^64 - 1 bytes": (lambda f: header_says(f, 2**64 - 1), "not a valid safetensors file"),
    "header no JSON": (lambda f: header_says(f, 50), "not a valid safetensors file"),
    "overlapping offsets": (overlap, "not a valid safetensors file"),
    "offsets beyond the file": (lambda f: offsets(f, 0, 2**40), "not a valid safetensors file"),
    "offsets that run backwards": (lambda f: offsets(f, 100, 0), "not a valid safetensors file"),
    "negative offsets": (lambda f: offsets(f, -64, 0), "not a valid safetensors file"),
    "a shard outside": (leave_the_folder, "shard '../outside.safetensors' is not the plain name"),
    "g_idx too large": (lambda f: with_tensors(f, g_idx=g_idx(3)), "g_idx holds values from 0 to 3, expected 0 to 2"),
    "g_idx negative": (lambda f: with_tensors(f, g_idx=g_idx(-1)), "g_idx holds values from -1 to 2, expected 0 to 2"),
    "g_idx too short": (lambda f: with_tensors(f, g_idx=g_idx()[:95]), "g_idx has shape [95], expected [96]"),
    "g_idx of floats": (lambda f: with_tensors(f, g_idx=g_idx().astype(np.float32)), "g_idx has dtype float32"),
    "scales of NaN": (lambda f: with_tensors(f, scales=np.full((3, 96), np.nan, np.float16)), "scales holds NaN"),
    "one infinite scale": (
        lambda f: with_tensors(f, scales=np.r_[np.ones(287, np.float16), np.float16(-np.inf)].reshape(3, 96)),
        "scales holds NaN or infinity",
    ),
    "scales beyond float32": (lambda f: with_tensors(f, scales=np.full((3, 96), 3e38, np.float32)), "scales reach 3e+38"),
    "shapes of other bits": (lambda f: in_config(f, "quantize_config.json", bits=8), "qweight has shape [12, 96], expected"),
    "shapes of other groups": (lambda f: in_config(f, "quantize_config.json", group_size=48), "qzeros has shape [3, 12], "
                               "expected [2, 12]"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), "expected a JSON object, found list"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{'a'}"), "not readable as JSON"),
    "a config nested too deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "not readable as JSON"),
    "a text for a number": (lambda f: in_config(f, "config.json", hidden_size="96"), "should be int, found '96'"),
    "a list of bits": (lambda f: in_config(f, "quantize_config.json", bits=[4]), "bits is [4], expected one of"),
    "far too many layers": (lambda f: in_config(f, "config.json", num_hidden_layers=10**15), "expected at most 10000"),
    "more rows than the file has": (lambda f: in_config(f, "config.json", vocab_size=10**9), "expected [1000000000, 96]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(folder: Path, capsys, name):
    damage, said = BAD_FOLDERS[name]
    damage(folder)
    refused(capsys, "generate", folder, "--prompt", "x", said=said)
    # the same folder inspected: a report on stdout, the problem in it, and the same exit code
    code = main(["inspect", str(folder), "--json"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    report = json.loads(captured.out)
    assert not report["loads"]
    assert any(said in problem for problem in report["problems"])
    assert not any(loader["loads"] for loader in report["loaders"].values())


def test_a_context_too_large_for_memory(folder: Path, capsys):
    words = ("generate", folder, "--prompt", "x", "--context", 10**15)
    refused(capsys, *words, said="more than there is; choose a smaller --context")


def test_ids_beyond_the_vocabulary(folder: Path, capsys):
    """The byte tokenizer has 259 ids, the embedding 64 rows."""
    refused(capsys, "generate", folder, "--prompt", "x", said="outside the vocabulary of 64")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    random_llama_folder(tmp_path / "dense", dtype="float16", vocab_size=260, num_hidden_layers=1)
    save_byte_tokenizer(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds no text"), ("a", "holds 1 token; 2 windows of 16 need 32 tokens"), ("abcde", "holds 5 tokens")],
)
def test_calibration_text_too_short(dense: Path, tmp_path: Path, capsys, text, said):
    (tmp_path / "text.txt").write_text(text)
    words = ("quantize", dense, tmp_path / "out", "--dataset", tmp_path / "text.txt", "--nsamples", 2, "--seqlen", 16)
    refused(capsys, *words, said=said)
    assert not (tmp_path / "out").exists()


def test_prompt_longer_than_the_context(dense: Path, capsys):
    refused(capsys, "generate", dense, "--prompt", "x" * 100, said="the prompt's 100 tokens fill the context of 64")


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_an_output_folder_that_holds_something_else(dense: Path, tmp_path: Path, capsys, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    more = ("--method", "rtn") if command == "quantize" else ("--to", "fp32")
    refused(capsys, command, dense, out, *more, said="already exists and is not an empty folder")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert (out / "thesis.txt").read_text() == "years of work"


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))  # what a write past it raises is an OSError, as of a full disk
from tinygptq.cli import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize("size", [0, 100, 20_000])  # at the first file, inside it, inside the weights
@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_a_full_disk_leaves_nothing_behind(dense: Path, tmp_path: Path, command, size):
    pytest.importorskip("resource", reason="file size limits are a POSIX feature")
    place = tmp_path / "place"
    place.mkdir()
    more = ["--method", "rtn"] if command == "quantize" else ["--to", "fp32"]
    code = FULL_DISK.format(size=size, words=[command, str(dense), str(place / "out"), *more])
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("tinygptq: error: ")]
    assert len(errors) == 1 and "cannot be written" in errors[0]
    assert list(place.iterdir()) == []


def test_an_unwritable_place(dense: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    refused(capsys, "quantize", dense, tmp_path / "file" / "out", "--method", "rtn", said="cannot be written")
    if Path("/proc/self").is_dir():
        refused(capsys, "quantize", dense, "/proc/self/out", "--method", "rtn", said="/proc/self/out: cannot be written")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("bench", "MODEL", "--context", "x"), "'x', expected numbers from 1 on"),
        (("bench", "MODEL", "--tokens", "0"), "0, expected at least 1"),
        (("eval", "MODEL", "--tasks", "gsm-cot", "--limit", "nan"), "--limit is nan"),
        (("size", "MODEL", "--context", "-5"), "--context is -5, expected at least 1"),
        (("chat", "MODEL", "--seed", "-5"), "seed is -5, expected at least 0"),
        (("convert", "MODEL", "out", "--to", "fp16", "--max-shard-size", "9" * 400), "larger than any disk"),
        (("card", "MODEL", "--out", ""), "is a folder, expected the name of a file"),
        (("compare", "MODEL", "MODEL", "--text", "t.txt", "--plot", "nowhere/x.png"), "there is no such folder"),
        (("inspect", "a" * 300), "File name too long"),
        (("convert", "missing.gguf", "out"), "no such folder or file"),
    ],
)
def test_options_out_of_range(folder: Path, capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tinygptq"])
    words = [str(folder) if word == "MODEL" else word for word in words]
    try:
        refused(capsys, *words, said=said)
    except SystemExit as left:  # argparse's own way out
        captured = capsys.readouterr()
        assert left.code == 2 and said in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sampling_defaults_of_a_folder_are_looked_at(folder: Path, capsys):
    (folder / "generation_config.json").write_text('{"top_p": 5}')
    assert main(["inspect", str(folder)]) == 2
    assert "generation_config.json: 'top_p' should be at most 1, found 5.0" in capsys.readouterr().err


def test_numbers_too_long_for_python(folder: Path, capsys):
    (folder / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    refused(capsys, "size", folder, said="config.json: not readable as JSON")


def test_folders_made_on_the_way_go_with_what_failed(dense: Path, tmp_path: Path, capsys):
    (tmp_path / "empty.txt").write_text("")
    refused(capsys, "quantize", dense, tmp_path / "a/b/out", "--dataset", tmp_path / "empty.txt", said="holds no text")
    refused(capsys, "convert", dense, tmp_path / "a/b/out", said="already")
    assert not (tmp_path / "a").exists()


def test_what_a_killed_conversion_left_goes_with_the_next(dense: Path, tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    abandoned, of_another = tmp_path / f".out.partial-{gone.pid}", tmp_path / f".out.partial-{1}"
    abandoned.mkdir()
    of_another.mkdir()
    assert main(["convert", str(dense), str(tmp_path / "out"), "--to", "fp16"]) == 0
    assert not abandoned.exists() and of_another.exists()


def test_a_card_is_written_through_a_link_and_into_what_is_no_file(folder: Path, tmp_path: Path):
    real, link = tmp_path / "real.md", tmp_path / "link.md"
    real.write_text("old")
    link.symlink_to(real.name)
    assert main(["card", str(folder), "--out", str(link)]) == 0
    assert link.is_symlink() and "GPTQ" in real.read_text()
    if sys.platform == "linux":
        assert main(["card", str(folder), "--out", "/dev/null"]) == 0
        assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to write to")
@pytest.mark.parametrize("words", [("inspect", "MODEL"), ("generate", "MODEL", "--prompt", "a", "--max-new-tokens", "2")])
def test_an_output_that_takes_nothing(dense: Path, words):
    words = [str(dense) if word == "MODEL" else word for word in words]
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "tinygptq.cli", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2
    assert "tinygptq: error: [Errno 28] No space left on device" in run.stderr and "Traceback" not in run.stderr


def test_standard_input_that_is_no_text(folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi \xff"), encoding="utf-8"))
    refused(capsys, "generate", folder, "--prompt", "-", said="standard input is not valid UTF-8")
    monkeypatch.setattr(sys, "stdin", None)
    refused(capsys, "generate", folder, "--prompt", "-", said="closed")


def test_windows_longer_than_the_model_was_made_for(dense: Path, tmp_path: Path, caplog):
    (tmp_path / "text.txt").write_text("a word or two " * 2000)
    most = json.loads((dense / "config.json").read_text())["max_position_embeddings"]
    command = ["perplexity", str(dense), "--dataset", str(tmp_path / "text.txt"), "--max-windows", "1"]
    assert main(command) == 0
    assert not caplog.messages
    assert main([*command, "--seqlen", str(most + 1)]) == 0
    assert any(f"windows of {most + 1} tokens, but the model was made for {most}" in line for line in caplog.messages)


def test_a_demo_that_cannot_be_kept_says_so_first(tmp_path: Path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    refused(capsys, "demo", "--out", tmp_path / "full", said="already exists and is not an empty folder")
