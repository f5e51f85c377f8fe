"""The calibration pass's functions on the device against ops.py, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import fresh_generator, relative_error

from tinygptq import ops
from tinygptq.weights import DenseLinear


def half(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float16)


def test_linear_norm_and_gate():
    from tinygptq.kernels.cuda import calibration
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    x, W, bias = half(rng, 3, 37, 96), half(rng, 160, 96), rng.normal(size=160).astype(np.float32)
    exact = x.astype(np.float64) @ W.T.astype(np.float64) + bias
    for weight in (W, W.astype(np.float32)):
        found = calibration.linear(cp.asarray(x), DenseLinear(cp.asarray(weight), cp.asarray(bias)))
        assert found.dtype == np.float16
        assert relative_error(found.get(), exact) < 1e-3
    gain = rng.normal(size=96).astype(np.float32)
    for rows in (x, 300 * x.astype(np.float32)):
        found = calibration.rms_norm(cp.asarray(rows), cp.asarray(gain), 1e-5)
        assert found.dtype == np.float32
        assert relative_error(found.get(), ops.rms_norm(rows.astype(np.float64), gain, 1e-5)) < 1e-6
    gate, up = 4 * half(rng, 3, 37, 160), half(rng, 3, 37, 160)
    exact = ops.swiglu(gate.astype(np.float64), up.astype(np.float64))
    assert relative_error(calibration.swiglu(cp.asarray(gate), cp.asarray(up)).get(), exact) < 5e-4


@pytest.mark.parametrize("shape", [(1, 37, 96), (2, 128, 576)], ids=str)
def test_split_linear_is_as_good_as_float32(shape):
    from tinygptq.kernels.cuda import calibration, halves
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    x = (rng.normal(size=shape) * rng.lognormal(0, 3, shape[-1])).astype(np.float32)
    x = np.clip(x, -65504, 65504)  # fp16's range: one draw in five had more, which halves.split says becomes infinite
    W, bias = rng.normal(size=(160, shape[-1])).astype(np.float32) / 50, rng.normal(size=160).astype(np.float32)
    high, low = (part.get().astype(np.float64) for part in halves.split(cp.asarray(x)))
    assert relative_error(high + halves.LOW * low, x.astype(np.float64)) < 2**-22
    found = calibration.linear(cp.asarray(x), calibration.SplitLinear(cp.asarray(W), cp.asarray(bias)))
    assert found.dtype == np.float32
    assert relative_error(found.get(), x.astype(np.float64) @ W.T.astype(np.float64) + bias) < 2e-6


def test_float32_is_rotated_as_float32():
    from tinygptq.kernels.cuda import calibration
    from tinygptq.kernels.cuda.runtime import cupy

    cp, x = cupy(), fresh_generator().normal(size=(2, 600, 6, 64)).astype(np.float32)
    cos, sin = ops.rope_tables((10000.0 ** -np.linspace(0, 1, 32)).astype(np.float32), 0, 600)
    exact = ops.apply_rope(x.swapaxes(1, 2).astype(np.float64), cos, sin)
    found = calibration.apply_rope(cp.asarray(x).swapaxes(1, 2), cp.asarray(cos), cp.asarray(sin))
    assert found.dtype == np.float32
    assert relative_error(found.get(), exact) < 1e-6


def test_attention_of_few_heads_is_float32():
    from tinygptq.kernels.cuda import calibration
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    q, k, v = (rng.normal(size=(2, 530, heads, 64)).astype(np.float32) for heads in (6, 2, 2))
    exact = ops.causal_attention(*(x.swapaxes(1, 2).astype(np.float64) for x in (q, k, v)))
    found = calibration.causal_attention(*(cp.asarray(x).swapaxes(1, 2) for x in (q, k, v)))
    assert found.dtype == np.float32
    assert relative_error(found.get(), exact) < 1e-6


def test_float32_values_keep_what_fp16_would_round_off(monkeypatch):
    """Equal shares of 1.0004 and -1: the mean is 0.0002, and 0 for values that have been rounded."""
    from tinygptq.kernels.cuda import calibration
    from tinygptq.kernels.cuda.runtime import cupy

    cp = cupy()
    monkeypatch.setattr(calibration, "NARROW", 0)  # as for many heads
    q, k, v = (cp.zeros((2, 600, heads, 64), dtype) for heads, dtype in ((6, np.float16), (2, np.float16), (2, np.float32)))
    v[:, 0::2], v[:, 1::2] = 1.0004, -1
    wide, rounded = (calibration.causal_attention(*(x.swapaxes(1, 2) for x in (q, k, values))).get()[:, 1::2]
                     for values in (v, v.astype(np.float16)))  # fmt: skip
    assert (rounded == 0).all()
    assert np.abs(wide.astype(np.float64) / (float(np.float32(1.0004)) / 2 - 0.5) - 1).max() < 2e-3


@pytest.mark.parametrize("heads,groups,dim", [(6, 6, 16), (6, 2, 16), (9, 3, 64), (4, 1, 128)])
@pytest.mark.parametrize("tokens", [1, 40, 512, 520, 1032])
def test_rope_and_attention(heads, groups, dim, tokens):
    from tinygptq.kernels.cuda import calibration
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng = cupy(), fresh_generator()
    q, k, v = (half(rng, 2, tokens, n, dim) for n in (heads, groups, groups))
    q *= 3  # so that some positions matter more than others
    cos, sin = ops.rope_tables((10000.0 ** -np.linspace(0, 1, dim // 2)).astype(np.float32), 0, tokens)
    turned = [ops.apply_rope(x.swapaxes(1, 2).astype(np.float64), cos, sin) for x in (q, k)]
    there = [calibration.apply_rope(cp.asarray(x).swapaxes(1, 2), cp.asarray(cos), cp.asarray(sin)) for x in (q, k)]
    for found, exact in zip(there, turned, strict=True):
        assert relative_error(found.get(), exact) < 5e-4
    exact = ops.causal_attention(*(x.get().astype(np.float64) for x in there), v.swapaxes(1, 2).astype(np.float64))
    found = calibration.causal_attention(*there, cp.asarray(v).swapaxes(1, 2))
    assert found.shape == (2, tokens, heads * dim)
    assert relative_error(found.get(), exact) < 2e-3
