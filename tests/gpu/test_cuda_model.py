"""Logits of every position on the GPU, perplexity and scoring over them, against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import random_models

from tinygptq.engine import CpuEngine
from tinygptq.measure import evaluate
from tinygptq.measure.compare import compare
from tinygptq.measure.scoring import Request, Scorer


@pytest.fixture(scope="module")
def models():
    from tinygptq.cuda.engine import CudaEngine

    config = random_models.config()
    weights = random_models.weights(config, 4, perm=False, seed=3)
    return config, CpuEngine(config, weights).model, CudaEngine(config, weights, 40).model


def test_logits_of_every_position(models):
    config, cpu, gpu = models
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (3, 37))
    expected, found = cpu.forward(ids), gpu.forward(ids).get()
    assert found.dtype == np.float32
    assert np.sqrt(np.mean((found - expected) ** 2)) < 5e-3 * expected.std()


def test_perplexity(models):
    config, cpu, gpu = models
    ids = np.random.default_rng(6).integers(0, config.vocab_size, 200)
    expected, found = (evaluate.perplexity(model, ids, 40).perplexity for model in (cpu, gpu))
    assert found == pytest.approx(expected, rel=5e-3)


def test_scores_behind_a_shared_beginning(models):
    config, cpu, gpu = models
    rng = np.random.default_rng(7)
    start = rng.integers(0, config.vocab_size, 20).tolist()
    requests = [Request((*start, *rng.integers(0, config.vocab_size, 3).tolist()), (1 + n, 2)) for n in range(5)]
    expected, found = (Scorer(model).score(requests) for model in (cpu, gpu))
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], rel=1e-2, abs=2e-2)


def test_compared_there_as_here(models):
    from tinygptq.cuda.engine import CudaEngine

    config, cpu, gpu = models
    other = random_models.weights(config, 4, perm=False, seed=4)
    ids = np.random.default_rng(8).integers(0, config.vocab_size, 160)
    here = compare(cpu, CpuEngine(config, other).model, ids, None, seqlen=40, worst=0)
    there = compare(gpu, CudaEngine(config, other, 40).model, ids, None, seqlen=40, worst=0)
    assert here.kl_mean > 0.1
    assert there.kl_mean == pytest.approx(here.kl_mean, rel=2e-2)
    assert there.perplexity_b == pytest.approx(here.perplexity_b, rel=5e-3)
    assert there.hidden_error == pytest.approx(here.hidden_error, rel=2e-2, abs=1e-6)
