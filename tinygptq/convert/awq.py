"""AWQ folders (Lin et al. 2023) as AutoAWQ writes them, version "gemm", to the clean form without changing a value.

The same grid as asymmetric GPTQ, ``W[k, n] = scales[g, n] * (code[k, n] - zero[g, n])``, packed along the other axis: word
``w`` of a row holds the codes of outputs 8w .. 8w+7, the i-th 4-bit field that of output ``8w + FIELD_OUTPUT[i]``. Zero
points are packed likewise and stored as they are, groups follow ``k // group_size``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig, read_json
from tinygptq.convert.source import Source
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import linear_names, norm_names
from tinygptq.folders.tensor_folder import INTEGERS, Tensors
from tinygptq.packing import PackedLinear, pack

FIELD_OUTPUT = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's order for its fp16 kernels
BITS = 4  # all that the gemm version has
PER_WORD = 32 // BITS


def awq_facts(folder: Path) -> dict[str, Any] | None:
    """The quantisation dict of an AWQ folder; None for any other folder."""
    raw = read_json(folder / "config.json").get("quantization_config") if (folder / "config.json").is_file() else None
    found = [raw] if isinstance(raw, dict) else []
    found += [read_json(folder / name) for name in ("quant_config.json",) if (folder / name).is_file()]
    for facts in found:
        method = facts.get("quant_method", facts.get("method"))
        # the older file of the two names no method, but only AWQ has a flag of this name
        if method == "awq" or (method is None and "zero_point" in facts):
            return facts
    return None


def unpack_outputs(words: np.ndarray) -> np.ndarray:
    """int32 words [R, N/8] of qweight or qzeros -> codes uint8 [R, N]."""
    words = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((words.shape[0], words.shape[1], PER_WORD), np.uint8)
    for i, output in enumerate(FIELD_OUTPUT):
        codes[:, :, output] = words >> np.uint32(BITS * i) & np.uint32(2**BITS - 1)
    return codes.reshape(words.shape[0], -1)  # (R, N)


class AwqLinears(Mapping[str, PackedLinear]):
    """The quantised linears of an AWQ folder, each unpacked and packed anew when asked for."""

    def __init__(self, parts: dict[str, dict[str, np.ndarray]], group_size: int) -> None:
        self._parts, self._group_size = parts, group_size

    def __getitem__(self, name: str) -> PackedLinear:
        parts = self._parts[name]
        codes = unpack_outputs(parts["qweight"])  # (K, N)
        rows = len(codes) if self._group_size == -1 else self._group_size
        return PackedLinear(pack(codes, BITS), clean_scales(parts["scales"]), self.zeros(name), BITS, rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts  # the inherited one would make the linear

    def zeros(self, name: str) -> np.ndarray:
        """True zero points, uint16 [G, N]."""
        return unpack_outputs(self._parts[name]["qzeros"]).astype(np.uint16)


def clean_scales(scales: np.ndarray) -> np.ndarray:
    """float16 as they are, anything else as float32."""
    return scales if scales.dtype == np.float16 else scales.astype(np.float32)


def read_awq(folder: Path, facts: dict[str, Any]) -> Source:
    """Open an AWQ folder.

    Raises:
        TinyGPTQError: another version than gemm, other bits than 4, no zero points, or a tensor that is missing or of
            another shape than the configuration asks for.
    """
    group_size = _group_size(folder, facts)
    config, tensors = LlamaConfig.from_folder(folder), Tensors(folder)
    table = (config.vocab_size, config.hidden_size)
    dense = {"model.embed_tokens.weight": tensors.take("model.embed_tokens.weight", table)}
    dense |= {f"{name}.weight": tensors.take(f"{name}.weight", (config.hidden_size,)) for name in norm_names(config)}
    if config.tie_word_embeddings:
        tensors.ignore("lm_head.weight")
    else:
        dense["lm_head.weight"] = tensors.take("lm_head.weight", table)
    parts = {}
    for name, (in_features, out_features) in linear_names(config):
        if config.has_bias(name) or f"{name}.bias" in tensors:
            dense[f"{name}.bias"] = tensors.take(f"{name}.bias", (out_features,))
        if f"{name}.qweight" not in tensors and f"{name}.weight" in tensors:  # modules_to_not_convert
            dense[f"{name}.weight"] = tensors.take(f"{name}.weight", (out_features, in_features))
        else:
            parts[name] = _take_parts(tensors, name, in_features, out_features, group_size)
    tensors.refuse_unknown()
    linears = AwqLinears(parts, group_size)
    quantization = QuantizeConfig(bits=BITS, group_size=group_size, sym=False)
    return Source(folder, config, quantization, dense, linears, lambda: ((name, linears.zeros(name)) for name in linears))


def _group_size(folder: Path, facts: dict[str, Any]) -> int:
    """The group size of an AWQ config, once everything else it says is what is read here."""
    version = str(facts.get("version", "gemm")).lower()
    if version != "gemm":
        raise TinyGPTQError(f"{folder}: AWQ version is {version!r}, only 'gemm' is supported")
    bits = facts.get("bits", facts.get("w_bit", BITS))
    if bits != BITS:
        raise TinyGPTQError(f"{folder}: AWQ bits is {bits!r}, expected {BITS}")
    if facts.get("zero_point", True) is not True:
        raise TinyGPTQError(f"{folder}: AWQ without zero points (zero_point is {facts['zero_point']!r}) is not supported")
    group = facts.get("group_size", facts.get("q_group_size", 128))
    if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and group < 1):
        raise TinyGPTQError(f"{folder}: AWQ group_size is {group!r}, expected -1 or a positive integer")
    return group


def _take_parts(tensors: Tensors, name: str, in_features: int, out_features: int, group_size: int) -> dict[str, np.ndarray]:
    rows = in_features if group_size == -1 else group_size
    if in_features % rows or in_features % PER_WORD or out_features % PER_WORD:
        raise TinyGPTQError(
            f"{tensors.folder}: {name}: [{in_features}, {out_features}] is no whole number of groups of "
            f"{rows} and of 32-bit words"
        )
    groups, words = in_features // rows, out_features // PER_WORD
    return {
        "qweight": tensors.take(f"{name}.qweight", (in_features, words), INTEGERS),
        "qzeros": tensors.take(f"{name}.qzeros", (groups, words), INTEGERS),
        "scales": tensors.take(f"{name}.scales", (groups, out_features)),
    }
