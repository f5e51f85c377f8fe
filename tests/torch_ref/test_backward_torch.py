"""The backward pass against torch's autograd on the same folder."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_llama_folder

from tinygptq import backward, ops
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.kernels import cpu
from tinygptq.model import Llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 6},
    "tied": {"tied": True},
    "head_dim above hidden/heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "large eps": {"rms_norm_eps": 0.1},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "float16": {"dtype": "float16"},
}


def drawn(logits: np.ndarray, seed: int) -> np.ndarray:
    """The tokens that `backward` draws: where the distribution function passes a uniform number."""
    uniform = np.random.default_rng(seed).random((*logits.shape[:2], 1), np.float32)[..., 0]
    p = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    total = np.cumsum(p / p.sum(axis=-1, keepdims=True), axis=-1)
    flat = [np.searchsorted(row, u) for row, u in zip(total.reshape(-1, total.shape[-1]), uniform.ravel(), strict=True)]
    return np.array(flat).reshape(uniform.shape)


def by_autograd(folder, ids: np.ndarray, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs = {}

    def keep(name):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(keep(f"model.layers.{name}"))
    logits = model(torch.from_numpy(ids)).logits
    tokens = drawn(logits.detach().numpy(), seed)
    (-torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(tokens)[..., None])).sum().backward()
    return {name: output.grad.numpy() for name, output in outputs.items()}, tokens


@pytest.mark.parametrize("functions", [ops, cpu], ids=["definition", "cpu"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_all_outputs_are_autograds(tmp_path, monkeypatch, name, functions):
    monkeypatch.setattr(backward, "QUERIES", 7)  # the attention matrix in several parts
    folder = tmp_path / "model"
    random_llama_folder(folder, **MODELS[name])
    checkpoint, ids = load_checkpoint(folder), np.random.default_rng(1).integers(0, 120, (2, 17))
    expected, tokens = by_autograd(folder, ids, seed=3)
    assert len(np.unique(tokens)) > 10
    model, found = Llama(checkpoint.config, checkpoint.weights, functions), {}
    for layer, outputs in backward.output_gradients(model, [model.embed(ids)], np.random.default_rng(3)):
        found |= {f"model.layers.{layer}.{linear}": dy for linear, dy in outputs.items()}
    assert found.keys() == expected.keys()
    for linear, dy in expected.items():
        np.testing.assert_allclose(found[linear], dy, rtol=2e-3, atol=2e-5 * np.abs(dy).max(), err_msg=linear)
