"""Who can load a folder: what ExLlama, Marlin, AutoGPTQ, GPTQModel, TGI, vLLM, KoboldAI and transformers demand of one.

A rule is one generator of reasons against; no reason means yes. Above each rule stands the source file that its demands
were read from; those of GPTQModel 7.7 and of transformers 5 with optimum 2 were also tried (scripts/interop).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinygptq.config import QuantizeConfig
from tinygptq.folders.gptq_configs import name_tool
from tinygptq.folders.gptq_files import FLOAT_ZEROS, NO_G_IDX, WITH_G_IDX, LinearFacts

Reasons = Iterator[str]
JOINED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # what servers make one matrix of


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

    def scales(self, name: str) -> str:
        return self.facts[name].scales if name in self.facts else ""

    def inputs(self, name: str) -> int:
        return self.shapes[name][0]

    def outputs(self, name: str) -> int:
        return self.shapes[name][1]

    def short_group(self, name: str) -> bool:
        """Whether the last group has fewer rows than the others."""
        return self.config.group_size != -1 and self.inputs(name) % self.config.group_size != 0

    def sorts(self, name: str) -> bool:
        """Whether there is a g_idx that is not all zero."""
        return self.layout(name) == WITH_G_IDX and self.config.num_groups(self.inputs(name)) > 1

    def joined_shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes with q, k and v as one matrix, gate and up as another, each under the name of the first."""
        joined: dict[str, tuple[int, int]] = {}
        for name, (inputs, outputs) in self.shapes.items():
            owner, _, linear = name.rpartition(".")
            first = f"{owner}.{JOINED.get(linear, linear)}"
            joined[first] = (inputs, joined.get(first, (inputs, 0))[1] + outputs)
        return joined


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
    if found := folder.where(folder.short_group):
        yield f"a group of {folder.config.group_size} does not divide the input features ({found})"


def _group_size(folder: Loadable, *supported: int) -> Reasons:
    if folder.config.group_size not in supported:
        sizes = ["none" if size == -1 else str(size) for size in supported]
        yield f"a group of {folder.config.group_size}; it has {', '.join(sizes[:-1])} and {sizes[-1]}"


def _some_config(folder: Loadable) -> Reasons:
    if not folder.places:
        yield "no quantize_config.json or other config says how it is quantised"


def _bits(folder: Loadable, *supported: int) -> Reasons:
    if folder.config.bits not in supported:
        yield f"{folder.config.bits} bits; it has {' and '.join(map(str, supported))}"


def _joined(folder: Loadable) -> Reasons:
    if folder.unequal:
        yield f"g_idx differs between {folder.unequal[0][0]} and {folder.unequal[0][1]}, which it joins"


def _label_is_right(folder: Loadable) -> Reasons:
    wanted = {"gptq": "zero - 1", "gptq_v2": "zero"}[folder.config.checkpoint_format]
    said = [name for name in folder.shapes if name in folder.facts and folder.facts[name].layout != FLOAT_ZEROS]
    if folder.places and (wrong := [name for name in said if folder.facts[name].stored_zeros != wanted]):
        yield f"it believes the label {folder.config.checkpoint_format}, which the zero points contradict ({wrong[0]})"


def _tiles(inputs: int, outputs: int) -> bool:
    """Whether Marlin has threads for a matrix of this shape."""
    return (inputs % 128 == 0 and outputs % 64 == 0) or (inputs % 64 == 0 and outputs % 128 == 0)


# ------------------------------------------------------------------------------------------------------------- rules


# exllama: model.py (Ex4bitLinear; an all-zero g_idx counts as none), exllama_ext.cpp (make_q4: fp16 scales),
# q4_matrix.cu (the rows of any other g_idx are sorted 128 columns at a time, a remainder is left as it was; groups are
# height / groups rows), q4_matmul.cu (groups in steps of 8 rows)
def _exllama_v1(folder: Loadable) -> Reasons:
    yield from _bits(folder, 4)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    if found := folder.where(lambda name: folder.scales(name) not in ("float16", "")):
        yield f"scales have to be fp16 ({found})"
    yield from _multiples(folder, "input", folder.inputs, 32)
    yield from _multiples(folder, "output", folder.outputs, 8)
    if found := folder.where(lambda name: folder.sorts(name) and folder.outputs(name) % 128 != 0):
        yield f"with g_idx, output features have to be a multiple of 128 ({found})"
    if found := folder.where(lambda name: folder.short_group(name) and folder.inputs(name) > folder.config.group_size):
        yield f"a group of {folder.config.group_size} does not divide the input features ({found})"
    yield from _even_groups(folder)
    if folder.config.group_size != -1 and folder.config.group_size % 8:
        yield f"a group has to be a multiple of 8, this is {folder.config.group_size}"


