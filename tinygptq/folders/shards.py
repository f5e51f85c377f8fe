"""Weights files of a folder, written tensor by tensor: one ``model.safetensors``, or shards and their index.

A shard holds tensors in the order announced, as many as fit below a size the user sets; a larger tensor has a shard of its
own. ``model.safetensors.index.json`` says which tensor is where, in the form transformers reads.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import write_json
from tinygptq.folders.tensorfile import Layout, TensorFileWriter

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LARGEST_SIZE = 1e18  # bytes


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``500 MiB`` or a plain number; decimal units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS:
        raise TinyGPTQError(f"{text!r} is not a size; expected a number of bytes, or one followed by KB, MB, GB or GiB")
    size = float(match[1]) * UNITS[match[2].upper()]
    if size > LARGEST_SIZE:
        raise TinyGPTQError(f"{text!r}: larger than any disk; leave the option out for a single file")
    if size < 1:
        raise TinyGPTQError(f"{text!r}: a shard cannot be smaller than a byte")
    return int(size)


def tensor_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout, headers not counted."""
    return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout.values())


def split_layout(layout: Layout, max_shard_size: int | None) -> list[Layout]:
    """The layout cut, in order, into parts of at most ``max_shard_size`` bytes of tensors; None is one part."""
    parts: list[dict] = [{}]
    filled = 0
    for name, entry in layout.items():
        size = tensor_bytes({name: entry})
        if max_shard_size is not None and parts[-1] and filled + size > max_shard_size:
            parts.append({})
            filled = 0
        parts[-1][name] = entry
        filled += size
    return list(parts)


class ShardedWriter:
    """Write the weights of a folder, in any order: ``write(name, array)`` for each tensor of the layout.

    Every file has its full size from the start; leaving the ``with`` block flushes them to disk.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_size: int | None = None) -> None:
        parts = split_layout(layout, max_shard_size)
        count = len(parts)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        if count > 1:
            places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            total = {"total_size": tensor_bytes(layout)}
            write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": places})
        self._writers: list[TensorFileWriter] = []
        try:
            for name, part in zip(names, parts, strict=True):
                self._writers.append(TensorFileWriter(folder / name, part))
        except OSError as error:
            self.__exit__(type(error))
            raise
        self._of = {tensor: self._writers[i] for i, part in enumerate(parts) for tensor in part}

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor; its dtype and shape must be the announced ones."""
        self._of[name].write(name, array)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for writer in self._writers:
            writer.__exit__(kind, *error)
