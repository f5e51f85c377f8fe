"""Writing a quantised folder: what the solver found is what is read back, and what any other tool would read.

The file is checked with the safetensors library and a decoder of a few lines that knows FORMAT and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers import random_llama_folder, random_solutions, small_config, solve_all, write_quantized
from safetensors import safe_open

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.export import (
    COMPANIONS,
    QuantizedFolderWriter,
    gptq_tensors,
    new_folder,
    require_packable,
    solution_of,
    tensor_layout,
)
from tinygptq.gptq import Solution
from tinygptq.packing import unpack
from tinygptq.quantization.placement import packed

GRID = list(product((2, 3, 4, 8), (True, False), ("gptq", "gptq_v2")))
ORDERS = list(product((False, True), (False, True), (32, 64, -1)))  # act-order, static groups; 64 leaves a short group


def raw_tensors(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping


def bits_to_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R, N] -> codes [R * 32 / bits, N]: each column's words end to end, ``bits`` at a time, lowest first."""
    columns = words.shape[1]
    stream = (words.view(np.uint32)[:, None] >> np.arange(32, dtype=np.uint32)[:, None] & 1).reshape(-1, columns)
    return (stream.reshape(-1, bits, columns) << np.arange(bits)[:, None]).sum(axis=1)


# ------------------------------------------------------------------------------------------------ what is read back


@pytest.mark.parametrize(("bits", "sym", "form"), GRID)
def test_everything_reads_back_bit_for_bit(tmp_path: Path, bits, sym, form):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    for i, (desc_act, static, group) in enumerate(ORDERS):
        config = QuantizeConfig(bits, group, desc_act, sym, static_groups=static, checkpoint_format=form)
        check_round_trip(tmp_path / "src", tmp_path / f"out-{i}", config, random_solutions, seed=i)


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(4, 64, desc_act=True),
        QuantizeConfig(3, 32, sym=False),
        QuantizeConfig(2, -1, desc_act=True, sym=False, checkpoint_format="gptq_v2"),
        QuantizeConfig(8, 64, desc_act=True, static_groups=True),
    ],
)
def test_what_the_solver_found_reads_back_bit_for_bit(tmp_path: Path, config):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    check_round_trip(tmp_path / "src", tmp_path / "out", config, solve_all, seed=0)


def check_round_trip(src: Path, out: Path, config: QuantizeConfig, solve, seed: int) -> None:
    solutions = write_quantized(src, out, config, solve, seed)
    raw, metadata = raw_tensors(out)
    assert metadata == {"format": "pt"}
    loaded = load_checkpoint(out)
    assert loaded.quantization == config
    assert solutions.keys() == loaded.weights.linears.keys()
    for name, solution in solutions.items():
        check_raw(raw, name, solution, config)
        check_clean(loaded.weights.linears[name], solution, config)


