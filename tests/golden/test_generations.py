"""Every generation of GPTQ file, from one random model each: all load to the same dequantised weights, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from golden import writers
from golden.writers import WRITERS, Quantized, random_model

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj"
MODELS = {
    "one group": {"group_size": -1},
    "groups": {"group_size": 32},
    "short last group": {"group_size": 64},
    "act-order": {"group_size": 32, "desc_act": True},
    "act-order, short last group": {"group_size": 64, "desc_act": True},
    "act-order, one group": {"group_size": -1, "desc_act": True},
    "static groups": {"group_size": 32, "desc_act": True, "static_groups": True},
}


def check(checkpoint: Checkpoint, model: Quantized) -> None:
    weights = checkpoint.weights
    assert weights.linears.keys() == model.linears.keys()
    for name, linear in model.linears.items():
        found = weights.linears[name].dequantize()
        assert found.dtype == np.float32
        assert np.array_equal(found, linear.weight()), name
        assert weights.linears[name].bias is None
    for name, norm in weights.norms.items():
        assert np.array_equal(norm, model.dense[f"{name}.weight"])
    assert np.array_equal(weights.embedding, model.dense["model.embed_tokens.weight"])
    assert np.array_equal(weights.head, model.dense["lm_head.weight"])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_generations_load_to_the_same_weights(tmp_path: Path, bits, sym, kind):
    model = random_model(bits, sym=sym, **MODELS[kind])
    for name, writer in WRITERS.items():
        if not writer.can_hold(model):
            continue
        writer.write(model, tmp_path / name)
        checkpoint = load_checkpoint(tmp_path / name)
        check(checkpoint, model)
        found = checkpoint.quantization
        assert (found.bits, found.group_size) == (bits, model.group_size), name
        assert checkpoint.facts.quantization.tool == writer.tool


@pytest.mark.parametrize("name", WRITERS)
def test_only_what_contradicts_its_label_warns(tmp_path: Path, caplog, name):
    model = random_model(group_size=-1)
    WRITERS[name].write(model, tmp_path)
    with caplog.at_level(logging.WARNING, "tinygptq"):
        load_checkpoint(tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    if "labelled" not in name:
        assert lines == []
        return
    stored, read = (7, "gptq") if name.startswith("v1") else (8, "gptq_v2")
    assert len(lines) == 1  # for seven linears
    assert f"every stored zero point is {stored}: read as {read} (7 linears" in lines[0]


def test_what_no_config_says_is_inferred(tmp_path: Path):
    for name, model in (
        ("gptq-for-llama 2", random_model(3, 32, sym=False)),
        ("gptq-for-llama 3", random_model(8, 64, desc_act=True)),
        ("gptq-for-llama 1", random_model(4, -1)),
    ):
        WRITERS[name].write(model, tmp_path / name)
        checkpoint = load_checkpoint(tmp_path / name)
        found = checkpoint.quantization
        assert (found.bits, found.group_size, found.sym, found.desc_act) == (
            model.bits, model.group_size, model.sym, model.desc_act)  # fmt: skip
        assert "no config says it" in checkpoint.facts.quantization.where


def test_a_group_size_that_shapes_leave_open_is_asked_for(tmp_path: Path):
    """Linears of 96 and 160 rows in 3 and 4 groups fit every size from 40 to 47, none of them a power of two."""
    model = random_model(4, 33)
    writers.write_configs(tmp_path)
    writers.save(tmp_path / "x.safetensors", writers.tensors_of(model))  # g_idx says it
    assert load_checkpoint(tmp_path).quantization.group_size == 33
    model = random_model(4, 40)
    writers.save(tmp_path / "x.safetensors", writers.tensors_of(model, g_idx=False))
    with pytest.raises(TinyGPTQError, match="shapes fit any from 40 to 47; write a quantize_config"):
        load_checkpoint(tmp_path)
    (tmp_path / "x.safetensors").rename(tmp_path / "llama-4bit-40g.safetensors")
    check(load_checkpoint(tmp_path), model)


# ------------------------------------------------------------------------------------------------ a zero point of zero


def zero_words(model: Quantized) -> np.ndarray:
    return model.linears[Q_PROJ].zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_borrows_for_a_zero_of_0_and_nothing_is_lost(tmp_path: Path, caplog, bits):
    model = random_model(bits, sym=False, least_zero=0)
    assert (zero_words(model) == 0).any() or bits == 8
    writers.gptqmodel_v1(model, tmp_path)
    check(load_checkpoint(tmp_path), model)


def only_last_fields(model: Quantized) -> Quantized:
    """Zeros of 0 only where they damage no neighbour: in the highest field of a word."""
    for linear in model.linears.values():
        linear.zeros[:, 7::8] = 0
    return model


def test_a_wrapped_zero_is_read_as_0_with_a_warning(tmp_path: Path, caplog):
    model = only_last_fields(random_model(4, sym=False))
    said = writers.facts(model)
    writers.write_configs(tmp_path, said)
    writers.save(tmp_path / "model.safetensors", writers.tensors_of(model, zeros=writers.minus_one_by_or))
    with caplog.at_level(logging.WARNING, "tinygptq"):
        check(load_checkpoint(tmp_path), model)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "zero points are stored as 15, which is a 0 that format gptq cannot hold; read as 0" in line
    assert "may be wrong" in line


# ------------------------------------------------------------------------------------------------ odd groups


def with_counts(counts: list[int], shuffled: bool, seed: int = 3) -> Quantized:
    """A model whose linears have groups of these many rows (the last takes what is left), down_proj's more of it."""
    rng = np.random.default_rng(seed)
    model = random_model(4, 32, desc_act=True)
    linears = {}
    for name, linear in model.linears.items():
        inputs, groups = len(linear.g_idx), len(linear.scales)
        g_idx = np.repeat(np.arange(len(counts)), counts)[:inputs]
        g_idx = np.r_[g_idx, np.full(inputs - len(g_idx), groups - 1)]
        g_idx = rng.permutation(g_idx) if shuffled else g_idx
        linears[name] = writers.Linear(linear.codes, linear.scales, linear.zeros, g_idx)
    return Quantized(4, 32, True, True, False, linears, model.dense)


