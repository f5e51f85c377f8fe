"""`inspect` and `size`: what they say of folders of every kind, and that sizes are those of written files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from golden import writers
from golden.writers import WRITERS, random_model
from helpers import (
    random_llama_folder,
    random_solutions,
    save_byte_tokenizer,
    save_safetensors,
    small_config,
    write_quantized,
)

from tinygptq.branches import BRANCHES
from tinygptq.cli import main
from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.sizes import sizes
from tinygptq.folders.tensor_folder import is_finite
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.release.inspect_folder import as_dict, as_text, inspect_folder

Q_PROJ = "model.layers.0.self_attn.q_proj"
LLAMA_7B = small_config(vocab_size=32001, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048)  # fmt: skip
# bytes of a written file's header and tensors; the published table has them in decimal GB
LLAMA_7B_BYTES = {
    "main": 3_893_986_888,
    "gptq-4bit-32g-actorder_True": 4_273_440_808,
    "gptq-4bit-64g-actorder_True": 4_020_471_448,
    "gptq-4bit-128g-actorder_True": 3_893_986_888,
    "gptq-8bit--1g-actorder_True": 7_009_584_800,
    "gptq-8bit-128g-actorder_False": 7_157_287_008,
}
PUBLISHED_GB = (3.894, 4.273, 4.020, 3.894, 7.0096, 7.157)


@pytest.fixture
def run(capsys):
    """Run a command line that succeeds; what it printed."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


# ------------------------------------------------------------------------------------------------------------ inspect


@pytest.mark.parametrize("name", WRITERS)
def test_every_generation_is_named(tmp_path: Path, name):
    writer = WRITERS[name]
    act_order = not (writer.one_group_only or writer.in_order_only)
    model = random_model(4, -1 if writer.one_group_only else 32, desc_act=act_order)
    writer.write(model, tmp_path)
    found = as_dict(inspect_folder(tmp_path))
    assert found["problems"] == []
    assert found["tool"] == writer.tool
    assert (found["bits"], found["group_size"], found["sym"], found["desc_act"]) == (4, model.group_size, True, act_order)
    layout = "float zeros" if "llama 1" in name else "qzeros" if "llama 2" in name else "qzeros and g_idx"
    assert found["generation"] == layout
    stored = "zero * scale" if "llama 1" in name else "zero" if name in ("gptqmodel v2", "v2 labelled v1") else "zero - 1"
    assert found["zero_points"] == {stored: 7}
    assert sum(found["bytes"].values()) == sum(found["files"].values())
    assert sum(found["files"].values()) == sum((tmp_path / file).stat().st_size for file in found["files"])
    assert len(found["linears"]) == 7
    assert any("labelled" in line for line in found["warnings"]) == ("labelled" in name)


def answers(folder: Path) -> dict[str, str]:
    """``yes``, or the reasons against."""
    return {name: "; ".join(reasons) or "yes" for name, reasons in inspect_folder(folder).loaders.items()}


