"""A quantisation that is stopped anywhere and continued writes, bit for bit, what one that is left alone writes."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import contents, random_llama_folder, save_byte_tokenizer

from tinygptq.cli import main
from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.quantization import blocks as block_loop
from tinygptq.quantization import placement, resume
from tinygptq.quantization.report import LinearReport
from tinygptq.quantization.resume import Progress, place_of, unfinished_folder
from tinygptq.quantization.run import QuantizeReport, quantize

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 3
CONFIG = QuantizeConfig(4, 32, desc_act=True)
KINDS = {
    "true-sequential": (CONFIG, "gptq"),
    "a block at once": (QuantizeConfig(3, 64, sym=False, true_sequential=False), "gptq"),
    "best": (QuantizeConfig(4, 32, recipe=RECIPES["best"]), "gptq"),  # the unquantised model runs beside it
    "rounding": (QuantizeConfig(4, 32), "rtn"),
}
KILLS = int(os.environ.get("TINYGPTQ_KILLS", "3"))


@pytest.fixture(autouse=True)
def save_every_block(monkeypatch):
    """Blocks of these models take less time than saving them, which real ones do not."""
    monkeypatch.setattr(resume, "SAVE_SHARE", np.inf)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """``src``, ``text.txt``, and uninterrupted runs under ``whole``."""
    root = tmp_path_factory.mktemp("resume")
    random_llama_folder(root / "src", vocab_size=260, num_hidden_layers=BLOCKS)
    save_byte_tokenizer(root / "src")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return root


def run(root: Path, out: Path, kind: str = "true-sequential", **options) -> QuantizeReport:
    config, method = KINDS[kind]
    settings = {"dataset": str(root / "text.txt"), "nsamples": 4, "seqlen": 32, "method": method, "resume": True, **options}
    return quantize(settings.pop("src", root / "src"), out, settings.pop("config", config), **settings)


def whole(root: Path, kind: str = "true-sequential") -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    folder = root / "whole" / kind
    if not folder.exists():
        run(root, folder, kind)
    return contents(folder)


def stop(*_: object) -> None:
    raise RuntimeError("stopped")


def stop_after(monkeypatch, blocks: int, failure: type[BaseException] = RuntimeError) -> None:
    """Let the next runs raise when ``blocks`` blocks are done and saved."""
    save = Progress.save

    def stopping(self, done, *args):
        save(self, done, *args)
        if done == blocks:
            raise failure("stopped")

    monkeypatch.setattr(Progress, "save", stopping)


@pytest.fixture
def begun(root, tmp_path, monkeypatch) -> Path:
    """An OUT on which work was stopped after two blocks."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 2)
        run(root, tmp_path / "out")
    return tmp_path / "out"


# ------------------------------------------------------------------------------------------------ stopped and continued


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", range(1, BLOCKS))
def test_continues_at_the_block_it_had_reached(root, tmp_path, monkeypatch, caplog, kind, blocks):
    out = tmp_path / "out"
    caplog.set_level(logging.INFO, "tinygptq")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, blocks)
        run(root, out, kind)
    assert not out.exists()
    assert f"{out}: {blocks} blocks are done and kept; the same command continues" in caplog.messages
    solved = []
    replace = block_loop._replace
    monkeypatch.setattr(block_loop, "_replace", lambda *args: solved.append(args[1]) or replace(*args))
    report = run(root, out, kind)
    assert solved == [layer for layer in range(blocks, BLOCKS) for _ in range(7)]
    assert contents(out) == whole(root, kind)
    assert list(tmp_path.iterdir()) == [out]
    assert len({linear.name for linear in report.linears}) == len(report.linears) == 7 * BLOCKS
    assert all(isinstance(linear, LinearReport) for linear in report.linears)
    assert report.seconds > sum(linear.seconds for linear in report.linears)  # those of the first part included


def test_stopped_in_every_block(root, tmp_path, monkeypatch):
    for blocks in range(1, BLOCKS):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
            stop_after(patch, blocks)
            run(root, tmp_path / "out")
    run(root, tmp_path / "out")
    assert contents(tmp_path / "out") == whole(root)


class Killed(BaseException):
    """Stands for a death that runs no handler."""