# exllamav2: ext.py (make_q_matrix: fp32 scales are rounded, an all-zero g_idx counts as none), ext_qmatrix.cpp,
# q_matrix.cu (the group is the power of two that gives as many groups; the last may be short), q_gemm_kernel_gptq.cuh
# (a group begins at a multiple of 32 rows), linear.py (outputs are padded to 32)
def _exllama_v2(folder: Loadable) -> Reasons:
    group = folder.config.group_size
    yield from _bits(folder, 4)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    if found := folder.where(lambda name: folder.scales(name) not in ("float16", "float32", "")):
        yield f"scales have to be fp16 or fp32 ({found})"
    yield from _multiples(folder, "input", folder.inputs, 32)
    yield from _multiples(folder, "output", folder.outputs, 32)
    yield from _even_groups(folder)
    if group != -1 and (group % 32 or group & (group - 1)) and folder.where(lambda name: folder.inputs(name) > group):
        yield f"a group has to be a power of two from 32 on, this is {group}"


# GPTQModel 7.7: nn_modules/qlinear/marlin.py; utils/marlin.py (marlin_is_tile_aligned: what it takes by itself)
def _marlin(folder: Loadable) -> Reasons:
    yield from _bits(folder, 4, 8)
    yield from _packed_zeros(folder)
    if found := folder.where(lambda name: name in folder.facts and not folder.facts[name].symmetric):
        yield f"asymmetric zero points ({found})"
    yield from _group_size(folder, -1, 32, 64, 128)
    yield from _whole_groups(folder)
    yield from _even_groups(folder)
    if found := folder.where(lambda name: not _tiles(*folder.shapes[name])):
        yield f"input and output features have to be multiples of 64, one of them of 128 ({found})"


