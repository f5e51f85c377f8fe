"""Folders to weights: Hugging Face checkpoints in fp16, bf16 or fp32, and GPTQ ones of every generation.

What comes out is clean: dense linears as memory-mapped views, packed ones with rows sorted by group and true zero points.
How a GPTQ folder's config is found is in :mod:`tinygptq.folders.gptq_configs`, how its tensors are read in
:mod:`tinygptq.folders.gptq_files`; writing is the other half: :mod:`tinygptq.folders.export`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.gptq_configs import Quantization, find_quantization, find_quantize_config, infer_quantization
from tinygptq.folders.gptq_files import LinearFacts, from_gptq, read_gptq, take_parts
from tinygptq.folders.tensor_folder import Tensors
from tinygptq.weights import DenseLinear, Linear, Weights

__all__ = ["Checkpoint", "FileFacts", "Tensors", "dense_tensors", "find_quantize_config", "from_gptq", "linear_names",
           "load_checkpoint", "norm_names", "quantization_of", "read_linear"]  # fmt: skip

log = logging.getLogger("tinygptq")

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class FileFacts:
    """What was found out about a GPTQ folder: who wrote it, and what each quantised linear's tensors turned out to be."""

    quantization: Quantization | None = None
    linears: Mapping[str, LinearFacts] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """One line for each kind of thing that contradicts the label, with where it occurs first and how often."""
        kinds: dict[str, list[tuple[str, str]]] = {}
        for name, facts in self.linears.items():
            for kind, text in facts.warnings:
                kinds.setdefault(kind, []).append((name, text))
        return [
            f"{found[0][0]}: {found[0][1]}" + (f" ({len(found)} linears: {kind})" if len(found) > 1 else "")
            for kind, found in kinds.items()
        ]


@dataclass(frozen=True)
class Checkpoint:
    """A folder, read: its configuration, how it was quantised (None if it was not), its weights, and what was found out."""

    folder: Path
    config: LlamaConfig
    quantization: QuantizeConfig | None
    weights: Weights
    facts: FileFacts = field(default_factory=FileFacts)


def load_checkpoint(folder: str | Path, sort_rows: bool = True) -> Checkpoint:
    """Read a Hugging Face or GPTQ folder of a LLaMA; what contradicts its label is logged as a warning.

    Args:
        sort_rows: False leaves the rows of act-order linears for the reader to sort; see
            :class:`~tinygptq.packing.PackedLinear`.

    Raises:
        TinyGPTQError: not a LLaMA, a missing tensor, one of another shape or dtype than the configuration asks for, or
            one that holds NaN or infinity; the message names the tensor, what was found and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TinyGPTQError(f"{folder}: no such folder")
    config = LlamaConfig.from_folder(folder)
    stated = find_quantization(folder)
    tensors = Tensors(folder, stated.file_base_name if stated else None)
    quantization = quantization_of(tensors, config, stated)
    dense = {name: tensors.take(f"{name}.weight", shape) for name, shape in dense_tensors(config, tensors)}
    read, facts = {}, {}
    for name, shape in quantizable(config, tensors):
        read[name], found = read_linear(tensors, name, *shape, quantization, config.has_bias(name), sort_rows)
        if found is not None:
            facts[name] = found
    if config.tie_word_embeddings:
        tensors.ignore(f"{HEAD}.weight")
    tensors.refuse_unknown()
    file_facts = FileFacts(quantization, facts)
    for line in file_facts.warnings():
        log.warning("%s: %s", folder, line)
    head = dense.pop(HEAD, None)
    embedding = dense.pop(EMBEDDING)
    if HEAD in read:  # GPTQModel's lm_head: true; the head is kept dense, with the values the codes stand for
        head = np.ascontiguousarray(read.pop(HEAD).dequantize().T)  # (vocab, C)
    weights = Weights(embedding, embedding if head is None else head, dense, read)
    return Checkpoint(folder, config, quantization.config if quantization else None, weights, file_facts)


def quantization_of(tensors: Tensors, config: LlamaConfig, stated: Quantization | None) -> Quantization | None:
    """How the folder is quantised: as its config states or, without one, as its tensors show."""
    if stated is None and any(f"{name}.qweight" in tensors for name, _ in linear_names(config)):
        return infer_quantization(tensors, linear_names(config))
    return stated


def dense_tensors(config: LlamaConfig, tensors: Tensors) -> Iterator[tuple[str, tuple[int, ...]]]:
    """``(name, shape)`` of what no tool quantises: the embedding, the norms, and the head unless it is tied or quantised."""
    table = (config.vocab_size, config.hidden_size)
    yield EMBEDDING, table
    if not config.tie_word_embeddings and f"{HEAD}.qweight" not in tensors:
        yield HEAD, table
    for name in norm_names(config):
        yield name, (config.hidden_size,)


def quantizable(config: LlamaConfig, tensors: Tensors) -> Iterator[tuple[str, tuple[int, int]]]:
    """``(name, (in_features, out_features))`` of the blocks' linears, and of the head where it is quantised too."""
    yield from linear_names(config)
    if f"{HEAD}.qweight" in tensors and not config.tie_word_embeddings:
        yield HEAD, (config.hidden_size, config.vocab_size)


def norm_names(config: LlamaConfig) -> list[str]:
    blocks = range(config.num_hidden_layers)
    kinds = ("input_layernorm", "post_attention_layernorm")
    return ["model.norm"] + [f"model.layers.{i}.{kind}" for i in blocks for kind in kinds]


def linear_names(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """``(name, (in_features, out_features))`` of every linear of every block."""
    for i in range(config.num_hidden_layers):
        for name, shape in config.linear_shapes().items():
            yield f"model.layers.{i}.{name}", shape


def read_linear(
    tensors: Tensors,
    name: str,
    inputs: int,
    outputs: int,
    quantization: Quantization | None,
    biased: bool,
    sort_rows: bool = True,
) -> tuple[Linear, LinearFacts | None]:
    """One linear, dense or packed as its tensors are, and what was found out about a packed one.

    Args:
        biased: whether the model's own config asks for a bias. One that it does not ask for is kept if it is not all zero:
            GPTQ-for-LLaMa and older AutoGPTQ files carry a zero bias for every linear.
    """
    bias = None
    if biased or f"{name}.bias" in tensors:
        values = tensors.take(f"{name}.bias", (outputs,)).astype(np.float32)
        bias = values if biased or values.any() else None
    if f"{name}.qweight" not in tensors:
        if quantization is not None and f"{name}.weight" not in tensors:
            raise TinyGPTQError(f"{tensors.folder}: tensor {name}.qweight is missing (the folder says it is quantised)")
        return DenseLinear(tensors.take(f"{name}.weight", (outputs, inputs)), bias), None
    if quantization is None:
        raise TinyGPTQError(f"{tensors.folder}: {name}.qweight is quantised, but there is no quantize_config.json")
    parts = take_parts(tensors, name, inputs, outputs, quantization.config)
    try:
        return read_gptq(parts, quantization.config, bias, quantization.tool, sort_rows)
    except TinyGPTQError as error:
        raise TinyGPTQError(f"{tensors.folder}: {name}: {error}") from None
