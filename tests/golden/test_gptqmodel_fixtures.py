"""Folders that met the real GPTQModel 7.7: read as it reads them, bit for bit, and with its logits.

gptqmodel/there_* were quantised by it, gptqmodel/here_* by tinygptq; each folder is as it was written, beside what GPTQModel
makes of it on a CPU (expected.npz: ids [1, T]; logits [1, T, vocab] in fp16, and of its modules in float32; the CRC-32 of
each linear's weights in fp16 [in, out]). scripts/interop/gptqmodel_roundtrip.py --fixtures writes them; gptqmodel/found.json
is what it found of larger ones, through GPTQModel and transformers.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

import tinygptq
from tinygptq.config import QuantizeConfig, read_json
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.export import tensor_layout
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.release.inspect_folder import inspect_folder

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "gptqmodel").glob("*/expected.npz"))
HALF_ROUNDING = 3e-3  # of the largest logit: a forward pass in fp16, 2^-11 for each of its steps


def named(prefix: str) -> list:
    return [pytest.param(folder, id=folder.name) for folder in FOLDERS if folder.name.startswith(prefix)]


def test_the_fixtures_are_there():
    assert len(named("there")) >= 7 and len(named("here")) >= 2


@pytest.mark.parametrize("folder", named(""))
def test_weights_are_those_of_gptqmodel_bit_for_bit(folder: Path):
    expected, checkpoint = np.load(folder / "expected.npz"), load_checkpoint(folder)
    assert sorted(checkpoint.weights.linears) == list(expected["linears"])
    for name, checksum in zip(expected["linears"], expected["crc32"], strict=True):
        weight = checkpoint.weights.linears[name].dequantize().astype(np.float16)  # (in, out)
        assert zlib.crc32(np.ascontiguousarray(weight)) == checksum, name


@pytest.mark.parametrize("folder", named(""))
def test_logits_are_those_of_gptqmodel(folder: Path):
    expected = np.load(folder / "expected.npz")
    ours = tinygptq.load(folder).forward(expected["ids"])
    largest = np.abs(ours).max()
    assert np.abs(ours - expected["single"]).max() < 1e-5 * largest
    assert np.abs(ours - expected["half"].astype(np.float32)).max() < HALF_ROUNDING * largest


@pytest.mark.parametrize("folder", named("there"))
def test_what_inspect_says_of_its_folders(folder: Path):
    found, name = inspect_folder(folder), folder.name
    assert found.problems == []
    assert found.quantization.tool == "GPTQModel"
    assert found.quantization.evidence == "meta.quantizer is gptqmodel:7.7.0"
    assert {facts.stored_zeros for facts in found.facts.values()} == {"zero" if name.endswith("_v2") else "zero - 1"}
    assert {facts.symmetric for facts in found.facts.values()} == {"asymmetric" not in name}
    act_order = name.endswith("act_order")
    assert ("act-order" in {facts.order for facts in found.facts.values()}) == act_order
    assert found.loaders["GPTQModel"] == []


def test_zero_points_of_0_in_format_gptq_are_there():
    """GPTQModel writes them with a borrow from the next one, which the reader undoes; the weights above hold it to that."""
    warnings = inspect_folder(Path(__file__).parent / "gptqmodel" / "there_4bit_16g_asymmetric").warnings
    assert any("undoing GPTQModel's borrow from the next one" in line for line in warnings)


@pytest.mark.parametrize("folder", named("here"))
def test_the_writer_still_writes_what_gptqmodel_was_shown(folder: Path):
    checkpoint, tensors = load_checkpoint(folder), TensorFile(folder / "model.safetensors")
    layout = tensor_layout(checkpoint.config, checkpoint.quantization)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == layout
    assert tensors.metadata == {"format": "pt"}
    stated = read_json(folder / "quantize_config.json")
    assert {*QuantizeConfig().to_dict(), "meta"} == stated.keys()
    assert read_json(folder / "config.json")["quantization_config"] == stated
