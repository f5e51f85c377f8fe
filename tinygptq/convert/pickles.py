"""PyTorch pickles (.bin, .pt, .pth) to safetensors: refused unless asked for, and then opened by torch's restricted reader.

A pickle is a program that builds objects; opening one runs it. ``torch.load(weights_only=True)`` runs only what builds
tensors and plain containers. This is the one place in the package that imports torch, and only when it is called.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from tinygptq.config import read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.shards import ShardedWriter
from tinygptq.folders.tensorfile import NAMES

SUFFIXES = (".bin", ".pt", ".pth")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # what trainers leave beside them
INDEX = "pytorch_model.bin.index.json"


def pickle_files(source: Path) -> list[Path]:
    """The pickles that hold a model's weights: the file itself, or a folder's; an empty list for a folder without."""
    if source.is_file():
        return [source] if source.suffix in SUFFIXES else []
    if (source / INDEX).is_file():
        return _indexed(source / INDEX)
    files = [path for path in sorted(source.iterdir()) if path.suffix in SUFFIXES and not path.name.startswith(NOT_WEIGHTS)]
    whole = [path for path in files if path.name == "pytorch_model.bin"]
    if whole or len(files) <= 1:
        return whole or files
    raise TinyGPTQError(
        f"{source}: holds several pickles ({', '.join(path.name for path in files[:4])}) and no {INDEX}; "
        "give the one that is meant"
    )


def _indexed(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise TinyGPTQError(f"{index}: 'weight_map' should map tensor names to file names")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix not in SUFFIXES:  # a path could leave the folder
            raise TinyGPTQError(f"{index}: shard {name!r} is not the plain name of a {'/'.join(SUFFIXES)} file")
        if not (index.parent / name).is_file():
            raise TinyGPTQError(f"{index.parent / name}: no such file")
    return [index.parent / name for name in names]


def refuse(files: list[Path]) -> None:
    """The error for pickles that nobody allowed."""
    raise TinyGPTQError(
        f"{files[0]}: is a PyTorch pickle, which can run any code when opened; --allow-pickle opens it with "
        "torch.load(weights_only=True), which builds tensors only"
    )


def write_safetensors(files: list[Path], folder: Path, max_shard_size: int | None = None) -> list[str]:
    """The tensors of the pickles, in their dtypes, as safetensors in an existing ``folder``; returns their names.

    Files in torch's zip format are memory-mapped, so that one tensor at a time is in memory; older ones are whole.

    Raises:
        TinyGPTQError: torch is missing, a file is no plain dict of tensors, or one tensor is in two files.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        loaded = load_pickle(path)
        twice = sorted(tensors.keys() & loaded.keys())
        if twice:
            raise TinyGPTQError(f"{path}: tensor {twice[0]} is also in another file")
        tensors |= loaded
    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with ShardedWriter(folder, layout, max_shard_size) as out:
        for name, array in tensors.items():
            out.write(name, array)
    return list(tensors)


def load_pickle(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file by name, as views of torch's memory (copies of those that are not contiguous)."""
    try:
        import torch
    except ImportError:
        raise TinyGPTQError(f"{path}: opening a PyTorch pickle needs PyTorch: pip install torch") from None
    options = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            loaded = torch.load(path, mmap=True, **options)
        except RuntimeError:  # not the zip format, which alone can be mapped
            loaded = torch.load(path, **options)
    except Exception as error:  # an unpickler meets whatever a broken or a hostile file holds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TinyGPTQError(f"{path}: torch.load(weights_only=True) refuses it ({reason})") from None
    if not isinstance(loaded, dict) or not loaded:
        raise TinyGPTQError(f"{path}: holds {type(loaded).__name__} {str(loaded)[:40]!r}, expected a dict of tensors")
    arrays = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TinyGPTQError(f"{path}: is no plain dict of tensors ({name!r} is a {type(tensor).__name__})")
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in map(str, NAMES) or tensor.layout != torch.strided:
            raise TinyGPTQError(f"{path}: tensor {name} is of a kind that is not supported ({kind}, {tensor.layout})")
        if name.endswith("rotary_emb.inv_freq"):
            continue
        dense = tensor.detach().contiguous()
        # torch and NumPy share no bfloat16, but they share its bits
        bits = dense.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if kind == "bfloat16" else dense.numpy()
        arrays[name] = bits
    return arrays
