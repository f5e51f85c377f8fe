"""``x @ W + bias`` on the CPU for packed and dense W: the fast twin of reference.py.

A linear is rearranged once (:func:`prepare`) into the tiles that cpu_tiles.py reads. One or a few rows of x then go through
those tiles directly, and W never exists; for many rows it is cheaper to write W out in float32 (cpu_products.py, or BLAS).
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass

import numpy as np
from llvmlite.binding import get_host_cpu_features

from tinygptq import threads
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels import cpu_launch, cpu_tiles
from tinygptq.kernels.cpu_layout import place_of_rows
from tinygptq.kernels.cpu_products import GRAM_COLUMNS, HEIGHT, LONG
from tinygptq.kernels.cpu_rows import STRETCH, TILES_AT_ONCE
from tinygptq.kernels.cpu_tiles import COLUMNS, FIELDS, UNIT
from tinygptq.packing import PackedLinear
from tinygptq.weights import DenseLinear, Linear

__all__ = [
    "CpuLinear",
    "apply_rope",
    "causal_attention",
    "gram",
    "linear",
    "matmul",
    "prepare",
    "prepared",
    "rms_norm",
    "swiglu",
    "warm_up",
    "widened",
]

FEW_ROWS = 16  # up to here x goes through the tiles; writing W out pays only for many rows
SLICE_SLIVERS = 34  # some 200 rows: the smallest slice of a product of many, which takes a few milliseconds
ATTENTION_SLICES = 16  # of the queries, for each thread


@dataclass(frozen=True, eq=False)
class CpuLinear:
    """A linear as the CPU kernels read it.

    Attributes:
        table: int64 [FIELDS], what compiled code knows about it (see cpu_tiles.py); addresses point into ``arrays``.
    """

    table: np.ndarray
    arrays: tuple[np.ndarray, ...]

    @property
    def in_features(self) -> int:
        return int(self.table[cpu_tiles.INPUTS])

    @property
    def out_features(self) -> int:
        return int(self.table[cpu_tiles.OUTPUTS])

    @property
    def is_packed(self) -> bool:
        return int(self.table[cpu_tiles.KIND]) < cpu_tiles.FLOAT16

    @property
    def padded_rows(self) -> int:
        """Room that the input needs: K, or the packed rows."""
        return int(self.table[cpu_tiles.ROWS])

    @property
    def groups(self) -> int:
        return -(-self.padded_rows // int(self.table[cpu_tiles.GROUP]))

    @property
    def nbytes(self) -> int:
        """Bytes that one product with it reads."""
        return sum(array.nbytes for array in self.arrays)


def warm_up() -> None:
    """Compile the kernels, or load them from the disk cache; the log ("tinygptq", INFO) says so when it compiles."""
    cpu_launch.run(cpu_launch.RMS_NORM, 0)


# ------------------------------------------------------------------------------------------ preparing


class _Arena:
    """Hands out pieces of large blocks: in large blocks the operating system can use large pages, which read faster."""

    BLOCK = 1 << 25

    def __init__(self) -> None:
        self._block, self._used = np.empty(0, np.uint8), 0

    def allocate(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] that begins at a cache line."""
        start = self._used + -(self._block.ctypes.data + self._used) % 64
        if start + nbytes > self._block.size:
            self._block = np.empty(max(nbytes + 63, self.BLOCK), np.uint8)
            start = -self._block.ctypes.data % 64
        self._used = start + nbytes
        return self._block[start : self._used]


_arena = _Arena()


def prepare(layer: Linear) -> CpuLinear:
    """Bring a linear into the form the kernels read; dense weights stay where they are.

    Raises:
        TinyGPTQError: a dense weight that is no float16, bfloat16 or float32.
    """
    return _prepare_packed(layer) if isinstance(layer, PackedLinear) else _prepare_dense(layer)


def _prepare_dense(layer: DenseLinear) -> CpuLinear:
    kinds = {"float16": cpu_tiles.FLOAT16, "bfloat16": cpu_tiles.BFLOAT16, "float32": cpu_tiles.FLOAT32}
    if layer.weight.dtype.name not in kinds:
        raise TinyGPTQError(f"a weight is {layer.weight.dtype.name}, expected float16, bfloat16 or float32")
    weight = np.ascontiguousarray(layer.weight)
    table = np.zeros(FIELDS, np.int64)
    table[cpu_tiles.KIND] = kinds[weight.dtype.name]
    table[cpu_tiles.OUTPUTS], table[cpu_tiles.INPUTS] = weight.shape
    table[cpu_tiles.ROWS] = table[cpu_tiles.GROUP] = weight.shape[1]
    table[cpu_tiles.CODES] = weight.ctypes.data
    return _with_bias(table, (weight,), layer.bias)