def check_raw(raw: dict[str, np.ndarray], name: str, solution: Solution, config: QuantizeConfig) -> None:
    """The file itself, by another decoder than ours."""
    qweight, qzeros, scales, g_idx = (raw[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    assert [a.dtype.name for a in (qweight, qzeros, scales, g_idx)] == ["int32", "int32", "float16", "int32"]
    assert np.array_equal(bits_to_codes(qweight, config.bits).T, solution.codes)
    offset = 1 if config.checkpoint_format == "gptq" else 0
    zeros = bits_to_codes(np.ascontiguousarray(qzeros.T), config.bits) + offset  # (N, G)
    assert np.array_equal(zeros, solution.zeros)
    assert scales.T.tobytes() == np.asarray(solution.scales).tobytes()
    assert np.array_equal(g_idx, solution.g_idx)
    again = solution_of({part: raw[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}, config)
    for part in ("codes", "scales", "zeros", "g_idx"):
        there, here = getattr(again, part), getattr(solution, part)
        assert there.dtype == here.dtype
        assert np.array_equal(there, here), part


def check_clean(layer, solution: Solution, config: QuantizeConfig) -> None:
    """What kernels get: rows sorted by group, true zeros, the permutation that undoes the sorting."""
    codes = unpack(layer.qweight, config.bits, layer.in_features)
    order = np.arange(layer.in_features) if layer.perm is None else layer.perm
    assert np.array_equal(codes, solution.codes.T[order])
    assert np.array_equal(np.arange(layer.in_features) // layer.group_size, solution.g_idx[order])
    assert np.array_equal(layer.zeros, solution.zeros.T)
    assert layer.scales.tobytes() == np.ascontiguousarray(solution.scales.T).tobytes()
    assert np.array_equal(layer.dequantize(), solution.dequantize().T)
    acts_in_order = not config.desc_act or config.static_groups or config.group_size == -1
    assert (layer.perm is None) == acts_in_order


def test_in_memory_and_by_file_are_the_same_layer(tmp_path: Path):
    config = QuantizeConfig(3, 32, desc_act=True, sym=False)
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    solutions = write_quantized(tmp_path / "src", tmp_path / "out", config, random_solutions)
    for name, linear in load_checkpoint(tmp_path / "out").weights.linears.items():
        other = packed(solutions[name], config)
        assert np.array_equal(linear.qweight, other.qweight)
        assert np.array_equal(linear.scales, other.scales)
        assert np.array_equal(linear.zeros, other.zeros)
        assert np.array_equal(linear.perm, other.perm)
        assert (linear.bits, linear.group_size) == (other.bits, other.group_size)


@pytest.mark.parametrize(("form", "word"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888)])
def test_symmetric_four_bit_zero_words(tmp_path: Path, form, word):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    write_quantized(tmp_path / "src", tmp_path / "out", QuantizeConfig(4, 32, checkpoint_format=form), random_solutions)
    words = {name: tensor for name, tensor in raw_tensors(tmp_path / "out")[0].items() if name.endswith("qzeros")}
    assert len(words) == 7
    for tensor in words.values():
        assert (tensor.view(np.uint32) == word).all()


# ------------------------------------------------------------------------------------------------ the folder's other parts


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_stays_dense_is_stored_in_fp16(tmp_path: Path, dtype, tied):
    stored = random_llama_folder(tmp_path / "src", num_hidden_layers=1, dtype=dtype, tied=tied)
    write_quantized(tmp_path / "src", tmp_path / "out", QuantizeConfig(4, 32), random_solutions)
    raw, _ = raw_tensors(tmp_path / "out")
    dense = [name for name in stored if not name.endswith("_proj.weight")]
    assert ("lm_head.weight" in dense) is not tied
    for name in dense:
        assert raw[name].dtype == np.float16
        assert np.array_equal(raw[name], stored[name].astype(np.float16))
    parts = {f"model.layers.0.{linear}.{part}" for linear in LlamaConfig.from_dict(small_config()).linear_shapes()
             for part in ("qweight", "qzeros", "scales", "g_idx")}  # fmt: skip
    assert raw.keys() == {*dense, *parts}


def test_both_configs_are_there_and_say_the_same(tmp_path: Path):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1, dtype="bfloat16", made_up_field=[1, {"a": None}])
    config = QuantizeConfig(8, -1, desc_act=True, damp_percent=0.05)
    write_quantized(tmp_path / "src", tmp_path / "out", config, random_solutions)
    model = json.loads((tmp_path / "out" / "config.json").read_text())
    alone = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert model.pop("quantization_config") == alone
    source = json.loads((tmp_path / "src" / "config.json").read_text())
    assert model == {**source, "torch_dtype": "float16"}
    assert alone == {
        "bits": 8, "group_size": -1, "desc_act": True, "sym": True, "damp_percent": 0.05, "static_groups": False,
        "true_sequential": True, "checkpoint_format": "gptq", "quant_method": "gptq",
        "model_name_or_path": "src", "model_file_base_name": "model",
    }  # fmt: skip


def test_tokenizer_files_come_along_and_nothing_else(tmp_path: Path):
    src = tmp_path / "src"
    random_llama_folder(src, num_hidden_layers=1)
    for name in (*COMPANIONS, "README.md", "pytorch_model.bin", "quant_config.json.bak"):
        (src / name).write_bytes(os.urandom(20))
    write_quantized(src, tmp_path / "out", QuantizeConfig(4, 32), random_solutions)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *COMPANIONS, "model.safetensors", "config.json", "quantize_config.json"
    }  # fmt: skip
    for name in COMPANIONS:
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, -1), (4, 32), (8, 128)])
def test_size_is_what_the_layout_says(tmp_path: Path, bits, group, tied, biased):
    overrides = {"attention_bias": biased, "mlp_bias": biased, "tied": tied, "num_hidden_layers": 1}
    random_llama_folder(tmp_path / "src", **overrides)
    config = QuantizeConfig(bits, group)
    write_quantized(tmp_path / "src", tmp_path / "out", config, random_solutions)
    layout = tensor_layout(LlamaConfig.from_folder(tmp_path / "src"), config)
    raw, _ = raw_tensors(tmp_path / "out")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in raw.items()} == layout
    data = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in layout.values())
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    assert len(content) == 8 + header + data


def test_biases_are_kept(tmp_path: Path):
    stored = random_llama_folder(tmp_path / "src", num_hidden_layers=1, attention_bias=True)
    write_quantized(tmp_path / "src", tmp_path / "out", QuantizeConfig(4, 32), random_solutions)
    linears = load_checkpoint(tmp_path / "out").weights.linears
    for name, linear in linears.items():
        if "self_attn" in name:
            assert np.array_equal(linear.bias, stored[f"{name}.bias"].astype(np.float16).astype(np.float32))
        else:
            assert linear.bias is None


# ------------------------------------------------------------------------------------------------ refusals and failures


