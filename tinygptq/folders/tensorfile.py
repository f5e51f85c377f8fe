"""safetensors files: read as memory-mapped views, written tensor by tensor in any order.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data. The
safetensors library checks a file's header (size, overlaps, offsets outside the file); it reads by copying, which a model
larger than memory cannot afford, so the views are made here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tinygptq.errors import TinyGPTQError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U32": np.dtype(np.uint32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFile(Mapping[str, np.ndarray]):
    """A safetensors file as a mapping of names to read-only memory-mapped arrays."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:  # first: safe_open calls a file that may not be read one that is not there
                length = int.from_bytes(file.read(8), "little")
                with safe_open(self.path, framework="numpy") as opened:  # checks the header against the file
                    self.metadata: dict[str, str] = opened.metadata() or {}
                text = file.read(length)
        except (FileNotFoundError, ValueError):  # ValueError: a name with a NUL
            raise TinyGPTQError(f"{path}: no such file") from None
        except PermissionError:
            raise TinyGPTQError(f"{path}: may not be read (its permissions)") from None
        except (SafetensorError, OSError) as error:
            raise TinyGPTQError(f"{path}: not a valid safetensors file ({error})") from None
        header = json.loads(text)
        header.pop("__metadata__", None)
        self._entries: dict[str, dict[str, Any]] = header
        self._data_start = 8 + length
        self._map = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.empty(0, np.uint8)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise TinyGPTQError(f"{self.path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
        begin, end = (self._data_start + offset for offset in entry["data_offsets"])
        view = self._map[begin:end]
        if begin % DTYPES[entry["dtype"]].itemsize:  # written without padding its header: a copy is aligned
            view = view.copy()
        return view.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # name -> dtype and shape, in file order


def plan_file(layout: Layout) -> tuple[bytes, dict[str, int], int]:
    """The first bytes of a file with these tensors, where each one's data begin, and the file's size in bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8, so that views are aligned
    start = 8 + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name in layout}
    return len(text).to_bytes(8, "little") + text, offsets, start + offset


class TensorFileWriter:
    """Write a safetensors file whose names, dtypes and shapes are known beforehand, one tensor at a time.

    The file has its full size from the start (a full disk shows at once), and data go straight to their place.
    ``metadata={"format": "pt"}``: some loaders raise without it.

    Args:
        keep: names of tensors that are in the file already, which an earlier writer of the same layout left unfinished.
    """

    def __init__(self, path: Path, layout: Layout, keep: Collection[str] = ()) -> None:
        header, self._offsets, size = plan_file(layout)
        self._layout = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in layout.items()}
        self._missing = set(layout) - set(keep)
        self._file = open(path, "r+b" if keep else "wb")  # noqa: SIM115 - closed by close() or by the with statement
        try:
            self._file.write(header)
            _reserve(self._file.fileno(), size)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor; its dtype and shape must be the announced ones."""
        dtype, shape = self._layout[name]
        if array.dtype != dtype or array.shape != shape:
            raise AssertionError(f"{name}: announced {dtype} {shape}, given {array.dtype} {array.shape}")
        self._file.seek(self._offsets[name])
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def close(self) -> None:
        """Flush to disk; every announced tensor must have been written."""
        with self._file:
            if self._missing:
                raise AssertionError(f"tensors announced but not written: {sorted(self._missing)[:3]}")
            self.flush()

    def flush(self) -> None:
        """What was written so far is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _reserve(descriptor: int, size: int) -> None:
    """Give the open file its final size, on disk where the platform can (so that a full disk shows now)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
