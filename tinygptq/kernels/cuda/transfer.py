"""What goes between the host's memory and the card: a block's linears, read ahead, and batches that do not fit on the card.

All of it through page-locked memory, which the card copies from and to by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tinygptq.folders.checkpoint import Checkpoint
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.weights import DenseLinear, Linear


class BlockReader:
    """Reads one block's linears ahead, on a thread of its own, through a piece of page-locked memory."""

    def __init__(self, source: Checkpoint, spent: Callable[[str, float], None]) -> None:
        cp = cupy()
        self._source, self._spent = source, spent
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tinygptq-read")
        self._stream, self._device = cp.cuda.Stream(non_blocking=True), cp.cuda.Device()
        largest = max(linear.weight.nbytes for linear in block_linears(source, 0).values())
        self._staging = page_locked(largest, np.uint8)
        self._begun: dict[int, tuple[dict[str, Any], Future[None]]] = {}

    def start(self, layer: int) -> None:
        """Begin to read a block. Called by the main thread, whose stream the arrays belong to."""
        cp = cupy()
        arrays = {}
        for name, linear in block_linears(self._source, layer).items():
            arrays[name] = cp.empty(linear.weight.shape, bits_dtype(linear.weight.dtype))
        ready = cp.cuda.get_current_stream().record()
        self._begun[layer] = arrays, self._thread.submit(self._fill, layer, arrays, ready)

    def _fill(self, layer: int, arrays: dict[str, Any], ready: Any) -> None:
        started = time.perf_counter()
        with self._device, self._stream:
            self._stream.wait_event(ready)
            for name, linear in block_linears(self._source, layer).items():
                data = np.ascontiguousarray(linear.weight).reshape(-1).view(np.uint8)
                np.copyto(self._staging[: data.size], data)  # where a memory-mapped file is read
                arrays[name].data.copy_from_host_async(self._staging.ctypes.data, data.size, self._stream)
                self._stream.synchronize()
        self._spent("reading", time.perf_counter() - started)

    def take(self, layer: int) -> dict[str, Linear]:
        """A block's linears, waiting for them if need be."""
        if layer not in self._begun:
            self.start(layer)
        arrays, filled = self._begun.pop(layer)
        filled.result()
        dense = block_linears(self._source, layer)
        return {
            name: DenseLinear(as_floats(array, dense[name].weight.dtype), on_card_if_any(dense[name].bias))
            for name, array in arrays.items()
        }

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class HostBatches:
    """Batches in page-locked memory, used like a list of arrays on the card; all copies are on the main stream, in order."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._kept: list[np.ndarray] = []
        for batch in batches:
            self._kept.append(page_locked(batch.size, batch.dtype).reshape(batch.shape))
            self[-1] = batch

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Any:
        cp, kept = cupy(), self._kept[i]
        array = cp.empty(kept.shape, kept.dtype)
        array.data.copy_from_host_async(kept.ctypes.data, kept.nbytes, cp.cuda.get_current_stream())
        return array

    def __setitem__(self, i: int, array: Any) -> None:
        kept = self._kept[i]
        array.data.copy_to_host_async(kept.ctypes.data, kept.nbytes, cupy().cuda.get_current_stream())


def page_locked(size: int, dtype: Any) -> np.ndarray:
    """An uninitialised array of host memory that the card can copy from and to by itself."""
    dtype = np.dtype(dtype)
    return np.frombuffer(cupy().cuda.alloc_pinned_memory(size * dtype.itemsize), dtype, size)


def block_linears(source: Checkpoint, layer: int) -> dict[str, DenseLinear]:
    """The block's linears by full name, as the folder holds them."""
    names = [f"model.layers.{layer}.{name}" for name in source.config.linear_shapes()]
    return {name: source.weights.linears[name] for name in names}


def bits_dtype(dtype: np.dtype) -> np.dtype:
    """What CuPy holds such numbers as: it has no bfloat16, of which it gets the bits."""
    return np.dtype(np.uint16) if dtype.name == "bfloat16" else dtype


def as_floats(array: Any, dtype: np.dtype) -> Any:
    """A card's array of `bits_dtype` as numbers: a bfloat16 is the upper half of a float32."""
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32) if dtype.name == "bfloat16" else array


def on_card(array: np.ndarray) -> Any:
    return as_floats(cupy().asarray(array.view(bits_dtype(array.dtype))), array.dtype)


def on_card_if_any(array: np.ndarray | None) -> Any:
    return None if array is None else on_card(array)
