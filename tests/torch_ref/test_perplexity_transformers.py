"""Perplexity of a real model in fp32 against transformers, on the published text of WikiText-2's raw test split."""

from __future__ import annotations

import numpy as np
import pytest

import tinygptq
from tinygptq.calibrate import evaluation_text
from tinygptq.measure.evaluate import perplexity

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
WINDOWS, SEQLEN = 2, 2048


def test_perplexity_equals_that_of_transformers(smollm2, data_dir):
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = tinygptq.load(smollm2, context=2)
    text = evaluation_text(data_dir / "wikitext-2" / "wiki.test.raw", model.tokenizer, protocol="wikitext2")[:40_000]
    ids = np.array(model.tokenizer.encode(text))
    assert ids.tolist() == AutoTokenizer.from_pretrained(smollm2)(text).input_ids
    reference = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    nats = []
    with torch.no_grad():
        for window in torch.tensor(ids[: WINDOWS * SEQLEN]).reshape(WINDOWS, 1, SEQLEN):
            nats.append(reference(window, labels=window).loss.item())
    result = perplexity(model.engine.model, ids, SEQLEN, WINDOWS)
    assert (result.windows, result.tokens) == (WINDOWS, WINDOWS * (SEQLEN - 1))
    assert result.perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
