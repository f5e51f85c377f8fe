"""Written folders read by torch code that knows the format and nothing of tinygptq: the logits must be the same.

The reader is the whole road of another tool: find the tensors, unpack the bits, dequantise, load the result into
transformers' LlamaForCausalLM.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder, random_solutions, solve_all, write_quantized

from tinygptq.config import QuantizeConfig
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.model import Llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, N] -> int64 [R * 32 / bits, N]: the bits of a column's words in a row, least significant first."""
    columns = words.shape[1]
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    stream = (unsigned[:, None, :] >> torch.arange(32)[None, :, None]) & 1  # (R, 32, N)
    return (stream.reshape(-1, bits, columns) << torch.arange(bits)[None, :, None]).sum(1)


def dequantize(tensors: dict[str, torch.Tensor], name: str, config: dict) -> torch.Tensor:
    """float32 [N, K], as nn.Linear holds it."""
    codes = unpack_rows(tensors[f"{name}.qweight"], config["bits"])  # (K, N)
    zeros = unpack_rows(tensors[f"{name}.qzeros"].T.contiguous(), config["bits"]).T  # (G, N)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    g_idx, scales = tensors[f"{name}.g_idx"].long(), tensors[f"{name}.scales"].float()
    return (scales[g_idx] * (codes - zeros[g_idx])).T.contiguous()


def read_into_transformers(folder: Path):
    """LlamaForCausalLM in float32 with the dequantised weights of a GPTQ folder."""
    raw = json.loads((folder / "config.json").read_text())
    quantization = raw.pop("quantization_config")
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    for name in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        state[f"{name}.weight"] = dequantize(tensors, name, quantization)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    model = model.to_empty(device="cpu").float()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its table is a buffer, in no file
    if raw.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def torch_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return read_into_transformers(folder)(torch.from_numpy(ids)).logits.numpy()


def own_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    checkpoint = load_checkpoint(folder)
    return Llama(checkpoint.config, checkpoint.weights).forward(ids)


def check(folder: Path, out: Path, config: QuantizeConfig, solve=random_solutions) -> np.ndarray:
    write_quantized(folder, out, config, solve)
    ids = np.random.default_rng(5).integers(0, 120, (2, 24))
    own, other = own_logits(out, ids), torch_logits(out, ids)
    assert other.std() > 0.1
    assert np.abs(own - other).max() < 1e-3
    return own


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_logits_of_another_reader(tmp_path: Path, bits, desc_act, sym, form):
    random_llama_folder(tmp_path / "src", tied=sym)
    config = QuantizeConfig(bits, 64, desc_act, sym, checkpoint_format=form)  # 64: short last groups
    check(tmp_path / "src", tmp_path / "out", config)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (QuantizeConfig(4, -1, desc_act=True), {}),
        (QuantizeConfig(4, 32, desc_act=True, static_groups=True), {}),
        (QuantizeConfig(3, 32, sym=False), {"attention_bias": True, "mlp_bias": True}),
        (QuantizeConfig(8, 32), {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 32}),
    ],
)
def test_other_groups_and_other_models(tmp_path: Path, config, overrides):
    random_llama_folder(tmp_path / "src", **overrides)
    check(tmp_path / "src", tmp_path / "out", config)


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.06), (4, 1.0)])
def test_solved_models_stay_near_their_source(tmp_path: Path, bits, largest):
    """Both readers could share a mistake; the unquantised model, read by transformers, cannot."""
    random_llama_folder(tmp_path / "src")
    quantised = check(tmp_path / "src", tmp_path / "out", QuantizeConfig(bits, 32, desc_act=True, sym=False), solve_all)
    ids = np.random.default_rng(5).integers(0, 120, (2, 24))
    source = own_logits(tmp_path / "src", ids)
    error = np.sqrt(np.mean((quantised - source) ** 2)) / source.std()
    assert 0 < error < largest


@pytest.mark.slow
def test_smollm2_rounded_to_four_bits(tmp_path: Path, smollm2: Path):
    from tinygptq import load, quantize

    quantize(smollm2, tmp_path / "out", QuantizeConfig(4, 64), method="rtn")
    model = load(tmp_path / "out", context=64)
    ids = np.array([model.tokenizer.encode("The capital of France is Paris. " * 16)[:64]])
    assert ids.shape == (1, 64)
    assert np.abs(model.forward(ids) - torch_logits(tmp_path / "out", ids)).max() < 1e-3