def _prepare_packed(layer: PackedLinear) -> CpuLinear:
    inputs, outputs, bits = layer.in_features, layer.out_features, layer.bits
    source = _padded_rows(inputs, layer.group_size)
    rows, group = len(source), min(-(-layer.group_size // UNIT) * UNIT, len(source))
    tiles = -(-outputs // COLUMNS)
    codes = _arena.allocate(tiles * rows * COLUMNS * bits // 8).view(np.int32)
    qweight = np.ascontiguousarray(layer.qweight)
    cpu_launch.run(cpu_launch.REPACK, tiles, qweight, outputs, bits, source, rows, *place_of_rows(bits), codes)
    wide = layer.scales.dtype != np.float16
    arrays = [codes, _in_tiles(layer.scales, np.float32 if wide else np.float16, tiles)]
    table = np.zeros(FIELDS, np.int64)
    table[cpu_tiles.KIND], table[cpu_tiles.INPUTS], table[cpu_tiles.OUTPUTS] = bits, inputs, outputs
    table[cpu_tiles.ROWS], table[cpu_tiles.GROUP] = rows, group
    table[cpu_tiles.CODES], table[cpu_tiles.SCALES] = codes.ctypes.data, arrays[1].ctypes.data
    table[cpu_tiles.WIDE] = wide
    if np.any(layer.zeros != 1 << (bits - 1)):
        arrays.append(_in_tiles(layer.zeros, np.uint16, tiles))
        table[cpu_tiles.ZEROS] = arrays[-1].ctypes.data
    if layer.perm is not None or not np.array_equal(source, np.arange(inputs)):
        order = np.arange(inputs) if layer.perm is None else layer.perm
        arrays.append(np.where(source >= 0, order[source], -1).astype(np.int32))
        table[cpu_tiles.GATHER] = arrays[-1].ctypes.data
    return _with_bias(table, tuple(arrays), layer.bias)


def _padded_rows(inputs: int, group_size: int) -> np.ndarray:
    """Which row each packed row is, int64: groups one after the other, each filled up to whole units with -1."""
    rows = []
    for start in range(0, inputs, group_size):
        group = np.arange(start, min(start + group_size, inputs))
        rows += [group, np.full(-len(group) % UNIT, -1)]
    return np.concatenate(rows).astype(np.int64)


def _in_tiles(values: np.ndarray, dtype: type, tiles: int) -> np.ndarray:
    """[G, N] -> [tiles, G, 16], the columns past the last filled with zeros."""
    groups, outputs = values.shape
    padded: np.ndarray = np.zeros((groups, tiles * COLUMNS), dtype)
    padded[:, :outputs] = values
    return np.ascontiguousarray(padded.reshape(groups, tiles, COLUMNS).swapaxes(0, 1))  # (tiles, G, 16)


def _with_bias(table: np.ndarray, arrays: tuple[np.ndarray, ...], bias: np.ndarray | None) -> CpuLinear:
    if bias is not None:
        padded = np.zeros(-(-len(bias) // COLUMNS) * COLUMNS, np.float32)
        padded[: len(bias)] = bias
        arrays += (padded,)
        table[cpu_tiles.BIAS] = padded.ctypes.data
    return CpuLinear(table, arrays)


# ------------------------------------------------------------------------------------------ multiplying

_prepared: weakref.WeakKeyDictionary[Linear, CpuLinear] = weakref.WeakKeyDictionary()
_scratch = threading.local()


def linear(x: np.ndarray, layer: Linear) -> np.ndarray:
    """``x float32 [..., K] -> x @ W + bias float32 [..., N]``; the layer is prepared on first use."""
    return matmul(x, prepared(layer))


def prepared(layer: Linear) -> CpuLinear:
    """The prepared form of a layer: made once, kept for as long as the layer lives."""
    if layer not in _prepared:
        _prepared[layer] = prepare(layer)
    return _prepared[layer]


def matmul(x: np.ndarray, weights: CpuLinear) -> np.ndarray:
    """``x @ W + bias``.

    Shapes:
        x: float32 [..., K]; returns float32 [..., N]. An infinite or NaN input of a packed linear makes its row NaN.
    """
    flat = np.ascontiguousarray(x, np.float32).reshape(-1, x.shape[-1])  # (M, K)
    if flat.shape[1] != weights.in_features:
        raise TinyGPTQError(f"an input has {flat.shape[1]} features, the linear expects {weights.in_features}")
    y = _few(flat, weights) if len(flat) <= FEW_ROWS else _many(flat, weights)
    return y.reshape(*x.shape[:-1], weights.out_features)


def _few(x: np.ndarray, weights: CpuLinear) -> np.ndarray:
    """[M, K] -> [M, N] through the tiles."""
    rows, outputs = len(x), weights.out_features
    out = np.empty((rows, -(-outputs // COLUMNS) * COLUMNS), np.float32)
    ordered = np.empty((rows, weights.padded_rows), np.float32)
    sums = np.empty((rows, weights.groups), np.float32)
    pairs, units = np.empty_like(ordered), np.empty(rows, np.float32)
    strides = x.strides[0], ordered.strides[0], sums.strides[0]
    job = (weights.table, x, strides[0], ordered, pairs, strides[1], sums, strides[2], units)
    if weights.is_packed:
        cpu_launch.run(cpu_launch.INTEGERS, rows, *job)
    parts = -(-out.shape[1] // (COLUMNS * TILES_AT_ONCE))
    cpu_launch.run(cpu_launch.TILES, parts, *job, rows, out, out.strides[0])
    return np.ascontiguousarray(out[:, :outputs])


def _many(x: np.ndarray, weights: CpuLinear) -> np.ndarray:
    """[M, K] -> [M, N] through W in float32."""
    outputs = weights.out_features
    bias = weights.arrays[-1][:outputs] if weights.table[cpu_tiles.BIAS] else None
    if weights.is_packed:
        y = _through_panels(x, weights) if panels_beat_blas() else threads.matmul(x, _dequantized(weights))
    elif weights.table[cpu_tiles.KIND] == cpu_tiles.FLOAT32:
        y = threads.matmul(x, weights.arrays[0].T)
    else:
        room = _room(weights.in_features * outputs).reshape(outputs, weights.in_features)
        y = threads.matmul(x, _widen(weights, room).T)
    if bias is not None:
        y += bias
    return y


@functools.cache
def panels_beat_blas() -> bool:
    """Whether cpu_products.py is for this machine: it was measured on AVX2; with wider vectors BLAS has twice the rate."""
    try:
        features = get_host_cpu_features()
    except RuntimeError:  # LLVM does not know them on this platform
        return False
    return bool(features.get("avx2") and features.get("fma") and not features.get("avx512f"))


def _through_panels(x: np.ndarray, weights: CpuLinear) -> np.ndarray:
    """[M, K] @ W [K, N] of a packed linear; M is at least HEIGHT."""
    (rows, inputs), outputs = x.shape, weights.out_features
    panels = -(-outputs // COLUMNS)
    W = _room(inputs * panels * COLUMNS)
    cpu_launch.run(cpu_launch.DEQUANTIZE, panels, weights.table, W, 4 * COLUMNS * inputs, 4 * COLUMNS)
    out = _aligned(rows, panels * COLUMNS)

    def part(some: slice) -> None:
        stretch = (some.start * HEIGHT, min(some.stop * HEIGHT, rows))
        job = (x, x.strides[0], rows, inputs, W, panels, out, out.strides[0], *stretch)
        cpu_launch.run_here(cpu_launch.PRODUCT, slice(0, 1), *job)

    threads.share(-(-rows // HEIGHT), x.size * outputs, part, smallest=SLICE_SLIVERS)
    return np.ascontiguousarray(out[:, :outputs])


def _dequantized(weights: CpuLinear) -> np.ndarray:
    """W of a packed linear, float32 [K, N], in the room for weights."""
    inputs, tiles = weights.in_features, -(-weights.out_features // COLUMNS)
    W = _room(inputs * tiles * COLUMNS).reshape(inputs, tiles * COLUMNS)
    cpu_launch.run(cpu_launch.DEQUANTIZE, tiles, weights.table, W, 4 * COLUMNS, W.strides[0])
    return W[:, : weights.out_features]


def gram(x: np.ndarray) -> np.ndarray:
    """The fast twin of :func:`tinygptq.threads.gram`: ``x.T @ x``, float32 [T, K] -> [K, K]."""
    if not len(x) or not panels_beat_blas():
        return threads.gram(x)
    x, width = np.ascontiguousarray(x), x.shape[1]
    high, wide = -(-width // HEIGHT) * HEIGHT, (-(-width // COLUMNS) + 1) * COLUMNS  # rows in different sets of a cache

    def part(some: slice) -> np.ndarray:
        out, room = _aligned(high, wide), _room(LONG * (width + 2 * GRAM_COLUMNS))
        job = (x[some], x.strides[0], some.stop - some.start, width, out, out.strides[0], room)
        cpu_launch.run_here(cpu_launch.GRAM, slice(0, 1), *job)
        return out[:width, :width]

    with np.errstate(all="ignore"):  # what is below the diagonal may be anything yet
        total = threads.total(len(x), x.size * width // 2, part)
    cpu_launch.run(cpu_launch.MIRROR, -(-width // COLUMNS), total, total.strides[0], width)
    return total


def widened(layer: DenseLinear) -> np.ndarray:
    """The weight of a linear in float32 [N, K]; it may be the linear's own array."""
    weights = prepared(layer)
    if weights.table[cpu_tiles.KIND] == cpu_tiles.FLOAT32:
        return weights.arrays[0]
    return _widen(weights, np.empty(layer.weight.shape, np.float32))


def _widen(weights: CpuLinear, out: np.ndarray) -> np.ndarray:
    """A 16-bit weight written to ``out``, float32 [N, K]."""
    cpu_launch.run(cpu_launch.WIDEN, len(out), weights.table, out)
    return out


def _room(count: int) -> np.ndarray:
    """float32 [count] to write a weight into: the same memory every time, one for each thread that calls."""
    if getattr(_scratch, "weight", np.empty(0)).size < count:
        _scratch.weight = _aligned(1, count)[0]
    return _scratch.weight[:count]


def _aligned(rows: int, columns: int) -> np.ndarray:
    """float32 [rows, columns] that begins at a cache line, as do the rows where ``columns`` is a multiple of 16."""
    memory = np.empty(4 * rows * columns + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + 4 * rows * columns].view(np.float32).reshape(rows, columns)


# ------------------------------------------------------------------------------------------ between the products


def causal_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The fast twin of :func:`tinygptq.ops.causal_attention`, a few queries at a time: never all T x S scores.

    Shapes:
        q: float32 [B, H, T, D], the last T of S positions. k, v: [B, G, S, D]. Returns [B, T, H * D].
    """
    (batch, heads, tokens, dim), (_, groups, seen, _) = q.shape, k.shape
    q, k, v = (x if x.strides[-1] == x.itemsize else np.ascontiguousarray(x) for x in (q, k, v))
    wide, long = (-(-n // COLUMNS) * COLUMNS for n in (dim, seen))
    keys, values = np.empty((batch * groups, long, dim), np.float32), np.empty((batch * groups, wide, seen), np.float32)
    layout = (k, v, *k.strides[:3], *v.strides[:3], groups, seen, dim, keys, values)
    cpu_launch.run(cpu_launch.LAY_OUT, batch * groups, *layout, number=dim**-0.5)
    out = np.empty((batch, tokens, heads * dim), np.float32)
    share = heads // groups  # query heads that read the same keys
    sizes = (groups, share, tokens, seen, dim, keys, values)

    def attend(some: slice) -> None:
        room = np.empty((HEIGHT, dim + long + COLUMNS + wide), np.float32)
        cpu_launch.run_here(cpu_launch.ATTEND, some, q, *q.strides[:3], out, *sizes, room)

    parts = batch * heads * -(-tokens // HEIGHT)
    threads.share(parts, 2 * q.size * seen, attend, slices=ATTENTION_SLICES)
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Twin of :func:`tinygptq.ops.rms_norm`; float32 [..., C] and [C]."""
    x, weight = np.ascontiguousarray(x), np.ascontiguousarray(weight)
    out, width = np.empty_like(x), x.shape[-1]
    cpu_launch.run(cpu_launch.RMS_NORM, x.size // width, x, weight, width, out, number=eps)
    return out


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Twin of :func:`tinygptq.ops.swiglu`; float32 of one shape. The result takes ``up``'s memory."""
    gate, up = np.ascontiguousarray(gate), np.ascontiguousarray(up)
    cpu_launch.run(cpu_launch.SWIGLU, -(-up.size // STRETCH), gate, up, up.size)
    return up


def apply_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Twin of :func:`tinygptq.ops.apply_rope`; float32 [B, H, T, D], cos and sin [T, D/2]. Rotates in place where it can."""
    x = np.ascontiguousarray(x.swapaxes(1, 2))  # (B, T, H, D), as the linear before it left it
    batch, tokens, heads, dim = x.shape
    cos, sin = np.ascontiguousarray(cos), np.ascontiguousarray(sin)
    cpu_launch.run(cpu_launch.ROPE, batch * tokens, x, tokens, heads, dim, cos, sin)
    return x.swapaxes(1, 2)
