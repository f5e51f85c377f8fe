"""Where quantising is done: :class:`Host` is this machine's processor and memory, placement_cuda.Card a GPU.

The block loop in blocks.py knows no more of either than these methods, and is written once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinygptq import threads
from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.folders.checkpoint import Checkpoint
from tinygptq.folders.export import gptq_tensors
from tinygptq.folders.gptq_files import from_gptq
from tinygptq.gptq import Hessian, Solution
from tinygptq.gptq.drift import Cross
from tinygptq.model import Llama
from tinygptq.packing import PackedLinear
from tinygptq.weights import DenseLinear, Linear, Weights, dense

TOKENS_AT_ONCE = 8192  # calibration tokens that go through a stage together; enough to keep BLAS busy
ROWS_AT_ONCE = 256  # of W, whose rounding errors are measured together, in the processor's cache
KEEP_BYTES = 4 << 30  # so much of one stage's activations is kept, and what is beyond it computed again when needed

log = logging.getLogger("tinygptq")

T = TypeVar("T")


class Clock:
    """Seconds spent on each part of the work: ``with clock("forward"): ...``; what is nested belongs to the outer part."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._running, self._lock = threading.local(), threading.Lock()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if getattr(self._running, "part", None) is not None:
            yield
            return
        self._running.part, mark = part, self._now()
        try:
            yield
        finally:
            self._running.part = None
            self._add(part, mark)

    def each(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each is there counts as ``part``."""
        items = iter(items)
        while True:
            with self(part):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    @property
    def seconds(self) -> dict[str, float]:
        return dict(self._spent)

    def add(self, part: str, seconds: float) -> None:
        """From another thread."""
        with self._lock:
            self._spent[part] += seconds

    def _now(self) -> Any:
        return time.perf_counter()

    def _add(self, part: str, mark: Any) -> None:
        self.add(part, time.perf_counter() - mark)


class Host:
    """This machine's processor and memory."""

    name = "cpu"  # what a run's fingerprint calls it
    solver: Any = "numba"  # solve's ``method``

    def __init__(self) -> None:
        self.clock = Clock()

    def session(self) -> AbstractContextManager:
        """All work goes on within it."""
        return contextlib.nullcontext()

    def model(self, source: Checkpoint) -> Llama:
        return fast_model(source, dict(source.weights.linears))

    def batches(self, ids: np.ndarray) -> list[np.ndarray]:
        """Whole windows, about TOKENS_AT_ONCE tokens together."""
        size = max(1, TOKENS_AT_ONCE // ids.shape[1])
        return [ids[i : i + size] for i in range(0, len(ids), size)]

    def embed(self, model: Llama, ids: np.ndarray) -> Any:
        """The residual stream before the first block: batches, each (B, T, C), in something that is used like a list."""
        return [model.embed(batch) for batch in self.batches(ids)]

    def block(self, model: Llama, layer: int, step: int = 1) -> AbstractContextManager:
        """Within it, the block's linears are where its products are done; block ``layer + step`` will be next."""
        return contextlib.nullcontext()

    def with_head(self, model: Llama) -> Llama:
        """The same model, of which `Llama.logits` works too; linears are shared."""
        return model

    def room(self, width: int) -> float:
        """Bytes of activations that may be kept while linears with ``width`` inputs are solved."""
        return KEEP_BYTES

    def room_of_inputs(self) -> float:
        """Bytes that may be kept of a stage's inputs which are but a norm of the residual stream, until they are mixed."""
        return KEEP_BYTES

    def hessian(self, in_features: int) -> Hessian:
        from tinygptq.kernels import cpu  # only here: importing Numba takes a while

        return Hessian(in_features, gram=cpu.gram)

    def cross(self) -> Cross:
        """What sums up how errors go together with inputs; nothing yet."""
        return Cross()

    def weight(self, linear: Linear) -> np.ndarray:
        """W, float32 (out, in)."""
        from tinygptq.kernels import cpu  # only here: importing Numba takes a while

        return cpu.widened(dense(linear))

    def static_grids(self, W: np.ndarray, config: QuantizeConfig) -> tuple[np.ndarray, np.ndarray]:
        from tinygptq.gptq import solver_numba  # only here: importing Numba takes a while

        return solver_numba.static_grids(W, config)

    def share(self, rows: int, work: int, part: Callable[[slice], None]) -> None:
        """Call ``part`` for slices that cover so many rows; ``work`` multiplications in all."""
        threads.share(rows, work, part, slices=max(1, rows // (ROWS_AT_ONCE * threads.count())))

    def matmul(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """A product of float32 matrices, for reports, within a part of `share`."""
        return a @ b

    def teacher(self, name: str, linear: Linear) -> Linear:
        """The unquantised linear ``name``, anew: what kernels prepare for it lasts as long as its block."""
        return DenseLinear(dense(linear).weight, linear.bias)

    def replacement(self, name: str, solution: Solution, config: QuantizeConfig, bias: np.ndarray | None) -> Linear:
        """What stands for the solved linear ``name`` from now on; exactly what the file will hold."""
        return packed(solution, config, bias)

    def tensors(self, solution: Solution, config: QuantizeConfig) -> Callable[[], dict[str, np.ndarray]]:
        """A function that gives the solution as files hold it, for another thread to call."""
        return functools.partial(gptq_tensors, solution, config)

    def announce(self, source: Checkpoint, ids: np.ndarray | None, config: QuantizeConfig) -> None:
        """Log how much memory the work will take."""
        log.info("memory: about %.1f GB beside the model's own file", host_bytes(source.config, ids) / 1e9)

    def saved(self, hidden: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """What of the residual stream has to be saved to go on from here."""
        return hidden

    def restored(
        self, saved: list[np.ndarray], model: Llama, ids: np.ndarray | None, config: QuantizeConfig, done: int, folder: Path
    ) -> Any:
        """The residual stream after ``done`` blocks, from what was saved of it and the folder in the making."""
        return saved


def host_bytes(config: LlamaConfig, ids: np.ndarray | None) -> int:
    """About how much memory the block loop takes on the processor: activations, and the Hessian's factors in float64."""
    shapes = config.linear_shapes().values()
    widest, weights = max(k for k, _ in shapes), max(k * n for k, n in shapes)
    base = 300 << 20  # Python, its packages, and compiled code
    if ids is None:
        return base + 16 * weights
    stream, at_once = 4 * ids.size * config.hidden_size, min(ids.size, TOKENS_AT_ONCE)
    kept = min(KEEP_BYTES, stream * config.intermediate_size // config.hidden_size)
    return base + stream + kept + 40 * widest**2 + 16 * weights + 16 * at_once * config.intermediate_size


def fast_model(source: Checkpoint, linears: dict[str, Linear]) -> Llama:
    """The definition of the forward pass with the CPU kernels plugged in, over its own dict of linears."""
    from tinygptq.kernels import cpu  # only here: importing Numba takes a while

    weights = Weights(source.weights.embedding, source.weights.head, source.weights.norms, linears)
    return Llama(source.config, weights, cpu)


def packed(solution: Solution, config: QuantizeConfig, bias: np.ndarray | None = None) -> PackedLinear:
    """A solution as kernels see it, by way of the tensors that are written."""
    return from_gptq(gptq_tensors(solution, config), config, bias)
