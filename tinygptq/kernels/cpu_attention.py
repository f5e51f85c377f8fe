"""The vector code of attention: softmax, rotary embedding, and one query over the cache. All arguments are addresses."""

from __future__ import annotations

import numpy as np

from tinygptq.kernels import simd
from tinygptq.kernels.simd import LANES, fma, inner, load_f32, splat, store_f32


@inner
def softmax_row(scores, count):
    """Softmax in place of ``count`` float32 at an address."""
    whole = count // LANES * LANES
    top = splat(-np.inf)
    for i in range(0, whole, LANES):
        top = simd.larger(load_f32(scores + 4 * i), top)
    peak = simd.largest(top)
    for i in range(whole, count):
        peak = max(peak, simd.read_f32(scores + 4 * i))
    sums, shift = splat(0.0), splat(peak)
    for i in range(0, whole, LANES):
        e = simd.exp(load_f32(scores + 4 * i) - shift)
        sums = sums + e
        store_f32(scores + 4 * i, e)
    total = simd.total(sums)
    for i in range(whole, count):
        e = simd.total(simd.exp(splat(simd.read_f32(scores + 4 * i) - peak))) * np.float32(0.125)
        total += e
        simd.write_f32(scores + 4 * i, e)
    share = np.float32(1.0) / total
    for i in range(0, whole, LANES):
        store_f32(scores + 4 * i, load_f32(scores + 4 * i) * splat(share))
    for i in range(whole, count):
        simd.write_f32(scores + 4 * i, simd.read_f32(scores + 4 * i) * share)


@inner
def exponentials(scores, count):
    """``exp(score - largest)`` in place of ``count`` float32, a multiple of LANES; returns their sum, to divide by."""
    top = splat(-np.inf)
    for i in range(0, count, LANES):
        top = simd.larger(load_f32(scores + 4 * i), top)
    sums, shift = splat(0.0), splat(simd.largest(top))
    for i in range(0, count, LANES):
        e = simd.exp(load_f32(scores + 4 * i) - shift)
        sums = sums + e
        store_f32(scores + 4 * i, e)
    return simd.total(sums)


@inner
def attend(q, keys, values, count, dim, scores, out):
    """One head of one query: ``out [D] = softmax(q . keys[t]) @ values``; all arguments but two are addresses.

    Shapes: q, out float32 [D] (q already scaled); keys, values [count, D]; scores: room for ``count``.
    """
    for t in range(count):
        simd.write_f32(scores + 4 * t, dot(q, keys + 4 * dim * t, dim))
    softmax_row(scores, count)
    for d in range(0, dim):
        simd.write_f32(out + 4 * d, np.float32(0.0))
    whole = dim // LANES * LANES
    for first in range(0, count, 4):  # four positions together: out is read and written a quarter as often
        last = min(first + 4, count)
        for d in range(0, whole, LANES):
            y = load_f32(out + 4 * d)
            for t in range(first, last):
                y = fma(splat(simd.read_f32(scores + 4 * t)), load_f32(values + 4 * (dim * t + d)), y)
            store_f32(out + 4 * d, y)
        for d in range(whole, dim):
            y = simd.read_f32(out + 4 * d)
            for t in range(first, last):
                y += simd.read_f32(scores + 4 * t) * simd.read_f32(values + 4 * (dim * t + d))
            simd.write_f32(out + 4 * d, y)


@inner
def dot(a, b, count):
    """The inner product of ``count`` float32 at two addresses."""
    whole = count // LANES * LANES
    sums = splat(0.0)
    for i in range(0, whole, LANES):
        sums = fma(load_f32(a + 4 * i), load_f32(b + 4 * i), sums)
    total = simd.total(sums)
    for i in range(whole, count):
        total += simd.read_f32(a + 4 * i) * simd.read_f32(b + 4 * i)
    return total


@inner
def rotate(x, cos, sin, half, scale):
    """RoPE in place on one head of ``2 * half`` float32 at an address, then times ``scale`` (see ops.apply_rope)."""
    for i in range(half):
        c, s = simd.read_f32(cos + 4 * i), simd.read_f32(sin + 4 * i)
        a, b = simd.read_f32(x + 4 * i), simd.read_f32(x + 4 * (half + i))
        simd.write_f32(x + 4 * i, (a * c - b * s) * scale)
        simd.write_f32(x + 4 * (half + i), (b * c + a * s) * scale)