@pytest.mark.parametrize(
    ("counts", "size"), [([64, 32], 64), ([40, 24, 32], None), ([1, 94, 1], None), ([0, 96, 0], None), ([7, 32, 57], None)]
)
@pytest.mark.parametrize("shuffled", [True, False])
def test_groups_of_any_size_keep_every_value(tmp_path: Path, caplog, counts, size, shuffled):
    model = with_counts(counts, shuffled)
    writers.autogptq_07(model, tmp_path)
    with caplog.at_level(logging.WARNING, "tinygptq"):
        checkpoint = load_checkpoint(tmp_path)
    check(checkpoint, model)
    assert "with the same values" in caplog.text
    assert checkpoint.facts.linears[Q_PROJ].order == "uneven groups"
    if size:
        assert checkpoint.weights.linears[Q_PROJ].group_size == size


def test_a_short_group_in_the_middle_needs_no_finer_groups(tmp_path: Path):
    model = random_model(4, 64, desc_act=True)
    swapped = {
        name: writers.Linear(linear.codes, linear.scales[::-1].copy(), linear.zeros, len(linear.scales) - 1 - linear.g_idx)
        for name, linear in model.linears.items()
    }
    model = Quantized(4, 64, True, True, False, swapped, model.dense)
    writers.autogptq_07(model, tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    check(checkpoint, model)
    assert {linear.group_size for linear in checkpoint.weights.linears.values()} == {64}


def test_act_order_without_g_idx_is_refused(tmp_path: Path):
    model = random_model(4, 32, desc_act=True)
    writers.write_configs(tmp_path, writers.facts(model))
    writers.save(tmp_path / "model.safetensors", writers.tensors_of(model, g_idx=False))
    with pytest.raises(TinyGPTQError, match=r"q_proj: g_idx is missing, and with act-order nothing else says"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------ files and biases


def test_a_stale_index_of_the_unquantised_model_is_passed_over(tmp_path: Path):
    model = random_model()
    writers.autogptq_03(model, tmp_path)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(load_checkpoint(tmp_path), model)


def test_a_real_bias_is_honoured(tmp_path: Path):
    model = random_model()
    tensors = writers.tensors_of(model, zero_bias=True)
    bias = np.linspace(-1, 1, 96).astype(np.float16)
    tensors[f"{Q_PROJ}.bias"] = bias
    writers.write_configs(tmp_path, writers.facts(model))
    writers.save(tmp_path / "model.safetensors", tensors)
    linears = load_checkpoint(tmp_path).weights.linears
    assert np.array_equal(linears[Q_PROJ].bias, bias.astype(np.float32))
    assert [name for name, linear in linears.items() if linear.bias is not None] == [Q_PROJ]


def test_a_quantised_head_is_kept_dense(tmp_path: Path):
    """GPTQModel with lm_head: true."""
    model = random_model(4, 32)
    rng = np.random.default_rng(0)
    head = writers.Linear(rng.integers(0, 16, (96, 64)), np.full((3, 64), 0.125, np.float32), np.full((3, 64), 8),
                          np.arange(96) // 32)  # fmt: skip
    dense = {name: tensor for name, tensor in model.dense.items() if not name.startswith("lm_head")}
    whole = Quantized(4, 32, True, False, False, model.linears | {"lm_head": head}, dense)
    writers.gptqmodel_v2(whole, tmp_path)
    weights = load_checkpoint(tmp_path).weights
    assert np.array_equal(weights.head, head.weight().T)
    assert weights.linears.keys() == model.linears.keys()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 4, "is_marlin_format": True}, "packed for the Marlin kernel"),
        ({"bits": 4, "pack_dtype": "int8"}, "pack_dtype is 'int8'"),
        ({"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, "this is an AWQ config"),
        ({"bits": 4, "quant_method": "awq"}, "quant_method is 'awq'"),
        ({"bits": 8, "group_size": 32}, "qweight has shape [12, 96], expected [24, 96]"),
        ({"bits": 4, "group_size": 64}, "qzeros has shape [3, 12], expected [2, 12]"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, said, message):
    writers.gptq_for_llama_3rd(random_model(), tmp_path)
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    with pytest.raises(TinyGPTQError) as caught:
        load_checkpoint(tmp_path)
    assert message in str(caught.value)


def test_float_zeros_that_are_no_zero_points_are_refused(tmp_path: Path):
    tensors = writers.float_zero_tensors(random_model(4, -1))
    tensors[f"{Q_PROJ}.zeros"] = tensors[f"{Q_PROJ}.zeros"] * np.float32(1.1)
    writers.write_configs(tmp_path)
    writers.save(tmp_path / "4bit.safetensors", tensors)
    with pytest.raises(TinyGPTQError, match="no whole multiples of the scales"):
        load_checkpoint(tmp_path)
