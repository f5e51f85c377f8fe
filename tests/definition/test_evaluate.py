"""Perplexity over models whose likelihoods are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptq.errors import TinyGPTQError
from tinygptq.measure import evaluate
from tinygptq.measure.evaluate import negative_log_likelihood, perplexity
from tinygptq.ops import softmax

VOCAB = 11


class TableModel:
    """A bigram model: the logits after token t are row t of a table. Keeps the windows it was given."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.windows = table.astype(np.float32), []

    tokens_at_once = 2048

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        self.windows += ids.tolist()
        return np.eye(len(self.table), dtype=np.float32)[ids]  # (B, T, V)

    def logits(self, h: np.ndarray) -> np.ndarray:
        return h @ self.table  # (B, T, V)


def uniform() -> TableModel:
    return TableModel(np.full((VOCAB, VOCAB), 3.0))


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, count)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    result = perplexity(uniform(), ids(50), seqlen=10)
    assert math.isclose(result.perplexity, VOCAB, rel_tol=1e-6)
    assert (result.tokens, result.windows, result.seqlen) == (45, 5, 10)


def test_a_model_that_knows_the_text_is_not_perplexed():
    counting = TableModel(100 * np.roll(np.eye(VOCAB), 1, axis=1))  # t -> t + 1
    assert perplexity(counting, np.arange(30) % VOCAB, seqlen=10).perplexity == 1.0


@given(count=st.integers(2, 60), seqlen=st.integers(2, 70), max_windows=st.one_of(st.none(), st.integers(1, 8)))
def test_windows_do_not_overlap_and_leftovers_are_left_out(count, seqlen, max_windows):
    model, text = uniform(), ids(count)
    result = perplexity(model, text, seqlen, max_windows)
    length = min(seqlen, count)  # a text shorter than one window is one shorter window
    windows = min(count // length, max_windows or count)
    assert model.windows == text[: windows * length].reshape(windows, length).tolist()
    assert (result.tokens, result.windows, result.seqlen) == (windows * (length - 1), windows, length)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 60))
def test_it_is_the_exponential_of_the_mean_over_all_predicted_tokens(seed, scale):
    table = scale * np.random.default_rng(seed).normal(size=(VOCAB, VOCAB))
    text, seqlen = ids(40, seed), 8
    probability = softmax(table.astype(np.float32).astype(np.float64))
    nats = [-math.log(probability[text[i], text[i + 1]]) for i in range(39) if (i + 1) % seqlen]
    assert len(nats) == 35
    assert math.isclose(perplexity(TableModel(table), text, seqlen).perplexity, math.exp(np.mean(nats)), rel_tol=1e-4)


class Reach:
    """A model whose nats for a token are how many tokens it was shown before it: what a stride is about."""

    tokens_at_once = 2048

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.arange(1.0, ids.shape[1] + 1, dtype=np.float32)[:, None], (*ids.shape, 1))  # (B, T, 1)

    def logits(self, h: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros_like(h), -h], axis=-1)  # token 1 costs log(1 + e^n), nearly n


@settings(deadline=None)
@given(count=st.integers(2, 60), seqlen=st.integers(2, 40), data=st.data())
def test_with_a_stride_every_token_is_predicted_once_with_as_much_before_it_as_the_windows_give(count, seqlen, data):
    stride = data.draw(st.integers(1, seqlen))
    expected, window = [], 0
    for token in range(1, count):  # each token, in the first window that reaches it
        while window + seqlen <= token:
            window += stride
        if token > window:
            expected.append(token - window)
    total = sum(np.log1p(np.exp(np.array(expected, np.float64))))
    result = perplexity(Reach(), np.ones(count, np.int64), seqlen, stride=stride)
    assert result.tokens == len(expected)
    assert math.isclose(result.perplexity, math.exp(total / len(expected)), rel_tol=1e-5)
    assert (result.seqlen, result.stride) == (min(seqlen, count), stride)
    if stride < seqlen:
        assert result.tokens == count - 1
        assert min(expected[seqlen:], default=seqlen) >= seqlen - stride


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_the_number_of_rows_formed_together_does_not_matter(monkeypatch, rows):
    model, text = TableModel(np.random.default_rng(0).normal(size=(VOCAB, VOCAB))), ids(20)
    windows = text.reshape(2, 10)
    expected = negative_log_likelihood(model, windows)
    assert expected.dtype == np.float32
    assert expected.shape == (2, 9)
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", rows)
    assert np.array_equal(negative_log_likelihood(model, windows), expected)


def test_large_logits_do_not_overflow():
    table = np.zeros((VOCAB, VOCAB))
    table[:, 0] = 3e4
    result = negative_log_likelihood(TableModel(table), np.array([[1, 0, 1]]))
    assert result.tolist() == [[0.0, 3e4]]


@pytest.mark.parametrize("value", [3e4, np.nan, np.inf])
def test_a_broken_model_has_no_perplexity(value):
    table = np.zeros((VOCAB, VOCAB))
    table[:, 0] = value
    with np.errstate(invalid="ignore"), pytest.raises(TinyGPTQError, match="no finite perplexity: the model is broken"):
        perplexity(TableModel(table), np.array([1, 2, 3]), 3)


@pytest.mark.parametrize(
    ("count", "arguments", "message"),
    [
        (10, {"seqlen": 1}, "--seqlen is 1, expected at least 2"),
        (10, {"seqlen": -5}, "--seqlen is -5"),
        (1, {}, "the text holds 1 token(s); perplexity needs at least 2"),
        (0, {}, "the text holds 0 token(s)"),
        (10, {"max_windows": 0}, "--max-windows is 0, expected at least 1"),
        (10, {"seqlen": 4, "stride": 0}, "--stride is 0, expected 1 to --seqlen, which is 4"),
        (10, {"seqlen": 4, "stride": 5}, "--stride is 5"),
        (10, {"max_windows": -1}, "--max-windows is -1, expected at least 1"),
    ],
)
def test_refusals(count, arguments, message):
    model = uniform()
    with pytest.raises(TinyGPTQError) as caught:
        perplexity(model, ids(count), **arguments)
    assert message in str(caught.value)
    assert model.windows == []
