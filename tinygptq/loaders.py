"""Who can load a folder: what ExLlama, Marlin, AutoGPTQ, GPTQModel, TGI, vLLM, KoboldAI and transformers demand of one.

A rule is one generator of reasons against; no reason means yes. The demands are those of ExLlama v1 and v2, Marlin as
GPTQModel calls it, AutoGPTQ 0.3-0.7, GPTQModel 7, TGI 2 and 3, vLLM, KoboldAI's 4-bit fork and transformers with optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinygptq.config import QuantizeConfig
from tinygptq.gptq_files import FLOAT_ZEROS, NO_G_IDX, LinearFacts

Reasons = Iterator[str]


@dataclass(frozen=True)
class Loadable:
    """What the rules look at.

    shapes: {name: (in_features, out_features)} of the quantised linears, facts: what was found out about each.
    model_config: config.json as it stands; quantize_config: the quantisation's, {} where none is.
    places: names of the files that hold a quantisation config. files: names of the weights files.
    unequal: pairs of linears that share an input and yet have different g_idx.
    """

    config: QuantizeConfig | None
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    facts: Mapping[str, LinearFacts] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    quantize_config: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    unequal: tuple[tuple[str, str], ...] = ()

    def where(self, wrong: Callable[[str], bool]) -> str:
        """``name`` or ``name and 6 more`` of the linears that are wrong, "" if none is."""
        names = [name for name in self.shapes if wrong(name)]
        return "" if not names else names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    def layout(self, name: str) -> str:
        return self.facts[name].layout if name in self.facts else ""

    def inputs(self, name: str) -> int:
        return self.shapes[name][0]

    def outputs(self, name: str) -> int:
        return self.shapes[name][1]


# ----------------------------------------------------------------------------------------------- what several demand


def _packed_zeros(folder: Loadable) -> Reasons:
    if found := folder.where(lambda name: folder.layout(name) == FLOAT_ZEROS):
        yield f"zero points are floats, as in GPTQ-for-LLaMa's first generation ({found})"


def _zero_minus_one(folder: Loadable) -> Reasons:
    if found := folder.where(lambda name: name in folder.facts and folder.facts[name].stored_zeros == "zero"):
        yield f"it reads zero points as zero - 1, these are stored as they are, as in gptq_v2 ({found})"


def _g_idx(folder: Loadable) -> Reasons:
    if found := folder.where(lambda name: folder.layout(name) in (NO_G_IDX, FLOAT_ZEROS)):
        yield f"g_idx is missing ({found})"


def _multiples(folder: Loadable, axis: str, size: Callable[[str], int], of: int) -> Reasons:
    if found := folder.where(lambda name: size(name) % of != 0):
        yield f"{axis} features have to be a multiple of {of} ({found})"


def _even_groups(folder: Loadable) -> Reasons:
    if found := folder.where(lambda name: name in folder.facts and folder.facts[name].order == "uneven groups"):
        yield f"groups have several sizes ({found})"


def _whole_groups(folder: Loadable) -> Reasons:
    group = folder.config.group_size
    if group != -1 and (found := folder.where(lambda name: folder.inputs(name) % group != 0)):
        yield f"a group of {group} does not divide the input features ({found})"


def _some_config(folder: Loadable) -> Reasons:
    if not folder.places:
        yield "no quantize_config.json or other config says how it is quantised"


def _bits(folder: Loadable, *supported: int) -> Reasons:
    if folder.config.bits not in supported:
        yield f"{folder.config.bits} bits; it has {' and '.join(map(str, supported))}"


# ------------------------------------------------------------------------------------------------------------- rules


def _exllama(folder: Loadable) -> Reasons:
    """v1 and v2 have the same 4-bit kernels."""
    config = folder.config
    yield from _bits(folder, 4)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    if found := folder.where(lambda name: name in folder.facts and folder.facts[name].scales != "float16"):
        yield f"scales have to be fp16 ({found})"
    yield from _multiples(folder, "input", folder.inputs, 32)
    yield from _multiples(folder, "output", folder.outputs, 8)
    yield from _whole_groups(folder)
    yield from _even_groups(folder)
    if config.group_size != -1 and config.group_size & (config.group_size - 1):
        yield f"a group has to be a power of two, this is {config.group_size}"
    if config.desc_act and config.group_size == -1:
        yield "act-order without groups"


def _marlin(folder: Loadable) -> Reasons:
    yield from _bits(folder, 4, 8)
    yield from _packed_zeros(folder)
    if found := folder.where(lambda name: name in folder.facts and not folder.facts[name].symmetric):
        yield f"asymmetric zero points ({found})"
    if folder.config.group_size not in (-1, 32, 64, 128):
        yield f"a group of {folder.config.group_size}; it has none, 32, 64 and 128"
    yield from _whole_groups(folder)
    yield from _even_groups(folder)
    yield from _multiples(folder, "output", folder.outputs, 64)


def _autogptq(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    yield from _g_idx(folder)


def _gptqmodel(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _packed_zeros(folder)
    yield from _g_idx(folder)
    if "is_marlin_format" in folder.quantize_config:
        yield "the config has the key is_marlin_format, at which it stops whatever the value"
    yield from _label_is_right(folder)


def _tgi(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _bits(folder, 2, 4, 8)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    yield from _g_idx(folder)
    if folder.unequal:
        yield f"g_idx differs between {folder.unequal[0][0]} and {folder.unequal[0][1]}, which it joins"
    if folder.places and folder.config.sym and "sym" not in folder.quantize_config:
        yield "the config does not say sym, which it takes for false"


def _vllm(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _packed_zeros(folder)
    yield from _whole_groups(folder)
    yield from _label_is_right(folder)
    if folder.unequal:
        yield f"g_idx differs between {folder.unequal[0][0]} and {folder.unequal[0][1]}, which it joins"


def _koboldai(folder: Loadable) -> Reasons:
    keys = ("gptq_bits", "gptq_groupsize")
    if not all(key in folder.model_config for key in keys) and "4bit-128g.safetensors" not in folder.files:
        yield "config.json has no gptq_bits and gptq_groupsize, and no file is named 4bit-128g.safetensors"
    yield from _zero_minus_one(folder)


def _transformers(folder: Loadable) -> Reasons:
    if "config.json" not in folder.places:
        yield "config.json has no quantization_config"
    if not any(name == "model.safetensors" or name.startswith("model-") for name in folder.files):
        yield f"it opens model.safetensors or its shards, this is {', '.join(folder.files[:2])}"
    yield from _packed_zeros(folder)
    yield from _g_idx(folder)
    yield from _label_is_right(folder)


def _label_is_right(folder: Loadable) -> Reasons:
    wanted = {"gptq": "zero - 1", "gptq_v2": "zero"}[folder.config.checkpoint_format]
    said = [name for name in folder.shapes if name in folder.facts and folder.facts[name].layout != FLOAT_ZEROS]
    if folder.places and (wrong := [name for name in said if folder.facts[name].stored_zeros != wanted]):
        yield f"it believes the label {folder.config.checkpoint_format}, which the zero points contradict ({wrong[0]})"


RULES: dict[str, Callable[[Loadable], Reasons]] = {
    "ExLlama v1": _exllama,
    "ExLlama v2": _exllama,
    "Marlin": _marlin,
    "AutoGPTQ": _autogptq,
    "GPTQModel": _gptqmodel,
    "TGI": _tgi,
    "vLLM": _vllm,
    "KoboldAI": _koboldai,
    "transformers": _transformers,
}
DENSE_LOADERS = ("ExLlama v2", "TGI", "vLLM", "KoboldAI", "transformers")  # load fp16 and bf16 folders as well


def who_can_load(folder: Loadable) -> dict[str, list[str]]:
    """``{loader: reasons against}``; an empty list means it can load the folder."""
    if folder.config is None:
        return {name: [] if name in DENSE_LOADERS else ["the folder is not quantised"] for name in RULES}
    return {name: list(rule(folder)) for name, rule in RULES.items()}


def remarks(folder: Loadable) -> dict[str, str]:
    """What to know about loaders that can load the folder."""
    if folder.config is None:
        return {}
    found = {}
    if folder.config.bits == 8:
        found["AutoGPTQ"] = "its 8-bit CUDA kernel decodes zero points wrongly from 0.7.0 on"
    if any(facts.stored_zeros == "zero" for facts in folder.facts.values()):
        found["vLLM"] = "only versions that know the format gptq_v2"
    return found
