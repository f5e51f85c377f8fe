"""Quantised folders to GPTQ or to floats: no code, zero point or scale changes, and what a format cannot hold is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conversions import (
    ASYM,
    Q_PROJ,
    assert_same_model,
    edit,
    peak_memory,
    quantized,
    refused,
    rewrite,
    run,
    stored_zeros,
    tensors,
    with_zeros,
)
from helpers import random_llama_folder

from tinygptq.config import QuantizeConfig
from tinygptq.convert import convert
from tinygptq.convert.source import source_of
from tinygptq.convert.writers import gptq_config, scale_change
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.shards import parse_size, split_layout
from tinygptq.folders.tensorfile import TensorFile

# -------------------------------------------------------------------------------------------------------- gptq, gptq_v2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group_size", [32, -1, 64])  # 64: the last group of 96 rows is short
def test_formats_there_and_back(tmp_path: Path, bits, desc_act, group_size):
    config = QuantizeConfig(bits, group_size, desc_act, sym=False, checkpoint_format="gptq_v2")
    quantized(tmp_path / "v2", config, with_zeros(1, config.max_code))
    assert convert(tmp_path / "v2", tmp_path / "v1").target == "gptq"
    convert(tmp_path / "v1", tmp_path / "back", "gptq_v2")
    v2, v1, back = (tensors(tmp_path / name) for name in ("v2", "v1", "back"))
    assert v2.keys() == v1.keys() == back.keys()
    for name, array in v2.items():
        assert array.dtype == back[name].dtype and np.array_equal(array, back[name]), name
        if not name.endswith("qzeros"):
            assert array.dtype == v1[name].dtype and np.array_equal(array, v1[name]), name
        else:
            assert np.array_equal(stored_zeros(array, bits), stored_zeros(v1[name], bits) + 1)
    assert_same_model(tmp_path / "v2", tmp_path / "v1")
    wanted = config.to_dict(model_name="v2") | {"checkpoint_format": "gptq"}
    assert json.loads((tmp_path / "v1" / "quantize_config.json").read_text()) == wanted
    assert json.loads((tmp_path / "v1" / "config.json").read_text())["quantization_config"] == wanted
    assert (tmp_path / "v1" / "tokenizer.json").is_file()


def test_a_zero_point_of_0_has_no_place_in_format_gptq(tmp_path: Path, capsys):
    quantized(tmp_path / "v2", replace(ASYM, checkpoint_format="gptq_v2"), with_zeros(0, 15))
    message = refused(capsys, tmp_path / "v2", tmp_path / "out")
    assert f"{Q_PROJ} has a zero point of 0, which format 'gptq' cannot hold" in message
    assert "(it stores zero - 1); use --to gptq_v2" in message
    assert run(capsys, tmp_path / "v2", tmp_path / "out", "--to", "gptq_v2")[0] == 0
    assert_same_model(tmp_path / "v2", tmp_path / "out")


def test_a_zero_point_beyond_the_codes_is_refused(tmp_path: Path):
    """No file holds one, a clean form may."""
    quantized(tmp_path / "v1", ASYM)
    source = source_of(load_checkpoint(tmp_path / "v1"))
    for form in ("gptq", "gptq_v2"):
        broken = replace(source, zeros=lambda: [("some.linear", np.full((3, 96), 16, np.uint16))])
        with pytest.raises(TinyGPTQError, match=r"some\.linear has a zero point of 16, beyond what 4 bits hold"):
            gptq_config(broken, form)


def test_what_is_symmetric_says_so(tmp_path: Path):
    quantized(tmp_path / "a", QuantizeConfig(group_size=32, sym=False), with_zeros(8, 8))
    convert(tmp_path / "a", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b").quantization.sym


def test_shards_and_names_become_one_file(tmp_path: Path, capsys):
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    convert(tmp_path / "a", tmp_path / "sharded", max_shard_size=50_000)
    shards = sorted(tmp_path.glob("sharded/*.safetensors"))
    held = [[array.nbytes for array in TensorFile(path).values()] for path in shards]
    assert len(shards) > 2 and all(sum(sizes) <= 50_000 or len(sizes) == 1 for sizes in held)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert {name: (tmp_path / "sharded" / shard) for name, shard in index["weight_map"].items()} == {
        name: path for path in shards for name in TensorFile(path)
    }
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors(tmp_path / "a").values())
    assert run(capsys, tmp_path / "sharded", tmp_path / "b")[0] == 0
    assert_same_model(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").glob("*.safetensors*")) == ["model.safetensors"]
    assert run(capsys, tmp_path / "a", tmp_path / "c", "--max-shard-size", "60KB")[0] == 0
    assert_same_model(tmp_path / "a", tmp_path / "c")


def test_sizes_of_shards():
    assert [parse_size(text) for text in ("17", "5GB", "1.5 MiB", "2kb")] == [17, 5 * 10**9, 3 * 2**19, 2000]
    for text in ("", "GB", "-5", "5XB", "0", "1e3"):
        with pytest.raises(TinyGPTQError, match=r"size|smaller"):
            parse_size(text)
    layout = {name: (np.dtype(np.float16), (count,)) for name, count in (("a", 5), ("b", 5), ("c", 30), ("d", 1))}
    assert [list(part) for part in split_layout(layout, 20)] == [["a", "b"], ["c"], ["d"]]
    assert [list(part) for part in split_layout(layout, None)] == [["a", "b", "c", "d"]]
    equal = {name: (np.dtype(np.float16), (5,)) for name in "abcde"}
    assert [list(part) for part in split_layout(equal, 20)] == [["a", "b"], ["c", "d"], ["e"]]


def test_uneven_groups_are_cut_finer(tmp_path: Path, caplog):
    """A g_idx that no tool writes, but the format allows: groups of 40, 32 and 24 rows."""
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    g_idx = np.random.default_rng(0).permutation(np.repeat([2, 0, 1], [40, 32, 24])).astype(np.int32)
    rewrite(tmp_path / "a", {f"{Q_PROJ}.g_idx": g_idx})
    convert(tmp_path / "a", tmp_path / "b")
    assert_same_model(tmp_path / "a", tmp_path / "b")
    assert load_checkpoint(tmp_path / "b").quantization.group_size == 8
    assert "groups of several sizes, cut into groups of 8" in caplog.text


# ------------------------------------------------------------------------------------------------------ GPTQ-for-LLaMa


def for_llama(folder: Path, generation: int, dtype=np.float32) -> None:
    """Turn a folder of format gptq into GPTQ-for-LLaMa's second or third generation: no config, one file, other scales."""
    changed: dict = {}
    for name, array in tensors(folder).items():
        if name.endswith(".scales"):
            changed[name] = array.astype(dtype)
            changed[name.replace("scales", "bias")] = np.zeros(array.shape[1], np.float16)
        elif name.endswith(".g_idx") and generation == 1:
            changed[name] = None
    rewrite(folder, changed, "llama-4bit-32g.safetensors")
    (folder / "quantize_config.json").unlink()
    edit(folder / "config.json", quantization_config=None)


