"""Quantising on an NVIDIA GPU: one block's weights and the whole residual stream on the card, everything else as on the CPU.

The next block is read, and solved linears are packed and written, by threads of their own, on CUDA streams of their own.
Arrays are given out by the main thread alone, for its stream; the reader fills them after what used their memory before is
done, and the packer reads them while it holds them.

The residual stream is fp16, as it is where an fp16 model runs: it is the largest array by far (2.1 GB for 128 windows of
2,048 tokens of a 7B). Where the card has no room for it, it stays in page-locked memory and comes over batch by batch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.checkpoint import Checkpoint
from tinygptq.config import LlamaConfig, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.export import gptq_tensors, solution_of
from tinygptq.gptq import Hessian, Solution
from tinygptq.kernels.cuda import calibration, solver
from tinygptq.kernels.cuda.cublas import Part, cublas
from tinygptq.kernels.cuda.hessian import HalfHessian
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.model import Llama
from tinygptq.placement import TOKENS_AT_ONCE, Clock, Host
from tinygptq.tensorfile import TensorFile
from tinygptq.weights import DenseLinear, Linear, Weights

log = logging.getLogger("tinygptq")

RESIDUAL = np.float16
MODEST = 7.5e9  # bytes of the card up to which activations are kept, to save time
SPARE = 1e9  # of them, for what the memory pool cannot use
BASE = 700 << 20  # of the card: CUDA's own, the libraries' code and workspaces, cuBLAS's and cuSOLVER's


class CardClock(Clock):
    """The card's time: from events on the stream, added up when they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        event = cupy().cuda.Event()
        event.record()
        return event

    def _add(self, part: str, mark: Any) -> None:
        self._spans.append((part, mark, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        for part, start, end in self._spans:
            end.synchronize()
            self.add(part, cupy().cuda.get_elapsed_time(start, end) / 1e3)
        self._spans.clear()
        return dict(self._spent)


class Card(Host):
    """The current CUDA device."""

    solver = solver

    def __init__(self) -> None:
        cp = cupy()
        self.name = f"cuda, {cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)['name'].decode()}"
        self.clock: Clock = CardClock()
        self._main, self._pack = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
        self._source: Checkpoint | None = None
        self._reader: BlockReader | None = None
        # bytes of the card in use throughout, and free at the start; whether it has no room for the residual stream
        self._used, self._most, self._on_host = 0.0, 0.0, False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        cp = cupy()
        pool, allocator = cp.get_default_memory_pool(), cp.cuda.get_allocator()
        cp.cuda.set_allocator(functools.partial(malloc, pool))
        try:
            with self._main:
                yield
                self._main.synchronize()
        except cp.cuda.memory.OutOfMemoryError as error:
            raise TinyGPTQError(f"the GPU has too little memory ({error}); try fewer --nsamples") from None
        finally:
            if self._reader is not None:
                self._reader.close()
            cp.cuda.set_allocator(allocator)
            pool.set_limit(size=0)
            pool.free_all_blocks()

    def model(self, source: Checkpoint) -> Llama:
        self._source, self._reader = source, BlockReader(source, self.clock.add)
        norms = {name: cupy().asarray(np.asarray(norm, np.float32)) for name, norm in source.weights.norms.items()}
        weights = Weights(source.weights.embedding, source.weights.head, norms, {})
        return Llama(source.config, weights, calibration)

    def announce(self, source: Checkpoint, ids: np.ndarray | None, config: QuantizeConfig) -> None:
        if getattr(config.recipe, "follows", False) or getattr(config.recipe, "refine", 0):
            raise TinyGPTQError("a recipe that corrects drift or refines codes runs on the CPU; take 'fast' or 'plain' here")
        stream = 0 if ids is None else stream_bytes(source.config, ids.size)
        self._most = cupy().cuda.runtime.memGetInfo()[0]
        widths = {k for k, _ in source.config.linear_shapes().values()}
        least = steady_bytes(source) + max(stage_bytes(source.config, k) for k in widths)
        self._on_host = least + stream > self._most
        self._used = steady_bytes(source) + (0 if self._on_host else stream)
        kept = {k: min(max(self.room(k), 0), stream * k / source.config.hidden_size) for k in widths}
        peak = max(self._used + stage_bytes(source.config, k) + kept[k] for k in widths)
        cupy().get_default_memory_pool().set_limit(size=int(max(peak + SPARE, MODEST) - BASE))
        log.info("memory: about %.1f GB on the GPU, of which %.1f GB are free, and %.1f GB on the host",
                 peak / 1e9, self._most / 1e9, (HOST_BASE + self._on_host * stream) / 1e9)  # fmt: skip

    def embed(self, model: Llama, ids: np.ndarray) -> Any:
        cp, source = cupy(), self._source
        table = on_card(np.asarray(source.weights.embedding))
        first = Llama(model.config, Weights(table, table, {}, {}), calibration)
        batches = (first.embed(cp.asarray(batch)).astype(RESIDUAL) for batch in self.batches(ids))
        return HostBatches(batches) if self._on_host else list(batches)

    @contextlib.contextmanager
    def block(self, model: Llama, layer: int) -> Iterator[None]:
        with self.clock("read"):
            linears = self._reader.take(layer)
        if layer + 1 < model.config.num_hidden_layers:
            self._reader.start(layer + 1)
        with self._in_place(model, linears):
            del linears  # each dense weight goes when it is replaced
            yield

    @contextlib.contextmanager
    def _in_place(self, model: Llama, linears: dict[str, Linear]) -> Iterator[None]:
        names = list(linears)
        model.weights.linears.update(linears)
        linears.clear()
        try:
            yield
        finally:
            for name in names:
                del model.weights.linears[name]

    def room(self, width: int) -> float:
        pool = cupy().get_default_memory_pool()
        if pool.free_bytes() > SPARE:  # pieces of other sizes than the coming stage needs
            pool.free_all_blocks()
        return min(MODEST, self._most) - SPARE - self._used - stage_bytes(self._source.config, width)

    def hessian(self, in_features: int) -> Hessian:
        return HalfHessian(in_features)

    def weight(self, linear: Linear) -> Any:
        return linear.weight.astype(np.float32)

    def static_grids(self, W: Any, config: QuantizeConfig) -> tuple[Any, Any]:
        return solver.static_grids(W, config)

    def share(self, rows: int, work: int, part: Callable[[slice], None]) -> None:
        for i in range(0, rows, 2048):
            part(slice(i, i + 2048))

    def matmul(self, a: Any, b: Any) -> Any:
        """In TF32: 11 bits of each factor, enough for a report."""
        out, sizes = cupy().empty((len(a), b.shape[1]), np.float32), (b.shape[1], len(a), a.shape[1])
        a, b = (cupy().ascontiguousarray(array) for array in (a, b))
        cublas().gemm(Part(b, b.shape[1]), Part(a, a.shape[1]), Part(out, b.shape[1]), sizes, self._main.ptr, tf32=True)
        return out

    def replacement(self, solution: Solution, config: QuantizeConfig, bias: Any) -> Linear:
        """Dense, in fp16: what ``scale * (code - zero)`` is, rounded once. It lasts as long as its block."""
        return DenseLinear(solution.dequantize().astype(np.float16), bias)

    def tensors(self, solution: Solution, config: QuantizeConfig) -> Callable[[], dict[str, np.ndarray]]:
        return functools.partial(self._packed, solution, config, self._main.record())

    def _packed(self, solution: Solution, config: QuantizeConfig, ready: Any) -> dict[str, np.ndarray]:
        with self._pack:
            self._pack.wait_event(ready)
            return {name: tensor.get() for name, tensor in gptq_tensors(solution, config).items()}

    def saved(self, hidden: Any) -> list[np.ndarray]:
        """Nothing: running the text through finished blocks again takes a fraction of a second each, less than a save."""
        return []

    def restored(
        self, saved: list, model: Llama, ids: np.ndarray | None, config: QuantizeConfig, done: int, folder: Path
    ) -> Any:
        if ids is None:
            return []
        hidden, tensors = self.embed(model, ids), TensorFile(folder / "model.safetensors")
        for layer in range(done):
            linears = {
                name: self.replacement(read_solution(tensors, name, config), config, on_card_if_any(dense.bias))
                for name, dense in block_linears(self._source, layer).items()
            }
            with self._in_place(model, linears):
                for i, h in enumerate(hidden):
                    hidden[i] = model.block(layer, h)
        return hidden


def malloc(pool: Any, size: int) -> Any:
    """From CuPy's pool, whose limit is soft: there, unused pieces go back to the card, and then, if need be, the limit goes.

    (Without one the pool would keep pieces of all the sizes that the stages of a block need one after another.)
    """
    try:
        return pool.malloc(size)
    except cupy().cuda.memory.OutOfMemoryError:
        if not pool.get_limit():
            raise
        pool.set_limit(size=0)
        return pool.malloc(size)


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


def read_solution(tensors: TensorFile, name: str, config: QuantizeConfig) -> Solution:
    """A finished linear, from the folder in the making to the card."""
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return solution_of({part: cupy().asarray(np.asarray(tensors[f"{name}.{part}"])) for part in parts}, config)


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


# ----------------------------------------------------------------------------------------------------- memory, predicted

HOST_BASE = 1500 << 20  # Python, its packages, CUDA's libraries, and what waits to be written


def stream_bytes(config: LlamaConfig, tokens: int) -> int:
    """The residual stream."""
    return tokens * config.hidden_size * np.dtype(RESIDUAL).itemsize


def steady_bytes(source: Checkpoint) -> int:
    """In use throughout: the libraries, this block's linears and the next one's."""
    return BASE + 2 * sum(
        linear.weight.size * max(2, linear.weight.itemsize) for linear in block_linears(source, 0).values()
    )


def stage_bytes(config: LlamaConfig, width: int) -> int:
    """The most that the work on linears with ``width`` inputs takes for a time: factoring in float64 at worst, or solving,
    or a batch's activations."""
    outputs = max(n for k, n in config.linear_shapes().values() if k == width)
    batch = TOKENS_AT_ONCE * (14 * config.hidden_size + 4 * config.intermediate_size)  # fp16, and the norm's in float32 too
    return max(24 * width**2, 8 * width**2 + 24 * width * outputs, 4 * width**2 + batch)
