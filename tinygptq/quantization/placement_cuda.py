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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import RECIPES, LlamaConfig, QuantizeConfig, Recipe
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint
from tinygptq.folders.export import gptq_tensors, solution_of
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.gptq import Hessian, Solution
from tinygptq.gptq.drift import Cross
from tinygptq.gptq.refine import BYTES_AT_ONCE
from tinygptq.kernels.cuda import calibration, solver
from tinygptq.kernels.cuda.cublas import Part, cublas
from tinygptq.kernels.cuda.hessian import HalfHessian
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.kernels.cuda.transfer import BlockReader, HostBatches, block_linears, on_card, on_card_if_any
from tinygptq.model import Llama
from tinygptq.ops import to_numpy
from tinygptq.quantization.placement import TOKENS_AT_ONCE, Clock, Host
from tinygptq.weights import DenseLinear, Linear, Weights

log = logging.getLogger("tinygptq")

RESIDUAL = np.float16
FUNCTIONS: Any = calibration  # whose linears may also be SplitLinears
EXACT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # rounded to fp16, they would change o_proj's codes
NARROW = 2048  # inputs up to which products in float32 take next to no time, and H is as good as the processor's
MODEST = 7.5e9  # bytes of the card up to which activations are kept, to save time; for a recipe of two models so much each
SPARE = 1e9  # of them, for what the memory pool cannot use
BASE = 950 << 20  # of the card: CUDA's own, the libraries' code and workspaces, cuBLAS's and cuSOLVER's


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
        self._source: Any = None  # the Checkpoint, once `model` has been called, and who reads its blocks
        self._reader: Any = None
        # bytes of the card in use throughout, and free at the start; whether it has no room for the residual stream
        self._used, self._most, self._on_host = 0.0, 0.0, False
        self._recipe, self._modest = RECIPES["plain"], MODEST

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
        return Llama(source.config, weights, FUNCTIONS)

    def announce(self, source: Checkpoint, ids: np.ndarray | None, config: QuantizeConfig) -> None:
        self._recipe, models = config.recipe, 1 + config.recipe.follows
        stream = 0 if ids is None else models * stream_bytes(source.config, ids.size)
        self._most, self._modest = cupy().cuda.runtime.memGetInfo()[0], models * MODEST
        widths = {k for k, _ in source.config.linear_shapes().values()}
        stages = {k: stage_bytes(source.config, k, self._recipe) for k in widths}
        steady = steady_bytes(source, self._recipe)
        self._on_host = steady + max(stages.values()) + stream > self._most
        self._used = steady + (0 if self._on_host else stream)
        kept = {k: min(max(self.room(k), 0), stream * k / source.config.hidden_size) for k in widths}
        peak = max(self._used + stages[k] + kept[k] for k in widths)
        cupy().get_default_memory_pool().set_limit(size=int(max(peak + SPARE, self._modest) - BASE))
        log.info("memory: about %.1f GB on the GPU, of which %.1f GB are free, and %.1f GB on the host",
                 (peak + SPARE) / 1e9, self._most / 1e9, (HOST_BASE + self._on_host * stream) / 1e9)  # fmt: skip

    def embed(self, model: Llama, ids: np.ndarray) -> Any:
        cp, source = cupy(), self._source
        table = on_card(np.asarray(source.weights.embedding))
        first = Llama(model.config, Weights(table, table, {}, {}), FUNCTIONS)
        batches = (first.embed(cp.asarray(batch)).astype(RESIDUAL) for batch in self.batches(ids))
        return HostBatches(batches) if self._on_host else list(batches)

    @contextlib.contextmanager
    def block(self, model: Llama, layer: int, step: int = 1) -> Iterator[None]:
        with self.clock("read"):
            linears = self._reader.take(layer)
        if 0 <= layer + step < model.config.num_hidden_layers:
            self._reader.start(layer + step)
        with self._in_place(model, linears):
            del linears  # each dense weight goes when it is replaced
            yield

    def with_head(self, model: Llama) -> Llama:
        weights = model.weights
        head = on_card(np.asarray(weights.head))
        return Llama(model.config, Weights(weights.embedding, head, weights.norms, weights.linears), FUNCTIONS)

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
        cupy().get_default_memory_pool().free_all_blocks()  # pieces of other sizes than the coming stage needs
        stage = stage_bytes(self._source.config, width, self._recipe)
        return min(self._modest, self._most) - SPARE - self._used - stage

    def room_of_inputs(self) -> float:
        """None: a norm takes less time here than moving what it makes out of something else's room would."""
        return 0

    def hessian(self, in_features: int) -> Hessian:
        return HalfHessian(in_features) if in_features > NARROW else Hessian(in_features)

    def cross(self) -> Cross:
        """In TF32: a sum over all tokens of products whose first factor is a difference that fp16 has rounded."""
        return Cross(self.matmul)

    def weight(self, linear: Any) -> Any:
        return linear.weight.astype(np.float32)

    def static_grids(self, W: Any, config: QuantizeConfig) -> tuple[Any, Any]:
        return solver.static_grids(W, config)

    def share(self, rows: int, work: int, part: Callable[[slice], None]) -> None:
        for i in range(0, rows, 2048):
            part(slice(i, i + 2048))

    def matmul(self, a: Any, b: Any) -> Any:
        """In TF32, 11 bits of each factor."""
        cp, (rows, inner), columns = cupy(), a.shape, b.shape[1]
        a, b, out = cp.ascontiguousarray(a), cp.ascontiguousarray(b), cp.empty((rows, columns), np.float32)
        parts, stream = (Part(b, columns), Part(a, inner), Part(out, columns)), cp.cuda.get_current_stream()
        cublas().gemm(*parts, (columns, rows, inner), stream.ptr, tf32=True)
        return out

    def teacher(self, name: str, linear: Linear) -> Any:
        """As exact as what replaces it, so that the difference between the two is quantisation's."""
        if name.endswith(EXACT):
            return calibration.SplitLinear(self.weight(linear), linear.bias)
        return super().teacher(name, linear)

    def replacement(self, name: str, solution: Solution, config: QuantizeConfig, bias: Any) -> Any:
        """Dense: what ``scale * (code - zero)`` is, rounded to fp16 but for EXACT. It lasts as long as its block."""
        weight = solution.dequantize()
        if name.endswith(EXACT):
            return calibration.SplitLinear(weight, bias)
        return DenseLinear(weight.astype(np.float16), bias)

    def tensors(self, solution: Solution, config: QuantizeConfig) -> Callable[[], dict[str, np.ndarray]]:
        return functools.partial(self._packed, solution, config, self._main.record())

    def _packed(self, solution: Solution, config: QuantizeConfig, ready: Any) -> dict[str, np.ndarray]:
        with self._pack:
            self._pack.wait_event(ready)
            return {name: to_numpy(tensor) for name, tensor in gptq_tensors(solution, config).items()}

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
                name: self.replacement(name, read_solution(tensors, name, config), config, on_card_if_any(dense.bias))
                for name, dense in block_linears(self._source, layer).items()
            }
            with self._in_place(model, linears):
                for i, h in enumerate(hidden):
                    hidden[i] = model.block(layer, h)
        return hidden


