"""The forward pass against transformers' LlamaForCausalLM on the same folder, and cached decoding against uncached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.kvcache import KVCache
from tinygptq.model import Llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip

MODELS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 6},
    "multi-head, not said": {"num_key_value_heads": None},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tied": True},
    "head_dim above hidden/heads": {"head_dim": 32},
    "head_dim below hidden/heads": {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    "attention bias": {"attention_bias": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "large eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, original length given": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    },
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3, as transformers 5 writes it": {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "float16": {"dtype": "float16"},
    "bfloat16, sharded": {"dtype": "bfloat16", "sharded": True},
}


def ids_of(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 120, (batch, tokens))


def reference(folder: Path, ids: np.ndarray) -> np.ndarray:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def load(folder: Path) -> Llama:
    checkpoint = load_checkpoint(folder)
    return Llama(checkpoint.config, checkpoint.weights)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name):
    random_llama_folder(tmp_path, **MODELS[name])
    ids = ids_of(3, 40)
    logits = load(tmp_path).forward(ids)
    expected = reference(tmp_path, ids)
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape == (3, 40, 120)
    assert expected.std() > 0.3  # the model says something, so that agreeing with it means something
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "linear", None])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])  # max_position_embeddings is 64
def test_around_and_beyond_the_trained_length(tmp_path: Path, kind, tokens):
    scaling = {"rope_scaling": {"rope_type": kind, "factor": 2.0}} if kind else {}
    random_llama_folder(tmp_path, **scaling)
    ids = ids_of(1, tokens)
    assert np.abs(load(tmp_path).forward(ids) - reference(tmp_path, ids)).max() < 1e-4


def test_scaling_is_seen_by_these_models(tmp_path: Path):
    """The comparisons above would be worth nothing if the random models did not care for positions."""
    ids, logits = ids_of(1, 150), {}
    for kind in ("none", "linear", "dynamic"):
        scaling = {} if kind == "none" else {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
        random_llama_folder(tmp_path / kind, **scaling)
        logits[kind] = load(tmp_path / kind).forward(ids)
    for one, other in (("none", "linear"), ("none", "dynamic"), ("linear", "dynamic")):
        assert np.abs(logits[one] - logits[other]).max() > 0.01


def test_rows_of_a_batch_do_not_see_each_other(tmp_path: Path):
    random_llama_folder(tmp_path)
    model, ids = load(tmp_path), ids_of(4, 20)
    together = model.forward(ids)
    for row in range(4):
        assert np.abs(model.forward(ids[row : row + 1])[0] - together[row]).max() < 1e-5


def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path):
    random_llama_folder(tmp_path)
    model, ids = load(tmp_path), ids_of(1, 30)
    changed = ids.copy()
    changed[0, 20:] = (changed[0, 20:] + 1) % 120
    before, after = model.forward(ids), model.forward(changed)
    assert np.abs(before[0, :20] - after[0, :20]).max() < 1e-5
    assert np.abs(before[0, 20:] - after[0, 20:]).max() > 0.01


# ------------------------------------------------------------------------------------------------------- the cache


@pytest.fixture(scope="module", params=["grouped-query", "multi-query", "linear", "llama3", "head_dim above hidden/heads"])
def model(request, tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("model")
    random_llama_folder(folder, **MODELS[request.param])
    return load(folder)


@settings(max_examples=15, deadline=None)
@given(chunks=st.lists(st.integers(1, 12), min_size=1, max_size=8), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_cached_logits_are_uncached_logits_however_the_text_is_cut(model, chunks, batch, seed):
    ids = ids_of(batch, sum(chunks), seed)
    cache = KVCache(model.config, batch, capacity=sum(chunks))
    pieces, start = [], 0
    for size in chunks:
        assert cache.length == start
        pieces.append(model.forward(ids[:, start : start + size], cache))
        start += size
    assert cache.length == start
    assert np.abs(np.concatenate(pieces, axis=1) - model.forward(ids)).max() < 1e-5


def test_token_by_token(model):
    ids = ids_of(2, 40)
    cache = KVCache(model.config, 2, capacity=64)
    steps = [model.forward(ids[:, t : t + 1], cache, last_only=True) for t in range(40)]
    assert np.abs(np.concatenate(steps, axis=1) - model.forward(ids)).max() < 1e-5


def test_last_only_is_the_last_row(model):
    ids = ids_of(2, 9)
    assert np.abs(model.forward(ids, last_only=True) - model.forward(ids)[:, -1:]).max() < 1e-5


def test_a_cut_cache_continues_as_if_it_had_never_been_longer(model):
    ids = ids_of(1, 20)
    cache = KVCache(model.config, 1, capacity=20)
    model.forward(ids, cache)
    cache.truncate(7)
    again = model.forward(ids[:, 7:], cache)
    assert np.abs(again - model.forward(ids)[:, 7:]).max() < 1e-5


def test_dynamic_scaling_within_the_trained_length_decodes_as_it_prefills(tmp_path: Path):
    """Beyond it the two differ by design, in transformers too: cached keys keep the angles of the shorter text."""
    random_llama_folder(tmp_path, **MODELS["dynamic"])
    model, ids = load(tmp_path), ids_of(1, 64)
    cache = KVCache(model.config, 1, capacity=64)
    steps = [model.forward(ids[:, t : t + 1], cache) for t in range(64)]
    assert np.abs(np.concatenate(steps, axis=1) - model.forward(ids)).max() < 1e-5


def test_dynamic_scaling_beyond_the_trained_length_decodes_as_transformers_does(tmp_path: Path):
    random_llama_folder(tmp_path, **MODELS["dynamic"])
    ids = ids_of(1, 90)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = load(tmp_path)
    cache, past = KVCache(model.config, 1, capacity=90), transformers.DynamicCache()
    for start, end in ((0, 50), *((t, t + 1) for t in range(50, 90))):
        logits = model.forward(ids[:, start:end], cache)
        with torch.no_grad():
            expected = other(torch.from_numpy(ids[:, start:end]), past_key_values=past, use_cache=True).logits.numpy()
        assert np.abs(logits - expected).max() < 1e-4


def test_a_full_cache_refuses_and_stays_as_it_is(model):
    cache = KVCache(model.config, 1, capacity=8)
    model.forward(ids_of(1, 6), cache)
    with pytest.raises(TinyGPTQError, match="context is full: 6 tokens are cached and 3 more do not fit in 8"):
        model.forward(ids_of(1, 3), cache)
    assert cache.length == 6
    model.forward(ids_of(1, 2), cache)
    assert cache.length == 8


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 120]], "token id 120 is outside the vocabulary of 120"),
        ([[-1, 0]], "token id -1 is outside the vocabulary"),
        ([0, 1], r"the shape \[batch, tokens\], found \[2\]"),
        (np.zeros((1, 0), int), r"found \[1, 0\]"),
    ],
)
def test_ids_that_are_none(model, ids, message):
    with pytest.raises(TinyGPTQError, match=message):
        model.forward(np.asarray(ids))
