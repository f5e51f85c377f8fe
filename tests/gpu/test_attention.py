"""Attention on the GPU against ops.py in float64: one token over long contexts, and prompts of every length."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq import ops
from tinygptq.kernels.cuda.layout import cache_width

SHAPES = [(4, 4, 64), (8, 1, 64), (12, 2, 128), (9, 3, 64), (6, 6, 80), (16, 1, 128)]  # heads, key-value heads, dimensions


def rotated(x, cos, sin):
    return ops.apply_rope(x, cos, sin)


def problem(rng, heads, groups, dim, tokens):
    qkv = rng.standard_normal((tokens, (heads + 2 * groups) * dim)).astype(np.float32)
    frequencies = (1e4 ** (-np.arange(dim // 2) / (dim // 2))).astype(np.float32)
    cos, sin = ops.rope_tables(frequencies, 0, tokens)
    return qkv, cos, sin


def expected(qkv, cos, sin, heads, groups, dim):
    """float64 [T, heads * dim]."""
    tokens = len(qkv)
    split = qkv.astype(np.float64).reshape(tokens, heads + 2 * groups, dim).swapaxes(0, 1)[None]
    q, k, v = split[:, :heads], split[:, heads : heads + groups], split[:, heads + groups :]
    return ops.causal_attention(rotated(q, cos, sin), rotated(k, cos, sin), v)[0]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("heads,groups,dim", [*SHAPES, (3, 3, 256)])
def test_one_token_over_what_was_before(heads, groups, dim, splits, bits):
    import cupy as cp

    from tinygptq.kernels.cuda import decode_attention as da

    rng = np.random.default_rng()
    capacity, positions = 700, [0, 1, 15, 16, 17, 255, 256, 511, 699]
    qkv, cos, sin = problem(rng, heads, groups, dim, capacity)
    want = expected(qkv, cos, sin, heads, groups, dim)
    width, tiling = cache_width(dim), da.Heads.of(heads, groups)
    dtype = np.float16 if bits == 16 else np.int8
    cache = (cp.zeros((2, groups, capacity, width), dtype), cp.zeros((2, groups, capacity, width), dtype),
             cp.zeros(2 * groups * capacity, np.float16), cp.zeros(2 * groups * capacity, np.float16))  # fmt: skip
    order = rng.permutation(heads * dim).astype(np.int32)
    kernel, stream = da.decode_attention_kernel(heads, groups, dim, bits, splits), cp.cuda.get_current_stream()
    form = (splits, tiling.tiles, 2), 32 * da.warps_of(dim), stream
    sums = cp.full(2 * heads * splits * da.record_of(dim), np.nan, np.float32)
    arrived = cp.zeros(2 * tiling.tiles, np.int32)
    tables = cp.asarray(cos), cp.asarray(sin)
    for position in range(capacity):  # the second sequence is one token behind
        rows = cp.asarray(np.stack([qkv[position], qkv[max(position - 1, 0)]]))
        at = cp.asarray(np.array([position, max(position - 1, 0)], np.int32))
        out = cp.full((2, heads * dim), np.nan, np.float16)
        given = (rows, *tables, at, cache, cp.asarray(order), sums, arrived, out)
        kernel(*form, *given)
        if position in positions:
            found = out.get()[:, order].astype(np.float64)
            for row in range(2):
                right = want[max(position - row, 0)]
                error = np.linalg.norm(found[row] - right) / np.linalg.norm(right)
                assert error < (2e-3 if bits == 16 else 2e-2), (position, row)
    assert not arrived.any()


@pytest.mark.parametrize("tokens,start", [(1, 0), (63, 0), (64, 0), (65, 0), (130, 0), (70, 57), (1, 199), (200, 1)])
@pytest.mark.parametrize("heads,groups,dim", [*SHAPES, (3, 3, 256)])
def test_a_prompt(heads, groups, dim, tokens, start):
    import cupy as cp

    from tinygptq.kernels.cuda import prefill_attention as pa
    from tinygptq.kernels.cuda.cache_codec import FILL_TOKENS, FILL_WARPS, fill_kernel

    rng = np.random.default_rng()
    total, width, stream = start + tokens, cache_width(dim), cp.cuda.get_current_stream()
    qkv, cos, sin = problem(rng, heads, groups, dim, total)
    qkv = qkv.astype(np.float16)
    want = expected(qkv, cos, sin, heads, groups, dim)[start:]
    shape = (3, groups, total + 9, width)
    cache = tuple(cp.zeros(shape, np.float16) for _ in range(2)) + tuple(cp.zeros(1, np.float16) for _ in range(2))
    fill, tables, device = fill_kernel(heads, groups, dim, 16), (cp.asarray(cos), cp.asarray(sin)), cp.asarray(qkv)
    for begin, end in ((0, start), (start, total)):
        if end > begin:
            grid = -(-(end - begin) // FILL_TOKENS), groups
            fill(grid, 32 * FILL_WARPS, stream, device[begin:end].copy(), *tables, begin, 1, cache)
    new = device[start:].copy()
    out = cp.full((tokens, heads * dim), np.nan, np.float16)
    kernel = pa.prefill_attention_kernel(heads, groups, dim, width)
    given = (new, *tables, cache[0][1], cache[1][1], start, out)
    kernel((heads, -(-tokens // pa.QUERIES)), pa.THREADS, stream, *given)
    found = out.get().astype(np.float64)
    assert np.linalg.norm(found - want) / np.linalg.norm(want) < 2e-3
