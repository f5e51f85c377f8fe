"""What a folder is: who quantised it and how, what its bytes are, every problem found, and who can load it.

Where :func:`tinygptq.folders.checkpoint.load_checkpoint` stops at the first problem, this goes on and lists them all; both
look at each tensor through the same functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import GenerationConfig, LlamaConfig, read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import (
    EMBEDDING,
    HEAD,
    FileFacts,
    dense_tensors,
    quantizable,
    quantization_of,
    read_linear,
)
from tinygptq.folders.gptq_configs import Quantization, find_quantization, stated_configs
from tinygptq.folders.gptq_files import LinearFacts
from tinygptq.folders.tensor_folder import Tensors
from tinygptq.packing import PackedLinear
from tinygptq.release.loaders import Loadable, remarks, who_can_load

KINDS = {  # ending of a tensor's name -> kind, the first that fits
    "qweight": "codes", "qzeros": "zero points", "zeros": "zero points", "scales": "scales", "g_idx": "g_idx",
    "bias": "biases",
    "norm.weight": "norms", f"{EMBEDDING}.weight": "embedding", f"{HEAD}.weight": "head", "proj.weight": "dense linears",
}  # fmt: skip
SHARED_INPUTS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
COMPARED = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "static_groups")  # what configs may disagree on


@dataclass(frozen=True)
class LinearRow:
    """One line of the table of linears; group_size and groups are those of the clean form, None for a dense linear."""

    name: str
    in_features: int
    out_features: int
    bits: int | None
    group_size: int | None
    groups: int | None
    order: str
    zeros: str
    dtype: str  # of the scales, or of a dense weight
    bias: bool


@dataclass
class Inspection:
    """Everything found out about a folder; ``problems`` keep it from loading, ``warnings`` do not."""

    folder: Path
    config: LlamaConfig | None = None
    quantization: Quantization | None = None
    facts: dict[str, LinearFacts] = field(default_factory=dict)
    linears: list[LinearRow] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)  # name -> bytes
    bytes: dict[str, int] = field(default_factory=dict)  # kind of tensor -> bytes
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    loaders: dict[str, list[str]] = field(default_factory=dict)  # name -> reasons against
    remarks: dict[str, str] = field(default_factory=dict)

    def attempt(self, do: Callable[[], Any]) -> Any:
        """``do()``; what it raises becomes a problem, and None is the result."""
        try:
            return do()
        except TinyGPTQError as error:
            self.problem(error)
            return None

    def problem(self, error: TinyGPTQError) -> None:
        text = str(error).removeprefix(f"{self.folder}: ").replace(f"{self.folder}/", "")
        if text not in self.problems:
            self.problems.append(text)


def inspect_folder(folder: str | Path) -> Inspection:
    """Look at a folder as a whole; never stops at a problem.

    Raises:
        TinyGPTQError: there is no such folder.
    """
    found = Inspection(Path(folder))
    if not found.folder.is_dir():
        raise TinyGPTQError(f"{folder}: no such folder")
    model_config = found.attempt(lambda: read_json(found.folder / "config.json"))
    if model_config is not None:
        found.config = found.attempt(lambda: LlamaConfig.from_dict(model_config, str(found.folder / "config.json")))
        if found.config is not None:
            found.attempt(partial(GenerationConfig.from_folder, found.folder, found.config))
    stated = found.attempt(lambda: find_quantization(found.folder)) if model_config is not None else None
    base_name = stated.file_base_name if stated else None
    tensors = found.attempt(lambda: Tensors(found.folder, base_name, on_error=found.problem))
    if tensors is not None:
        found.files = {file.path.name: file.path.stat().st_size for file in tensors.files}
        found.bytes = bytes_by_kind(tensors, sum(found.files.values()))
    unequal: tuple[tuple[str, str], ...] = ()
    config = found.config
    if tensors is not None and config is not None:
        quantization = found.attempt(lambda: quantization_of(tensors, config, stated))
        found.quantization = quantization
        unreadable = quantization is None and any(name.endswith(".qweight") for name in tensors.names())
        _look_at_tensors(found, config, tensors, unreadable)
        unequal = unequal_g_idx(config, tensors)
    places = _compare_configs(found, model_config)
    found.warnings += FileFacts(found.quantization, found.facts).warnings()
    _look_at_tokenizer(found)
    _judge(found, model_config or {}, places, unequal)
    return found


def _look_at_tensors(found: Inspection, config: LlamaConfig, tensors: Tensors, unreadable: bool) -> None:
    """Every tensor the configuration asks for, then those that it does not."""
    for name, shape in dense_tensors(config, tensors):
        found.attempt(partial(tensors.take, f"{name}.weight", shape))
    for name, shape in quantizable(config, tensors):
        if unreadable and f"{name}.qweight" in tensors:
            continue  # without bits nothing can be said of it; why there are none is a problem already
        biased = config.has_bias(name)
        read = found.attempt(partial(read_linear, tensors, name, *shape, found.quantization, biased))
        if read is not None:
            linear, facts = read
            if facts is not None:
                found.facts[name] = facts
            found.linears.append(_row(name, linear, facts))
    if config.tie_word_embeddings:
        tensors.ignore(f"{HEAD}.weight")
    if not unreadable and not found.problems:
        found.attempt(tensors.refuse_unknown)


def _row(name: str, linear: Any, facts: LinearFacts | None) -> LinearRow:
    biased, shape = linear.bias is not None, (linear.in_features, linear.out_features)
    if not isinstance(linear, PackedLinear) or facts is None:
        return LinearRow(name, *shape, None, None, None, "", "", linear.weight.dtype.name, biased)
    groups = len(linear.scales)
    return LinearRow(
        name, *shape, linear.bits, linear.group_size, groups, facts.order, facts.stored_zeros, facts.scales, biased
    )


def bytes_by_kind(tensors: Tensors, total: int) -> dict[str, int]:
    """Bytes of the files by kind of tensor; what belongs to no tensor is ``headers``."""
    sizes: Counter[str] = Counter()
    for name in tensors.names():
        kind = next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "other")
        try:
            sizes[kind] += tensors.peek(name).nbytes
        except TinyGPTQError:  # a dtype that is not supported, reported where the tensor is asked for
            continue
    sizes["headers"] = total - sum(sizes.values())
    return dict(sizes)


def unequal_g_idx(config: LlamaConfig, tensors: Tensors) -> tuple[tuple[str, str], ...]:
    """Pairs of linears with the same input and different g_idx; loaders that join them cannot."""
    found = []
    for layer in range(config.num_hidden_layers):
        for names in SHARED_INPUTS:
            full = [f"model.layers.{layer}.{name}" for name in names]
            have = [name for name in full if f"{name}.g_idx" in tensors]
            for other in have[1:]:
                if not np.array_equal(tensors.peek(f"{have[0]}.g_idx"), tensors.peek(f"{other}.g_idx")):
                    found.append((have[0], other))
    return tuple(found)


def _compare_configs(found: Inspection, model_config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the files that hold a quantisation config; a warning where they contradict each other."""
    if model_config is None:
        return ()
    try:
        stated = list(stated_configs(found.folder))
    except TinyGPTQError:  # reported already, unless only a later place is broken
        return ()
    places = [Path(where.split(" (")[0]).name for where, _ in stated]
    for place, (_, raw) in list(zip(places, stated, strict=True))[1:]:
        first = stated[0][1]
        wrong = [key for key in COMPARED if key in raw and key in first and raw[key] != first[key]]
        if wrong:
            values = ", ".join(f"{key} {first[key]!r} and {raw[key]!r}" for key in wrong)
            found.warnings.append(f"{places[0]} and {place} contradict each other: {values}; the first counts")
    return tuple(places)


