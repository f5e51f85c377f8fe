"""The twins of ops.py's functions: norm, SwiGLU, rotary embedding, causal attention."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq import ops
from tinygptq.kernels import cpu


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_rms_norm(width):
    x, weight = random(2, 3, width) * 4, random(width, seed=1)
    y = cpu.rms_norm(x, weight, 1e-5)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, ops.rms_norm(x, weight, 1e-5), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 4096), (4097,)])
def test_swiglu(shape):
    gate, up = random(*shape) * 30, random(*shape, seed=1)
    expected = ops.swiglu(gate, up.copy())
    y = cpu.swiglu(gate, up)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("heads", "tokens", "dim"), [(1, 1, 2), (3, 5, 8), (2, 4, 10)])
def test_apply_rope(heads, tokens, dim):
    x, angles = random(2, heads, tokens, dim), random(tokens, dim // 2, seed=1)
    cos, sin = np.cos(angles), np.sin(angles)
    expected = ops.apply_rope(x, cos, sin)
    np.testing.assert_allclose(cpu.apply_rope(x.copy(), cos, sin), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "seen", "dim"),
    [
        (1, 1, 1, 1, 2),
        (6, 2, 5, 5, 8),
        (4, 4, 3, 20, 10),
        (2, 1, 50, 70, 4),
        (9, 3, 96, 96, 64),  # SmolLM2's heads
        (2, 2, 13, 33, 100),
    ],
)
def test_causal_attention(heads, groups, tokens, seen, dim):
    spread = 3 if dim <= 10 else 1  # scores grow with dim, and float32's rounding of them with the scores
    q, k = random(2, heads, tokens, dim) * spread, random(2, groups, seen, dim, seed=1) * spread
    v = random(2, groups, seen, dim, seed=2)
    y = cpu.causal_attention(q, k, v)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, ops.causal_attention(q, k, v), atol=2e-6)


def test_causal_attention_of_arrays_in_another_order():
    q, k, v = random(2, 7, 4, 8), random(2, 7, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)[:, :7]
    y = cpu.causal_attention(*(x.swapaxes(1, 2) for x in (q, k, v)))
    np.testing.assert_allclose(y, ops.causal_attention(*(x.swapaxes(1, 2) for x in (q, k, v))), atol=2e-6)
    backwards = [x[..., ::-1].swapaxes(1, 2) for x in (q, k)]
    np.testing.assert_allclose(cpu.causal_attention(*backwards, v.swapaxes(1, 2)), y, atol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_a_query_does_not_see_changes_nothing(bad):
    q, k, v = random(1, 2, 20, 8), random(1, 1, 20, 8, seed=1), random(1, 1, 20, 8, seed=2)
    y = cpu.causal_attention(q, k, v)
    k[0, 0, 17], v[0, 0, 17] = bad, 5
    assert np.array_equal(cpu.causal_attention(q, k, v)[:, :17], y[:, :17])
