"""Sampling: each step by itself, then the draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinygptq.errors import TinyGPTQError
from tinygptq.ops import softmax
from tinygptq.sampling import Sampler, SamplingParams, keep_top_k, keep_top_p, penalise_repetition

LOGITS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-20, 20, width=32))


def sampler(vocab: int = 8, eos: tuple[int, ...] = (), seed: int | None = 0, **params) -> Sampler:
    return Sampler(SamplingParams(**params), vocab, eos, seed)


# ------------------------------------------------------------------------------------------------------- the steps


def test_repetition_penalty_by_hand():
    logits = np.array([2.0, -2.0, 2.0, -2.0], np.float32)
    seen = np.array([True, True, False, False])
    penalised = penalise_repetition(logits, seen, 1.25)
    assert penalised.dtype == np.float32
    assert penalised.tolist() == [1.6000000238418579, -2.5, 2.0, -2.0]


@given(LOGITS, st.integers(0, 50))
def test_top_k_keeps_the_k_largest(logits, k):
    kept = keep_top_k(logits, k)
    alive = kept > -np.inf
    assert kept.dtype == np.float32
    assert np.array_equal(kept[alive], logits[alive])
    if k == 0 or k >= len(logits):
        assert alive.all()
    else:
        assert np.array_equal(alive, logits >= np.sort(logits)[-k])  # ties with the k-th stay


@given(LOGITS, st.floats(0, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    kept = keep_top_p(logits, p)
    alive = kept > -np.inf
    probability = softmax(logits.astype(np.float64))
    assert np.array_equal(kept[alive], logits[alive])
    assert alive[np.flatnonzero(logits == logits.max())].any()
    assert probability[alive].sum() >= p - 1e-5
    if not alive.all():
        assert probability[alive].min() >= probability[~alive].max() * (1 - 1e-6)  # the kept ones are the likeliest
    if alive.sum() > 1:
        assert probability[alive].sum() - probability[alive].min() <= p + 1e-5  # and none of them could be spared


def test_top_p_of_zero_keeps_the_likeliest_alone():
    assert np.flatnonzero(keep_top_p(np.array([1, 3, 2], np.float32), 0.0) > -np.inf).tolist() == [1]


@pytest.mark.parametrize(("p", "count"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_top_p_reached_exactly_is_enough(p, count):
    kept = keep_top_p(np.zeros(4, np.float32), p)  # four quarters, exact in binary
    assert (kept > -np.inf).sum() == count


def test_top_p_skips_what_top_k_took_out():
    logits = np.array([5, -np.inf, 4, -np.inf], np.float32)
    assert np.flatnonzero(keep_top_p(logits, 0.99) > -np.inf).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0.0 to 1000000.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-38}, "temperature is 1e-38, expected 0 (the most likely token)"),  # logits would overflow
        ({"temperature": 1e300}, "temperature is 1e+300"),
        ({"temperature": "x"}, "temperature is 'x'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.01}, "top_p is 1.01, expected 0.0 to 1.0"),
        ({"top_p": -0.01}, "top_p is -0.01"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected 1e-06 to 1000000.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
    ],
)
def test_settings_out_of_range(params, message):
    with pytest.raises(TinyGPTQError) as caught:
        SamplingParams(**params)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------------- the draw


@given(LOGITS)
def test_temperature_zero_is_the_first_maximum(logits):
    assert sampler(len(logits)).draw(logits) == int(np.argmax(logits))


@given(LOGITS, st.integers(0, 2**32), st.floats(0.1, 3), st.integers(0, 10), st.floats(0, 1))
def test_a_draw_is_always_a_candidate(logits, seed, temperature, top_k, top_p):
    before = logits.copy()
    one = sampler(len(logits), seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    candidates = np.flatnonzero(one.distribution(logits) > -np.inf)
    assert one.draw(logits) in candidates
    assert np.array_equal(logits, before)


def test_the_same_seed_draws_the_same_tokens():
    rng = np.random.default_rng(1)
    steps = rng.normal(size=(200, 50)).astype(np.float32)
    runs = [[s.draw(logits) for logits in steps]
            for s in (sampler(50, seed=seed, temperature=1.0) for seed in (7, 7, 8))]  # fmt: skip
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_no_seed_is_fresh_randomness():
    logits = np.zeros(1000, np.float32)
    runs = [[s.draw(logits) for _ in range(20)] for s in (sampler(1000, seed=None, temperature=1.0) for _ in range(2))]
    assert runs[0] != runs[1]  # equal by chance once in 1000^20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    """Pearson's statistic over 6 categories (5 degrees of freedom): above 25.7 with probability 1e-4. The seed is fixed."""
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5, 1.5], np.float32)
    draws, one = 6_000, sampler(6, seed=3, temperature=temperature)
    counts = np.bincount([one.draw(logits) for _ in range(draws)], minlength=6)
    expected = draws * softmax(logits.astype(np.float64) / temperature)
    assert ((counts - expected) ** 2 / expected).sum() < 25.7


def test_draws_within_top_k_follow_the_softmax_of_the_survivors():
    logits = np.array([1.0, 0.0, -1.0, 2.0], np.float32)
    one = sampler(4, seed=4, temperature=1.0, top_k=2)
    counts = np.bincount([one.draw(logits) for _ in range(4_000)], minlength=4)
    assert counts[[1, 2]].tolist() == [0, 0]
    share = np.e / (1 + np.e)  # of token 3 beside token 0
    assert abs(counts[3] - 4_000 * share) < 4 * np.sqrt(4_000 * share * (1 - share))


def test_end_of_text_waits_for_min_new_tokens():
    logits = np.array([0, 5, 4, 1], np.float32)
    one = sampler(4, eos=(1, 2, 99), min_new_tokens=2)  # 99: an id beyond the vocabulary cannot be drawn anyway
    assert [one.draw(logits) for _ in range(4)] == [3, 3, 1, 1]
    assert logits.tolist() == [0, 5, 4, 1]


def test_prompt_and_answer_are_both_penalised():
    logits = np.array([4.0, 3.9, 3.8, 0.1], np.float32)
    one = sampler(4, repetition_penalty=1.1)
    one.observe([0])
    assert [one.draw(logits) for _ in range(3)] == [1, 2, 0]  # each seen once, then the largest again


def test_a_negative_seed_is_refused():
    with pytest.raises(TinyGPTQError, match="seed is -1, expected at least 0"):
        sampler(seed=-1)


@pytest.mark.parametrize("token", [-1, 8, 10**9])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(TinyGPTQError, match=f"token id {token} is outside the vocabulary of 8"):
        sampler(8).observe([0, token])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[np.nan, 1], [1, np.inf], [-np.inf, -np.inf], [np.nan, np.nan]])
def test_broken_logits_are_refused(logits, temperature):
    with pytest.raises(TinyGPTQError, match="logits hold NaN or infinity"):
        sampler(2, temperature=temperature).draw(np.array(logits, np.float32))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize(
    "logits", [np.full(8, np.nan), np.r_[np.nan, np.zeros(7)], np.full(8, -np.inf), np.r_[np.inf, np.zeros(7)]]
)
def test_logits_that_are_no_numbers(settings, logits):
    sampler = Sampler(SamplingParams(**settings), 8, (), 0)
    with pytest.raises(TinyGPTQError, match="the logits hold NaN or infinity"):
        sampler.draw(logits.astype(np.float32))
