"""Random linears and models in memory, of any width, for tests of the kernels and the engine."""

from __future__ import annotations

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.kernels import reference
from tinygptq.packing import PackedLinear, pack
from tinygptq.weights import DenseLinear, Weights

ACCURACY = 1e-6  # of a product's norm, as for a careful float32 one


def packed(K, N, bits, group, *, sym=True, perm=False, bias=False, wide=False, seed=0) -> PackedLinear:
    """A random packed linear; K a multiple of 32 / bits, and of 32 at 3 bits."""
    rng = np.random.default_rng(seed)
    group = K if group == -1 else group
    groups = -(-K // group)
    scales = (rng.random((groups, N)) * 0.02 + 0.001).astype(np.float32 if wide else np.float16)
    middle = np.full((groups, N), 2 ** (bits - 1), np.uint16)
    return PackedLinear(
        qweight=pack(rng.integers(0, 2**bits, (K, N)), bits),
        scales=scales,
        zeros=middle if sym else rng.integers(0, 2**bits + 1, (groups, N)).astype(np.uint16),
        bits=bits,
        group_size=group,
        perm=rng.permutation(K).astype(np.int32) if perm else None,
        bias=rng.standard_normal(N).astype(np.float32) if bias else None,
    )


def config(**changes) -> LlamaConfig:
    shape = dict(vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6)
    shape |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=40, rms_norm_eps=1e-5)
    return LlamaConfig(**(shape | changes))


def weights(config: LlamaConfig, kind, *, group=32, sym=True, perm=False, seed=0) -> Weights:
    """Random weights; ``kind`` is a width (packed) or a dtype (dense)."""
    rng = np.random.default_rng(seed)
    dtype = np.float16 if isinstance(kind, int) else kind

    def array(*shape):
        return (rng.standard_normal(shape) * 0.3).astype(dtype)

    linears = {}
    for layer in range(config.num_hidden_layers):
        for i, (name, (K, N)) in enumerate(config.linear_shapes().items()):
            full = f"model.layers.{layer}.{name}"
            if isinstance(kind, int):
                linears[full] = packed(K, N, kind, group, sym=sym, perm=perm, seed=10 * layer + i)
            else:
                linears[full] = DenseLinear(array(N, K))
    layers = [f"model.layers.{layer}" for layer in range(config.num_hidden_layers)]
    names = [f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")]
    norms = {name: 1 + array(config.hidden_size) for name in [*names, "model.norm"]}
    embedding = array(config.vocab_size, config.hidden_size)
    return Weights(embedding, array(config.vocab_size, config.hidden_size), norms, linears)


def inputs(rows, K, seed=1) -> np.ndarray:
    """float32 [rows, K] whose sizes differ by orders of magnitude, as activations do."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, K)) * 10.0 ** rng.uniform(-3, 1, K)).astype(np.float32)


def assert_close(y, x, layer):
    expected = reference.matmul(x.astype(np.float64), layer)
    assert y.dtype == np.float32 and y.shape == expected.shape
    assert np.linalg.norm(y - expected) < ACCURACY * np.linalg.norm(expected)
    by_row = np.linalg.norm(y - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert by_row.max() < 4 * ACCURACY  # a row of few outputs can cancel