def malloc(pool: Any, size: int) -> Any:
    """From CuPy's pool, whose limit is soft: there, unused pieces go back to the card, and then, if need be, it is raised.

    (Without one the pool would keep pieces of all the sizes that the stages of a block need one after another.)
    """
    try:
        return pool.malloc(size)
    except cupy().cuda.memory.OutOfMemoryError:
        if not pool.get_limit():
            raise
        pool.set_limit(size=pool.get_limit() + size)
        return pool.malloc(size)


def read_solution(tensors: TensorFile, name: str, config: QuantizeConfig) -> Solution:
    """A finished linear, from the folder in the making to the card."""
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return solution_of({part: cupy().asarray(np.asarray(tensors[f"{name}.{part}"])) for part in parts}, config)


# ----------------------------------------------------------------------------------------------------- memory, predicted

HOST_BASE = 1500 << 20  # Python, its packages, CUDA's libraries, and what waits to be written


def stream_bytes(config: LlamaConfig, tokens: int) -> int:
    """The residual stream."""
    return tokens * config.hidden_size * np.dtype(RESIDUAL).itemsize


def steady_bytes(source: Checkpoint, recipe: Recipe) -> int:
    """In use throughout: the libraries, this block's linears, the next one's, and those of an unquantised model beside."""
    return BASE + (2 + recipe.follows) * sum(
        linear.weight.size * max(2, linear.weight.itemsize) for linear in block_linears(source, 0).values()
    )


def stage_bytes(config: LlamaConfig, width: int, recipe: Recipe) -> int:
    """The most that the work on linears with ``width`` inputs takes for a time: factoring in float64 at worst, or solving,
    or a batch's activations."""
    outputs = max(n for k, n in config.linear_shapes().values() if k == width)
    batch = TOKENS_AT_ONCE * (14 * config.hidden_size + 4 * config.intermediate_size)  # fp16, and the norm's in float32 too
    square, weights = width**2, width * outputs
    drift = 4 * (square + max(weights if recipe.residual else 0, square)) if recipe.follows else 0  # R, and E X^T
    refining = 12 * square + 20 * weights + 2 * BYTES_AT_ONCE if recipe.refine else 0
    return drift + max(24 * square, 8 * square + 24 * weights + refining, 4 * square + (1 + recipe.follows) * batch)
