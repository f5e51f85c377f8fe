"""How keys and values lie in the GPU's cache: fp16, or 8-bit integers with one scale for each token and head.

8 bits: ``scale`` is the largest magnitude over 127, an fp16 number; ``value = scale * integer``. The definition is
:func:`to_8_bits`. An integer becomes an fp16 number without a conversion instruction: with its sign bit flipped it is
``integer + 128`` unsigned, and a byte under 0x64 is the fp16 number 1024 + byte, from which 1152 is subtracted, exactly.

A token's key or value is made by one warp in shared memory, as the cache holds it, and copied out 16 bytes at a time. In
the kernels below, ``width`` is :func:`.layout.cache_width` of a head's dimensions, and the cache is ``(keys, values,
key_scales, value_scales)``: float16 or int8 [R, groups, capacity, width] twice, float16 [R * groups * capacity] twice.
"""

import functools
from typing import Any

import numpy as np

from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.layout import cache_width
from tinygptq.kernels.cuda.ptx import load_shared, pick_bytes, store_16_bytes, sub_half2
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import warp_max

SIGNS, OVER_1024, OFFSET = np.uint32(0x80808080), np.uint32(0x64646464), np.uint32(0x64806480)  # the last is 1152 twice
FILL_WARPS = 8  # of a block that fills the cache: half of them make keys, half values
FILL_TOKENS = FILL_WARPS // 2


def to_8_bits(x: Any) -> tuple[Any, Any]:
    """float32 [..., D] -> (int8 [..., D], scales float16 [...]); NumPy or CuPy."""
    scales = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float16)
    divisor = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    return np.clip(np.rint(x / divisor[..., None]), -127, 127).astype(np.int8), scales


@device_function
def halves_of_integers(word):
    """Four int8 of a word to two half2."""
    flipped = word ^ SIGNS
    return (
        sub_half2(pick_bytes(flipped, OVER_1024, 0x4140), OFFSET),
        sub_half2(pick_bytes(flipped, OVER_1024, 0x4342), OFFSET),
    )


@device_function
def _rounded(x):
    return np.int8(min(max(cuda.libdevice.rintf(x), np.float32(-127)), np.float32(127)))


@functools.cache
def token_encoder(bits: int, dim: int):
    """The device function ``(qkv, line, first, cos, sin, position, turned, to, at)`` -> scale, of a whole warp: one head's
    key or value of one token as the cache holds it, padded with zeros.

    Its numbers are ``qkv[line, first : first + dim]``, rotated to ``position`` where ``turned``; they go to shared memory,
    ``to[at : at + width]`` of the cache's type, and need a ``syncwarp`` before other lanes read them. The scale is 1 for
    16 bits.
    """
    half, width = dim // 2, cache_width(dim)
    turns = -(-half // 32)  # of 32 lanes, each with one pair (d, d + half)

    @device_function
    def scale_of(pairs):
        largest = np.float32(0)
        for i in range(turns):
            largest = max(largest, max(abs(pairs[i, 0]), abs(pairs[i, 1])))
        return np.float32(np.float16(warp_max(largest) / np.float32(127)))

    @device_function
    def encode(qkv, line, first, cos, sin, position, turned, to, at):
        pairs = cuda.local.array((turns, 2), np.float32)
        lane, scale, divisor = cuda.threadIdx.x & 31, np.float32(1), np.float32(1)
        for i in range(turns):
            d = min(32 * i + lane, half - 1)
            a, b = np.float32(qkv[line, first + d]), np.float32(qkv[line, first + d + half])
            if turned:
                c, s = cos[position, d], sin[position, d]
                a, b = a * c - b * s, b * c + a * s
            pairs[i, 0], pairs[i, 1] = a, b
        if bits == 8:
            scale = scale_of(pairs)
            divisor = scale if scale > np.float32(0) else np.float32(1)
        for i in range(turns):
            d = min(32 * i + lane, half - 1)
            if bits == 8:
                to[at + d], to[at + d + half] = _rounded(pairs[i, 0] / divisor), _rounded(pairs[i, 1] / divisor)
            else:
                to[at + d], to[at + d + half] = pairs[i, 0], pairs[i, 1]
        for d in range(dim + lane, width, 32):
            to[at + d] = 0
        return scale

    return encode


@functools.cache
def token_storer(bits: int, width: int):
    """The device function ``(encoded, at, lane, array, token)``: a warp copies ``encoded[at : at + width]``, shared memory,
    to keys or values; ``token`` counts the rows of the whole array."""
    piece = 8 if bits == 16 else 16  # numbers in 16 bytes

    @device_function
    def store_token(encoded, at, lane, array, token):
        if lane < width // piece:
            store_16_bytes(array, token * width + piece * lane, load_shared(encoded, at + piece * lane))

    return store_token


@functools.cache
def fill_kernel(heads: int, groups: int, dim: int, bits: int) -> Kernel:
    """The kernel ``(qkv, cos, sin, start, row, cache)`` that puts keys, rotated, and values of many tokens into the cache.

    Shapes: qkv float16 [T, (heads + 2 groups) * dim]; cos, sin float32 [at least start + T, dim / 2]; start: the first
    token's position; row: the sequence's place in the cache. Grid (ceil(T / 4), groups), block 256.
    """
    width, encode = cache_width(dim), token_encoder(bits, dim)
    store, size, dtype = token_storer(bits, width), FILL_WARPS * width, np.float16 if bits == 16 else np.int8

    def fill_cache(qkv, cos, sin, start, row, cache):
        keys, values, key_scales, value_scales = cache
        encoded = cuda.shared.array(size, dtype, alignment=16)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        line, group, is_value = cuda.blockIdx.x * FILL_TOKENS + (warp >> 1), cuda.blockIdx.y, warp & 1
        if line < qkv.shape[0]:
            first, at = (heads + group + is_value * groups) * dim, warp * width
            scale = encode(qkv, line, first, cos, sin, start + line, is_value == 0, encoded, at)
            cuda.syncwarp()
            token = np.int64(row * groups + group) * keys.shape[2] + start + line
            if is_value:
                store(encoded, at, lane, values, token)
            else:
                store(encoded, at, lane, keys, token)
            if bits == 8 and lane == 0:
                if is_value:
                    value_scales[token] = scale
                else:
                    key_scales[token] = scale

    return Kernel(fill_cache, 32 * FILL_WARPS)


def _expand(integers, scales, out):
    token, group = cuda.blockIdx.x, cuda.blockIdx.y
    scale = np.float32(scales[group * integers.shape[1] + token])
    for d in range(cuda.threadIdx.x, out.shape[2], 32):
        out[group, token, d] = np.float32(integers[group, token, d]) * scale


expand_kernel = Kernel(_expand, 32)
"""``(integers, scales, out)``: one sequence's 8-bit keys or values to fp16. Shapes: int8 [G, capacity, W], float16
[G * capacity], float16 [G, capacity, W]. Grid (tokens, G), block 32."""
