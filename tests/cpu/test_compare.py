"""Two models side by side, against the same figures computed plainly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_llama_folder, save_byte_tokenizer
from random_models import config, weights

from tinygptq.cli import main
from tinygptq.errors import TinyGPTQError
from tinygptq.measure.compare import compare
from tinygptq.measure.evaluate import perplexity
from tinygptq.model import Llama
from tinygptq.ops import softmax

A, B = (Llama(config(), weights(config(), np.float32, seed=seed)) for seed in (0, 1))
IDS = np.random.default_rng(0).integers(0, 80, 100)


def letter(token: int) -> str:
    return chr(0x4E00 + token)


TOKENS = SimpleNamespace(decode=lambda ids, skip_special: "".join(map(letter, ids)), token_text=letter)


@pytest.fixture(scope="module")
def found():
    return compare(A, B, IDS, TOKENS, seqlen=30, worst=4)


def test_predictions_are_compared_token_by_token(found):
    windows = IDS[:90].reshape(3, 30)
    log_a, log_b = (np.log(softmax(model.forward(windows)[:, :-1].astype(np.float64))) for model in (A, B))  # (3, 29, V)
    kl = (np.exp(log_a) * (log_a - log_b)).sum(axis=-1).ravel()
    assert found.tokens == 87
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert found.top1_agreement == pytest.approx((log_a.argmax(-1) == log_b.argmax(-1)).mean())
    assert found.perplexity_a == pytest.approx(perplexity(A, IDS, 30).perplexity, rel=1e-4)
    assert found.perplexity_b == pytest.approx(perplexity(B, IDS, 30).perplexity, rel=1e-4)


def test_the_worst_tokens_are_shown_in_their_context(found):
    assert [one.kl for one in found.worst] == pytest.approx(sorted(found.kl.tolist())[:-5:-1], rel=1e-5)
    for one in found.worst:
        window, place = divmod(one.position, 30)
        logits = [model.forward(IDS[None, 30 * window : 30 * window + 30])[0, place] for model in (A, B)]
        assert one.actual == letter(IDS[one.position + 1])
        assert one.context.endswith(letter(IDS[one.position]))
        assert (one.a, one.b) == tuple(letter(int(row.argmax())) for row in logits)
        assert one.probability_a == pytest.approx(softmax(logits[0]).max(), rel=1e-4)


def test_errors_of_the_hidden_states_block_by_block(found):
    windows = IDS[:90].reshape(3, 30)
    h = [model.embed(windows) for model in (A, B)]
    for layer in range(3):
        expected = np.linalg.norm(h[1] - h[0]) / np.linalg.norm(h[0])
        assert found.hidden_error[layer] == pytest.approx(expected, rel=1e-5)
        h = [model.block(layer, state) for model, state in zip((A, B), h, strict=True)] if layer < 2 else h
    assert len(found.hidden_error) == 3


def test_a_model_does_not_differ_from_itself():
    same = compare(A, A, IDS, TOKENS, seqlen=50, max_windows=1)
    assert (same.kl_mean, same.kl_p99, same.top1_agreement) == (0, 0, 1)
    assert same.hidden_error == [0, 0, 0]
    assert same.perplexity_a == same.perplexity_b
    assert same.tokens == 49


def test_refusals():
    larger = config(vocab_size=81)
    with pytest.raises(TinyGPTQError, match="vocab_size is 80 and 81"):
        compare(A, Llama(larger, weights(larger, np.float32)), IDS, TOKENS)
    with pytest.raises(TinyGPTQError, match="a text of 1 token"):
        compare(A, B, IDS[:1], TOKENS)
    with pytest.raises(TinyGPTQError, match="--max-windows is 0"):
        compare(A, B, IDS, TOKENS, max_windows=0)
    broken = weights(config(), np.float32)
    broken.norms["model.norm"][:] = np.nan
    with pytest.raises(TinyGPTQError, match="NaN or infinite"):
        compare(A, Llama(config(), broken), IDS, TOKENS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    for seed, name in enumerate(("a", "b")):
        random_llama_folder(root / name, vocab_size=260, num_hidden_layers=1, seed=seed)
        save_byte_tokenizer(root / name)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 5)
    return root


def test_the_command(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["compare", str(folders / "a"), str(folders / "b"), "--text", str(folders / "text.txt"), "--seqlen", "60"]
    assert main([*words, "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 3 * 59
    assert len(found["hidden_error"]) == 2
    assert len(found["worst"]) == 10
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--worst", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{found['perplexity_b']:.4f}" in shown
    assert shown.count("...") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "a.jpg"], "ends in .png"),
        (["--worst", "-1"], "--worst is -1"),
        (["--text", "none.txt"], "neither a file"),
    ],
)
def test_mistakes_on_the_command_line(folders, capsys, words, message):
    command = ["compare", str(folders / "a"), str(folders / "b"), "--text", str(folders / "text.txt")]
    assert main([*command, *words]) == 2
    assert message in capsys.readouterr().err
