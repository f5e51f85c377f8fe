"""How a folder says it was quantised: the config, wherever it lies and whoever wrote it, or the tensors where none does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import SUPPORTED_BITS, QuantizeConfig, read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.tensor_folder import Tensors
from tinygptq.packing import unpack

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
Shapes = Iterable[tuple[str, tuple[int, int]]]  # name of a linear, (in_features, out_features)


@dataclass(frozen=True)
class Quantization:
    """How a folder was quantised, where that is written, and which tool wrote it as far as can be told.

    raw: the config as it stands, {} when it was inferred from the tensors.
    """

    config: QuantizeConfig
    where: str
    tool: str
    evidence: str
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def file_base_name(self) -> str | None:
        """The weights file's name without its ending, where AutoGPTQ noted it."""
        name = self.raw.get("model_file_base_name")
        return name if isinstance(name, str) else None


def find_quantize_config(folder: Path) -> QuantizeConfig | None:
    """How a folder was quantised, from the first of the three places that says so; None for an unquantised one."""
    found = find_quantization(folder)
    return found.config if found else None


def find_quantization(folder: Path) -> Quantization | None:
    """As :func:`find_quantize_config`, with where it was found and by whom it was written.

    Raises:
        TinyGPTQError: a config of the wrong type, another method than GPTQ, or fields out of range.
    """
    for where, raw in stated_configs(Path(folder)):
        _require_gptq(raw, where)
        tool, evidence = name_tool(raw)
        return Quantization(QuantizeConfig.from_dict(raw, where), where, tool, evidence, raw)
    return None


