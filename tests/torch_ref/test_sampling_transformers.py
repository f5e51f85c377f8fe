"""The sampler's distribution against transformers' own logits processors, composed in generate()'s order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinygptq.sampling import Sampler, SamplingParams

torch = pytest.importorskip("torch")
process = pytest.importorskip("transformers.generation.logits_process")

VOCAB = 24


def processors(params: SamplingParams, prompt_length: int, eos: list[int]):
    """What generate() would build: penalties first, then temperature, top-k and top-p if it samples."""
    chain = process.LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens and eos:
        chain.append(process.MinNewTokensLengthLogitsProcessor(prompt_length, params.min_new_tokens, eos))
    if params.temperature:
        chain.append(process.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            chain.append(process.TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            chain.append(process.TopPLogitsWarper(params.top_p))
    return chain


def near_a_tie(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether rounding alone could move a token over the boundary of top-p.

    Both sides sum float32 probabilities in ascending order and compare with 1 - top_p; softmax and the sum differ in their
    last bits. So cases are left out in which, in float64, some partial sum (but the last, which is 1: the likeliest token
    always stays) lies within 1e-5 of the boundary. Equal logits are left out too: their order is not defined in torch.
    """
    alive = np.sort(logits[logits > -np.inf].astype(np.float64))
    if (np.diff(alive) == 0).any():
        return True
    probability = np.exp(alive - alive.max())
    below = np.cumsum(probability / probability.sum())[:-1]
    return bool((np.abs(below - (1 - params.top_p)) < 1e-5).any())


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 4)),
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB + 5)),
    top_p=st.one_of(st.just(1.0), st.just(0.0), st.floats(0.01, 0.999)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.5)),
    min_new_tokens=st.integers(0, 6),
)


@settings(max_examples=200, deadline=None)
@given(
    params=SETTINGS,
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0.1, 10),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10),
    answered=st.integers(0, 6),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True),
)
def test_distribution_is_that_of_transformers(params, seed, spread, prompt, answered, eos):
    rng = np.random.default_rng(seed)
    sampler = Sampler(params, VOCAB, tuple(eos), seed=0)
    sampler.observe(prompt)
    answer = [sampler.draw(spread * rng.normal(size=VOCAB).astype(np.float32)) for _ in range(answered)]
    logits = (spread * rng.normal(size=VOCAB)).astype(np.float32)

    chain, ids = processors(params, len(prompt), eos), torch.tensor([prompt + answer])
    if params.temperature and params.top_p < 1.0:
        before_top_p = process.LogitsProcessorList(chain[:-1])(ids, torch.tensor(logits)[None])
        assume(not near_a_tie(before_top_p[0].numpy(), params))
    expected = chain(ids, torch.tensor(logits)[None])[0].numpy()

    found = sampler.distribution(logits)
    assert found.dtype == np.float32
    assert np.array_equal(found == -np.inf, expected == -np.inf)
    alive = found > -np.inf
    np.testing.assert_allclose(found[alive], expected[alive], rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3, 24, 25])
def test_equal_logits_at_the_top_k_boundary_all_stay_in_both(top_k):
    logits = np.repeat(np.arange(6, dtype=np.float32), 4)
    params = SamplingParams(temperature=1.0, top_k=top_k)
    expected = process.TopKLogitsWarper(top_k)(None, torch.from_numpy(logits)[None])[0].numpy()
    assert np.array_equal(Sampler(params, VOCAB, (), 0).distribution(logits), expected)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75, 0.76])
def test_a_top_p_that_is_reached_exactly_keeps_as_many_in_both(p):
    logits = np.zeros(4, np.float32)  # four quarters, exact in binary; which of them stay is not defined
    expected = process.TopPLogitsWarper(p)(None, torch.tensor(logits)[None])[0].numpy()
    found = Sampler(SamplingParams(temperature=1.0, top_p=p), 4, (), 0).distribution(logits)
    assert (found > -np.inf).sum() == (expected > -np.inf).sum()
