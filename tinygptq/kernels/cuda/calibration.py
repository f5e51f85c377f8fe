"""The forward pass over calibration text on the device: the five functions of model.py for fp16 CuPy arrays.

Many tokens at once, so that all time is in dense products, which are cuBLAS's; between them are four small kernels. All
arithmetic is in float32. Products take and give fp16; a norm gives float32, for the Hessian that sees it before a product
rounds it. The definition is ops.py.

Quantised q, k and v are the exception (`SplitLinear`): their inputs, weights and outputs are float32 to within 2^-22, and so
are the values that attention mixes; queries and keys are rounded to fp16 once, after their rotation. For there the same
error meets every token (a weight's) or every occurrence of a token (in block 0 an input's), and does not average out in the
Hessian of o_proj as roundings of its inputs do. On SmolLM2-135M, 4 bits in groups of 128, fp16 throughout leaves 98.8 % of
block 0's codes of o_proj what float32 makes them; rounding x alone 99.3, the weights 99.1, q, k and v 99.5; this way 99.9.
Attention of few heads, which takes next to no time, is float32 from queries to mixtures.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygptq.kernels.cuda.cublas import Part, cublas
from tinygptq.kernels.cuda.halves import LOW, split
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import half2_from_floats, half2_to_floats
from tinygptq.kernels.cuda.runtime import cuda, cupy, multiprocessors
from tinygptq.kernels.cuda.warps import block_sum, warp_max, warp_sum
from tinygptq.weights import DenseLinear

THREADS, LANES = 256, 32
QUERIES = 512  # of one sequence whose scores are in memory at once
NARROW = 2048  # elements of a token's queries up to which attention is float32 throughout
LOG2E = np.float32(math.log2(math.e))
ONE, ZERO, LOWEST = np.float32(1), np.float32(0), np.float32(-3e38)

exp2 = cuda.libdevice.exp2f


class SplitLinear:
    """A linear whose float32 weights [N, K] are two fp16 numbers each (see halves.py); what it gives is float32."""

    def __init__(self, weight: Any, bias: Any = None) -> None:
        (self.high, self.low), self.bias = split(weight), bias

    def __call__(self, x: Any) -> Any:
        """Float32 [..., K] -> float32 [..., N]."""
        (columns, inner), out = self.high.shape, cupy().empty((*x.shape[:-1], len(self.high)), np.float32)
        high, low = split(x)
        sizes = (columns, x.size // inner, inner)
        for rows, weight, share in ((high, self.high, 1.0), (high, self.low, LOW), (low, self.high, LOW)):
            factors = Part(weight, inner, transposed=True), Part(rows, inner)
            cublas().gemm(*factors, Part(out, columns), sizes, _stream().ptr, alpha=share, beta=float(share < 1))
        if self.bias is not None:
            out += self.bias
        return out


def linear(x: Any, layer: DenseLinear | SplitLinear) -> Any:
    """``x @ weight.T + bias``: [..., K] -> float16 [..., N]; x and weights of another dtype are rounded to fp16.

    With a `SplitLinear` float32 -> float32.
    """
    if isinstance(layer, SplitLinear):
        return layer(x)
    cp = cupy()
    weight = cp.ascontiguousarray(layer.weight, dtype=np.float16)
    out = cp.empty((*x.shape[:-1], weight.shape[0]), np.float16)
    rows = cp.ascontiguousarray(x, dtype=np.float16).reshape(-1, x.shape[-1])
    cublas().multiply_transposed(rows, weight, out.reshape(len(rows), -1), _stream().ptr)
    if layer.bias is not None:
        out += layer.bias
    return out


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """float16 or float32 [..., C] -> float32; weight float32 [C]."""
    out = cupy().empty(x.shape, np.float32)
    rows = x.reshape(-1, x.shape[-1])
    NORM(len(rows), THREADS, _stream(), rows, weight, np.float32(eps), out.reshape(rows.shape))
    return out


def apply_rope(x: Any, cos: Any, sin: Any) -> Any:
    """[B, H, T, D], a view of contiguous [B, T, H, D], float16 or float32, in place; cos, sin: float32 [T, D/2]."""
    flat = x.swapaxes(1, 2)  # (B, T, H, D)
    ROTATE(_blocks(flat.size // 2), THREADS, _stream(), flat.reshape(-1, *flat.shape[-2:]), cos, sin)
    return x


def swiglu(gate: Any, up: Any) -> Any:
    """``silu(gate) * up``, written over gate; an even number of float16."""
    pairs = gate.reshape(-1).view(np.uint32)
    GATE(_blocks(pairs.size), THREADS, _stream(), pairs, up.reshape(-1).view(np.uint32))
    return gate


def causal_attention(q: Any, k: Any, v: Any) -> Any:
    """q [B, H, T, D] and k, v [B, G, T, D], views of contiguous [B, T, heads, D] -> [B, T, H * D]; float16 or all float32.

    QUERIES queries of all heads of a sequence at a time: their scores in float32, a softmax, their mixtures. No query's
    tile has keys beyond its last query. The result is float32 where all is (see NARROW), else float16.
    """
    cp, (batch, heads, tokens, dim), groups = cupy(), q.shape, k.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    assert all(x.flags.c_contiguous for x in (q, k, v))
    values, kept = ((v, 1.0),), v.dtype
    if kept == np.float32 and heads * dim > NARROW:
        # the small part of values first: their sum is then rounded to fp16 only once, when the large part comes to it
        values, kept = tuple(zip(split(v)[::-1], (LOW, 1.0), strict=True)), np.float16
    q, k = q.astype(kept, copy=False), k.astype(kept, copy=False)
    out = cp.empty((batch, tokens, heads * dim), kept)
    size = heads * min(QUERIES, tokens) * tokens
    scores, shares = cp.empty(size, np.float32), cp.empty(size, kept)
    for b in range(batch):
        for first in range(0, tokens, QUERIES):
            count = min(QUERIES, tokens - first)
            _mix_tile(q, k, values, out, scores, shares, b, first, count, (heads, groups, dim, tokens))
    return out


def _mix_tile(q, k, values, out, scores, shares, b, first, count, sizes) -> None:
    heads, groups, dim, tokens = sizes
    stream, seen, each = _stream(), first + count, heads // groups  # query heads that share keys and values
    q_row, k_row, tile = heads * dim, groups * dim, count * seen
    q_start, k_start = (b * tokens + first) * q_row, b * tokens * k_row
    for j in range(each):  # a batch: one query head of each group
        keys = Part(k, k_row, k_start, dim, transposed=True)
        queries = Part(q, q_row, q_start + j * dim, each * dim)
        found = Part(scores, seen, j * tile, each * tile)
        cublas().gemm(keys, queries, found, (seen, count, dim), stream.ptr, batch=groups)
    rows, share = heads * count, np.float32(dim**-0.5) * LOG2E
    s, p = scores[: rows * seen].reshape(rows, seen), shares[: rows * seen].reshape(rows, seen)
    SOFTMAX(-(-rows // (THREADS // LANES)), THREADS, stream, s, p, count, first, share)
    for j in range(each):
        weights = Part(shares, seen, j * tile, each * tile)
        mixed = Part(out, q_row, q_start + j * dim, each * dim)
        for i, (v, part) in enumerate(values):
            columns, beta = Part(v, k_row, k_start, dim), float(i > 0)
            cublas().gemm(columns, weights, mixed, (dim, count, seen), stream.ptr, alpha=part, beta=beta, batch=groups)


def _stream() -> Any:
    return cupy().cuda.get_current_stream()


def _blocks(elements: int) -> int:
    return max(1, min(-(-elements // THREADS), 16 * multiprocessors()))


# ----------------------------------------------------------------------------------------------------------- kernels


def norm_rows(x, weight, eps, out):
    """A block for each row of x [rows, C]; out float32 [rows, C]."""
    shared = cuda.shared.array(33, np.float32)
    row, start = cuda.blockIdx.x, cuda.threadIdx.x
    total = ZERO
    for k in range(start, x.shape[1], THREADS):
        value = np.float32(x[row, k])
        total += value * value
    inverse = ONE / cuda.libdevice.sqrtf(block_sum(total, shared) / np.float32(x.shape[1]) + eps)
    for k in range(start, out.shape[1], THREADS):
        out[row, k] = np.float32(x[row, k]) * inverse * weight[k]


def rotate_pairs(x, cos, sin):
    """x float16 or float32 [B * T, heads, D], in place; a thread for each pair, grid-stride."""
    positions, half = cos.shape
    heads = x.shape[1]
    for i in range(cuda.grid(1), x.size // 2, cuda.gridsize(1)):
        d, head, token = i % half, i // half % heads, i // (half * heads)
        c, s = cos[token % positions, d], sin[token % positions, d]
        a, b = np.float32(x[token, head, d]), np.float32(x[token, head, d + half])
        x[token, head, d] = a * c - b * s
        x[token, head, d + half] = b * c + a * s


def gate_pairs(gate, up):
    """gate = silu(gate) * up, both half2; grid-stride."""
    for i in range(cuda.grid(1), gate.size, cuda.gridsize(1)):
        g, u = half2_to_floats(gate[i]), half2_to_floats(up[i])
        low = g[0] / (ONE + exp2(-g[0] * LOG2E)) * u[0]
        gate[i] = half2_from_floats(low, g[1] / (ONE + exp2(-g[1] * LOG2E)) * u[1])


def softmax_rows(scores, shares, queries, first, factor):
    """A warp for each row of scores float32 [heads * queries, S]: the softmax, base 2, of ``factor * score`` over keys up to
    the query's own position ``first + row % queries``; 0 beyond it. shares: float16 or float32, of the same shape."""
    row = cuda.blockIdx.x * (THREADS // LANES) + cuda.threadIdx.x // LANES
    lane = cuda.threadIdx.x % LANES
    if row < scores.shape[0]:
        visible = first + row % queries + 1
        largest, total = LOWEST, ZERO
        for k in range(lane, visible, LANES):
            value = scores[row, k] * factor
            if value > largest:
                total = total * exp2(largest - value) + ONE
                largest = value
            else:
                total += exp2(value - largest)
        highest = warp_max(largest)
        inverse = ONE / warp_sum(total * exp2(largest - highest))
        for k in range(lane, scores.shape[1], LANES):
            share = exp2(scores[row, k] * factor - highest) * inverse if k < visible else ZERO
            shares[row, k] = share


NORM, ROTATE = Kernel(norm_rows, THREADS), Kernel(rotate_pairs, THREADS)
GATE, SOFTMAX = Kernel(gate_pairs, THREADS), Kernel(softmax_rows, THREADS)
