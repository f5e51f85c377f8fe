"""What is measured of each linear's outputs: against the gradients themselves, and against the change of a prediction."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_llama_folder

from tinygptq.backward import output_gradients
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.model import Llama
from tinygptq.ops import softmax
from tinygptq.quantization import sensitivity
from tinygptq.quantization.placement import Host


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Llama:
    folder = tmp_path_factory.mktemp("model") / "model"
    random_llama_folder(folder)
    checkpoint = load_checkpoint(folder)
    return Llama(checkpoint.config, checkpoint.weights)


def windows(count: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 120, (count, tokens))


def test_it_is_the_sum_over_the_chosen_windows(model, monkeypatch):
    monkeypatch.setattr(sensitivity, "TOKENS", 33)
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", 20)
    monkeypatch.setattr(sensitivity, "WIDTH", 50)
    ids, expected = windows(6, 10), {}
    hidden = [model.embed(batch) for batch in (ids[[0, 2]], ids[[4]])]  # three whole windows, evenly spaced, two at a time
    for layer, outputs in output_gradients(model, hidden, np.random.default_rng(sensitivity.SEED)):
        for name, dy in outputs.items():
            dy = dy.reshape(-1, dy.shape[-1]).astype(np.float64)
            full, lengths = f"model.layers.{layer}.{name}", np.linalg.norm(dy, axis=1)
            part = np.einsum("ti,tj,t->ij", dy, dy, 1 / np.where(lengths > 0, lengths, 1))
            expected[full] = expected.get(full, 0) + part
    found = sensitivity.output_matrices(model, ids, Host())
    assert found.keys() == model.weights.linears.keys() == expected.keys()
    for name, blocks in found.items():
        out = len(expected[name])
        assert len(blocks) == -(-out // 50)
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
        start = 0
        for A in blocks:
            own = slice(start, start + len(A))
            start += len(A)
            part = expected[name][own, own] * 2 / 3  # the scale that gptq.Hessian gives
            np.testing.assert_allclose(A, part, rtol=1e-3, atol=1e-5 * np.abs(part).max())
        assert start == out
    assert max(map(len, found.values())) > 1


def test_a_token_without_a_gradient_adds_nothing():
    dy = np.array([[[0, 0], [3, 4]]], np.float32)
    np.testing.assert_allclose(sensitivity.tempered(dy), np.array([[[0, 0], [3, 4]]]) / np.sqrt(5), rtol=1e-6)


def test_gradients_foretell_the_divergence(model):
    """Half of ``e^T A e`` is the Kullback-Leibler divergence that an error e at one position causes, summed over those to
    come; here of errors of the same direction at any one position, averaged."""
    layer, name, T = 0, "mlp.down_proj", 6
    full, rng, ids = f"model.layers.{layer}.{name}", np.random.default_rng(1), windows(1, T)
    samples = [dict(output_gradients(model, [model.embed(ids)], rng))[layer][name][0] for _ in range(400)]  # (T, out) each
    e = rng.normal(size=samples[0].shape[-1]).astype(np.float32)
    expected = np.mean([(dy @ e) ** 2 for dy in samples], axis=0) / 2  # (T,)
    before, size, found = model.forward(ids), np.float32(0.02), []
    for t in range(T):
        found.append(divergence(before, forward_with(model, full, ids, t, e * size)) / size**2)
    assert np.sum(found) == pytest.approx(expected.sum(), rel=0.15)


def forward_with(model: Llama, full: str, ids: np.ndarray, position: int, error: np.ndarray) -> np.ndarray:
    """The logits with ``error`` added to one linear's output at one position."""
    linear = model.weights.linears[full]

    class Functions:
        def __getattr__(self, name):
            return getattr(model.functions, name)

        def linear(self, x, layer):
            y = model.functions.linear(x, layer)
            if layer is linear:
                y[:, position] += error
            return y

    return Llama(model.config, model.weights, Functions()).forward(ids)


def divergence(before: np.ndarray, after: np.ndarray) -> float:
    p, q = softmax(before.astype(np.float64)), softmax(after.astype(np.float64))
    return float((p * (np.log(p) - np.log(q))).sum())
