"""`quantize --device cuda` as a whole: beside the CPU, twice, cut off and continued, with activations on the host."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_layers import relative_error
from helpers import contents, random_llama_folder, save_byte_tokenizer

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.quantization.run import quantize

BLOCKS = 3
KINDS = {
    "main": (QuantizeConfig(4, 32), "gptq"),
    "act-order": (QuantizeConfig(4, 32, desc_act=True), "gptq"),
    "a block at once": (QuantizeConfig(3, 64, sym=False, true_sequential=False), "gptq"),
    "rounding": (QuantizeConfig(4, 32), "rtn"),
    "best": (QuantizeConfig(4, 32, recipe=RECIPES["best"]), "gptq"),
}


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def source(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    random_llama_folder(folder, dtype=request.param, vocab_size=260, num_hidden_layers=BLOCKS)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(chr(c) for c in np.random.default_rng(0).integers(97, 123, 20000)))
    return path


def run(source: Path, out: Path, text: Path, kind: str, **options):
    config, method = KINDS[kind]
    settings = {"dataset": str(text), "nsamples": 300, "seqlen": 40, "device": "cuda", "method": method, **options}
    return quantize(source, out, config, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_beside_the_cpu_and_twice(source, text, tmp_path, kind):
    report = run(source, tmp_path / "a", text, kind)
    run(source, tmp_path / "b", text, kind)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    expected = run(source, tmp_path / "cpu", text, kind, device="cpu")
    here, there = (load_checkpoint(tmp_path / name).weights.linears for name in ("cpu", "a"))
    for name, linear in here.items():
        if "layers.0.self_attn" in name or kind == "rounding":
            same_order = linear.perm is None or np.array_equal(linear.perm, there[name].perm)
            # o_proj's inputs have been fp16: where two entries of diag(H) nearly tie, groups may be cut another way
            assert same_order or name.endswith("o_proj"), name
            a, b = linear.dequantize(), there[name].dequantize()
            if kind == "best":  # one other code, and the scale refitted for its group makes all of that differ
                assert relative_error(b, a) < 0.1, (name, relative_error(b, a), (a == b).mean())
            elif same_order:
                assert (a == b).mean() > 0.9, name
    assert [r.name for r in report.linears] == [r.name for r in expected.linears]
    if kind != "rounding":
        for a, b in zip(report.linears[:7], expected.linears[:7], strict=True):
            assert abs(a.loss / b.loss - 1) < 0.1, a.name
            assert abs(a.rtn_loss / b.rtn_loss - 1) < 0.1, a.name
        assert {"forward", "Hessian", "Cholesky", "solver", "pack", "write", "reading"} <= set(report.stages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", range(1, BLOCKS))
def test_cut_off_and_continued(source, text, tmp_path, monkeypatch, kind, blocks):
    from tinygptq.quantization import resume

    monkeypatch.setattr(resume, "SAVE_SHARE", np.inf)
    save = resume.Progress.save

    def stopping(self, done, *args):
        save(self, done, *args)
        if done == blocks:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(resume.Progress, "save", stopping)
        run(source, tmp_path / "a", text, kind, resume=True)
    run(source, tmp_path / "a", text, kind, resume=True)
    run(source, tmp_path / "b", text, kind)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("kind", ["main", "a block at once", "best"])
def test_activations_on_the_host_change_nothing(source, text, tmp_path, monkeypatch, kind):
    from tinygptq.quantization import placement_cuda

    run(source, tmp_path / "a", text, kind)
    made = []
    original = placement_cuda.HostBatches.__init__
    monkeypatch.setattr(placement_cuda.HostBatches, "__init__", lambda self, b: made.append(1) or original(self, b))
    monkeypatch.setattr(placement_cuda, "stage_bytes", lambda *_: 10**15)  # nothing fits, nothing is kept
    run(source, tmp_path / "b", text, kind)
    assert len(made) == (4 if kind == "best" else 1)  # the unquantised model's too, and those of two batches for gradients
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_hessians_on_tensor_cores(source, text, tmp_path, monkeypatch):
    """As for inputs wider than those of this model."""
    from tinygptq.quantization import placement_cuda

    reports = [run(source, tmp_path / "a", text, "main")]
    monkeypatch.setattr(placement_cuda, "NARROW", 0)
    reports.append(run(source, tmp_path / "b", text, "main"))
    run(source, tmp_path / "c", text, "main")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    for a, b in zip(*(report.linears[:7] for report in reports), strict=True):
        assert abs(a.loss / b.loss - 1) < 0.05, a.name


def test_kill_9(source, text, tmp_path):
    """Killed after its first saved state, and once more later; the last run ends as one that is left alone."""
    words = [sys.executable, "-m", "tinygptq.cli", "quantize", str(source), "", "--device", "cuda", "--dataset", str(text),
             "--nsamples", "300", "--seqlen", "40", "--group-size", "32", "--desc-act", "--resume"]  # fmt: skip
    words[5] = str(tmp_path / "whole")
    subprocess.run(words, check=True, capture_output=True)
    words[5] = str(tmp_path / "killed")
    for wait in (0.0, 0.05):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        state = tmp_path / ".killed.unfinished" / "state.json"
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(words, check=False, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
