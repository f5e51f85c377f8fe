"""``tinygptq bench`` and ``doctor`` on a machine without a GPU: what they print, and that figures fit together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import tinygptq
from tinygptq.cli import main

MODEL = str(Path(tinygptq.__file__).parent / "assets" / "storyteller")


def test_figures_fit_together(capsys):
    assert main(["bench", MODEL, "--context", "20,40", "--prompt-tokens", "32", "--tokens", "8", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["load_seconds"] > 0
    assert found["memory_gb_per_second"] > 0
    assert [prompt["tokens"] for prompt in found["prefill"]] == [32]
    assert [row["context"] for row in found["decoding"]] == [20, 40]
    for row in found["decoding"]:
        assert row["rows"] == 1
        read = row["gb_per_second"] * 1e9 / row["tokens_per_second"]  # bytes a token
        assert read > found["weights_bytes"] > 3e6
        assert read < found["weights_bytes"] * 1.2


def test_the_table(capsys):
    assert main(["bench", MODEL, "--context", "20", "--prompt-tokens", "32", "--tokens", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "threads: loaded in" in lines[0]
    assert lines[1].startswith("prompt of")
    assert lines[2].startswith("decoding after")
    assert lines[2].endswith("of the memory's")


def test_several_sequences_need_a_gpu(capsys):
    assert main(["bench", MODEL, "--rows", "4"]) == 2
    assert "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--context", "0"], ["--prompt-tokens", "x"], ["--device", "tpu"]])
def test_options_out_of_range_end_in_one_line(option, capsys):
    with pytest.raises(SystemExit) if option[0] != "--device" else _nothing():
        assert main(["bench", MODEL, *option]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def test_doctor_names_what_is_there_and_what_is_missing(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {check["what"]: check for check in json.loads(capsys.readouterr().out)}
    assert found["numpy"]["ok"]
    if importlib.util.find_spec("cupy") is None:
        assert not found["GPU"]["ok"]
        assert "tinygptq[cuda]" in found["cupy-cuda13x"]["mend"]
    assert main(["doctor"]) == 0
    assert "ok       Python" in capsys.readouterr().out
