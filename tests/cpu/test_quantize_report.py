"""What a run of quantize leaves and says: the log, the picture, the warnings, the baseline's loss."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder, save_byte_tokenizer

from tinygptq.cli import main
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Hessian, prepare, round_to_nearest
from tinygptq.pictures import require_picture
from tinygptq.quantization import report as quantize_report
from tinygptq.quantization.placement import Clock, Host
from tinygptq.quantization.report import LOG_COLUMNS, LOG_NAME, DeadInputs, LinearReport, rounding_loss
from tinygptq.quantization.run import quantize

ORDER = ["k_proj", "v_proj", "q_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    random_llama_folder(folder / "model", vocab_size=260)
    save_byte_tokenizer(folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return folder


def words(source: Path, out: Path, *more: str) -> list[str]:
    return ["quantize", str(source / "model"), str(out), "--dataset", str(source / "text.txt"), "--nsamples", "70",
            "--seqlen", "32", "--group-size", "32", *more]  # fmt: skip


def test_the_log_has_a_row_for_each_linear(source, tmp_path):
    config = QuantizeConfig(4, 32)
    text = str(source / "text.txt")
    report = quantize(source / "model", tmp_path / "out", config, dataset=text, nsamples=70, seqlen=32)
    with open(tmp_path / "out" / LOG_NAME, newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == LOG_COLUMNS
    assert [(int(row[0]), row[1]) for row in rows] == [(block, name) for block in range(2) for name in ORDER]
    for row, linear in zip(rows, report.linears, strict=True):
        loss, rtn, share, damp, dead, seconds = map(float, row[2:])
        assert loss == pytest.approx(linear.loss, rel=1e-5)
        assert 0 < share < 1  # GPTQ beats rounding
        assert share == pytest.approx(loss / rtn, abs=1e-3)
        assert (damp, dead) == (0.01, 0)
        assert seconds > 0
    assert set(report.stages) == {"forward", "Hessian", "Cholesky", "solver", "comparison with RTN", "pack", "write"}
    assert all(seconds > 0 for seconds in report.stages.values())


@pytest.mark.parametrize("config", [QuantizeConfig(4, 32), QuantizeConfig(3, 48, desc_act=True, sym=False)], ids=["4", "3"])
@pytest.mark.parametrize("rows,within", [(10_000, 1e-4), (128, 0.05)], ids=["every row", "some rows"])
def test_the_baseline_is_rounding_to_nearest(config, rows, within, monkeypatch):
    monkeypatch.setattr(quantize_report, "ROWS_COMPARED", rows)
    rng = np.random.default_rng(5)
    X = rng.normal(size=(3, 400, 96)) @ rng.normal(size=(96, 96))
    X[..., [2, 50]] = 0
    hessian = Hessian(96)
    hessian.add(X.astype(np.float32))
    W = rng.normal(size=(2100, 96)).astype(np.float32)
    factor = prepare(hessian.H, config)
    expected = round_to_nearest(W, config, hessian.H).loss
    assert rounding_loss(W, hessian.H, factor, config, Host()) == pytest.approx(expected, rel=within)


def test_the_picture(source, tmp_path):
    assert main(words(source, tmp_path / "out", "--report", str(tmp_path / "report.png"))) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "report.png"}


@pytest.mark.parametrize(
    "more,said",
    [
        (("--report", "here.pdf"), "expected a name that ends in .png"),
        (("--report", "no/such/folder/here.png"), "there is no such folder"),
        (("--report", "here.png", "--method", "rtn"), "rounding to nearest measures no errors"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(source, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert main(words(source, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TinyGPTQError, match=r"pip install tinygptq\[plot\]"):
        require_picture("x.png", "--report")


def test_json_has_no_nan(source, tmp_path, capsys):
    assert main(words(source, tmp_path / "out", "--method", "rtn", "--json")) == 0
    linears = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))["linears"]
    assert all(linear["loss"] is None and linear["rtn_loss"] is None and linear["dead"] == 0 for linear in linears)
    assert not (tmp_path / "out" / LOG_NAME).exists()


def test_few_windows_are_warned_of(source, tmp_path, caplog):
    text = str(source / "text.txt")
    for nsamples, warned in ((63, True), (64, False)):
        caplog.clear()
        quantize(
            source / "model", tmp_path / str(nsamples), QuantizeConfig(4, 32), dataset=text, nsamples=nsamples, seqlen=16
        )
        said = [m for m in caplog.messages if "windows of 16 tokens" in m]
        assert len(said) == warned


def test_too_short_a_text_is_refused_with_what_would_fit(source, tmp_path, capsys):
    assert main(words(source, tmp_path / "out", "--seqlen", "4000")) == 2
    assert "--nsamples 2 or --seqlen 128 would fit" in capsys.readouterr().err


def test_dead_inputs_are_warned_of_once_and_summed_up(tmp_path, source, caplog):
    """A norm's gain of zero makes one input of q, k and v dead."""
    from helpers import save_safetensors
    from safetensors.numpy import load_file

    random_llama_folder(tmp_path / "model", vocab_size=260)
    save_byte_tokenizer(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for block in range(2):
        tensors[f"model.layers.{block}.input_layernorm.weight"][: 5 + block] = 0
    save_safetensors(tensors, tmp_path / "model" / "model.safetensors")
    report = quantize(tmp_path / "model", tmp_path / "out", QuantizeConfig(4, 32), dataset=str(source / "text.txt"),
                      nsamples=70, seqlen=32)  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "zero in all of the calibration text" in record.getMessage()]
    assert said == [
        "model.layers.0.self_attn.k_proj: 5 of 96 inputs are zero in all of the calibration text, so that their weights "
        "become zero; text of more kinds would reach them",
        "6 linears have inputs that are zero in all of the calibration text; the most has "
        "model.layers.1.self_attn.k_proj: 6 of 96",
    ]
    assert [linear.dead for linear in report.linears] == [5, 5, 5, 0, 0, 0, 0, 6, 6, 6, 0, 0, 0, 0]


def test_one_linear_with_dead_inputs_is_warned_of_once(caplog):
    caplog.set_level(logging.WARNING, "tinygptq")
    dead = DeadInputs()
    dead.add("a", 0, 10)
    dead.add("b", 3, 10)
    dead.sum_up()
    assert [m.split(":")[0] for m in caplog.messages] == ["b"]


def test_memory_is_announced(source, tmp_path, caplog):
    caplog.set_level(logging.INFO, "tinygptq")
    assert main(words(source, tmp_path / "out")) == 0
    assert any(m.startswith("memory: about 0.") for m in caplog.messages)


def test_a_clock_counts_what_is_nested_once():
    clock = Clock()
    with clock("a"):
        for _ in clock.each("b", range(3)):
            pass
    assert set(clock.seconds) == {"a"}
    assert list(clock.each("b", "xyz")) == ["x", "y", "z"]
    assert set(clock.seconds) == {"a", "b"}


def test_a_report_knows_its_place():
    report = LinearReport("model.layers.12.mlp.down_proj", 1.0, 4.0, 0.01, 0, 0.5)
    assert (report.block, report.linear, report.loss_over_rtn) == (12, "down_proj", 0.25)
    assert np.isnan(LinearReport("model.layers.12.mlp.down_proj", 0.0, 0.0, 0.01, 0, 0.5).loss_over_rtn)