def stated_configs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, dict)`` of each of the three places that holds a config, in the order in which they count."""
    for name in CONFIG_FILES:
        if (folder / name).exists():
            yield str(folder / name), read_json(folder / name)
    raw = read_json(folder / "config.json").get("quantization_config")
    if raw is not None:
        where = f"{folder / 'config.json'} (quantization_config)"
        if not isinstance(raw, dict):
            raise TinyGPTQError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        yield where, raw


def _require_gptq(raw: dict[str, Any], where: str) -> None:
    """Refuse what looks like a GPTQ config and is another packing."""
    if "zero_point" in raw and "quant_method" not in raw and "w_bit" in raw:  # AutoAWQ's own file has no quant_method
        raise TinyGPTQError(f"{where}: this is an AWQ config (zero_point, w_bit); `tinygptq convert` makes GPTQ of it")
    if raw.get("is_marlin_format") is True or raw.get("checkpoint_format") == "marlin":
        raise TinyGPTQError(f"{where}: the weights are packed for the Marlin kernel (AutoGPTQ 0.7); only plain GPTQ is read")
    if raw.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise TinyGPTQError(f"{where}: pack_dtype is {raw['pack_dtype']!r}, only 'int32' is supported")


def name_tool(raw: Mapping[str, Any]) -> tuple[str, str]:
    """``(tool, evidence)`` of a config: each version of each tool added fields that the earlier ones do not have."""
    meta = raw.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    if isinstance(quantizer, list):
        quantizer = ", ".join(str(item) for item in quantizer)
    if quantizer:
        known = {"gptqmodel": "GPTQModel", "auto_gptq": "AutoGPTQ", "autogptq": "AutoGPTQ"}
        name = str(quantizer).split(":")[0].strip().lower()
        return known.get(name, str(quantizer).split(":")[0]), f"meta.quantizer is {quantizer}"
    for tool, keys in (
        ("GPTQModel", ("pack_dtype", "format")),
        ("transformers with optimum", ("use_exllama", "disable_exllama", "block_name_to_quantize", "exllama_config")),
        ("tinygptq, or AutoGPTQ 0.7", ("checkpoint_format",)),
        ("AutoGPTQ 0.5 or 0.6", ("quant_method",)),
        ("AutoGPTQ 0.4", ("static_groups",)),
        ("AutoGPTQ 0.3 or earlier", ("damp_percent", "desc_act")),
    ):
        found = [key for key in keys if key in raw]
        if found:
            return tool, f"the config has {' and '.join(found)}"
    return "unknown", "the config has none of the fields that tell tools apart"


# ------------------------------------------------------------------------------------------------ without any config


def infer_quantization(tensors: Tensors, shapes: Shapes) -> Quantization:
    """Bits, group size, act-order and symmetry from the tensors alone, as GPTQ-for-LLaMa leaves them (it writes no config).

    bits = qweight rows * 32 / K; group size from G, and from g_idx where there is one; zero points are zero - 1.

    Raises:
        TinyGPTQError: linears that disagree, or a group size that several values would fit.
    """
    linears = [(name, *shape) for name, shape in shapes if f"{name}.qweight" in tensors]
    bits = _infer_bits(tensors, linears)
    group = _infer_group(tensors, linears)
    orders = [tensors.peek(f"{name}.g_idx") for name, *_ in linears if f"{name}.g_idx" in tensors]
    desc_act = any(g_idx.ndim == 1 and bool((np.diff(g_idx) < 0).any()) for g_idx in orders)
    sym = all(_looks_symmetric(tensors, name, bits) for name, *_ in linears)
    first = any(f"{name}.zeros" in tensors for name, *_ in linears)
    generation = "first generation" if first else "third generation" if orders else "second generation"
    seen = "float zeros" if first else "qzeros and g_idx" if orders else "qzeros, but no g_idx"
    config = QuantizeConfig(bits, group, desc_act=desc_act, sym=sym)
    tool, where = f"GPTQ-for-LLaMa, {generation}", "the tensors' shapes (no config says it)"
    return Quantization(config, where, tool, f"no quantisation config, {seen}")


def _infer_bits(tensors: Tensors, linears: list[tuple[str, int, int]]) -> int:
    found: dict[int, str] = {}
    for name, inputs, _ in linears:
        words = tensors.peek(f"{name}.qweight").shape
        if len(words) != 2 or words[0] * 32 % inputs or words[0] * 32 // inputs not in SUPPORTED_BITS:
            wanted = f"no whole number of bits for {inputs} input features ({', '.join(map(str, SUPPORTED_BITS))})"
            raise TinyGPTQError(f"{tensors.folder}: tensor {name}.qweight has shape {list(words)}, {wanted}")
        found.setdefault(words[0] * 32 // inputs, name)
    if len(found) > 1:
        which = " and ".join(f"{bits} ({name})" for bits, name in sorted(found.items()))
        raise TinyGPTQError(f"{tensors.folder}: the linears' shapes give several widths, {which}, and no config explains it")
    return next(iter(found))


def _infer_group(tensors: Tensors, linears: list[tuple[str, int, int]]) -> int:
    """The one group size that fits every linear: G = ceil(K / group) leaves a range for each, g_idx leaves one value.

    In a range, the size in the file's name (``4bit-128g``) or the power of two is taken, else the smallest if it divides
    every K.
    """
    low, high, several = 1, max(inputs for _, inputs, _ in linears), False
    whole = 1  # the widest linear that is one group: the size is at least that
    for name, inputs, _ in linears:
        groups = 1 if f"{name}.zeros" in tensors else len(np.atleast_1d(_scales(tensors, name)))
        if not 1 <= groups <= inputs:
            raise TinyGPTQError(f"{tensors.folder}: tensor {name}.scales has {groups} groups for {inputs} input features")
        if groups == 1:
            whole = max(whole, inputs)
            continue
        several = True
        least, most = _group_range(tensors, name, inputs, groups)
        low, high = max(low, least), min(high, most)
    if not several:
        return -1
    low = max(low, whole)
    powers = [1 << p for p in range(low.bit_length() + 1) if low <= 1 << p <= high]
    named = [int(size) for file in tensors.files for size in re.findall(r"(\d+)g\b", file.path.stem)]
    for size in [*(size for size in named if low <= size <= high), *powers]:
        return size
    if low <= high and (low == high or all(inputs % low == 0 for _, inputs, _ in linears)):
        return low
    raise TinyGPTQError(
        f"{tensors.folder}: no config gives the group size, and the shapes fit "
        + (f"any from {low} to {high}; write a quantize_config.json" if low <= high else "no single one")
    )


def _group_range(tensors: Tensors, name: str, inputs: int, groups: int) -> tuple[int, int]:
    """Smallest and largest group size that give a linear this many groups, two or more."""
    if f"{name}.g_idx" in tensors:
        g_idx = tensors.peek(f"{name}.g_idx")
        if g_idx.ndim == 1 and g_idx.dtype.kind == "i" and g_idx.any() and g_idx.min() >= 0 and g_idx.max() < groups:
            size = int(np.bincount(g_idx).max())
            return size, size
    return -(-inputs // groups), -(-inputs // (groups - 1)) - 1


def _scales(tensors: Tensors, name: str) -> np.ndarray:
    if f"{name}.scales" not in tensors:
        raise TinyGPTQError(f"{tensors.folder}: tensor {name}.scales is missing")
    return tensors.peek(f"{name}.scales")


def _looks_symmetric(tensors: Tensors, name: str, bits: int) -> bool:
    """Whether all packed zero points are one value that symmetric files have; float zeros are compared with the scales."""
    half = 2 ** (bits - 1)
    if f"{name}.qzeros" not in tensors:
        zeros = tensors.peek(f"{name}.zeros") if f"{name}.zeros" in tensors else np.zeros(0)
        return zeros.dtype.kind != "i" and np.array_equal(zeros, half * _scales(tensors, name))
    words = tensors.peek(f"{name}.qzeros")
    if words.ndim != 2 or words.dtype.itemsize != 4 or words.shape[1] * 32 % bits:
        return True  # refused later, by shape or dtype
    columns = np.ascontiguousarray(words.T)
    if not columns.size or columns.shape[0] % (bits if bits == 3 else 1):
        return True
    stored = unpack(columns, bits, columns.shape[0] * 32 // bits)
    return stored.min() == stored.max() and int(stored.max()) in (half - 1, half)