# AutoGPTQ 0.7: nn_modules/qlinear/qlinear_cuda.py (2, 3, 4 and 8 bits; buffers of whole 32s)
def _autogptq(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    yield from _g_idx(folder)
    yield from _multiples(folder, "input", folder.inputs, 32)
    yield from _multiples(folder, "output", folder.outputs, 32)


# GPTQModel 7.7: quantization/config.py (group sizes, is_marlin_format), models/loader.py (from_quantized: asymmetric
# format gptq of its own making alone), nn_modules/qlinear/torch.py (any shape, any last group)
def _gptqmodel(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _packed_zeros(folder)
    yield from _g_idx(folder)
    yield from _group_size(folder, -1, 16, 32, 64, 128, 256, 512, 1024)
    if "is_marlin_format" in folder.quantize_config:
        yield "the config has the key is_marlin_format, at which it stops whatever the value"
    own = name_tool(folder.quantize_config)[1].startswith("meta.quantizer is gptqmodel:")
    if not folder.config.sym and folder.config.checkpoint_format == "gptq" and not own:
        yield "asymmetric and in format gptq, which it takes from itself alone; gptq_v2 loads"
    yield from _label_is_right(folder)


# TGI 3: utils/quantization.py (get_loader; sym is false unless the config says otherwise), layers/gptq/__init__.py
# (get_multi_weights_col compares g_idx), layers/gptq/triton.py (2, 4, 8 bits), layers/marlin/gptq.py (what it takes on
# GPUs from Ampere on: whole groups, shapes that fill Marlin's tiles, q/k/v and gate/up joined)
def _tgi(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    yield from _bits(folder, 2, 4, 8)
    yield from _packed_zeros(folder)
    yield from _zero_minus_one(folder)
    yield from _g_idx(folder)
    yield from _joined(folder)
    config = folder.config
    if folder.places and config.sym and "sym" not in folder.quantize_config:
        yield "the config does not say sym, which it takes for false"
    if config.sym and config.bits in (4, 8) and config.group_size in (-1, 32, 64, 128):
        yield from _whole_groups(folder)
        if wrong := [name for name, shape in folder.joined_shapes().items() if not _tiles(*shape)]:
            yield f"input and output features have to be multiples of 64, one of them of 128 ({wrong[0]})"
    elif config.bits == 4 and not config.desc_act:
        yield from _whole_groups(folder)


# vLLM: layers/quantization/gptq.py (GPTQConfig.from_config, GPTQLinearMethod.create_weights; g_idx may be missing)
def _vllm(folder: Loadable) -> Reasons:
    yield from _some_config(folder)
    if folder.places and (missing := [key for key in VLLM_KEYS if key not in folder.quantize_config]):
        yield f"the config does not say {' and '.join(missing)}"
    yield from _packed_zeros(folder)
    yield from _whole_groups(folder)
    yield from _label_is_right(folder)
    yield from _joined(folder)


VLLM_KEYS = ("bits", "group_size", "desc_act")


# KoboldAI: modeling/inference_models/gptq_hf_torch/class.py (load_model_gptq_settings)
def _koboldai(folder: Loadable) -> Reasons:
    config, model = folder.config, folder.model_config
    named = [name for name in folder.files if "4bit" in name and name.endswith(".safetensors")]
    if "gptq_bits" in model:
        believed, said = (model["gptq_bits"], model.get("gptq_groupsize", -1)), "config.json says"
        if "model.safetensors" not in folder.files:
            yield f"with gptq_bits in config.json it opens model.safetensors, this is {', '.join(folder.files[:2])}"
    elif named:
        size = re.search(r"4bit-(\d+)g", named[0])
        believed, said = (4, int(size[1]) if size else -1), "the file's name says"
    else:
        yield "config.json has no gptq_bits, and no file has 4bit in its name"
        believed = None
    if believed not in (None, (config.bits, config.group_size)):
        yield f"{said} {believed[0]} bits and group {believed[1]}, it has {config.bits} and {config.group_size}"
    yield from _zero_minus_one(folder)


# transformers 5 and optimum 2: quantizers/quantizer_gptq.py, optimum/gptq/quantizer.py (every linear of a block is taken
# for quantised: one that dynamic leaves out is memory that nothing was read into); GPTQModel's kernels do the work
def _transformers(folder: Loadable) -> Reasons:
    if "config.json" not in folder.places:
        yield "config.json has no quantization_config"
    if not any(name == "model.safetensors" or name.startswith("model-") for name in folder.files):
        yield f"it opens model.safetensors or its shards, this is {', '.join(folder.files[:2])}"
    yield from _packed_zeros(folder)
    yield from _g_idx(folder)
    yield from _group_size(folder, -1, 16, 32, 64, 128, 256, 512, 1024)
    if folder.quantize_config.get("dynamic"):
        yield "the config has settings of single linears (dynamic), which it passes over"
    yield from _label_is_right(folder)


RULES: dict[str, Callable[[Loadable], Reasons]] = {
    "ExLlama v1": _exllama_v1,
    "ExLlama v2": _exllama_v2,
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
    found, config = {}, folder.config
    if config.bits == 8:
        found["AutoGPTQ"] = "its 8-bit CUDA kernel decodes zero points wrongly from 0.7.0 on"
    if config.bits == 4 and folder.where(folder.short_group):
        found["AutoGPTQ"] = "with disable_exllamav2=True; that kernel wants whole groups"
        found["transformers"] = 'on a CPU with GPTQConfig(bits=4, backend="torch"); its choice there wants whole groups'
    if config.bits not in (4, 8) or not config.sym:
        found["vLLM"] = "not the versions whose GPTQ is Marlin alone (auto_gptq.py, 2026): symmetric 4 and 8 bits"
    elif any(facts.stored_zeros == "zero" for facts in folder.facts.values()):
        found["vLLM"] = "only versions that know the format gptq_v2"
    return found
