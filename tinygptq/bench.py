"""How fast a model runs here: loading, prompts, decoding, in tokens and bytes a second beside what the memory can do.

Each figure is the median of several runs. Decoding is timed with sampling on, as it is used: top-k 40, top-p 0.95, the whole
way from one token to the next. Its bytes are those of the weights that a token reads, and of the keys and values before it.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq import threads
from tinygptq.errors import TinyGPTQError
from tinygptq.language_model import LanguageModel
from tinygptq.sampling import Sampler, SamplingParams

SAMPLING = SamplingParams(temperature=0.7, top_k=40, top_p=0.95, repetition_penalty=1.1)
WARM_UP = 8  # tokens decoded before the clock starts
REPLAYS = 20  # of a graph that is timed


@dataclass(frozen=True)
class Decoding:
    """Decoding ``tokens`` tokens of each of ``rows`` sequences after ``context`` others; bandwidth in GB/s of bytes read."""

    rows: int
    context: int
    tokens: int
    tokens_per_second: float
    gb_per_second: float


@dataclass(frozen=True)
class Prefill:
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class Bench:
    """All of it. memory_gb_per_second: what the memory can do, measured. kernels: microseconds of a step by kind (GPU)."""

    device: str
    load_seconds: float
    memory_gb_per_second: float
    weights_bytes: int
    device_bytes: int | None
    prefill: list[Prefill]
    decoding: list[Decoding]
    kernels: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    model: LanguageModel, load_seconds: float, contexts: Sequence[int], prompts: Sequence[int], tokens: int = 64,
    rounds: int = 3, profile: bool = False,
) -> Bench:  # fmt: skip
    """Measure a loaded model.

    Args:
        contexts: tokens before those that are decoded; prompts: lengths of prompts. What the engine has no room for is left
            out. tokens: decoded in a run. profile: also time a step's kernels, kind by kind.
    """
    machine, engine = (_Gpu(model) if hasattr(model.engine, "draw_batch") else _Cpu(model)), model.engine
    vocab = model.config.vocab_size
    prefill = [
        Prefill(length, length / statistics.median(_prefill_seconds(engine, vocab, length, rounds)))
        for length in prompts
        if length <= engine.capacity
    ]
    decoding = [
        _decoding(model, machine, context, tokens, rounds)
        for context in contexts
        if context + tokens + WARM_UP <= engine.capacity
    ]
    kernels = machine.kernel_times(min(contexts)) if profile else {}
    facts = machine.name(), load_seconds, machine.bandwidth(), machine.weights_bytes(), machine.memory()
    return Bench(*facts, prefill, decoding, kernels)


def _ids(vocab: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, length)


def _prefill_seconds(engine: Any, vocab: int, length: int, rounds: int) -> list[float]:
    seconds = []
    for _ in range(rounds + 1):
        engine.reset()
        start = time.perf_counter()
        engine.prefill(_ids(vocab, length))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _decoding(model: LanguageModel, machine: Any, context: int, tokens: int, rounds: int) -> Decoding:
    rows = getattr(model.engine, "rows", 1)
    seconds = statistics.median(_decode_seconds(model, context, tokens) for _ in range(rounds))
    read = machine.weights_bytes() + rows * machine.cache_bytes(context + WARM_UP + tokens // 2)
    return Decoding(rows, context, tokens, rows / seconds, read / seconds * 1e-9)


def _decode_seconds(model: LanguageModel, context: int, tokens: int) -> float:
    """Seconds from one token to the next."""
    engine, vocab = model.engine, model.config.vocab_size
    ids = _ids(vocab, context)
    if hasattr(engine, "generate_batch"):
        return _ahead_seconds(engine, ids, vocab, tokens)
    sampler = Sampler(SAMPLING, vocab, (), seed=0)
    engine.reset()
    logits = engine.prefill(ids)
    for step in range(WARM_UP + tokens):
        if step == WARM_UP:
            start = time.perf_counter()
        logits = engine.decode(sampler.draw(logits))
    return (time.perf_counter() - start) / tokens


def _ahead_seconds(engine: Any, ids: np.ndarray, vocab: int, tokens: int) -> float:
    """The same where the engine draws tokens itself, all its sequences at once."""
    samplers = [Sampler(SAMPLING, vocab, (), seed=row) for row in range(engine.rows)]
    start = time.perf_counter()
    for number, _ in enumerate(engine.draw_batch([ids] * engine.rows, samplers, WARM_UP + tokens)):
        if number + 1 == WARM_UP:
            start = time.perf_counter()
    return (time.perf_counter() - start) / tokens


# ---------------------------------------------------------------------------------------------- devices


class _Cpu:
    """The processor: weights as the CPU kernels hold them, keys and values in float32."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def name(self) -> str:
        return f"{processor_name()}, {threads.count()} threads"

    def bandwidth(self) -> float:
        """GB/s at which all threads together read: the best of five sums over a gigabyte."""
        values, times = np.ones(1 << 27), []
        parts = np.zeros(len(values) >> 20)

        def add(rows: slice) -> None:
            for i in range(*rows.indices(len(parts))):
                parts[i] = values[i << 20 : (i + 1) << 20].sum()

        for _ in range(5):
            start = time.perf_counter()
            threads.share(len(parts), 1 << 60, add)
            times.append(time.perf_counter() - start)
        return values.nbytes / min(times) * 1e-9

    def weights_bytes(self) -> int:
        weights = self.model.engine.model.weights
        return weights.head.nbytes + sum(linear.nbytes for linear in weights.linears.values())

    def cache_bytes(self, tokens: int) -> int:
        config = self.model.config
        return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens

    def memory(self) -> None:
        """Not told: the system pages weights in as it likes."""

    def kernel_times(self, context: int) -> dict[str, float]:
        raise TinyGPTQError("--profile times the kernels of a CUDA graph; it needs --device cuda")


