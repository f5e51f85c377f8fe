"""How keys and values lie in the GPU's cache: fp16, or 8-bit integers with one scale for each token and head.

8 bits: ``scale`` is the largest magnitude over 127, an fp16 number; ``value = scale * integer``. The definition is
:func:`to_8_bits`. An integer becomes an fp16 number without a conversion instruction: with its sign bit flipped it is
``integer + 128`` unsigned, and a byte under 0x64 is the fp16 number 1024 + byte, from which 1152 is subtracted, exactly.
"""

import functools
from typing import Any

import numpy as np

from tinygptq.kernels.cuda.intrinsics import load_8_bytes
from tinygptq.kernels.cuda.launch import Kernel
from tinygptq.kernels.cuda.ptx import load_16_bytes, load_shared, mma, pick_bytes, sub_half2
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import warp_max

SIGNS, OVER_1024, OFFSET = np.uint32(0x80808080), np.uint32(0x64646464), np.uint32(0x64806480)  # the last is 1152 twice


def to_8_bits(x: Any) -> tuple[Any, Any]:
    """float32 [..., D] -> (int8 [..., D], scales float16 [...]); NumPy or CuPy."""
    scales = (np.abs(x).max(axis=-1) / np.float32(127)).astype(np.float16)
    divisor = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    return np.clip(np.rint(x / divisor[..., None]), -127, 127).astype(np.int8), scales


@device_function
def _to_half2(word):
    """Four int8 of a word to two half2."""
    flipped = word ^ SIGNS
    return (
        sub_half2(pick_bytes(flipped, OVER_1024, 0x4140), OFFSET),
        sub_half2(pick_bytes(flipped, OVER_1024, 0x4342), OFFSET),
    )


@functools.cache
def cache_reader(bits: int):
    """Device functions: ``(array, index)`` -> 8 dimensions as four half2, not yet scaled; ``(scales, index)`` -> float32."""
    if bits == 16:

        @device_function
        def one(scales, index):
            return np.float32(1)

        return load_16_bytes, one

    @device_function
    def load(array, index):
        words = load_8_bytes(array, index)
        a, b = _to_half2(words[0])
        c, d = _to_half2(words[1])
        return a, b, c, d

    @device_function
    def scale(scales, index):
        return np.float32(scales[index])

    return load, scale


@functools.cache
def query_step(bits: int):
    """``(multiply, step)``: the device function that adds ``step`` dimensions of 16 keys times 8 queries to mma's sums.

    ``multiply(keys, low, high, query, query_row, d, t, total)``: low and high are the places of a lane's two keys at
    dimension d, query_row that of its query in shared memory, in words. A lane's 16 bytes are neighbouring dimensions; the
    query is read in the same order.
    """
    if bits == 16:

        @device_function
        def multiply_half(keys, low, high, query, query_row, d, t, total):
            a, b = load_16_bytes(keys, low + 8 * t), load_16_bytes(keys, high + 8 * t)
            q = load_shared(query, query_row + d // 2 + 4 * t)
            total = mma((a[0], b[0], a[1], b[1]), (q[0], q[1]), total)
            return mma((a[2], b[2], a[3], b[3]), (q[2], q[3]), total)

        return multiply_half, 32

    @device_function
    def multiply_word(a, b, q0, q1, total):
        a0, a1 = _to_half2(a)
        b0, b1 = _to_half2(b)
        return mma((a0, b0, a1, b1), (q0, q1), total)

    @device_function
    def multiply_integers(keys, low, high, query, query_row, d, t, total):
        a, b = load_16_bytes(keys, low + 16 * t), load_16_bytes(keys, high + 16 * t)
        q = load_shared(query, query_row + d // 2 + 8 * t)
        r = load_shared(query, query_row + d // 2 + 8 * t + 4)
        total = multiply_word(a[0], b[0], q[0], q[1], total)
        total = multiply_word(a[1], b[1], q[2], q[3], total)
        total = multiply_word(a[2], b[2], r[0], r[1], total)
        return multiply_word(a[3], b[3], r[2], r[3], total)

    return multiply_integers, 64


@functools.cache
def cache_writer(bits: int, dim: int):
    """Device function that puts one token's rotated key and its value into the cache: warp 0 the key, warp 1 the value.

    ``(qkv, line, cos, sin, cache, row, group, heads, groups, position)``: ``line`` is the token's place in qkv, ``row`` its
    sequence's in the cache; shapes as in :mod:`.decode_attention`.
    """
    half = dim // 2
    turns = -(-half // 32)  # of 32 lanes, each with one pair (d, d + half)

    @device_function
    def write(array, scales, place, row, group, position, pairs, lane):
        scale = np.float32(1)
        if bits == 8:
            largest = np.float32(0)
            for i in range(turns):
                largest = max(largest, max(abs(pairs[i, 0]), abs(pairs[i, 1])))
            scale = np.float32(np.float16(warp_max(largest) / np.float32(127)))
            if lane == 0:
                scales[place] = scale
            if scale == np.float32(0):
                scale = np.float32(1)
        for i in range(turns):
            d = 32 * i + lane
            if d < half:
                if bits == 8:
                    array[row, group, position, d] = _rounded(pairs[i, 0] / scale)
                    array[row, group, position, d + half] = _rounded(pairs[i, 1] / scale)
                else:
                    array[row, group, position, d] = pairs[i, 0]
                    array[row, group, position, d + half] = pairs[i, 1]

    @device_function
    def write_token(qkv, line, cos, sin, cache, row, group, heads, groups, position):
        keys, values, key_scales, value_scales = cache
        pairs = cuda.local.array((turns, 2), np.float32)
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        first = (heads + group + warp * groups) * dim
        place = (row * groups + group) * keys.shape[2] + position
        if warp < 2:
            for i in range(turns):
                d = 32 * i + lane
                pairs[i, 0], pairs[i, 1] = np.float32(0), np.float32(0)
                if d < half:
                    a, b = np.float32(qkv[line, first + d]), np.float32(qkv[line, first + d + half])
                    if warp == 0:
                        c, s = cos[position, d], sin[position, d]
                        a, b = a * c - b * s, b * c + a * s
                    pairs[i, 0], pairs[i, 1] = a, b
            if warp == 0:
                write(keys, key_scales, place, row, group, position, pairs, lane)
            else:
                write(values, value_scales, place, row, group, position, pairs, lane)

    return write_token


@device_function
def _rounded(x):
    return np.int8(min(max(cuda.libdevice.rintf(x), np.float32(-127)), np.float32(127)))


def _expand(integers, scales, out):
    token, group = cuda.blockIdx.x, cuda.blockIdx.y
    scale = np.float32(scales[group * integers.shape[1] + token])
    for d in range(cuda.threadIdx.x, out.shape[2], 32):
        out[group, token, d] = np.float32(integers[group, token, d]) * scale


expand_kernel = Kernel(_expand, 32)
"""``(integers, scales, out)``: one sequence's 8-bit keys or values to fp16. Shapes: int8 [G, capacity, W], float16
[G * capacity], float16 [G, capacity, W]. Grid (tokens, G), block 32."""
