"""PyTorch pickles: refused unless allowed, opened by torch's restricted reader, and never trusted further than that."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conversions import ASYM, Q_PROJ, assert_same_model, quantized, refused, rewrite, run, tensors, with_zeros
from helpers import random_llama_folder, save_byte_tokenizer

from tinygptq.convert import convert
from tinygptq.convert.pickles import pickle_files
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint

torch = pytest.importorskip("torch")


def to_torch(array: np.ndarray):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def pickled(folder: Path, name: str = "pytorch_model.bin", shards: int = 1, **options) -> None:
    """Put a folder's safetensors into pickles instead."""
    state = OrderedDict((key, to_torch(array)) for key, array in tensors(folder).items())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if shards == 1:
        torch.save(state, folder / name, **options)
        return
    places = {key: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, key in enumerate(state)}
    for shard in set(places.values()):
        torch.save({key: state[key] for key in state if places[key] == shard}, folder / shard, **options)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


class Runs:
    """A pickle of this creates a file when it is opened without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_refused_by_default(tmp_path: Path, capsys):
    random_llama_folder(tmp_path / "a")
    pickled(tmp_path / "a")
    for source in (tmp_path / "a", tmp_path / "a" / "pytorch_model.bin"):
        message = refused(capsys, source, tmp_path / "out")
        assert "pytorch_model.bin: is a PyTorch pickle, which can run any code when opened; --allow-pickle" in message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_floats_keep_their_dtype(tmp_path: Path, capsys, dtype, shards, zipped):
    stored = random_llama_folder(tmp_path / "a", dtype=dtype)
    save_byte_tokenizer(tmp_path / "a")
    pickled(tmp_path / "a", shards=shards, _use_new_zipfile_serialization=zipped)
    (tmp_path / "a" / "training_args.bin").write_bytes(b"not weights")
    code, out, _ = run(capsys, tmp_path / "a", tmp_path / "out", "--allow-pickle")
    assert (code, out) == (0, f"{tmp_path / 'out'}: pickle to safetensors\n")
    after = tensors(tmp_path / "out")
    assert after.keys() == stored.keys()
    for name, array in stored.items():
        assert after[name].dtype == array.dtype and after[name].tobytes() == array.tobytes(), name
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_to_another_dtype_and_into_shards(tmp_path: Path):
    stored = random_llama_folder(tmp_path / "a", dtype="float32")
    pickled(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "half", "fp16", allow_pickle=True, max_shard_size=50_000)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 2
    after = tensors(tmp_path / "half")
    assert all(np.array_equal(after[name], array.astype(np.float16)) for name, array in stored.items())


def test_what_torch_keeps_and_folders_do_not(tmp_path: Path):
    """Inverse frequencies go; transposed and shared tensors are written out."""
    stored = random_llama_folder(tmp_path / "a", tied=True)
    state = {name: to_torch(array) for name, array in stored.items()}
    state[f"{Q_PROJ}.weight"] = state[f"{Q_PROJ}.weight"].T.contiguous().T
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "a" / "pytorch_model.bin")
    convert(tmp_path / "a", tmp_path / "out", allow_pickle=True)
    after = tensors(tmp_path / "out")
    assert after.keys() == stored.keys() | {"lm_head.weight"}
    assert all(np.array_equal(after[name], array) for name, array in stored.items())


@pytest.mark.parametrize("name", ["llama-4bit-32g.pt", "pytorch_model.bin"])
def test_a_quantised_pickle_becomes_gptq(tmp_path: Path, capsys, name):
    quantized(tmp_path / "a", ASYM, with_zeros(1, 15))
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    scales = {key: array.astype(np.float32) for key, array in tensors(tmp_path / "old").items() if key.endswith("scales")}
    rewrite(tmp_path / "old", scales)
    pickled(tmp_path / "old", name)
    code, out, _ = run(capsys, tmp_path / "old" / name, tmp_path / "out", "--allow-pickle")
    assert (code, out) == (0, f"{tmp_path / 'out'}: pickle (gptq) to gptq\n")
    assert_same_model(tmp_path / "a", tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").quantization == ASYM
    facts = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert facts["model_name_or_path"] == ("old" if name == "pytorch_model.bin" else "llama-4bit-32g")


def test_hostile_and_broken_pickles_do_nothing(tmp_path: Path, capsys):
    random_llama_folder(tmp_path / "a")
    pickled(tmp_path / "a")
    path, trace = tmp_path / "a" / "pytorch_model.bin", tmp_path / "trace"
    whole = path.read_bytes()
    hostile = {"model.norm.weight": Runs(trace)}
    cases = {
        "refuses it": [
            lambda: torch.save(hostile, path), lambda: path.write_bytes(whole[:5000]), lambda: path.write_bytes(b""),
        ],
        "expected a dict of tensors": [lambda: torch.save([1, 2], path), lambda: torch.save({}, path)],
        "is no plain dict of tensors ('epoch' is a int)": [lambda: torch.save({"epoch": 3}, path)],
        "not supported (complex64": [lambda: torch.save({"x": torch.zeros(2, dtype=torch.complex64)}, path)],
        "tensor model.embed_tokens.weight is missing": [lambda: torch.save({"x": torch.zeros(2)}, path)],
    }  # fmt: skip
    for part, writers in cases.items():
        for write in writers:
            write()
            assert part in refused(capsys, tmp_path / "a", tmp_path / "out", "--allow-pickle")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["a"]


def test_without_torch(tmp_path: Path, capsys, monkeypatch):
    random_llama_folder(tmp_path / "a")
    pickled(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(capsys, tmp_path / "a", tmp_path / "out", "--allow-pickle")
    assert "opening a PyTorch pickle needs PyTorch: pip install torch" in message


def test_which_files(tmp_path: Path):
    index = tmp_path / "pytorch_model.bin.index.json"
    assert pickle_files(tmp_path) == []
    for name in ("optimizer.pt", "training_args.bin", "a.pt"):
        (tmp_path / name).touch()
    assert pickle_files(tmp_path) == [tmp_path / "a.pt"]
    (tmp_path / "b.pth").touch()
    with pytest.raises(TinyGPTQError, match=r"several pickles \(a.pt, b.pth\)"):
        pickle_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert pickle_files(tmp_path) == [tmp_path / "pytorch_model.bin"]
    index.write_text(json.dumps({"weight_map": {"x": "b.pth", "y": "a.pt", "z": "a.pt"}}))
    assert pickle_files(tmp_path) == [tmp_path / "a.pt", tmp_path / "b.pth"]
    for places, part in (
        ({"x": "../a.pt"}, "not the plain name"), ({"x": "a.safetensors"}, "not the plain name"), ({"x": 1}, "weight_map"),
        ({}, "weight_map"), ([], "weight_map"), ({"x": "absent.bin"}, "no such file"),
    ):  # fmt: skip
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(TinyGPTQError, match=part):
            pickle_files(tmp_path)


def test_one_tensor_in_two_files(tmp_path: Path, capsys):
    random_llama_folder(tmp_path / "a")
    pickled(tmp_path / "a", shards=2)
    torch.save({"model.norm.weight": torch.ones(96)}, tmp_path / "a" / "pytorch_model-00001-of-00002.bin")
    torch.save({"model.norm.weight": torch.ones(96)}, tmp_path / "a" / "pytorch_model-00002-of-00002.bin")
    message = refused(capsys, tmp_path / "a", tmp_path / "out", "--allow-pickle")
    assert "tensor model.norm.weight is also in another file" in message