def watched(patch: pytest.MonkeyPatch, last: int | None) -> list[str]:
    """Die at step number ``last`` of all that changes a file or its name; returns the steps as they are taken."""
    steps: list[str] = []

    def counting(name: str, function: Callable) -> Callable:
        def step(*args, **kwargs):
            steps.append(name)
            if last is not None and len(steps) > last:
                raise Killed
            return function(*args, **kwargs)

        return step

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"),
                        (resume, "_write_batches"), (placement, "packed")):  # fmt: skip
        patch.setattr(owner, name, counting(name, getattr(owner, name)))
    patch.setattr(resume, "_after_failure", lambda *_: None)
    return steps


def test_killed_before_each_step_that_touches_a_file(root, tmp_path, monkeypatch):
    """All that can be left behind between two steps; within a write, it is for SIGKILL below."""
    expected = whole(root)
    with monkeypatch.context() as patch:
        steps = watched(patch, None)
        run(root, tmp_path / "counted")
    assert steps.count("_write_batches") == BLOCKS - 1
    assert steps.count("packed") == 7 * BLOCKS
    for last in [i for i, step in enumerate(steps) if step != "packed" or i % 4 == 0]:
        out = tmp_path / f"out-{last}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            watched(patch, last)
            run(root, out)
        if out.exists():  # only the clearing away was left to do
            with pytest.raises(TinyGPTQError, match="already exists"):
                run(root, out)
        else:
            run(root, out)
        assert contents(out) == expected, last
        assert not place_of(out).exists()


