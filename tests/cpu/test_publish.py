"""The six branches of a small random model: made, kept, made again, on one process and on a cluster that loses a worker."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers import random_llama_folder, save_byte_tokenizer

import tinygptq
from tinygptq.branches import BRANCHES
from tinygptq.cli import main
from tinygptq.config import LlamaConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import find_quantize_config, load_checkpoint
from tinygptq.folders.sizes import sizes
from tinygptq.release import publish as publishing
from tinygptq.release.facts import read_meta
from tinygptq.release.publish import Recipe, publish

needs_dask = pytest.mark.skipif(not importlib.util.find_spec("distributed"), reason="dask[distributed] is not installed")
WINDOWS = {"nsamples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """``src``, whose sizes no group of 64 or 128 divides (as SmolLM2's 576), and ``text.txt``."""
    root = tmp_path_factory.mktemp("publish")
    random_llama_folder(root / "src", vocab_size=260, num_hidden_layers=1)
    save_byte_tokenizer(root / "src")
    (root / "src" / "README.md").write_text("---\nlicense: mit\n---\nThe original text.\n")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return root


@pytest.fixture(scope="module")
def made(root) -> Path:
    """All six, measured."""
    recipe = Recipe(str(root / "text.txt"), **WINDOWS, perplexity=str(root / "text.txt"), max_windows=3)
    outcomes = publish(root / "src", root / "out", recipe, card={"base_model": "someone/small"})
    assert [(made.branch, made.error, made.kept) for made in outcomes] == [(name, None, False) for name in BRANCHES]
    return root / "out"


def again(root: Path, made: Path, **options) -> list:
    recipe = Recipe(str(root / "text.txt"), **WINDOWS, perplexity=str(root / "text.txt"), max_windows=3)
    return publish(root / "src", made, recipe, **options)


def states(out: Path) -> dict[str, tuple[int, int]]:
    """Which file each branch's weights are, and when they were written."""
    weights = {name: (out / name / "model.safetensors").stat() for name in BRANCHES if (out / name).exists()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in weights.items()}


def test_six_folders_as_the_card_names_them(root, made):
    config = LlamaConfig.from_folder(root / "src")
    assert {path.name for path in made.iterdir()} == {*BRANCHES, "README.md"}
    for name, quantization in BRANCHES.items():
        checkpoint = load_checkpoint(made / name)
        assert checkpoint.quantization == quantization
        assert (made / name / "model.safetensors").stat().st_size == sizes(config, quantization).file
        assert (made / name / "README.md").read_text() == (made / "README.md").read_text()
        noted = json.loads((made / name / "quantize_config.json").read_text())
        assert noted == json.loads((made / name / "config.json").read_text())["quantization_config"]
        meta = noted["meta"]
        assert meta["quantizer"][0].startswith("tinygptq")
        assert (meta["dataset"], meta["nsamples"], meta["seqlen"], meta["seed"]) == ("text.txt", 4, 32, 0)
        assert str(root) not in json.dumps(noted)  # a public file should not say where it was made
        assert f"| {meta['perplexity']['perplexity']:.3f} |" in (made / "README.md").read_text()
    assert "The original text." in (made / "README.md").read_text()
    original = tinygptq.load(root / "src").perplexity((root / "text.txt").read_text(), 32, 3).perplexity
    noted = {name: read_meta(made / name)["perplexity"]["unquantised"] for name in BRANCHES}
    assert noted == dict.fromkeys(BRANCHES, pytest.approx(original, rel=1e-6))
    assert f"The unquantised model has {original:.3f}." in (made / "README.md").read_text()


def test_a_second_run_does_nothing(root, made, monkeypatch):
    before = states(made)
    monkeypatch.setattr(publishing, "quantize", None)
    monkeypatch.setattr(publishing, "load", None)
    outcomes = again(root, made)
    assert all(outcome.kept and outcome.error is None for outcome in outcomes)
    assert states(made) == before


def test_what_is_missing_is_made_again(root, made):
    import shutil

    before = states(made)
    shutil.rmtree(made / "gptq-4bit-64g-actorder_True")
    partial = made / ".gptq-4bit-64g-actorder_True.unfinished"  # what a killed process leaves
    (partial / "folder").mkdir(parents=True)
    (partial / "folder" / "model.safetensors").write_bytes(b"half")
    leftover = made / ".main.unfinished"  # of one that was killed at its very last step
    leftover.mkdir()
    (leftover / "state.json").touch()
    outcomes = again(root, made)
    assert [outcome.branch for outcome in outcomes if not outcome.kept] == ["gptq-4bit-64g-actorder_True"]
    assert not partial.exists()
    assert not leftover.exists()
    after = states(made)
    assert {name for name in BRANCHES if after[name] != before[name]} == {"gptq-4bit-64g-actorder_True"}


def test_a_perplexity_can_be_added_later(root, tmp_path):
    recipe = Recipe(str(root / "text.txt"), **WINDOWS)
    publish(root / "src", tmp_path / "out", recipe, only=["main"])
    before = states(tmp_path / "out")
    assert "| - | Yes |" in (tmp_path / "out" / "README.md").read_text()
    measured = Recipe(str(root / "text.txt"), **WINDOWS, perplexity=str(root / "text.txt"), max_windows=2)
    (outcome,) = publish(root / "src", tmp_path / "out", measured, only=["main"])
    assert (outcome.error, outcome.kept) == (None, False)
    assert states(tmp_path / "out") == before
    assert "| - | Yes |" not in (tmp_path / "out" / "README.md").read_text()


def test_one_failing_branch_does_not_lose_the_others(root, tmp_path, capsys):
    taken = tmp_path / "out" / "gptq-4bit-32g-actorder_True"
    taken.mkdir(parents=True)
    (taken / "config.json").write_text((root / "src" / "config.json").read_text())
    (taken / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    text = str(root / "text.txt")
    words = ["branches", str(root / "src"), str(tmp_path / "out"), "--dataset", text, "--nsamples", "4", "--seqlen", "32"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    last = err.splitlines()[-1]
    assert last.startswith("tinygptq: error: 1 of 6 branches failed: gptq-4bit-32g-actorder_True (")
    assert "was made with another quantisation config; remove it to make it again" in last
    assert {path.name for path in taken.iterdir()} == {"config.json", "quantize_config.json"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `main` |" in card
    assert "| `gptq-4bit-32g-actorder_True` |" not in card


@pytest.mark.parametrize(("change", "expected"), [({"seed": 1}, "seed 0, not 1"), ({"nsamples": 5}, "nsamples 4, not 5")])
def test_other_facts_are_not_taken_for_finished(root, made, change, expected):
    recipe = Recipe(str(root / "text.txt"), **{**WINDOWS, **change})
    (outcome,) = publish(root / "src", made, recipe, only=["main"])
    assert f"was made with {expected}; remove it" in outcome.error


def test_a_branch_that_broke_since_is_told_and_not_on_the_card(root, tmp_path):
    recipe = Recipe(str(root / "text.txt"), **WINDOWS)
    names = ["main", "gptq-8bit-128g-actorder_False"]
    publish(root / "src", tmp_path / "out", recipe, only=names)
    config = tmp_path / "out" / names[1] / "config.json"
    config.write_text(config.read_text().replace("160", "192"))  # the size of the MLP
    kept, broken = publish(root / "src", tmp_path / "out", recipe, only=["main"])
    assert (kept.branch, kept.error, kept.kept) == ("main", None, True)
    assert broken.branch == names[1]
    assert "mlp" in broken.error
    assert "| `main` |" in (tmp_path / "out" / "README.md").read_text()
    assert f"| `{names[1]}` |" not in (tmp_path / "out" / "README.md").read_text()


def test_another_model_is_not_taken_for_finished(root, made, tmp_path):
    recipe = Recipe(str(root / "text.txt"), **WINDOWS)
    for name, overrides, expected in (("src2", {}, "model_name_or_path 'src', not 'src2'"),
                                      ("src", {"rms_norm_eps": 1e-4}, "a model of another shape")):  # fmt: skip
        random_llama_folder(tmp_path / name, vocab_size=260, num_hidden_layers=1, **overrides)
        (outcome,) = publish(tmp_path / name, made, recipe, only=["main"])
        assert f"was made with {expected}; remove it" in outcome.error


def test_mistakes_stop_before_anything_is_made(root, made, tmp_path):
    text = str(root / "text.txt")
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("my own words")
    new = tmp_path / "new"
    for src, out, recipe, options, part in (
        (root / "src", new, Recipe(text), {"only": ["five"]}, "no branch is called 'five'"),
        (root / "nothing", new, Recipe(text), {}, "nothing: no such folder"),
        (made / "main", new, Recipe(text), {}, "is quantised already"),
        (root / "src", new, Recipe("nothing.txt"), {}, "'nothing.txt' is neither a file nor one of"),
        (root / "src", new, Recipe(text, perplexity="no.txt"), {}, "'no.txt' is neither a file nor one of"),
        (root / "src", new, Recipe(text, template="nonsense"), {}, "unknown prompt template 'nonsense'"),
        (root / "src", tmp_path / "file", Recipe(text), {}, "file: is a file"),
        (root / "src", tmp_path / "other", Recipe(text), {}, "holds thesis.tex, which is no branch"),
        (root / "src", tmp_path / "own", Recipe(text), {}, "README.md: was not written by tinygptq"),
    ):
        with pytest.raises(TinyGPTQError, match=re.escape(part)):
            publish(src, out, recipe, **options)
        assert not new.exists()


# ---------------------------------------------------------------------------------------------------- on a cluster


@needs_dask
def test_no_scheduler_at_the_address(root, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "CONNECT_SECONDS", 1)
    with pytest.raises(TinyGPTQError, match=r"--cluster tcp://127\.0\.0\.1:9: no Dask scheduler answers there"):
        publish(root / "src", tmp_path / "out", Recipe(str(root / "text.txt"), **WINDOWS), cluster="tcp://127.0.0.1:9")
    with pytest.raises(TinyGPTQError, match="--cluster nonsense: no Dask scheduler answers there"):
        publish(root / "src", tmp_path / "out", Recipe(str(root / "text.txt"), **WINDOWS), cluster="nonsense")


def test_without_dask_it_says_what_to_install(root, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(TinyGPTQError, match=r"pip install tinygptq\[cluster\]"):
        publish(root / "src", tmp_path / "out", Recipe(str(root / "text.txt"), **WINDOWS), cluster="local")


class Stumbling:
    """Stands for ``quantize``: raises on 64g at the first attempt, and on 32g at each."""

    def __init__(self) -> None:
        self.calls, self.quantize = [], publishing.quantize

    def __call__(self, src, out, config, **settings):
        self.calls.append(config.group_size)
        if config.group_size == 32 or (config.group_size == 64 and self.calls.count(64) == 1):
            raise RuntimeError("the worker stumbles\nover two lines")
        return self.quantize(src, out, config, **settings)


def test_an_unexpected_error_here_does_not_lose_the_others(root, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "quantize", Stumbling())
    outcomes = publish(root / "src", tmp_path / "out", Recipe(str(root / "text.txt"), **WINDOWS))
    failed = {outcome.branch: outcome.error for outcome in outcomes if outcome.error}
    assert failed == {f"gptq-4bit-{group}g-actorder_True": "RuntimeError: the worker stumbles" for group in (32, 64)}


@needs_dask
def test_a_job_that_raises_is_tried_again(root, tmp_path, monkeypatch):
    from distributed import LocalCluster

    stumbling = Stumbling()
    monkeypatch.setattr(publishing, "quantize", stumbling)
    threads = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "inproc"}
    with LocalCluster(**threads, dashboard_address=":0") as cluster:
        outcomes = publish(root / "src", tmp_path / "out", Recipe(str(root / "text.txt"), **WINDOWS),
                           cluster=cluster.scheduler_address)  # fmt: skip
    failed = {outcome.branch: outcome.error for outcome in outcomes if outcome.error}
    assert failed == {"gptq-4bit-32g-actorder_True": "RuntimeError: the worker stumbles"}
    assert stumbling.calls.count(64) == 2
    assert stumbling.calls.count(32) == 1 + publishing.RETRIES


def branches_with_one_worker_killed(src: Path, out: Path, recipe: Recipe, monkeypatch, after: float = 0.0) -> str:
    """Make all six on two workers; the first to begin a branch is killed with SIGKILL ``after`` seconds, which leaves its
    unfinished folder behind. Returns the branch it was at."""
    killed: list[str] = []
    monkeypatch.setenv("PYTHONPATH", str(Path(publishing.__file__).parents[1]))  # workers are new interpreters

    def kill_the_first_that_works() -> None:
        for _ in range(6000):
            for lock in out.glob(".*.unfinished/lock"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # just done: then another
                    told = re.match(r"process (\d+) on ", lock.read_text())
                    if told is None:  # it is being written
                        continue
                    assert int(told[1]) != os.getpid()
                    time.sleep(after)
                    if lock.exists():
                        os.kill(int(told[1]), signal.SIGKILL)
                        killed.append(lock.parent.name.removeprefix(".").removesuffix(".unfinished"))
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_first_that_works)
    killer.start()
    outcomes = publish(src, out, recipe, cluster="local")
    killer.join()
    assert len(killed) == 1
    assert [(made.branch, made.error, made.kept) for made in outcomes] == [(name, None, False) for name in BRANCHES]
    assert {path.name for path in out.iterdir()} == {*BRANCHES, "README.md"}  # nothing partial is left
    assert {name: find_quantize_config(out / name) for name in BRANCHES} == BRANCHES
    return killed[0]


@needs_dask
def test_a_killed_workers_branch_is_made_by_another(root, tmp_path, monkeypatch):
    recipe = Recipe(str(root / "text.txt"), nsamples=16, seqlen=64)
    killed = branches_with_one_worker_killed(root / "src", tmp_path / "out", recipe, monkeypatch)
    (alone,) = publish(root / "src", tmp_path / "alone", recipe, only=[killed])
    assert alone.error is None
    weights = [(tmp_path / folder / killed / "model.safetensors").read_bytes() for folder in ("out", "alone")]
    assert weights[0] == weights[1]


@needs_dask
@pytest.mark.slow
def test_six_branches_of_a_real_model_with_one_worker_killed(smollm2, data_dir, tmp_path, monkeypatch):
    """SmolLM2's 576 features are no multiple of 128."""
    texts = data_dir / "wikitext-2"
    recipe = Recipe(str(texts / "valid.joined.txt"), nsamples=8, seqlen=256, perplexity=str(texts / "test.joined.txt"),
                    max_windows=4)  # fmt: skip
    branches_with_one_worker_killed(smollm2, tmp_path / "out", recipe, monkeypatch, after=1.0)
    for name, quantization in BRANCHES.items():
        size = (tmp_path / "out" / name / "model.safetensors").stat().st_size
        assert size == sizes(LlamaConfig.from_folder(smollm2), quantization).file
        measured = json.loads((tmp_path / "out" / name / "quantize_config.json").read_text())["meta"]["perplexity"]
        before, after = measured["unquantised"], measured["perplexity"]
        assert 5 < before < 60
        if quantization.bits == 8:  # so little is lost that a short text may gain by chance
            assert after == pytest.approx(before, rel=0.01)
        else:
            assert before < after < 60
