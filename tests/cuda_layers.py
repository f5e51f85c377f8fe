"""Random packed linears and inputs for the tests of the CUDA kernels, and the float64 product they are held against."""

from __future__ import annotations

import numpy as np

from tinygptq import packing
from tinygptq.packing import PackedLinear

# (bits, group size, symmetric, act-order, K, N): every width, both kinds of zero point, groups shorter and longer than a
# chunk of 128 rows, one group for all, K and N that fill no chunk, no strip of 32 columns and no block of 128
LAYERS = (
    (4, 128, True, False, 256, 264),
    (4, 32, False, True, 416, 136),
    (4, 64, True, True, 192, 128),
    (4, 1024, True, False, 1024, 72),
    (8, 288, True, True, 288, 136),
    (8, 128, False, False, 384, 40),
    (3, 64, False, False, 192, 136),
    (3, 96, True, True, 480, 8),
    (2, 128, True, False, 640, 40),
    (2, 32, False, False, 32, 520),
)
LAYER_NAMES = [
    f"{bits}bit-g{group}-{'sym' if symmetric else 'asym'}{'-actorder' if order else ''}-{k}x{n}"
    for bits, group, symmetric, order, k, n in LAYERS
]


def fresh_generator() -> np.random.Generator:
    """Other numbers in every run: a kernel must be right for any input. The seed is printed when a test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def random_linear(
    rng: np.random.Generator,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    k: int,
    n: int,
    *,
    bias: bool = False,
) -> PackedLinear:
    """A packed linear of random codes, scales over a factor of 20, and all zero points from 0 to 2^bits."""
    groups = -(-k // group_size)
    zeros = np.full((groups, n), 1 << (bits - 1)) if symmetric else rng.integers(0, (1 << bits) + 1, (groups, n))
    return PackedLinear(
        qweight=packing.pack(rng.integers(0, 1 << bits, (k, n)), bits),
        scales=rng.uniform(1e-3, 2e-2, (groups, n)).astype(np.float16),
        zeros=zeros.astype(np.uint16),
        bits=bits,
        group_size=group_size,
        perm=rng.permutation(k).astype(np.int32) if act_order else None,
        bias=rng.normal(size=n).astype(np.float32) if bias else None,
    )


def random_rows(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    """float16 [rows, k]."""
    return rng.normal(size=(rows, k)).astype(np.float16)


def exact_product(x: np.ndarray, layer: PackedLinear) -> np.ndarray:
    """float64 [rows, N]."""
    product = x.astype(np.float64) @ layer.dequantize().astype(np.float64)
    return product if layer.bias is None else product + layer.bias


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over the norm; NaN, which no bound admits, where anything was left unwritten."""
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))
