"""A model's weights on the GPU: linears that share an input side by side, each in the layout its kernels read.

q, k and v become one product, gate and up another whose columns alternate 16 by 16, so that one warp holds both factors of
SwiGLU; they stand in the order in which ``down`` has its rows, so that with act-order its input needs no sorting. What the
packed kernels cannot take (groups that are no multiple of 32, q, k and v sorted in different orders) is kept in fp16, with
the values its codes stand for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda import dispatch, plain
from tinygptq.kernels.cuda.cublas import cublas
from tinygptq.kernels.cuda.layout import DeviceLinear, to_device
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.kernels.cuda.transfer import page_locked
from tinygptq.ops import to_numpy
from tinygptq.packing import PackedLinear
from tinygptq.weights import DenseLinear, Linear, Weights

log = logging.getLogger("tinygptq")

TURN = 16  # columns of gate, then as many of up
ALIGNED = 32  # in_features and group sizes that the packed kernels serve are multiples of it
LAUNCH_BOUND = 385  # tokens below which a prompt waits for the host's launches, some 11 a block, and not for the card


@dataclass(frozen=True, eq=False)
class DeviceDense:
    """A linear in fp16 on the device: weight float16 [N, K], bias float32 [N] or None; its rows are in the model's order."""

    weight: Any
    bias: Any = None
    perm: None = None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


Product = DeviceLinear | DeviceDense


@dataclass(frozen=True, eq=False)
class DeviceBlock:
    """One transformer block: its four products, and its norms' weights, float32 [C]."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    input_norm: Any
    post_norm: Any


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """All of a LLaMA. embedding: float16 [vocab, C], on the device where the head is the same, else on the host, where a
    token's row costs one small copy. norm: float32 [C]."""

    embedding: Any
    blocks: list[DeviceBlock]
    norm: Any
    head: DeviceDense

    @property
    def nbytes_read(self) -> int:
        """Bytes of weights that a decoded token reads."""
        products = [p for b in self.blocks for p in (b.qkv, b.o, b.gate_up, b.down)]
        return self.head.nbytes + sum(product.nbytes for product in products)