def _look_at_tokenizer(found: Inspection) -> None:
    from tinygptq.tokenizer import Tokenizer  # only here: sentencepiece takes a while to import

    try:
        size = Tokenizer.from_folder(found.folder).vocab_size
    except TinyGPTQError as error:
        found.warnings.append(str(error).removeprefix(f"{found.folder}: "))
        return
    if found.config is not None and size > found.config.vocab_size:
        rows = found.config.vocab_size
        found.warnings.append(f"the tokenizer has {size} ids and the embedding {rows} rows; larger ids cannot be used")


def _judge(found: Inspection, model_config: Mapping[str, Any], places: tuple[str, ...], unequal: tuple) -> None:
    stated = found.quantization
    folder = Loadable(
        config=stated.config if stated else None,
        shapes={row.name: (row.in_features, row.out_features) for row in found.linears if row.bits is not None},
        facts=found.facts,
        model_config=model_config,
        quantize_config=stated.raw if stated else {},
        places=places,
        files=tuple(found.files),
        unequal=unequal,
    )
    found.loaders = who_can_load(folder)
    if found.problems:
        found.loaders = {name: ["the folder has problems (above)", *reasons] for name, reasons in found.loaders.items()}
    found.remarks = {name: text for name, text in remarks(folder).items() if not found.loaders[name]}


# ---------------------------------------------------------------------------------------------------------- reporting