def test_a_zero_point_of_zero_is_refused_by_format_gptq():
    solution = Solution(
        codes=np.zeros((32, 32), np.uint8), scales=np.ones((32, 1), np.float16), zeros=np.zeros((32, 1), np.uint16),
        g_idx=np.zeros(32, np.int32), loss=0.0, damp=0.01,
    )  # fmt: skip
    with pytest.raises(TinyGPTQError, match="zero point of 0 cannot be written in format 'gptq'; use 'gptq_v2'"):
        gptq_tensors(solution, QuantizeConfig(4, -1))
    assert (gptq_tensors(solution, QuantizeConfig(4, -1, checkpoint_format="gptq_v2"))["qzeros"] == 0).all()
    full = replace(solution, zeros=np.full((32, 1), 16, np.uint16))  # stored as 15, it would be read as a wrapped 0
    with pytest.raises(TinyGPTQError, match="zero point of 16 is beyond the largest code of 4 bits"):
        gptq_tensors(full, QuantizeConfig(4, -1))


@pytest.mark.parametrize(
    ("overrides", "bits", "message"),
    [
        ({"intermediate_size": 100}, 4, "mlp.gate_proj: 100 output features of 4 bits"),
        ({"hidden_size": 48, "num_attention_heads": 6, "head_dim": 16}, 3, "self_attn.q_proj: 48 input features of 3 bits"),
        ({"head_dim": 4, "num_key_value_heads": 1}, 4, "self_attn.k_proj: 4 output features of 4 bits"),
    ],
)
def test_sizes_that_do_not_fill_words_are_refused(overrides, bits, message):
    with pytest.raises(TinyGPTQError) as caught:
        require_packable(LlamaConfig.from_dict(small_config(**overrides)), QuantizeConfig(bits))
    assert message in str(caught.value)
    require_packable(LlamaConfig.from_dict(small_config()), QuantizeConfig(bits))


@pytest.mark.parametrize("value", [7e4, np.nan, np.inf])
def test_values_beyond_fp16_are_refused_and_nothing_stays(tmp_path: Path, value):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    source = load_checkpoint(tmp_path / "src")
    norm = np.array(source.weights.norms["model.norm"])
    norm[3] = value
    source = replace(source, weights=replace(source.weights, norms={**source.weights.norms, "model.norm": norm}))
    config = QuantizeConfig(4, 32)
    with (
        pytest.raises(TinyGPTQError, match=r"tensor model\.norm holds values that fp16 cannot"),
        new_folder(tmp_path / "out") as folder,
        QuantizedFolderWriter(folder, source, config),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, TinyGPTQError, OSError])
@pytest.mark.parametrize("written", [0, 3])
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, failure, written):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    source, config = load_checkpoint(tmp_path / "src"), QuantizeConfig(4, 32)
    solutions = list(random_solutions(source, config).items())
    expected = TinyGPTQError if failure is OSError else failure  # a full disk is the user's to mend
    with (
        pytest.raises(expected, match="half-way"),
        new_folder(tmp_path / "out") as folder,
        QuantizedFolderWriter(folder, source, config) as writer,
    ):
        for name, solution in solutions[:written]:
            writer.write(name, solution)
        assert not (tmp_path / "out").exists()
        raise failure("half-way")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_linear_left_out_is_no_success(tmp_path: Path):
    random_llama_folder(tmp_path / "src", num_hidden_layers=1)
    source, config = load_checkpoint(tmp_path / "src"), QuantizeConfig(4, 32)
    solutions = list(random_solutions(source, config).items())
    with (
        pytest.raises(AssertionError, match=r"not written: .*mlp\.down_proj"),
        new_folder(tmp_path / "out") as folder,
        QuantizedFolderWriter(folder, source, config) as writer,
    ):
        for name, solution in solutions[:-1]:
            writer.write(name, solution)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: (p.mkdir(), (p / "mine").touch())])
def test_an_output_that_exists_is_left_alone(tmp_path: Path, make):
    out = tmp_path / "out"
    make(out)
    with pytest.raises(TinyGPTQError) as caught, new_folder(out):
        pytest.fail("the body should not run")
    assert str(caught.value) == f"{out}: already exists and is not an empty folder; remove it or choose another"
    assert list(tmp_path.iterdir()) == [out]
    assert out.is_file() or [path.name for path in out.iterdir()] == ["mine"]


def test_an_empty_folder_and_missing_parents_will_do(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with new_folder(out) as folder:
            (folder / "x").touch()
        assert [path.name for path in out.iterdir()] == ["x"]
        assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []


def test_the_current_folder_will_do(tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path(".")) as folder:
        (folder / "x").touch()
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["x"]


def test_a_file_among_the_parents(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(TinyGPTQError, match="cannot be written") as caught, new_folder(tmp_path / "file" / "out"):
        pytest.fail("the body should not run")
    assert str(tmp_path / "file" / "out") in str(caught.value)


@pytest.mark.parametrize(("where", "name"), [(Path, "mkdir"), (os, "replace")])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch, where, name, number):
    """At the first step or the last; injected, because root may write anywhere."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(where, name, refuse)
    with pytest.raises(TinyGPTQError) as caught, new_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert str(caught.value) == f"{tmp_path / 'out'}: cannot be written ({os.strerror(number)})"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path):
    with pytest.raises(TinyGPTQError, match="cannot be written"), new_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
