"""Linears are packed and written on a thread of their own while the next ones are solved."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from tinygptq.folders.export import QuantizedFolderWriter

AHEAD = 7  # linears that may wait to be written, a block's; more would fill memory when the disk is slow


class WriteBehind:
    """A :class:`QuantizedFolderWriter` that is given work to do, and does it in the order in which it was given.

    An error of the writer's is raised by the next call of any method here.

    Args:
        spent: is told the seconds of packing and of writing, as ``spent("pack", seconds)``.
    """

    def __init__(self, writer: QuantizedFolderWriter, spent: Callable[[str, float], None]) -> None:
        self._writer, self._spent = writer, spent
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tinygptq-write")
        # what is there already, embedding and head, goes to the disk meanwhile: the first flush need not wait for it
        self._waiting: deque[Future[None]] = deque([self._thread.submit(writer.flush)])

    def write(self, name: str, tensors: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Write what ``tensors()`` gives, which is called on the other thread."""
        while len(self._waiting) >= AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._write, name, tensors))

    def _write(self, name: str, tensors: Callable[[], Mapping[str, np.ndarray]]) -> None:
        started = time.perf_counter()
        made = tensors()
        packed = time.perf_counter()
        self._writer.write_tensors(name, made)
        self._spent("pack", packed - started)
        self._spent("write", time.perf_counter() - packed)

    def flush(self) -> None:
        """All that was given is on the disk when this returns."""
        self.wait()
        self._writer.flush()

    def wait(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    @property
    def checksums(self) -> Mapping[str, int]:
        """Of all tensors written so far; see :class:`QuantizedFolderWriter`."""
        self.wait()
        return self._writer.checksums

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self.wait()