def multiply(x: Any, product: Product, out: Any, stream: Any, *, gathered: bool = False) -> Any:
    """``out = x @ W + bias`` for any number of rows, x float16 [M, K], out float16 or float32 [M, N]; returns out.

    ``gathered``: x's columns are in the order of the product's rows already.
    """
    if not isinstance(product, DeviceDense):
        return dispatch.linear(x, product, out, stream, gathered=gathered, few_launches=len(x) < LAUNCH_BOUND)
    cublas().multiply_transposed(x, product.weight, out, stream.ptr)
    if product.bias is not None:
        plain.add_bias(-(-out.size // 256), 256, stream, out, product.bias)
    return out


def upload(config: LlamaConfig, weights: Weights) -> DeviceWeights:
    """Bring the weights to the GPU, block by block; host memory holds one fused linear at a time.

    Raises:
        TinyGPTQError: a dense weight beyond fp16's range.
    """
    cp = cupy()
    blocks, scratch = [], cp.cuda.MemoryPool()
    for layer in range(config.num_hidden_layers):
        linears = {name: weights.linears[f"model.layers.{layer}.{name}"] for name in config.linear_shapes()}
        norms = [weights.norms[f"model.layers.{layer}.{name}"] for name in ("input_layernorm", "post_attention_layernorm")]
        q, k, v, o = (linears[f"self_attn.{name}_proj"] for name in "qkvo")
        gate, up, down = (linears[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
        last = settled(side_by_side, scratch, [down])
        order = np.arange(down.in_features) if last.perm is None else to_numpy(last.perm)
        products = [
            settled(side_by_side, scratch, [q, k, v]),
            settled(side_by_side, scratch, [o]),
            settled(side_by_side, scratch, [gate, up], alternating(order)),
            last,
        ]
        blocks.append(DeviceBlock(*products, *(cp.asarray(norm, np.float32) for norm in norms)))
    scratch.free_all_blocks()
    head = to_half(weights.head, "the head")
    embedding = head if weights.head is weights.embedding else pinned(weights.embedding)
    return DeviceWeights(embedding, blocks, cp.asarray(weights.norms["model.norm"], np.float32), DeviceDense(head))


def settled(make: Callable[..., Product], scratch: Any, *given: Any) -> Product:
    """What ``make`` makes, in memory of just its size: all that it needs on its way is taken from the pool ``scratch``."""
    cp = cupy()
    with cp.cuda.using_allocator(scratch.malloc):
        made = make(*given)
    arrays = {name: value.copy() for name, value in vars(made).items() if isinstance(value, cp.ndarray)}
    cp.cuda.get_current_stream().synchronize()  # before the scratch memory is used again
    return replace(made, **arrays)


def alternating(order: np.ndarray) -> np.ndarray:
    """How the columns of gate and up, each in ``order`` int [I], alternate: 16 of gate, 16 of up, and so on; int [2 I].

    Entry i is the column, of gate (below I) or of up, that stands at place i.
    """
    gate = order.reshape(-1, TURN)
    return np.concatenate([gate, gate + len(order)], axis=1).ravel()


def side_by_side(linears: Sequence[Linear], columns: np.ndarray | None = None) -> Product:
    """One product for linears with the same input; ``columns`` puts the joined outputs in another order."""
    bias = joined_bias(linears)
    if bias is not None and columns is not None:
        bias = bias[columns]
    packed = fit_together(linears)
    if packed is None:
        if any(isinstance(linear, PackedLinear) for linear in linears):
            log.warning("a linear whose groups or order the CUDA kernels do not take is kept in fp16")
        weight = cupy().concatenate([half_of(linear) for linear in linears])
        weight = weight if columns is None else weight[columns]
        return DeviceDense(weight, None if bias is None else cupy().asarray(bias))
    cp = cupy()
    order = slice(None) if columns is None else columns
    joined = replace(
        packed[0],
        qweight=cp.concatenate([cp.asarray(linear.qweight) for linear in packed], axis=1)[:, order],
        scales=np.concatenate([linear.scales for linear in packed], axis=1)[:, order],
        zeros=np.concatenate([linear.zeros for linear in packed], axis=1)[:, order],
        bias=bias,
    )
    return to_device(joined)


def fit_together(linears: Sequence[Linear]) -> list[PackedLinear] | None:
    """The same linears, where the packed kernels can take them as one."""
    packed = [linear for linear in linears if isinstance(linear, PackedLinear)]
    if len(packed) < len(linears):
        return None
    first = packed[0]
    if first.in_features % ALIGNED or min(first.group_size, first.in_features) % ALIGNED:
        return None
    alike = all(
        (linear.bits, linear.group_size, linear.scales.dtype) == (first.bits, first.group_size, first.scales.dtype)
        and _same_order(linear.perm, first.perm)
        for linear in packed
    )
    return packed if alike else None


def _same_order(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def joined_bias(linears: Sequence[Linear]) -> np.ndarray | None:
    """float32 [sum of N], 0 where one of several has none; None where none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    zeros = [np.zeros(linear.out_features, np.float32) for linear in linears]
    parts = [zero if linear.bias is None else linear.bias for linear, zero in zip(linears, zeros, strict=True)]
    return np.concatenate(parts)


def half_of(linear: Linear) -> Any:
    """A linear's weight as float16 [N, K] on the device."""
    if isinstance(linear, DenseLinear):
        return to_half(linear.weight, "a weight")
    return cupy().asarray(np.ascontiguousarray(linear.dequantize().T).astype(np.float16))


def to_half(weight: np.ndarray, what: str) -> Any:
    """float16 on the device from float16, bfloat16 or float32."""
    cp = cupy()
    if weight.dtype == np.float16:
        return cp.asarray(weight)
    half = cp.asarray(np.asarray(weight).astype(np.float32)).astype(np.float16)
    if not bool(cp.isfinite(half).all()):
        raise TinyGPTQError(f"{what} reaches beyond float16's 65504, in which the GPU keeps it; use --device cpu")
    return half


def shared_with_host(shape: tuple[int, ...], dtype: Any) -> tuple[np.ndarray, Any]:
    """Page-locked host memory that the GPU reads and writes in place: a NumPy array, and CuPy's over the same bytes."""
    cp, host = cupy(), page_locked(prod(shape), dtype).reshape(shape)
    pointer = cp.cuda.MemoryPointer(cp.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host), 0)
    return host, cp.ndarray(shape, dtype, pointer)


def pinned(weight: np.ndarray) -> Any:
    """A float16 copy in host memory that the GPU reads in place, as a CuPy array over it."""
    host, device = shared_with_host(weight.shape, np.float16)
    host[:] = weight
    if not np.isfinite(host).all():
        raise TinyGPTQError("the embedding reaches beyond float16's 65504, in which the GPU keeps it; use --device cpu")
    return device


def input_order(product: Product) -> np.ndarray:
    """Where each input goes so that the product finds it in the order of its rows: int32 [K], the inverse of its perm."""
    if product.perm is None:
        return np.arange(product.in_features, dtype=np.int32)
    perm = to_numpy(product.perm)
    order = np.empty_like(perm)
    order[perm] = np.arange(len(perm), dtype=perm.dtype)
    return order
