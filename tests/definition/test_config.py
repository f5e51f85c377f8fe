"""The three configurations: what they read, and that every refusal is one line that names the field."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from tinygptq.config import RECIPES, GenerationConfig, LlamaConfig, QuantizeConfig, Recipe, RopeScaling, read_json
from tinygptq.errors import TinyGPTQError


def refused(call, *parts: str) -> None:
    """``call`` raises one line that holds every one of ``parts``."""
    with pytest.raises(TinyGPTQError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---------------------------------------------------------------------------------------------------------- LLaMA


def test_every_field_is_read():
    config = LlamaConfig.from_dict(
        small_config(head_dim=32, rope_theta=5e5, tie_word_embeddings=True, eos_token_id=[2, 7], attention_bias=True)
    )
    assert config == LlamaConfig(
        vocab_size=120,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=None,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=1,
        eos_token_ids=(2, 7),
    )
    assert isinstance(config.rope_theta, float)


def test_defaults_are_those_of_llama_1():
    raw = small_config(num_key_value_heads=None, max_position_embeddings=None, rms_norm_eps=None, rope_theta=None,
                       tie_word_embeddings=None, bos_token_id=None, eos_token_id=None, hidden_act=None)  # fmt: skip
    config = LlamaConfig.from_dict(raw)
    assert config.num_key_value_heads == 6
    assert config.head_dim == 16
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope_theta) == (2048, 1e-6, 10000.0)
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_ids) == (False, None, ())


def test_null_means_absent():
    raw = small_config() | dict.fromkeys(("head_dim", "num_key_value_heads", "rope_scaling", "eos_token_id"))
    config = LlamaConfig.from_dict(raw)
    assert (config.head_dim, config.num_key_value_heads, config.rope_scaling, config.eos_token_ids) == (16, 6, None, ())


def test_linear_shapes_follow_head_dim_and_grouped_queries():
    shapes = LlamaConfig.from_dict(small_config(head_dim=32)).linear_shapes()
    assert shapes == {
        "self_attn.q_proj": (96, 192),
        "self_attn.k_proj": (96, 64),
        "self_attn.v_proj": (96, 64),
        "self_attn.o_proj": (192, 96),
        "mlp.gate_proj": (96, 160),
        "mlp.up_proj": (96, 160),
        "mlp.down_proj": (160, 96),
    }


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0, original_max_position_embeddings=64)),
        ({"rope_type": "linear", "factor": 2.5}, RopeScaling("linear", 2.5, original_max_position_embeddings=64)),
        ({"type": "dynamic", "factor": 4.0}, RopeScaling("dynamic", 4.0, original_max_position_embeddings=64)),
        ({"rope_type": "llama3", **LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
    ],
)
def test_rope_scaling_in_both_spellings(scaling, expected):
    raw = small_config(rope_theta=None)
    assert LlamaConfig.from_dict(raw | {"rope_scaling": scaling, "rope_theta": 5e5}).rope_scaling == expected
    # transformers 5 writes one object that holds theta too
    config = LlamaConfig.from_dict(raw | {"rope_parameters": {"rope_theta": 5e5, **(scaling or {})}})
    assert config.rope_scaling == expected
    assert config.rope_theta == 5e5


def test_rope_scaling_type_older_spelling_yields_to_the_newer():
    raw = {"type": "default", "rope_type": "linear", "factor": 2.0}
    assert RopeScaling.from_dict(raw, 64, "x").kind == "linear"


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads"])  # fmt: skip
def test_missing_sizes_are_named(field):
    raw = small_config(**{field: None})
    refused(lambda: LlamaConfig.from_dict(raw, "X/config.json"), f"X/config.json: '{field}' is missing")


NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
           "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")  # fmt: skip
NOT_NUMBERS = st.one_of(st.text(), st.booleans(), st.lists(st.integers(), max_size=2), st.just({}), st.just({"a": 1}))


@given(field=st.sampled_from(NUMBERS), value=NOT_NUMBERS)
def test_wrong_types_are_named(field, value):
    refused(lambda: LlamaConfig.from_dict(small_config(**{field: value})), f"'{field}' should be", repr(value))


@given(
    field=st.sampled_from([name for name in NUMBERS if name not in ("rms_norm_eps", "rope_theta")]),
    value=st.one_of(st.integers(max_value=0), st.just(10**400), st.just(float("nan")), st.just(float("inf")),
                    st.floats(1.01, 9.99).filter(lambda x: not x.is_integer())),
)  # fmt: skip
def test_sizes_that_are_no_sizes_are_named(field, value):
    refused(lambda: LlamaConfig.from_dict(small_config(**{field: value})), f"'{field}' should be")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"rms_norm_eps": -1e-6}, ["'rms_norm_eps'"]),
        ({"rope_theta": 0}, ["'rope_theta'"]),
        ({"rope_theta": float("inf")}, ["'rope_theta'"]),
        ({"tie_word_embeddings": "yes"}, ["'tie_word_embeddings'", "true or false"]),
        ({"attention_bias": 1}, ["'attention_bias'", "true or false"]),
        ({"eos_token_id": "2"}, ["'eos_token_id'", "token id"]),
        ({"eos_token_id": [2, -1]}, ["'eos_token_id'", "[2, -1]"]),
        ({"bos_token_id": True}, ["'bos_token_id'"]),
        ({"num_key_value_heads": 4}, ["6 attention heads", "4 key-value heads"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size 96", "num_attention_heads 5"]),
        ({"head_dim": 15}, ["head_dim 15 is odd"]),
        ({"rope_scaling": "linear"}, ["'rope_scaling'", "'linear'"]),
        ({"rope_parameters": [1]}, ["'rope_parameters'", "[1]"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["rope_scaling type 'yarn'", "linear, dynamic, llama3"]),
        ({"rope_scaling": {"type": ["linear"]}}, ["rope_scaling type ['linear']"]),
        ({"rope_scaling": {"type": "linear"}}, ["'factor' is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["'factor' should be at least 1"]),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, ["high_freq_factor > low_freq"]),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": "1"}}, ["'low_freq_factor' should be float"]),
    ],
)
def test_refusals_name_the_field(overrides, parts):
    refused(lambda: LlamaConfig.from_dict(small_config(**overrides), "X"), "X: ", *parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"architectures": ["MistralForCausalLM"]}, ["architectures", "MistralForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures"]),
        ({"architectures": []}, ["architectures"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ({"architectures": None, "model_type": "gpt2"}, ["model_type", "'gpt2'"]),
        ({"architectures": None, "model_type": None}, ["model_type"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
    ],
)
def test_other_architectures_are_refused(overrides, parts):
    refused(lambda: LlamaConfig.from_dict(small_config(**overrides)), *parts)


def test_older_spellings_of_the_architecture():
    assert LlamaConfig.from_dict(small_config(architectures=["LLaMAForCausalLM"])).hidden_size == 96
    assert LlamaConfig.from_dict(small_config(architectures=None)).hidden_size == 96


# ----------------------------------------------------------------------------------------------------- JSON files


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"{", "not readable as JSON"), (b"[1]", "expected a JSON object, found list"), (b"\xff\xfe{}", "not readable"),
     (b"", "not readable"), (b"[" * 100_000, "not readable")],
)  # fmt: skip
def test_files_that_are_no_json_object(tmp_path: Path, content, part):
    (tmp_path / "config.json").write_bytes(content)
    refused(lambda: LlamaConfig.from_folder(tmp_path), "config.json", part)


def test_missing_file_and_folder_in_its_place(tmp_path: Path):
    refused(lambda: read_json(tmp_path / "config.json"), "config.json: no such file")
    refused(lambda: read_json(tmp_path), str(tmp_path))


# ----------------------------------------------------------------------------------------------------- quantising


def test_quantize_config_reads_back_what_it_writes():
    config = QuantizeConfig(3, 32, True, False, 0.1, True, False, "gptq_v2")
    raw = json.loads(json.dumps(config.to_dict("name")))
    assert QuantizeConfig.from_dict(raw) == config
    assert raw["quant_method"] == "gptq"
    assert raw["model_name_or_path"] == "name"
    assert raw["sym"] is False  # some readers take its absence for False, so it is always written
    assert "is_marlin_format" not in raw


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"bits": 4, "group_size": 128}, QuantizeConfig()),
        ({"w_bit": 3, "q_group_size": 64}, QuantizeConfig(bits=3, group_size=64)),
        ({"wbits": 2, "groupsize": -1}, QuantizeConfig(bits=2, group_size=-1)),
        ({"bits": 8, "group_size": -1, "desc_act": True, "damp_percent": None}, QuantizeConfig(8, -1, True)),
        ({"bits": 4, "format": "gptq_v2", "method": "gptq"}, QuantizeConfig(checkpoint_format="gptq_v2")),
        ({"bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"}, QuantizeConfig()),
        ({"bits": 4, "pack_dtype": "int32", "lm_head": False, "meta": {}}, QuantizeConfig()),
    ],
)
def test_quantize_config_spellings(raw, expected):
    before = dict(raw)
    assert QuantizeConfig.from_dict(raw) == expected
    assert raw == before


def test_the_recipe_is_no_field_of_the_file_but_a_remark_in_meta():
    assert QuantizeConfig().recipe == RECIPES["fast"]
    assert "recipe" not in QuantizeConfig().to_dict()
    for recipe in RECIPES.values():
        assert QuantizeConfig.from_dict({"bits": 4, "meta": {"recipe": asdict(recipe)}}).recipe == recipe
    odd = {"clip": True, "later": 1, "shrink": "much", "drift": float("nan"), "refine": 10**400}
    for said, expected in ((odd, Recipe(clip=True)), ({}, RECIPES["plain"]), ({"later": 1}, RECIPES["plain"])):
        assert QuantizeConfig.from_dict({"bits": 4, "meta": {"recipe": said}}).recipe == expected
    for said in ("fast", None, 3, [True]):
        assert QuantizeConfig.from_dict({"bits": 4, "meta": {"recipe": said}}) == QuantizeConfig()


def test_what_the_recipe_means_for_the_solver():
    contiguous, ordered = QuantizeConfig(), QuantizeConfig(desc_act=True)
    assert contiguous.in_act_order and contiguous.grids_first
    assert ordered.in_act_order and not ordered.grids_first
    plain = QuantizeConfig(recipe=RECIPES["plain"])
    assert not plain.in_act_order and not plain.grids_first
    assert QuantizeConfig(static_groups=True, recipe=RECIPES["plain"]).grids_first


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        ({}, ["'bits' is missing"]),
        ({"bits": None}, ["'bits' is missing"]),
        ({"bits": 5}, ["bits is 5", "(2, 3, 4, 8)"]),
        ({"bits": 4.0}, ["bits is 4.0"]),
        ({"bits": "4"}, ["bits is '4'"]),
        ({"bits": True}, ["bits is True"]),
        ({"bits": 4, "group_size": 0}, ["group_size is 0"]),
        ({"bits": 4, "group_size": -2}, ["group_size is -2"]),
        ({"bits": 4, "group_size": 64.0}, ["group_size is 64.0"]),
        ({"bits": 4, "damp_percent": 1}, ["damp_percent is 1"]),
        ({"bits": 4, "damp_percent": -0.1}, ["damp_percent is -0.1"]),
        ({"bits": 4, "damp_percent": float("nan")}, ["damp_percent is nan"]),
        ({"bits": 4, "damp_percent": "0.01"}, ["damp_percent is '0.01'"]),
        ({"bits": 4, "desc_act": "false"}, ["desc_act is 'false'"]),
        ({"bits": 4, "sym": 1}, ["sym is 1"]),
        ({"bits": 4, "static_groups": 0}, ["static_groups is 0"]),
        ({"bits": 4, "true_sequential": []}, ["true_sequential is []"]),
        ({"bits": 4, "checkpoint_format": "marlin"}, ["checkpoint_format 'marlin'"]),
        ({"bits": 4, "quant_method": "awq"}, ["quant_method is 'awq'"]),
    ],
)
def test_quantize_config_refusals(raw, parts):
    refused(lambda: QuantizeConfig.from_dict(raw, "X/quantize_config.json"), "X/quantize_config.json: ", *parts)


@given(group=st.one_of(st.just(-1), st.integers(1, 300)), in_features=st.integers(1, 300))
def test_groups_cover_the_rows_exactly(group, in_features):
    config = QuantizeConfig(group_size=group)
    rows, groups = config.rows_per_group(in_features), config.num_groups(in_features)
    assert 1 <= rows <= in_features
    assert (groups - 1) * rows < in_features <= groups * rows
    assert group != -1 or groups == 1


@pytest.mark.parametrize(("bits", "largest"), [(2, 3), (3, 7), (4, 15), (8, 255)])
def test_max_code(bits, largest):
    assert QuantizeConfig(bits=bits).max_code == largest


# ----------------------------------------------------------------------------------------------------- generating


def generation(folder: Path, raw: dict | None) -> GenerationConfig:
    if raw is not None:
        (folder / "generation_config.json").write_text(json.dumps(raw), encoding="utf-8")
    return GenerationConfig.from_folder(folder, LlamaConfig.from_dict(small_config(eos_token_id=[2, 3])))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, GenerationConfig(eos_token_ids=(2, 3))),
        ({}, GenerationConfig(eos_token_ids=(2, 3))),
        ({"eos_token_id": 9}, GenerationConfig(eos_token_ids=(9,))),
        ({"eos_token_id": [9, 10]}, GenerationConfig(eos_token_ids=(9, 10))),
        ({"do_sample": True}, GenerationConfig(1.0, 50, 1.0, 1.0, (2, 3))),
        ({"do_sample": False, "temperature": 0.7}, GenerationConfig(0.0, 0, 1.0, 1.0, (2, 3))),
        ({"temperature": 0.7, "top_p": 0.9}, GenerationConfig(0.7, 50, 0.9, 1.0, (2, 3))),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1},
            GenerationConfig(0.6, 20, 0.95, 1.1, (2, 3)),
        ),
        ({"do_sample": True, "top_k": 0, "temperature": None}, GenerationConfig(1.0, 0, 1.0, 1.0, (2, 3))),
    ],
)
def test_generation_config(tmp_path: Path, raw, expected):
    assert generation(tmp_path, raw) == expected


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ({"temperature": -1}, "'temperature' should be at least 0"),
        ({"temperature": "hot"}, "'temperature' should be float"),
        ({"top_k": 1.5}, "'top_k' should be int"),
        ({"top_k": -1}, "'top_k' should be at least 0"),
        ({"do_sample": True, "top_p": -0.5}, "'top_p' should be at least 0"),
        ({"repetition_penalty": 0}, "'repetition_penalty' should be at least 0.001"),
        ({"do_sample": "no"}, "'do_sample' should be true or false"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' should be a token id"),
    ],
)
def test_generation_config_refusals(tmp_path: Path, raw, part):
    # a temperature outside of sampling would not be looked at
    refused(lambda: generation(tmp_path, {"do_sample": True, **raw}), "generation_config.json: ", part)