def quantized(tmp_path: Path, config: QuantizeConfig, **overrides) -> Path:
    """A folder of a size that Marlin takes, as tinygptq writes it."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    random_llama_folder(tmp_path / "src", **(sizes | {"num_hidden_layers": 1} | overrides))
    write_quantized(tmp_path / "src", tmp_path / "out", config, random_solutions)
    return tmp_path / "out"


def test_who_can_load_a_plain_folder(tmp_path: Path):
    folder = quantized(tmp_path, QuantizeConfig(4, 128))
    found = answers(folder)
    assert found.pop("KoboldAI").startswith("config.json has no gptq_bits")
    assert set(found.values()) == {"yes"}
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"gptq_bits": 4, "gptq_groupsize": 128}))
    assert answers(folder)["KoboldAI"] == "yes"


@pytest.mark.parametrize(
    ("config", "noes"),
    [
        (QuantizeConfig(8, -1, desc_act=True), {"ExLlama v1": "8 bits; it has 4", "ExLlama v2": "8 bits; it has 4"}),
        (QuantizeConfig(3, 32), {"Marlin": "3 bits; it has 4 and 8", "TGI": "3 bits; it has 2 and 4 and 8"}),
        (QuantizeConfig(4, 32, sym=False), {"Marlin": "asymmetric zero points",
                                            "GPTQModel": "asymmetric and in format gptq, which it takes from itself alone"}),
        (QuantizeConfig(4, 16), {"Marlin": "a group of 16; it has none, 32, 64 and 128",
                                 "ExLlama v2": "a power of two from 32 on, this is 16"}),
        (QuantizeConfig(4, 96), {"ExLlama v1": "a group of 96 does not divide the input features",
                                 "ExLlama v2": "a power of two from 32 on, this is 96", "vLLM": "a group of 96 does",
                                 "GPTQModel": "a group of 96; it has none, 16, 32, 64, 128, 256, 512 and 1024",
                                 "transformers": "a group of 96; it has"}),
        (QuantizeConfig(4, 4), {"ExLlama v1": "a group has to be a multiple of 8", "GPTQModel": "a group of 4; it has",
                                "transformers": "a group of 4; it has"}),
        (QuantizeConfig(4, 32, checkpoint_format="gptq_v2"), {"AutoGPTQ": "it reads zero points as zero - 1",
                                                              "ExLlama v1": "it reads", "TGI": "it reads"}),
        # random groups differ in q, k and v
        (QuantizeConfig(4, 32, desc_act=True), {"TGI": "g_idx differs", "vLLM": "g_idx differs"}),
    ],
)  # fmt: skip
def test_each_no_has_its_reason(tmp_path: Path, config, noes):
    found = answers(quantized(tmp_path, config))
    for name, reason in noes.items():
        assert reason in found[name]
    assert all(found[name] == "yes" for name in {"GPTQModel", "transformers", "AutoGPTQ"} - noes.keys())


@pytest.mark.parametrize("desc_act", [False, True])
def test_without_groups_act_order_is_no_matter(tmp_path: Path, desc_act):
    """An all-zero g_idx counts as none to both versions of ExLlama."""
    found = answers(quantized(tmp_path, QuantizeConfig(4, -1, desc_act=desc_act)))
    assert {found["ExLlama v1"], found["ExLlama v2"], found["vLLM"], found["TGI"], found["Marlin"]} == {"yes"}


SMOLLM2_LIKE = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3, "num_key_value_heads": 1}
NARROW = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2}  # k, v: 32


@pytest.mark.parametrize(
    ("config", "shape", "noes"),
    [
        (QuantizeConfig(4, 64), SMOLLM2_LIKE, {"Marlin": "multiples of 64, one of them of 128 (model.layers.0.self_attn.q_p",
                                               "TGI": "multiples of 64, one of them of 128 (model.layers.0.self_attn.q_p",
                                               "ExLlama v1": "with g_idx, output features have to be a multiple of 128"}),
        (QuantizeConfig(2, 64), SMOLLM2_LIKE, {"Marlin": "2 bits"}),
        (QuantizeConfig(4, 16, sym=False, checkpoint_format="gptq_v2"), SMOLLM2_LIKE, {"Marlin": "asymmetric"}),
        (QuantizeConfig(4, 128), NARROW, {"TGI": "a group of 128 does not divide", "Marlin": "a group of 128 does not",
                                          "ExLlama v1": "a group of 128 does not", "vLLM": "a group of 128 does not"}),
    ],
)  # fmt: skip
def test_shapes_that_kernels_do_not_take(tmp_path: Path, config, shape, noes):
    found = answers(quantized(tmp_path, config, **shape))
    for name, reason in noes.items():
        assert reason in found[name]
    assert (found["TGI"] == "yes") == ("TGI" not in noes and config.checkpoint_format == "gptq")
    assert found["GPTQModel"] == found["transformers"] == "yes"
    if config.checkpoint_format == "gptq" and config.bits == 4:
        assert found["ExLlama v2"] == "yes"


def test_what_to_know_about_a_short_last_group(tmp_path: Path):
    found = inspect_folder(quantized(tmp_path, QuantizeConfig(4, 64), **NARROW))
    assert "its choice there wants whole groups" in found.remarks["transformers"]
    assert "disable_exllamav2" in found.remarks["AutoGPTQ"]
    assert found.remarks["transformers"] in as_text(found)


def test_asymmetric_folders_of_gptqmodel_load_there(tmp_path: Path):
    folder = quantized(tmp_path, QuantizeConfig(4, 32, sym=False))
    raw = json.loads((folder / "quantize_config.json").read_text())
    raw["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    (folder / "quantize_config.json").write_text(json.dumps(raw))
    assert answers(folder)["GPTQModel"] == "yes"
    assert "Marlin alone" in inspect_folder(folder).remarks["vLLM"]


def test_transformers_passes_over_settings_of_single_linears(tmp_path: Path):
    folder = quantized(tmp_path, QuantizeConfig(4, 32))
    raw = json.loads((folder / "quantize_config.json").read_text()) | {"dynamic": {"-:.*down_proj": {}}}
    (folder / "quantize_config.json").write_text(json.dumps(raw))
    found = answers(folder)
    assert "settings of single linears (dynamic)" in found["transformers"]
    assert found["GPTQModel"] == "yes"


@pytest.mark.parametrize(
    ("name", "added", "answer"),
    [
        ("model.safetensors", {}, "config.json has no gptq_bits, and no file has 4bit in its name"),
        ("model.safetensors", {"gptq_bits": 4, "gptq_groupsize": 32}, "yes"),
        ("model.safetensors", {"gptq_bits": 4}, "config.json says 4 bits and group -1, it has 4 and 32"),
        ("4bit-32g.safetensors", {}, "yes"),
        ("llama-4bit-32g.safetensors", {}, "yes"),
        ("4bit-128g.safetensors", {}, "the file's name says 4 bits and group 128, it has 4 and 32"),
        ("4bit.safetensors", {}, "the file's name says 4 bits and group -1, it has 4 and 32"),
        ("4bit-32g.safetensors", {"gptq_bits": 4, "gptq_groupsize": 32}, "it opens model.safetensors"),
    ],
)
def test_where_koboldai_looks_for_bits_and_group(tmp_path: Path, name, added, answer):
    folder = quantized(tmp_path, QuantizeConfig(4, 32))
    (folder / "model.safetensors").rename(folder / name)
    raw = json.loads((folder / "quantize_config.json").read_text()) | {"model_file_base_name": Path(name).stem}
    (folder / "quantize_config.json").write_text(json.dumps(raw))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | added))
    assert answer in answers(folder)["KoboldAI"]


def test_scales_that_exllama_does_not_take(tmp_path: Path):
    import ml_dtypes

    folder = quantized(tmp_path, QuantizeConfig(4, 32))
    tensors = {name: np.array(tensor) for name, tensor in TensorFile(folder / "model.safetensors").items()}
    for dtype, second in ((np.float32, "yes"), (ml_dtypes.bfloat16, "scales have to be fp16 or fp32")):
        changed = {name: t.astype(dtype) if name.endswith("scales") else t for name, t in tensors.items()}
        save_safetensors(changed, folder / "model.safetensors")
        found = answers(folder)
        assert "scales have to be fp16 (" in found["ExLlama v1"]
        assert second in found["ExLlama v2"]


def test_vllm_wants_the_names_of_autogptq_0_4(tmp_path: Path):
    folder = quantized(tmp_path, QuantizeConfig(4, 32))
    raw = json.loads((folder / "quantize_config.json").read_text())
    older = {"wbits": raw["bits"], "groupsize": raw["group_size"], "desc_act": False, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps(older))
    assert answers(folder)["vLLM"] == "the config does not say bits and group_size"


def test_dense_folders(tmp_path: Path):
    random_llama_folder(tmp_path, dtype="bfloat16")
    found = inspect_folder(tmp_path)
    assert found.quantization is None
    assert found.loaders["Marlin"] == ["the folder is not quantised"]
    assert found.loaders["vLLM"] == []
    assert "quantised       no" in as_text(found)
    assert found.bytes["dense linears"] == sum(x.weight.nbytes for x in load_checkpoint(tmp_path).weights.linears.values())


def test_every_problem_is_found_not_only_the_first(tmp_path: Path):
    writers.autogptq_03(random_model(4, 32, desc_act=True), tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    tensors = {name: np.array(tensor) for name, tensor in TensorFile(path).items()}
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"][0, 0] = np.inf
    tensors[f"{Q_PROJ}.g_idx"][0] = 9
    tensors["model.layers.0.mlp.up_proj.scales"] = tensors["model.layers.0.mlp.up_proj.scales"][:2]
    save_safetensors(tensors, path)
    problems = inspect_folder(tmp_path).problems
    for part in ("model.norm.weight is missing", "lm_head.weight holds NaN or infinity", "g_idx holds values from 0 to 9",
                 "up_proj.scales has shape [2, 160], expected [3, 160]"):  # fmt: skip
        assert sum(part in problem for problem in problems) == 1
    assert len(problems) == 4


def test_contradicting_configs_are_pointed_out(tmp_path: Path):
    model = random_model(4, 32)
    writers.autogptq_06(model, tmp_path)
    other = writers.facts(model) | {"desc_act": True, "damp_percent": 0.1}
    (tmp_path / "quantize_config.json").write_text(json.dumps(other))
    warnings = inspect_folder(tmp_path).warnings
    expected = "quantize_config.json and config.json contradict each other: desc_act True and False; the first counts"
    assert expected in warnings


def test_a_tokenizer_larger_than_the_embedding(tmp_path: Path):
    writers.autogptq_06(random_model(), tmp_path)
    save_byte_tokenizer(tmp_path)
    expected = "the tokenizer has 259 ids and the embedding 64 rows; larger ids cannot be used"
    assert expected in inspect_folder(tmp_path).warnings


def test_inspect_from_the_command_line(tmp_path: Path, run, capsys):
    writers.gptqmodel_v1(random_model(4, 32), tmp_path)
    text = run("inspect", tmp_path)
    for part in ("GPTQModel (meta.quantizer is gptqmodel:7.7.0)", "4 bits, group 32, act-order no, symmetric",
                 "every stored value is 7", "problems: none", "self_attn.q_proj", "3 x 32 rows"):  # fmt: skip
        assert part in text
    assert json.loads(run("inspect", tmp_path, "--json"))["loads"] is True
    (tmp_path / "config.json").unlink()
    assert main(["inspect", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "config.json: no such file" in captured.out
    assert captured.err.count("\n") == 1 and "cannot be loaded, 1 problem" in captured.err


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "bfloat16"])
def test_is_finite_by_bits(dtype):
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if dtype.itemsize == 2:  # every value there is
        for bits in range(2**16):
            value = np.array([0, bits], unsigned).view(dtype)
            assert is_finite(value) == bool(np.isfinite(value.astype(np.float32)).all())
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        array = np.zeros((3, 5), dtype)
        assert is_finite(array)
        array[2, 4] = value
        assert not is_finite(array)
    assert is_finite(np.array([np.finfo(dtype).max, np.finfo(dtype).min] if dtype != ml_dtypes.bfloat16 else [3e38], dtype))
    assert is_finite(np.zeros((0, 3), dtype))


# --------------------------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_a_written_file(tmp_path: Path, branch, tied):
    """A thirty-second of LLaMA-7B: one layer, every side divided by 32, the vocabulary's odd row kept."""
    shape = {"vocab_size": 1001, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4,
             "num_key_value_heads": 4, "num_hidden_layers": 1}  # fmt: skip
    random_llama_folder(tmp_path / "src", dtype="float16", tied=tied, **shape)
    write_quantized(tmp_path / "src", tmp_path / "out", BRANCHES[branch], random_solutions)
    found = sizes(LlamaConfig.from_folder(tmp_path / "src"), BRANCHES[branch])
    assert found.file == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.weights == sum(tensor.nbytes for tensor in TensorFile(tmp_path / "out" / "model.safetensors").values())