@pytest.mark.parametrize(("generation", "desc_act"), [(1, False), (2, False), (2, True)])
def test_gptq_for_llama(tmp_path: Path, generation, desc_act, caplog):
    config = replace(ASYM, desc_act=desc_act)
    quantized(tmp_path / "a", config, with_zeros(1, 15))
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    for_llama(tmp_path / "old", generation)
    convert(tmp_path / "old", tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    loaded = load_checkpoint(tmp_path / "b").quantization
    assert (loaded.bits, loaded.group_size, loaded.desc_act, loaded.sym) == (4, 32, desc_act, False)
    assert "rounded to fp16" not in caplog.text  # these float32 scales were fp16 values


def test_first_generation_with_float_zeros(tmp_path: Path):
    """zeros = zero * scale and scales, float32 [N, 1]; no g_idx, and a zero bias."""
    config = replace(ASYM, group_size=-1)
    solutions = quantized(tmp_path / "a", config, with_zeros(1, 15))
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    changes: dict = {}
    for name, solution in solutions.items():
        scales = solution.scales.astype(np.float32)  # (N, 1)
        changes |= {f"{name}.qzeros": None, f"{name}.g_idx": None, f"{name}.scales": scales}
        changes[f"{name}.zeros"] = scales * solution.zeros
        changes[f"{name}.bias"] = np.zeros(len(scales), np.float32)
    rewrite(tmp_path / "old", changes)
    (tmp_path / "old" / "quantize_config.json").unlink()
    edit(tmp_path / "old" / "config.json", quantization_config=None)
    convert(tmp_path / "old", tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_one_file_beside_its_config(tmp_path: Path, capsys):
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    for_llama(tmp_path / "old", 2)
    (tmp_path / "old" / "other.safetensors").write_bytes(b"not looked at")
    code, out, _ = run(capsys, tmp_path / "old" / "llama-4bit-32g.safetensors", tmp_path / "b")
    assert (code, out) == (0, f"{tmp_path / 'b'}: gptq to gptq\n")
    assert_same_model(tmp_path / "a", tmp_path / "b")
    facts = json.loads((tmp_path / "b" / "quantize_config.json").read_text())
    assert facts["model_name_or_path"] == "llama-4bit-32g"
    (tmp_path / "old" / "config.json").unlink()
    message = refused(capsys, tmp_path / "old" / "llama-4bit-32g.safetensors", tmp_path / "c")
    assert "there is no config.json beside it" in message


def test_scales_that_fp16_rounds_are_stated(tmp_path: Path, caplog):
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    name = f"{Q_PROJ}.scales"
    scales = tensors(tmp_path / "a")[name].astype(np.float32)
    scales[1, 7] *= 1 + 2**-13
    rewrite(tmp_path / "a", {name: scales})
    convert(tmp_path / "a", tmp_path / "b")
    assert f"scales rounded to fp16: the largest relative change is 0.00012, in {Q_PROJ}" in caplog.text
    exact = scales.astype(np.float64)
    assert np.isclose(scale_change(scales), np.abs(exact.astype(np.float16) / exact - 1).max(), rtol=1e-9)
    assert scale_change(scales.astype(np.float16)) == 0.0
    assert scale_change(np.float32([0, 0.5])) == 0.0
    assert scale_change(np.float32([1e-9])) == 1.0  # lost altogether
    rewrite(tmp_path / "a", {name: np.full_like(scales, 70000)})
    with pytest.raises(TinyGPTQError, match=f"{Q_PROJ}.scales holds values that fp16 cannot"):
        convert(tmp_path / "a", tmp_path / "c")


def test_bfloat16_scales(tmp_path: Path):
    """A bfloat16 value of this size is an fp16 value."""
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    name = f"{Q_PROJ}.scales"
    rewrite(tmp_path / "a", {name: tensors(tmp_path / "a")[name].astype(ml_dtypes.bfloat16)})
    convert(tmp_path / "a", tmp_path / "b")
    assert tensors(tmp_path / "b")[name].dtype == np.float16
    assert_same_model(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------------------------------ to floats


@pytest.mark.parametrize(("bits", "desc_act", "form"), [(4, False, "gptq"), (3, True, "gptq_v2"), (8, True, "gptq")])
def test_to_floats(tmp_path: Path, capsys, bits, desc_act, form):
    config = QuantizeConfig(bits, 32, desc_act, sym=False, checkpoint_format=form)
    quantized(tmp_path / "a", config, with_zeros(1, config.max_code))
    edit(tmp_path / "a" / "config.json", gptq_bits=bits, gptq_groupsize=32)
    for to in ("fp16", "fp32"):
        assert run(capsys, tmp_path / "a", tmp_path / to, "--to", to)[0] == 0
    quant, half, single = (load_checkpoint(tmp_path / name) for name in ("a", "fp16", "fp32"))
    assert half.quantization is single.quantization is None
    for name, linear in quant.weights.linears.items():
        exact = linear.dequantize().T
        assert single.weights.linears[name].weight.dtype == np.float32
        assert np.array_equal(single.weights.linears[name].weight, exact), name
        assert np.array_equal(half.weights.linears[name].weight, exact.astype(np.float16)), name
    raw = json.loads((tmp_path / "fp16" / "config.json").read_text())
    assert not {"quantization_config", "gptq_bits", "gptq_groupsize"} & raw.keys()
    assert raw["torch_dtype"] == "float16"
    names = {path.name for path in (tmp_path / "fp16").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("to", ["gptq", "fp16"])
def test_biases_that_no_config_asks_for_are_kept_and_asked_for(tmp_path: Path, to):
    """transformers gives all four attention linears a bias or none, so the others get zeros."""
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    bias = np.linspace(-1, 1, 96).astype(np.float16)
    rewrite(tmp_path / "a", {f"{Q_PROJ}.bias": bias})
    convert(tmp_path / "a", tmp_path / "b", to)
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["attention_bias"] is True
    after = tensors(tmp_path / "b")
    assert np.array_equal(after[f"{Q_PROJ}.bias"], bias)
    biases = {name for name in after if name.endswith(".bias")}
    assert len(biases) == 8 and all(not after[name].any() for name in biases - {f"{Q_PROJ}.bias"})
    assert np.array_equal(load_checkpoint(tmp_path / "b").weights.linears[Q_PROJ].bias, bias.astype(np.float32))


def test_a_linear_left_in_floats_stays_so(tmp_path: Path):
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    weight = np.random.default_rng(0).normal(size=(96, 96)).astype(np.float16)
    parts = {f"{Q_PROJ}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}
    rewrite(tmp_path / "a", parts | {f"{Q_PROJ}.weight": weight})
    convert(tmp_path / "a", tmp_path / "b", "gptq_v2")
    assert_same_model(tmp_path / "a", tmp_path / "b")
    assert np.array_equal(tensors(tmp_path / "b")[f"{Q_PROJ}.weight"], weight)


@pytest.mark.parametrize("to", ["gptq_v2", "fp32"])
def test_memory_for_one_linear_at_a_time(tmp_path: Path, to):
    """Codes stay memory-mapped where rows lie in order."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    quantized(tmp_path / "a", QuantizeConfig(), **sizes)
    outs = iter(("first", "second"))
    peak = peak_memory(lambda: convert(tmp_path / "a", tmp_path / next(outs), to))
    largest = 256 * 512 * 4
    linears = load_checkpoint(tmp_path / "a").weights.linears.values()
    total = sum(linear.in_features * linear.out_features * 4 for linear in linears)
    assert peak < 6 * largest < total / 4


# ------------------------------------------------------------------------------------------------------ nothing to convert


def test_what_is_no_source(tmp_path: Path, capsys):
    random_llama_folder(tmp_path / "dense")
    assert "is an unquantised Hugging Face folder already" in refused(capsys, tmp_path / "dense", tmp_path / "out")
    assert "is not quantised" in refused(capsys, tmp_path / "dense", tmp_path / "out", "--to", "gptq")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "text.txt").write_text("text")
    assert "not a GGUF, safetensors or PyTorch file" in refused(capsys, tmp_path / "text.txt", tmp_path / "out")
    assert "is not a size" in refused(capsys, tmp_path / "dense", tmp_path / "out", "--max-shard-size", "big")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "dense" / "config.json").read_text())
    assert "no .safetensors file" in refused(capsys, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(TinyGPTQError, match="cannot convert to 'int4'"):
        convert(tmp_path / "dense", tmp_path / "out", "int4")


def test_a_dense_folder_changes_its_dtype_when_asked(tmp_path: Path):
    stored = random_llama_folder(tmp_path / "dense", dtype="bfloat16", sharded=True)
    convert(tmp_path / "dense", tmp_path / "out", "fp32")
    after = tensors(tmp_path / "out")
    assert all(np.array_equal(after[name], array.astype(np.float32)) for name, array in stored.items())


def test_an_existing_folder_is_left_alone(tmp_path: Path, capsys):
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    code, _, err = run(capsys, tmp_path / "a", tmp_path / "taken")
    assert code == 2 and "already exists" in err
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine"]
