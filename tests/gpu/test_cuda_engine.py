"""The engine on the GPU against the one on the CPU: prompts, decoding, draws, batches, both caches, every kind of linear."""

from __future__ import annotations

import numpy as np
import pytest
import random_models

from tinygptq.engine import CpuEngine
from tinygptq.sampling import Sampler, SamplingParams

CASES = {  # changes of the config, kind, options of the weights
    "4-bit": ({}, 4, {}),
    "act-order, as each its own": ({}, 4, {"perm": True}),
    "8-bit asymmetric": ({"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2}, 8, {"sym": False}),
    "3-bit, one group": ({"num_attention_heads": 2, "head_dim": 32}, 3, {"group": -1}),
    "heads of 128, many to a group": ({"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 1}, 4, {}),
    "heads of 40": ({"head_dim": 40, "num_attention_heads": 4, "num_key_value_heads": 4}, 2, {}),
    "fp16": ({}, np.float16, {}),
    "groups of 48": ({}, 4, {"group": 48}),
}


def engines(name, *, context=40, **options):
    from tinygptq.cuda.engine import CudaEngine

    changes, kind, special = CASES[name]
    config = random_models.config(**changes)
    weights = random_models.weights(config, kind, seed=3, **special)
    return config, CpuEngine(config, weights, context), CudaEngine(config, weights, context, **options)


def difference(found, expected) -> float:
    """Of log-probabilities, in the root mean square, over the logits' spread."""
    return float(np.sqrt(np.mean((found - expected) ** 2)) / np.std(expected))


@pytest.mark.parametrize("name", CASES)
def test_prompt_and_decoding_equal_the_cpu(name):
    config, cpu, gpu = engines(name)
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 30)
    assert difference(gpu.prefill(ids[:23]), cpu.prefill(ids[:23])) < 6e-3
    for token in ids[23:]:
        assert difference(gpu.decode(int(token)), cpu.decode(int(token))) < 6e-3


def test_a_step_equals_a_prompt_of_the_same_tokens():
    config, _, gpu = engines("4-bit")
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 40)
    for length in (2, 17, 33, 40):
        gpu.reset()
        whole = gpu.prefill(ids[:length])
        gpu.truncate(length - 1)
        assert difference(gpu.decode(int(ids[length - 1])), whole) < 3e-3


def test_a_prompt_in_pieces_equals_one_at_once():
    config, _, gpu = engines("4-bit")
    ids = np.random.default_rng(6).integers(0, config.vocab_size, 39)
    whole = gpu.prefill(ids)
    gpu.reset()
    gpu.prompt.chunk = 16
    assert difference(gpu.prefill(ids), whole) < 3e-3


@pytest.mark.parametrize("name", ["4-bit", "heads of 128, many to a group"])
def test_an_8_bit_cache_is_near_the_16_bit_one(name):
    config, cpu, gpu = engines(name, cache_bits=8)
    ids = np.random.default_rng(7).integers(0, config.vocab_size, 30)
    assert difference(gpu.prefill(ids[:20]), cpu.prefill(ids[:20])) < 3e-2
    for token in ids[20:]:
        assert difference(gpu.decode(int(token)), cpu.decode(int(token))) < 3e-2


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.8, "top_k": 12}, {"temperature": 1.3, "top_k": 40, "top_p": 0.7, "repetition_penalty": 1.3}],
)
def test_tokens_drawn_ahead_are_those_of_the_gpus_own_logits(settings):
    config, _, gpu = engines("4-bit")
    prompt = list(np.random.default_rng(8).integers(0, config.vocab_size, 9))
    params = SamplingParams(**settings, min_new_tokens=6)
    one, other = (Sampler(params, config.vocab_size, (3, 7), seed=1) for _ in range(2))
    one.observe(prompt)
    other.observe(prompt)
    logits, expected = gpu.prefill(np.array(prompt)), []
    for _ in range(30):
        expected.append(one.draw(logits))
        logits = gpu.decode(expected[-1])
    gpu.reset()
    gpu.prefill(np.array(prompt))
    assert list(gpu.draw_ahead(other, 30)) == expected
    assert gpu.length == len(prompt) + 29


def test_stopping_early_leaves_the_engine_where_the_text_is():
    config, _, gpu = engines("4-bit")
    prompt = np.arange(9)
    sampler = Sampler(SamplingParams(), config.vocab_size, (), seed=None)
    gpu.prefill(prompt)
    drawn = gpu.draw_ahead(sampler, 20)
    tokens = [next(drawn) for _ in range(5)]
    drawn.close()
    assert gpu.length == 9 + 4
    again = gpu.decode(tokens[-1])
    gpu.reset()
    assert difference(gpu.prefill(np.array([*prompt, *tokens])), again) < 3e-3


def test_a_batch_gives_each_prompt_what_it_gets_alone():
    config, _, gpu = engines("4-bit", rows=3)
    rng = np.random.default_rng(9)
    prompts = [list(rng.integers(0, config.vocab_size, n)) for n in (5, 17, 33)]
    params = SamplingParams(temperature=0.9, top_k=20)
    samplers = [Sampler(params, config.vocab_size, (3,), seed=n) for n in range(3)]
    together = gpu.generate_batch(prompts, samplers, 12, (3,))
    for n, prompt in enumerate(prompts):
        alone = gpu.generate_batch([prompt], [Sampler(params, config.vocab_size, (3,), seed=n)], 12, (3,))
        assert together[n] == alone[0]
        assert len(together[n]) <= min(12, 40 - len(prompt))
    samplers = [Sampler(params, config.vocab_size, (3,), seed=n) for n in range(3)]
    cut = gpu.generate_batch(prompts, samplers, 12, (3,), lambda row, token: row == 1 and token == together[1][2])
    assert cut == [together[0], together[1][: together[1].index(together[1][2]) + 1], together[2]]


def test_broken_logits_end_in_one_line():
    from tinygptq.errors import TinyGPTQError

    config, _, gpu = engines("4-bit")
    gpu.prefill(np.arange(4))
    gpu.sequences.logits[0, 5] = np.nan
    with pytest.raises(TinyGPTQError, match="NaN or infinity"):
        next(gpu.draw_ahead(Sampler(SamplingParams(), config.vocab_size, (), None), 4))
