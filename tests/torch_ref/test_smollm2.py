"""A real model against transformers in fp32: logits, cached decoding, greedy text."""

from __future__ import annotations

import numpy as np
import pytest

import tinygptq
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.model import Llama

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "def fibonacci(n):",
    "Water boils at",
    "The three laws of thermodynamics are",
)


@pytest.fixture(scope="module")
def reference(smollm2):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(smollm2):
    return tinygptq.load(smollm2, context=640)


@pytest.fixture(scope="module")
def ids(data_dir):
    return np.load(data_dir / "reference" / "smollm2_ids.npz")["evaluation"][:1, :512].astype(np.int64)


def test_logits_equal_those_of_transformers(model, reference, ids, smollm2):
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    found = model.forward(ids)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-3
    checkpoint = load_checkpoint(smollm2)
    definition = Llama(checkpoint.config, checkpoint.weights).forward(ids[:, :128])
    assert np.abs(definition - expected[:, :128]).max() < 1e-3


def test_decoding_token_by_token_gives_the_logits_of_one_pass(model, ids):
    expected = model.forward(ids)[0]
    model.engine.reset()
    found = [model.engine.prefill(ids[0, :1])]
    found += [model.engine.decode(int(token)).copy() for token in ids[0, 1:]]
    assert np.abs(np.stack(found) - expected).max() < 1e-4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(model, reference, prompt):
    start = model.tokenizer.encode(prompt)
    with torch.no_grad():
        tokens = reference.generate(
            torch.tensor([start]), attention_mask=torch.ones(1, len(start)), max_new_tokens=128, do_sample=False
        )
    tokens = [token for token in tokens[0, len(start) :].tolist() if token not in model.defaults.eos_token_ids]
    found = model.generate(prompt, max_new_tokens=128, temperature=0.0, repetition_penalty=1.0)
    assert found == model.tokenizer.decode(tokens)
    if prompt == PROMPTS[0]:
        assert "Paris" in found