def as_dict(found: Inspection) -> dict[str, Any]:
    """The whole inspection as one JSON object."""
    stated, config = found.quantization, found.config
    said = stated.config if stated else None
    zeros = Counter(facts.stored_zeros for facts in found.facts.values())
    return {
        "folder": str(found.folder),
        "loads": not found.problems,
        "model": config and {
            "layers": config.num_hidden_layers, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size,
            "intermediate_size": config.intermediate_size, "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads, "tied": config.tie_word_embeddings,
        },
        "quantized": stated is not None,
        "tool": stated and stated.tool,
        "tool_evidence": stated and stated.evidence,
        "config_from": stated and stated.where,
        "generation": " and ".join(sorted({facts.layout for facts in found.facts.values()})) or None,
        "bits": said and said.bits,
        "group_size": said and said.group_size,
        "desc_act": said and said.desc_act,
        "static_groups": said and said.static_groups,
        "sym": said and said.sym,
        "symmetric_zeros": all(facts.symmetric for facts in found.facts.values()) if found.facts else None,
        "row_order": dict(Counter(facts.order for facts in found.facts.values())),
        "checkpoint_format": said and said.checkpoint_format,
        "zero_points": dict(zeros),
        "zero_evidence": zero_evidence(found),
        "files": found.files,
        "bytes": found.bytes,
        "linears": [vars(row) for row in found.linears],
        "problems": found.problems,
        "warnings": found.warnings,
        "loaders": {name: {"loads": not reasons, "reasons": reasons} | ({"remark": found.remarks[name]}
                    if name in found.remarks else {}) for name, reasons in found.loaders.items()},
    }  # fmt: skip


def zero_evidence(found: Inspection) -> list[str]:
    """What the zero convention rests on, each with the number of linears it was seen in."""
    seen = Counter((facts.stored_zeros, facts.evidence) for facts in found.facts.values())
    return [f"stored as {stored}: {evidence} ({count} linears)" for (stored, evidence), count in seen.items()]


def as_text(found: Inspection) -> str:
    """The inspection for a reader."""
    lines = [f"{found.folder}"]
    if (config := found.config) is not None:
        tied = ", head tied" if config.tie_word_embeddings else ""
        lines.append(f"  model           LLaMA, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
                     f"vocabulary {config.vocab_size}{tied}")  # fmt: skip
    lines += _quantization_lines(found)
    if found.files:
        lines.append(f"  files           {', '.join(f'{name} ({size:,} bytes)' for name, size in found.files.items())}")
    lines += ["", "bytes"] + [f"  {kind:<15} {size:>15,}" for kind, size in found.bytes.items() if size]
    lines += ["", "linears", *_linear_lines(found.linears)]
    for title, entries in (("problems", found.problems), ("warnings", found.warnings)):
        lines += ["", f"{title}{'' if entries else ': none'}"] + [f"  - {entry}" for entry in entries]
    lines += ["", "who can load it"]
    for name, reasons in found.loaders.items():
        answer = f"no: {'; '.join(reasons)}" if reasons else "yes"
        lines.append(f"  {name:<15} {answer}" + (f" ({found.remarks[name]})" if name in found.remarks else ""))
    return "\n".join(lines)


def _quantization_lines(found: Inspection) -> list[str]:
    if found.quantization is None:
        return [] if found.problems else ["  quantised       no"]
    said, stated = found.quantization.config, found.quantization
    group = "none" if said.group_size == -1 else str(said.group_size)
    order = ("yes, static groups" if said.static_groups else "yes") if said.desc_act else "no"
    layouts = " and ".join(sorted({facts.layout for facts in found.facts.values()}))
    return [
        f"  written by      {stated.tool} ({stated.evidence})",
        f"  according to    {stated.where.replace(f'{found.folder}/', '')}",
        f"  tensors         {layouts or 'unknown'}",
        f"  quantised       {said.bits} bits, group {group}, act-order {order}, {'symmetric' if said.sym else 'asymmetric'}",
        *(f"  zero points     {line}" for line in zero_evidence(found)),
    ]


def _linear_lines(rows: list[LinearRow]) -> list[str]:
    """One line for all blocks whose linear of this name has the same shape and packing."""
    seen: dict[tuple, list[str]] = {}
    for row in rows:
        short = row.name.split(".", 3)[-1] if row.name.startswith("model.layers.") else row.name
        rest = tuple(value for key, value in vars(row).items() if key != "name")
        seen.setdefault((short, rest), []).append(row.name)
    lines = []
    for (short, rest), names in seen.items():
        row = LinearRow(short, *rest)
        packing = f"{row.bits} bits, {row.groups} x {row.group_size} rows, {row.order}, scales {row.dtype}"
        text = packing if row.bits else f"dense {row.dtype}"
        size = f"{row.in_features} x {row.out_features}"
        lines.append(f"  {short:<18} x{len(names):<4} {size:<14} {text}{', bias' if row.bias else ''}")
    return lines