def test_llama_7b_by_its_config_alone(tmp_path: Path, run):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    table = json.loads(run("size", path, "--all-branches", "--json"))["branches"]
    assert {row["branch"]: row["file"] for row in table} == LLAMA_7B_BYTES
    assert [row["exllama"] for row in table] == [True] * 4 + [False] * 2
    for row, published in zip(table, PUBLISHED_GB, strict=True):
        assert abs(row["file"] / 1e9 - published) < 6e-4
    text = run("size", tmp_path, "--all-branches").splitlines()
    assert text[1].split() == ["main", "4", "128", "No", "0.01", "3.89", "GB", "3,893,986,888", "Yes"]
    last = "gptq-8bit--1g-actorder_True 8 None Yes 0.01 7.01 GB 7,009,584,800 No"
    assert text[5].split() == last.split()


def test_size_as_options_and_configs_say(tmp_path: Path, run):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    assert json.loads(run("size", tmp_path, "--json"))["quantization"] is None
    assert json.loads(run("size", tmp_path, "--bits", 4, "--json"))["file"] == LLAMA_7B_BYTES["main"]
    (tmp_path / "quantize_config.json").write_text('{"bits": 8, "group_size": -1}')
    found = json.loads(run("size", tmp_path, "--json"))
    assert found["file"] == LLAMA_7B_BYTES["gptq-8bit--1g-actorder_True"]
    assert found["kv_per_1000_tokens"] == 2 * 32 * 4096 * 4 * 1000
    found = json.loads(run("size", tmp_path, "--group-size", 128, "--json"))
    assert found["file"] == LLAMA_7B_BYTES["gptq-8bit-128g-actorder_False"]
    assert "7,009,584,800 bytes" in run("size", tmp_path)


def test_size_refuses(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    for words, part in (
        (("--all-branches", "--bits", "4"), "--all-branches has bits and group sizes of its own"),
        (("--group-size", "0"), "group_size is 0"),
    ):
        assert main(["size", str(tmp_path), *words]) == 2
        err = capsys.readouterr().err
        assert part in err and err.count("\n") == 1
    with pytest.raises(TinyGPTQError, match="no such folder"):
        inspect_folder(tmp_path / "nowhere")
