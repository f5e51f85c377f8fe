"""What the GPU's engine is predicted to take, beside arrays laid out on the host; what is said when it is too much."""

from __future__ import annotations

import json

import numpy as np
import pytest
import random_models

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.cuda import memory
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda.layout import to_device

SEVEN_B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 32001,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize("bits,group,sym", [(4, 32, True), (3, 64, False), (8, -1, True), (8, 32, False), (2, 128, True)])
def test_a_linear_takes_what_its_layout_has(bits, group, sym):
    linear = random_models.packed(192, 72, bits, group, sym=sym)
    laid_out = to_device(linear, np.asarray)
    arrays = [laid_out.codes, laid_out.scales, *([] if sym else [laid_out.zeros])]
    found = memory.packed_bytes(192, 72, bits, linear.group_size, sym)
    assert found == sum(array.nbytes for array in arrays)


def test_weights_in_memory_and_their_config_agree():
    config = random_models.config()
    weights = random_models.weights(config, 4, group=32)
    assert memory.weights_bytes(config, weights) == memory.weights_bytes(config, QuantizeConfig(bits=4, group_size=32))
    assert memory.weights_bytes(config, random_models.weights(config, np.float16)) == memory.weights_bytes(config, None)


def test_a_plan_counts_what_it_allocates():
    config = random_models.config()
    plan = memory.decode_plan(config, 3) | memory.prefill_plan(config, 40, 8)
    arrays = vars(memory.allocate(plan, np)).values()
    assert memory.bytes_of(plan) == sum(array.nbytes for array in arrays)


def test_7b_at_4_bits_fits_a_card_of_6_gb():
    config = LlamaConfig.from_dict(SEVEN_B)
    assert memory.predict(config, QuantizeConfig(), 2048).total < 5.0e9
    assert memory.predict(config, QuantizeConfig(), 2048, cache_bits=8).total < 4.5e9


def test_too_little_memory_says_what_would_fit():
    config = LlamaConfig.from_dict(SEVEN_B)
    wanted = memory.predict(config, QuantizeConfig(), 2048)
    memory.require_room(wanted, wanted.total, config, 1, 16)
    with pytest.raises(TinyGPTQError, match=r"needs 4\.98 GB of device memory and 4\.50 GB are free: a context of 1088"):
        memory.require_room(wanted, int(4.5e9), config, 1, 16)
    with pytest.raises(TinyGPTQError, match=r"3\.60 GB of it for weights alone: --cache-bits 8"):
        memory.require_room(wanted, int(3e9), config, 1, 16)


def test_size_tells_the_devices_memory(tmp_path, capsys):
    from tinygptq.cli import main

    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    assert main(["size", str(tmp_path), "--bits", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device_bytes"] == memory.predict(LlamaConfig.from_dict(SEVEN_B), QuantizeConfig(), 2048).total
    assert found["device_bytes_with_8_bit_cache"] < found["device_bytes"]
