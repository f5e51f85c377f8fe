"""Layer 0 of a real model against the losses that the original implementation reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.gptq import Hessian, prepare, round_to_nearest, solve
from tinygptq.ops import rms_norm


@pytest.mark.slow
def test_losses_of_q_k_v_are_those_of_the_original(smollm2: Path, data_dir: Path) -> None:
    """Within 1 %: the original rounds with fp32 scales (up to 0.8 % here), and finds the grids of groups smaller than its
    block from weights not yet corrected (up to 0.6 %). With both undone the losses agree to 0.05 %."""
    reference = json.loads((data_dir / "reference" / "original_gptq.json").read_text())
    ids = np.load(data_dir / "reference" / "smollm2_ids.npz")["calibration"]  # (32, 512)
    tensors = load_file(smollm2 / "model.safetensors")
    norm = tensors["model.layers.0.input_layernorm.weight"].astype(np.float32)
    hessian = Hessian(len(norm))
    for window in ids:
        hessian.add(rms_norm(tensors["model.embed_tokens.weight"][window].astype(np.float32), norm, 1e-5))
    for row in reference["configs"]:
        choices = {key: row[key] for key in ("bits", "group_size", "sym", "desc_act")}
        config = QuantizeConfig(**choices, recipe=RECIPES["plain"])
        factor = prepare(hessian.H, config)
        for name in ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"):
            W = tensors[f"model.layers.{name}.weight"].astype(np.float32)
            loss = solve(W, factor, config).loss
            assert loss == pytest.approx(row["layer0_losses"][name], rel=0.01), (row["name"], name)
            assert loss < round_to_nearest(W, config, hessian.H).loss / 4