SCRIPT = """
import sys
from tinygptq.quantization import resume
from tinygptq.cli import main
resume.SAVE_SHARE = float(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def start(src: Path, out: Path, text: Path, *options: str, share: float) -> subprocess.Popen:
    words = ["quantize", str(src), str(out), "--dataset", str(text), *options, "--resume"]
    command = [sys.executable, "-c", SCRIPT, str(share), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def working_time(process: subprocess.Popen, out: Path) -> float:
    """Seconds from the first sign of work on OUT to the end of the process."""
    while not place_of(out).exists() and process.poll() is None:
        time.sleep(0.005)
    begun = time.perf_counter()
    process.wait()
    return time.perf_counter() - begun


def kill_again_and_again(
    begin: Callable[[Path], subprocess.Popen], folder: Path, kills: int, rng: random.Random
) -> Iterator[Path]:
    """Yield finished folders, one of them left alone and the others continued after kill -9 at ``kills`` random moments."""
    process = begin(folder / "whole")
    seconds = working_time(process, folder / "whole")
    output = process.communicate()
    assert process.returncode == 0, output
    yield folder / "whole"
    killed, number, out = 0, 0, folder / "out-0"
    while killed < kills or not out.exists():
        process = begin(out)
        while not place_of(out).exists() and process.poll() is None:
            time.sleep(0.005)
        if killed < kills:
            time.sleep(rng.uniform(0, 0.6 * seconds))  # a run is thus cut into several, most of them in the middle
            process.send_signal(signal.SIGKILL)
        output = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        killed += process.returncode == -signal.SIGKILL
        if out.exists():
            yield out
            if killed < kills:
                number += 1
                out = folder / f"out-{number}"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_kill_9_at_random_moments(tmp_path):
    """Windows enough that blocks take most of the time; as many kills as TINYGPTQ_KILLS says."""
    random_llama_folder(tmp_path / "src", vocab_size=260, num_hidden_layers=8)
    save_byte_tokenizer(tmp_path / "src")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)

    def begin(out: Path) -> subprocess.Popen:
        options = ("--nsamples", "128", "--seqlen", "64", "--group-size", "32")
        return start(tmp_path / "src", out, tmp_path / "text.txt", *options, share=np.inf)

    folders = list(kill_again_and_again(begin, tmp_path, KILLS, random.Random(8)))
    assert len(folders) > 1
    for folder in folders[1:]:
        assert contents(folder) == contents(folders[0])
    assert {path.name for path in tmp_path.iterdir()} - {"src", "text.txt"} == {folder.name for folder in folders}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_kill_9_of_a_real_model(smollm2, data_dir, tmp_path):
    """With states as rare as a user has them; 20 kills take some four minutes on two cores."""

    def begin(out: Path) -> subprocess.Popen:
        text = data_dir / "wikitext-2" / "valid.joined.txt"
        return start(smollm2, out, text, "--nsamples", "4", "--seqlen", "128", share=0.03)

    first, *others = kill_again_and_again(begin, tmp_path, KILLS, random.Random(20))
    for folder in others:
        assert contents(folder) == contents(first)


# ------------------------------------------------------------------------------------------------ what stays, and what not


def test_nothing_to_continue_is_a_start(root, tmp_path):
    run(root, tmp_path / "out")
    assert contents(tmp_path / "out") == whole(root)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, TinyGPTQError, MemoryError])
def test_without_resume_a_failure_leaves_nothing(root, tmp_path, monkeypatch, failure):
    stop_after(monkeypatch, 2, failure)
    with pytest.raises(failure, match="stopped"):
        run(root, tmp_path / "out", resume=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, TinyGPTQError, OSError])
def test_with_resume_a_failure_leaves_what_is_done(root, tmp_path, monkeypatch, failure):
    with monkeypatch.context() as patch:
        stop_after(patch, 1, failure)
        with pytest.raises(TinyGPTQError if failure is OSError else failure, match="stopped"):
            run(root, tmp_path / "out")
    work = place_of(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [work]
    assert {path.name for path in work.iterdir()} == {"folder", "activations-1", "state.json", "lock"}
    run(root, tmp_path / "out")
    assert contents(tmp_path / "out") == whole(root)


def test_with_resume_too_nothing_stays_of_no_block(root, tmp_path, monkeypatch):
    monkeypatch.setattr(block_loop, "_replace", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run(root, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_activations_stay(root, begun):
    assert {path.name for path in place_of(begun).iterdir()} == {"folder", "activations-2", "state.json", "lock"}


def test_without_resume_an_unfinished_run_is_not_thrown_away(root, begun):
    with pytest.raises(TinyGPTQError) as caught:
        run(root, begun, resume=False)
    assert str(caught.value) == (
        f"{begun}: an earlier run was cut off after 2 blocks; add --resume to the same command to continue it, "
        f"or remove {place_of(begun)} to start over"
    )
    run(root, begun)
    assert contents(begun) == whole(root)


def test_what_was_killed_in_its_first_block_is_no_obstacle(root, tmp_path):
    for resuming in (False, True):
        out = tmp_path / str(resuming)
        folder = place_of(out) / "folder"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        (place_of(out) / "activations-1").write_bytes(b"half")
        run(root, out, resume=resuming)
        assert contents(out) == whole(root)


def test_two_runs_do_not_share_one_out(root, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    with unfinished_folder(out) as progress:
        with pytest.raises(TinyGPTQError, match=rf"out: process {os.getpid()} on .+ is at work on it"):
            run(root, out)
        progress.begin({})
        (progress.folder / "x").touch()
    assert list(contents(out)) == ["x"]


def test_a_disk_too_full_for_the_state_does_not_stop_the_work(root, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "_write_batches", refuse)
    run(root, tmp_path / "out", resume=False)
    assert contents(tmp_path / "out") == whole(root)
    assert f"{tmp_path / 'out'}: progress cannot be saved after block 1 (No space left on device)" in caplog.messages


def test_a_file_system_that_cannot_flush_folders_will_do(root, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 2)
        run(root, tmp_path / "out")
    run(root, tmp_path / "out")
    assert contents(tmp_path / "out") == whole(root)


def test_saving_takes_a_small_share_of_the_time(root, tmp_path, monkeypatch):
    saved = []
    replace = Progress._replace_state
    monkeypatch.setattr(Progress, "_replace_state", lambda self, state: saved.append(state.blocks) or replace(self, state))
    for share, expected in ((1e-9, [1]), (np.inf, list(range(1, BLOCKS)))):
        monkeypatch.setattr(resume, "SAVE_SHARE", share)
        saved.clear()
        run(root, tmp_path / str(share))
        assert saved == expected


def test_another_number_of_threads_is_told(root, begun, monkeypatch, caplog):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    begun_on = json.loads((place_of(begun) / "state.json").read_text())["state"]["threads"]
    run(root, begun)
    told = f"{begun}: begun on {begun_on} threads, continued on 3; weights may differ in a few codes from those of one run"
    assert (told in caplog.messages) == (begun_on != 3)


# ------------------------------------------------------------------------------------------------ stale or damaged states


def stale(root: Path, kind: str, tmp_path: Path, monkeypatch) -> dict:
    """What to give to ``run`` so that it is another run than the one begun."""
    if kind == "bits":
        return {"config": QuantizeConfig(3, 32, desc_act=True)}
    if kind == "text":
        (tmp_path / "other.txt").write_text("a lazy dog sleeps under the brown fox. " * 60)
        return {"dataset": str(tmp_path / "other.txt")}
    if kind == "windows":
        return {"nsamples": 3}
    if kind == "rtn":
        return {"method": "rtn"}
    if kind == "version":
        monkeypatch.setattr(resume, "made_by", lambda: {"quantizer": ["tinygptq:9.9"]})
        return {}
    random_llama_folder(tmp_path / "src", vocab_size=260, num_hidden_layers=BLOCKS, seed=1)  # files of the same sizes
    save_byte_tokenizer(tmp_path / "src")
    shutil.copy2(root / "src" / "config.json", tmp_path / "src")  # with its time of change
    return {"src": tmp_path / "src"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bits", "bits 4, not 3"),
        ("text", "another calibration text"),
        ("windows", "another calibration text"),
        ("rtn", "the method gptq"),
        ("version", "tinygptq(:[^,]+)?, and this is tinygptq:9.9"),
        ("model", r"another model \(model.safetensors has another size or time of change\)"),
    ],
)
def test_a_stale_state_is_refused_and_kept(root, begun, tmp_path, monkeypatch, kind, expected):
    before = contents(place_of(begun) / "folder")
    with monkeypatch.context() as patch, pytest.raises(TinyGPTQError) as caught:
        run(root, begun, **stale(root, kind, tmp_path, patch))
    out, work = re.escape(str(begun)), re.escape(str(place_of(begun)))
    pattern = f"{out}: its unfinished run was begun with {expected}; remove {work} to start over"
    assert re.fullmatch(pattern, str(caught.value))
    assert contents(place_of(begun) / "folder") == before
    run(root, begun)
    assert contents(begun) == whole(root)


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def later_format(work: Path) -> None:
    state = json.loads((work / "state.json").read_text())["state"] | {"format": 3, "more": []}
    (work / "state.json").write_text(json.dumps({"sha256": resume._digest(state), "state": state}))


DAMAGES = {
    "state cut": lambda work: cut(work / "state.json"),
    "state empty": lambda work: cut(work / "state.json", 0),
    "state no object": lambda work: (work / "state.json").write_text("[1, 2]"),
    "state of other things": lambda work: (work / "state.json").write_text('{"sha256": 1, "state": null}'),
    "state no text": lambda work: (work / "state.json").write_bytes(b"\xff\xfe\x00"),
    "state nested": lambda work: (work / "state.json").write_text("[" * 100_000),
    "state of a later format": later_format,
    **{f"state flipped at {i}": lambda work, i=i: flip(work / "state.json", i / 10) for i in range(11)},
    "activations cut": lambda work: cut(work / "activations-2"),
    "activations gone": lambda work: (work / "activations-2").unlink(),
    "activations flipped": lambda work: flip(work / "activations-2", 0.3),
    "weights cut": lambda work: cut(work / "folder" / "model.safetensors"),
    "weights empty": lambda work: cut(work / "folder" / "model.safetensors", 0),
    "weights gone": lambda work: (work / "folder" / "model.safetensors").unlink(),
    "weights' header": lambda work: flip(work / "folder" / "model.safetensors", 0),
    "weights flipped": lambda work: flip(work / "folder" / "model.safetensors", 0.4),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_says_what_to_remove(root, begun, capsys, damage):
    work = place_of(begun)
    DAMAGES[damage](work)
    options = ["--nsamples", 4, "--seqlen", 32, "--group-size", 32, "--desc-act", "--resume"]
    words = ["quantize", root / "src", begun, "--dataset", root / "text.txt", *options]
    assert main([str(word) for word in words]) == 2
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith(f"tinygptq: error: {work}")
    removed = re.search(r"; remove (\S+) to start over$", last)[1]
    assert Path(removed).exists()
    assert not begun.exists()
    shutil.rmtree(removed)
    assert main([str(word) for word in words]) == 0
    assert contents(begun) == whole(root)