class _Gpu:
    """A CUDA device."""

    def __init__(self, model: LanguageModel) -> None:
        from tinygptq.kernels.cuda.runtime import cupy

        self.engine: Any = model.engine  # a CudaEngine
        self.cp = cupy()

    def name(self) -> str:
        return self.cp.cuda.runtime.getDeviceProperties(self.cp.cuda.Device().id)["name"].decode()

    def bandwidth(self) -> float:
        """GB/s read and written together by a copy from device to device, as large as there is room for: the best of ten."""
        size = min(4 << 30, self.cp.cuda.Device().mem_info[0] // 4)
        source, target = (self.cp.zeros(size, np.uint8) for _ in range(2))
        milliseconds = self._times(lambda stream: target.data.copy_from_device_async(source.data, size, stream), 10)
        return 2 * size / min(milliseconds) * 1e-6

    def weights_bytes(self) -> int:
        return self.engine.weights.nbytes_read

    def cache_bytes(self, tokens: int) -> int:
        """Of keys, values and their scales that one sequence reads after so many tokens."""
        keys, _, scales, _ = self.engine.step.cache
        layers, _, groups, _, width = keys.shape
        return 2 * layers * groups * tokens * (width * keys.itemsize + (scales.itemsize if keys.itemsize == 1 else 0))

    def memory(self) -> int:
        """Bytes of device memory that CuPy holds for this process: all that the engine has allocated."""
        self.cp.get_default_memory_pool().free_all_blocks()
        return self.cp.get_default_memory_pool().total_bytes()

    def kernel_times(self, context: int) -> dict[str, float]:
        """Microseconds of a step for each kind of kernel: graphs of that kind alone, replayed."""
        step = self.engine.step
        step.sequences.positions.fill(context)
        step.sequences.drawn.fill(0)
        works = {name: functools.partial(step.launch, only=name) for name, _ in step.kernels()} | {"draw": step.launch_draw}
        return {name: self._replayed(work) for name, work in works.items()}

    def _replayed(self, work: Callable[[], None]) -> float:
        """Microseconds of a graph of that work."""
        stream = self.engine.stream
        self.cp.cuda.Device().synchronize()
        stream.begin_capture()
        work()
        graph = stream.end_capture()
        return statistics.median(self._times(graph.launch, REPLAYS, stream)) * 1e3

    def _times(self, work: Callable[[Any], Any], count: int, stream: Any = None) -> list[float]:
        """Milliseconds of each of so many runs, after one that is not counted."""
        stream, times = stream or self.cp.cuda.Stream(non_blocking=True), []
        self.cp.cuda.Device().synchronize()
        for _ in range(count + 1):
            begin, end = self.cp.cuda.Event(), self.cp.cuda.Event()
            begin.record(stream)
            work(stream)
            end.record(stream)
            end.synchronize()
            times.append(self.cp.cuda.get_elapsed_time(begin, end))
        return times[1:]


def processor_name() -> str:
    """As the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
