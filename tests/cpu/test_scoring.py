"""Scoring with shared beginnings against one plain forward pass for each request, on random models."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import config, weights

from tinygptq.config import RopeScaling
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels import cpu
from tinygptq.kvcache import KVCache
from tinygptq.measure.scoring import Request, Scorer, log_likelihood
from tinygptq.measure.shared_prefix import Batch, ForkedCache, plan
from tinygptq.model import Llama

MODEL = Llama(config(), weights(config(), np.float32))
FAST = Llama(config(), weights(config(), 4), cpu)


def random_tree(seed: int, questions: int = 12) -> list[Request]:
    """Questions after one of two long beginnings, some with several answers, one of them a single token."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(0, 80, 15).tolist(), rng.integers(0, 80, 6).tolist()]
    requests = []
    for _ in range(questions):
        question = beginnings[rng.integers(2)] + rng.integers(0, 80, rng.integers(1, 8)).tolist()
        for _ in range(rng.integers(1, 4)):
            requests.append(Request(question, rng.integers(0, 80, rng.integers(1, 5)).tolist()))
    rng.shuffle(requests)
    return requests


def assert_equal_to_the_definition(scorer: Scorer, requests: list[Request], model: Llama) -> None:
    for found, request in zip(scorer.score(requests), requests, strict=True):
        expected = log_likelihood(model, request)
        assert found.logprob == pytest.approx(expected.logprob, abs=2e-4)
        assert found.is_greedy == expected.is_greedy


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), max_batch=st.integers(1, 9), max_tokens=st.integers(1, 200), share=st.booleans())
def test_every_request_is_scored_as_by_one_plain_pass(seed, max_batch, max_tokens, share):
    scorer = Scorer(MODEL, max_batch=max_batch, max_tokens=max_tokens, share=share)
    assert_equal_to_the_definition(scorer, random_tree(seed), MODEL)
    assert_equal_to_the_definition(scorer, random_tree(seed + 1, 3), MODEL)  # goes on with what the first has left


def test_the_cpu_kernels_on_packed_weights():
    assert_equal_to_the_definition(Scorer(FAST), random_tree(0), Llama(config(), FAST.weights))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_stretched_rotary_embeddings(kind):
    stretched = config(rope_scaling=RopeScaling(kind, 2.0, original_max_position_embeddings=16))
    model = Llama(stretched, weights(stretched, np.float32))
    assert_equal_to_the_definition(Scorer(model), random_tree(1), model)


def test_greedy_is_every_token_the_most_likely():
    context = [3, 1, 4]
    best = []
    for _ in range(4):
        best.append(int(MODEL.forward(np.array([context + best]))[0, -1].argmax()))
    wrong = [*best[:3], (best[3] + 1) % 80]
    right, other = Scorer(MODEL).score([Request(context, best), Request(context, wrong)])
    assert (right.is_greedy, other.is_greedy) == (True, False)
    assert right.logprob > other.logprob


def test_what_is_shared_is_computed_once():
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, 80, 30).tolist()
    requests = [Request([*beginning, a], [b]) for a in range(20) for b in range(4)]  # one-token answers: read off together
    shared, plain = Scorer(MODEL), Scorer(MODEL, share=False)
    np.testing.assert_allclose(
        [one.logprob for one in shared.score(requests)], [one.logprob for one in plain.score(requests)], atol=1e-4
    )
    assert plain.tokens_computed == 20 * 31
    assert shared.tokens_computed == 30 + 20
    shared.score(requests)
    assert shared.tokens_computed == 30 + 20 + 20  # the beginning is still there


def test_a_request_that_is_the_beginning_of_another_costs_nothing():
    scorer = Scorer(MODEL)
    requests = [Request([1, 2, 3], [4]), Request([1, 2], [3, 4, 5, 6]), Request([1, 2, 3, 4], [9])]
    assert_equal_to_the_definition(scorer, requests, MODEL)
    assert scorer.tokens_computed == 5


def test_repeated_and_no_requests():
    scorer = Scorer(MODEL)
    assert scorer.score([]) == []
    one, two = scorer.score([Request([5, 6], [7]), Request([5, 6], [7])])
    assert one == two


# ------------------------------------------------------------------------------------------------ the plan


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), max_batch=st.integers(1, 6), max_tokens=st.integers(1, 60), cost=st.integers(0, 30))
def test_a_plan_covers_all_in_order_within_the_limits(seed, max_batch, max_tokens, cost):
    rng = np.random.default_rng(seed)
    sequences = sorted(rng.integers(0, 2, rng.integers(1, 9)).tolist() for _ in range(rng.integers(0, 12)))
    needed = [int(rng.integers(0, len(one))) for one in sequences]
    arrays = [np.array(one) for one in sequences]
    batches = plan(arrays, needed, max_batch, max_tokens, held=[1, 0, 1], pass_cost=cost)
    assert [i for batch in batches for i in range(batch.start, batch.end)] == list(range(len(sequences)))
    for batch in batches:
        members = sequences[batch.start : batch.end]
        assert len({tuple(one[: batch.shared]) for one in members}) == 1
        assert all(batch.shared <= first for first in needed[batch.start : batch.end])
        assert len(members) <= max_batch
        assert len(members) == 1 or len(members) * (max(map(len, members)) - batch.shared) <= max_tokens


def test_long_beginnings_are_shared_and_short_ones_are_not_worth_a_pass():
    long = [np.array([*range(50), i, i]) for i in range(4)]
    assert plan(long, [50] * 4, 8, 1000) == [Batch(0, 1, 0), Batch(1, 4, 50)]  # the first is run whole, and left to share
    short = [np.array([1, 2, i, i]) for i in range(4)]
    assert plan(short, [2] * 4, 8, 1000) == [Batch(0, 4, 0)]


def test_a_forked_cache_continues_the_trunk_and_leaves_it_alone():
    ids = np.random.default_rng(0).integers(0, 80, (3, 12))
    ids[:, :7] = ids[0, :7]
    trunk = KVCache(MODEL.config, 1, 20)
    MODEL.hidden(ids[:1, :7], trunk)
    kept = trunk.keys.copy()
    found = MODEL.forward(ids[:, 7:], ForkedCache(trunk, 3, 5))
    np.testing.assert_allclose(found, MODEL.forward(ids)[:, 7:], atol=1e-4)
    assert trunk.length == 7
    assert np.array_equal(trunk.keys, kept)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], [1]), "at least one token each"),
        (Request([1], []), "at least one token each"),
        (Request([1], [80]), "token id 80 is outside the vocabulary of 80"),
        (Request([-1], [8]), "token id -1 is outside"),
        (Request([1] * 38, [2] * 4), "41 tokens to score do not fit the context of 40"),
    ],
)
def test_refusals(request_, message):
    with pytest.raises(TinyGPTQError, match=message):
        Scorer(MODEL).score([Request([1], [2]), request_])


def test_the_longest_request_that_fits():
    assert_equal_to_the_definition(Scorer(MODEL), [Request([1] * 38, [2] * 3)], MODEL)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(TinyGPTQError, match="a batch of 0 sequences"):
        Scorer(MODEL, max_batch=0)


def test_a_broken_model_is_refused():
    broken = weights(config(), np.float32)
    broken.norms["model.norm"][:] = np.nan
    with pytest.raises(TinyGPTQError, match="NaN or infinity"):
        Scorer(Llama(config(), broken)).score([Request([1], [2])])
