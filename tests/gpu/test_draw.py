"""The draw on the GPU against sampling.Sampler: the same tokens for the same logits and random numbers."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq.sampling import Sampler, SamplingParams

VOCAB, ENDS, STEPS = 32_001, (2, 31_999), 12
CASES = {
    "greedy": {},
    "greedy, with a penalty": {"repetition_penalty": 1.3},
    "the likeliest": {"temperature": 0.7, "top_k": 1},
    "40": {"temperature": 0.7, "top_k": 40},
    "40, top-p, penalty": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1},
    "hot, no end of text yet": {"temperature": 1.9, "top_k": 200, "top_p": 0.8, "min_new_tokens": 5},
    "more than are gathered at once": {"temperature": 3.0, "top_k": 900},  # and equal ones at the edge: below 1,024 in all
    "a tiny nucleus": {"temperature": 1.0, "top_k": 64, "top_p": 1e-6},
}


def random_logits(rng, arrangement):
    logits = 3 * rng.standard_normal(VOCAB, np.float32)
    if arrangement == "equal ones":
        return np.round(16 * logits) / 16
    if arrangement == "largest in few threads":  # a thread's logits are 1,024 places apart
        order = np.argsort(np.arange(VOCAB) % 1024, kind="stable")
        logits[order] = np.sort(logits)[::-1].copy()
    if arrangement == "some excluded":
        logits[rng.random(VOCAB) < 0.999] = -np.inf
        logits[7] = 0
    return logits


@pytest.mark.parametrize("arrangement", ["as they come", "equal ones", "largest in few threads", "some excluded"])
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_samplers(name, arrangement):
    import cupy as cp

    from tinygptq.kernels.cuda.draw import THREADS, draw

    params, rng, rows = SamplingParams(**CASES[name]), np.random.default_rng(3), 2
    samplers, twins = ([Sampler(params, VOCAB, ENDS, seed=row) for row in range(rows)] for _ in range(2))
    for sampler in (*samplers, *twins):
        sampler.observe([5, 17, 31_000])
    settings = np.array([[params.temperature, params.top_p, params.repetition_penalty]] * rows, np.float32)
    seen = cp.asarray(np.stack([sampler.seen for sampler in samplers]))
    uniforms = cp.asarray(np.stack([sampler.uniforms(STEPS) for sampler in samplers]))
    numbers = [cp.full(rows, value, np.int32) for value in (max(params.top_k, 1), params.min_new_tokens)]
    drawn, tokens, positions = (cp.zeros(rows, np.int32) for _ in range(3))
    history = cp.full((rows, STEPS), -7, np.int32)
    given = cp.asarray(settings), *numbers, cp.asarray(samplers[0].ends), seen, uniforms, drawn, tokens, positions, history
    for step in range(STEPS):
        logits = np.stack([random_logits(rng, arrangement) for _ in range(rows)])
        expected = [twin.draw(line) for twin, line in zip(twins, logits, strict=True)]
        draw(rows, THREADS, cp.cuda.get_current_stream(), cp.asarray(logits), *given, 100)
        assert tokens.get().tolist() == expected, step
        assert history.get()[:, step].tolist() == expected
    assert positions.get().tolist() == drawn.get().tolist() == [STEPS] * rows


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_broken_logits_are_told(bad, temperature):
    import cupy as cp

    from tinygptq.kernels.cuda.draw import BROKEN, THREADS, draw

    logits, one = np.zeros((1, 500), np.float32), [cp.ones(1, np.int32) for _ in range(4)]
    logits[0, 300] = bad
    settings, none = cp.asarray(np.array([[temperature, 1, 1]], np.float32)), cp.zeros((1, 500), np.bool_)
    history, drawn = cp.zeros((1, 3), np.int32), cp.zeros(1, np.int32)
    given = settings, one[0], one[1], none[0], none, cp.zeros((1, 3)), drawn, one[2], one[3], history, 9
    draw(1, THREADS, cp.cuda.get_current_stream(), cp.asarray(logits), *given)
    assert history.get()[0, 0] == BROKEN
