"""The task list of a decode step, and the memory it works in: made once for a model, run by cpu_decode.py."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.kernels import cpu_launch, cpu_tiles
from tinygptq.kernels.cpu import CpuLinear
from tinygptq.kernels.cpu_decode import (
    ADD,
    ATTEND,
    CAPACITY,
    COUNTERS_SIZE,
    DELTA,
    EMBED,
    GATE,
    GATED,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYOUT_FIELDS,
    LOGITS,
    MEMO_FIELDS,
    MIX,
    NO_NORM,
    NORM_WIDTH,
    ORDERED,
    PAIRS,
    PROJECT,
    ROTATE,
    SCORES,
    SUMS,
    UP,
    H,
    K,
    Q,
    V,
)
from tinygptq.kernels.cpu_tiles import COLUMNS

PIECE = 1 << 16  # bytes of weights that make a task worth its ticket


@dataclass(frozen=True)
class Plan:
    """A model's decode step, laid out in memory.

    Attributes:
        tasks: int64 [T, TASK_FIELDS]. linears: int64 [.., FIELDS], the embedding first. layout: int64 [LAYOUT_FIELDS].
        norms: float32 [2 * layers + 1, C] padded to whole vectors. work: float32, the vectors between linears.
        scratch: float32 [threads, ..], memo: int64 [threads, MEMO_FIELDS]: for each thread alone.
    """

    tasks: np.ndarray
    linears: np.ndarray
    layout: np.ndarray
    norms: np.ndarray
    work: np.ndarray
    scratch: np.ndarray
    memo: np.ndarray
    counters: np.ndarray
    kept: tuple[CpuLinear, ...]  # whose arrays ``linears`` points into

    @property
    def logits(self) -> np.ndarray:
        """float32 [vocab], a view of what the last step computed."""
        start = int(self.layout[LOGITS])
        return self.work[start : start + int(self.linears[0, cpu_tiles.OUTPUTS])]

    def step(
        self, token: int, position: int, keys: np.ndarray, values: np.ndarray, cos: np.ndarray, sin: np.ndarray, eps: float
    ) -> np.ndarray:
        """Run one token: write its keys and values into the cache at ``position``, return the logits, float32 [vocab].

        Shapes: keys, values float32 [layers, 1, G, capacity, D]; cos, sin float32 [1, D / 2]; all contiguous.
        """
        self.counters[:] = 0
        cpu_launch.run(
            *(cpu_launch.DECODE, len(self.scratch), token, position, self.tasks, len(self.tasks), self.linears, self.layout),
            *(self.norms, self.work, self.scratch, self.scratch.strides[0], self.memo, self.counters, keys, values),
            *(cos, sin),
            number=eps,
        )
        return self.logits


def _padded(count: int) -> int:
    return -(-count // COLUMNS) * COLUMNS


def make_plan(
    config: LlamaConfig,
    embedding: CpuLinear,
    blocks: list[list[CpuLinear]],
    head: CpuLinear,
    norms: np.ndarray,
    capacity: int,
    threads: int,
) -> Plan:
    """Lay out a decode step.

    Args:
        blocks: for each layer q, k, v, o, gate, up, down.
        norms: float32 [2 * layers + 1, C]: each layer's two, then the final one.
    """
    linears = [embedding, *(linear for block in blocks for linear in block), head]
    layout = np.zeros(LAYOUT_FIELDS, np.int64)
    layout[NORM_WIDTH] = _padded(config.hidden_size)
    layout[HIDDEN], layout[HEADS] = config.hidden_size, config.num_attention_heads
    layout[KV_HEADS] = config.num_key_value_heads
    layout[HEAD_DIM], layout[CAPACITY] = config.head_dim, capacity
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = {H: hidden, Q: queries, K: keys, V: keys, MIX: queries, GATE: inner, UP: inner, DELTA: hidden}
    work = _place(layout, sizes | {LOGITS: config.vocab_size})
    rows = max(linear.padded_rows for linear in linears)
    own = {ORDERED: rows, PAIRS: rows, SUMS: max(linear.groups for linear in linears), SCORES: capacity}
    own_size = _place(layout, own, start=_padded(hidden))  # the normalised input comes first
    padded_norms = np.zeros((len(norms), _padded(hidden)), np.float32)
    padded_norms[:, :hidden] = norms
    return Plan(
        tasks=_make_tasks(config, linears, layout, threads),
        linears=np.stack([linear.table for linear in linears]),
        layout=layout,
        norms=padded_norms,
        work=np.zeros(work, np.float32),
        scratch=np.zeros((threads, own_size), np.float32),
        memo=np.zeros((threads, MEMO_FIELDS), np.int64),
        counters=np.zeros(COUNTERS_SIZE, np.int64),
        kept=tuple(linears),
    )


def _place(layout: np.ndarray, sizes: dict[int, int], start: int = 0) -> int:
    """Give each vector its offset, in whole tiles; return the end."""
    for name, size in sizes.items():
        layout[name] = start
        start += _padded(size)
    return start


def _make_tasks(config: LlamaConfig, linears: list[CpuLinear], layout: np.ndarray, threads: int) -> np.ndarray:
    tasks: list[tuple[int, ...]] = []

    def phase(layer: int, *work: tuple) -> None:
        """Append tasks that may all run once everything before is done; ``work``: (op, linear or None, pieces, ...)."""
        wait = len(tasks)
        for op, linear, (count, pieces), source, norm, target in work:
            for first, last in _ranges(count, pieces):
                tasks.append((op, wait, layer, linear, first, last, source, norm, layout[target]))

    def split(index: int, together: int = 1) -> tuple[int, int]:
        """(tiles, pieces) of a linear, or of ``together`` linears of one shape."""
        tiles = -(-linears[index].out_features // COLUMNS)
        pieces = min(max(linears[index].nbytes * together // PIECE, 1), 8 * threads)
        return tiles, min(tiles, -(-pieces // threads) * threads if pieces > 1 else 1)

    phase(0, (EMBED, 0, (1, 1), 0, NO_NORM, H))
    h, mix, gate = layout[H], layout[MIX], layout[GATE]
    for layer in range(config.num_hidden_layers):
        q = 1 + 7 * layer
        before, after = 2 * layer, 2 * layer + 1
        phase(layer, *((PROJECT, q + i, split(q + i), h, before, target) for i, target in enumerate((Q, K, V))))
        phase(layer, (ROTATE, 0, (1, 1), h, NO_NORM, H))
        phase(layer, (ATTEND, 0, (config.num_attention_heads,) * 2, h, NO_NORM, MIX))
        phase(layer, (ADD, q + 3, split(q + 3), mix, NO_NORM, DELTA))
        phase(layer, (GATED, q + 4, split(q + 4, together=2), h, after, GATE))
        phase(layer, (ADD, q + 6, split(q + 6), gate, NO_NORM, DELTA))
    last = len(linears) - 1
    phase(config.num_hidden_layers, (PROJECT, last, split(last), h, 2 * config.num_hidden_layers, LOGITS))
    return np.array(tasks, np.int64)


def _ranges(count: int, pieces: int) -> list[tuple[int, int]]:
    """``pieces`` ranges of nearly equal length that cover 0 .. count-1."""
    ends = [count * piece // pieces for piece in range(pieces + 1)]
    return list(itertools.pairwise(ends))
