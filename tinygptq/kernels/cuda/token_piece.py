"""A *piece*: 16 tokens of the cache against up to 8 queries, held and computed by one warp in registers alone.

With g = lane // 4 and t = lane % 4 as in :mod:`.ptx`, both products run on tensor cores::

    scores [8 heads, 16 tokens]   = queries (A: row g is head g; rows 8-15 are 0)  keys (B: column g is token g, or g + 8)
    mixture [dimensions, 8 heads] += values (A: rows g, g + 8: dimensions)  exp2(scores - maximum) (B: column g is head g)

mma's sums of the first have the places that B of the second wants: a lane has tokens 2t, 2t + 1, 2t + 8 and 2t + 9 of head
g. Keys are read as they lie, 8 neighbouring dimensions a lane; A wants two neighbouring tokens of a dimension in one
register, which two byte permutations make of two tokens' values.

A lane's words: ``keys[n, j, i]`` of token ``g + 8 n``, dimensions ``32 j + 8 t`` and the 7 after it; ``values[n, c, i]`` of
the n-th of its four tokens, dimensions ``64 c + 8 g`` and the 7 after it; ``scales[n]`` of the same four tokens' keys, then
of their values (8 bits only).
"""

import functools

import numpy as np

from tinygptq.kernels.cuda.cache_codec import halves_of_integers
from tinygptq.kernels.cuda.intrinsics import load_8_bytes, load_shared_8_bytes
from tinygptq.kernels.cuda.ptx import half2_from_floats, load_16_bytes, load_shared, mma, mul_half2, pick_bytes
from tinygptq.kernels.cuda.runtime import cuda
from tinygptq.kernels.cuda.tables import device_function
from tinygptq.kernels.cuda.warps import ALL

TOKENS = 16
NO_SUM, ZERO = (np.float32(0),) * 4, np.uint32(0)
LOWEST = np.float32(-1e30)  # the score of what is not there; its exp2 against any other is 0
LOWER_HALVES, UPPER_HALVES = 0x5410, 0x7632  # byte permutations: of two half2, the half2 of their lower, their upper halves


def words_of_eight(bits: int) -> int:
    """Words that hold 8 dimensions of a token."""
    return bits // 4


@device_function
def _token(lane, n):
    """The n-th of a lane's four tokens: 2t, 2t + 1, 2t + 8, 2t + 9."""
    return 2 * (lane & 3) + (n & 1) + 8 * (n >> 1)


@functools.cache
def piece_reader(bits: int, width: int):
    """Device functions ``read_keys(keys, scales, array, array_scales, base, first, last)`` and ``read_values(...)`` alike.

    They fill a lane's words and scales of the piece that begins at token ``first``, and read no token after ``last``, but
    that one again. ``base``: the place of the sequence's and head's token 0 among all tokens.
    """
    load, count = (load_16_bytes if bits == 16 else load_8_bytes), words_of_eight(bits)
    key_steps, value_steps = width // 32, width // 64

    @device_function
    def read_scales(scales, to, array_scales, base, first, last):
        lane = cuda.threadIdx.x & 31
        for n in range(4):
            scales[to + n] = np.float32(array_scales[base + min(first + _token(lane, n), last)])

    @device_function
    def read_keys(keys, scales, array, array_scales, base, first, last):
        lane = cuda.threadIdx.x & 31
        for n in range(2):
            at = (base + min(first + 8 * n + (lane >> 2), last)) * width + 8 * (lane & 3)
            for j in range(key_steps):
                words = load(array, at + 32 * j)
                for i in range(count):
                    keys[n, j, i] = words[i]
        if bits == 8:
            read_scales(scales, 0, array_scales, base, first, last)

    @device_function
    def read_values(values, scales, array, array_scales, base, first, last):
        lane = cuda.threadIdx.x & 31
        for n in range(4):
            at = (base + min(first + _token(lane, n), last)) * width + 8 * (lane >> 2)
            for c in range(value_steps):
                words = load(array, at + 64 * c)
                for i in range(count):
                    values[n, c, i] = words[i]
        if bits == 8:
            read_scales(scales, 4, array_scales, base, first, last)

    return read_keys, read_values


@functools.cache
def newest_putter(bits: int, width: int):
    """The device function ``(keys, values, scales, newest, newest_scales, first, position)``: puts the token at ``position``
    where it belongs, and in place of those after it; ``newest`` [2 * width], in shared memory, is its key and its value as
    the cache holds them."""
    load, count = (load_shared if bits == 16 else load_shared_8_bytes), words_of_eight(bits)

    @device_function
    def put_newest(keys, values, scales, newest, newest_scales, first, position):
        lane = cuda.threadIdx.x & 31
        for n in range(2):
            if first + 8 * n + (lane >> 2) >= position:
                for j in range(width // 32):
                    words = load(newest, 32 * j + 8 * (lane & 3))
                    for i in range(count):
                        keys[n, j, i] = words[i]
        for n in range(4):
            if first + _token(lane, n) >= position:
                for c in range(width // 64):
                    words = load(newest, width + 64 * c + 8 * (lane >> 2))
                    for i in range(count):
                        values[n, c, i] = words[i]
                if bits == 8:
                    scales[n], scales[n + 4] = newest_scales[0], newest_scales[1]

    return put_newest


def _halves(bits):
    """Device function: 8 dimensions' words, ``held[n, j]``, as four half2."""

    @device_function
    def halves(held, n, j):
        if bits == 16:
            return held[n, j, 0], held[n, j, 1], held[n, j, 2], held[n, j, 3]
        a, b = halves_of_integers(held[n, j, 0])
        c, d = halves_of_integers(held[n, j, 1])
        return a, b, c, d

    return halves


@functools.cache
def piece_scorer(bits: int, width: int):
    """The device function ``(query, at, keys, scales)`` -> scores of head g and the lane's four tokens.

    query: float16 in shared memory, where head g's dimension 0 is at ``at``; read for each piece, for want of registers.
    """
    halves = _halves(bits)

    @device_function
    def score_piece(query, at, keys, scales):
        t = cuda.threadIdx.x & 3
        low, low_too, high, high_too = NO_SUM, NO_SUM, NO_SUM, NO_SUM  # two sums of each 8 tokens: shorter chains
        for j in range(width // 32):
            q = load_shared(query, at + 32 * j + 8 * t)
            a, b = (q[0], ZERO, q[1], ZERO), (q[2], ZERO, q[3], ZERO)
            k = halves(keys, 0, j)
            low, low_too = mma(a, (k[0], k[1]), low), mma(b, (k[2], k[3]), low_too)
            k = halves(keys, 1, j)
            high, high_too = mma(a, (k[0], k[1]), high), mma(b, (k[2], k[3]), high_too)
        s = low[0] + low_too[0], low[1] + low_too[1], high[0] + high_too[0], high[1] + high_too[1]
        if bits == 8:
            return s[0] * scales[0], s[1] * scales[1], s[2] * scales[2], s[3] * scales[3]
        return s

    return score_piece


@device_function
def soften(scores, first, position, largest, total):
    """The online softmax (Milakov & Gimelshein 2018) of head g over a piece that has at least one token; scores in base 2.

    Returns exp2(score - maximum) of the lane's four tokens, 0 for those after ``position``; the maximum so far, this lane's
    part of the sum so far, and the factor for what was summed up before.
    """
    t = first + 2 * (cuda.threadIdx.x & 3)
    a = scores[0] if t <= position else LOWEST
    b = scores[1] if t + 1 <= position else LOWEST
    c = scores[2] if t + 8 <= position else LOWEST
    d = scores[3] if t + 9 <= position else LOWEST
    top = max(max(a, b), max(c, d))
    top = max(top, cuda.shfl_xor_sync(ALL, top, 1))
    top = max(max(top, cuda.shfl_xor_sync(ALL, top, 2)), largest)
    exp2 = cuda.libdevice.exp2f
    p, factor = (exp2(a - top), exp2(b - top), exp2(c - top), exp2(d - top)), exp2(largest - top)
    return p, top, total * factor + ((p[0] + p[1]) + (p[2] + p[3])), factor


@functools.cache
def piece_mixer(bits: int, width: int):
    """The device function ``(mixed, values, scales, p, factor)``: ``mixed = mixed * factor + values * p``.

    mixed float32 [width / 16, 4], mma's sums: entry ``[4 c + j, 2 e + h]`` is dimension ``64 c + 8 g + 2 j + e``, head
    ``2 t + h``.
    """
    halves = _halves(bits)

    @device_function
    def scaled(values, scales, n, c):
        v = halves(values, n, c)
        if bits == 8:
            s = half2_from_floats(scales[n + 4], scales[n + 4])
            return mul_half2(v[0], s), mul_half2(v[1], s), mul_half2(v[2], s), mul_half2(v[3], s)
        return v

    @device_function
    def mix(mixed, values, scales, p, factor):
        lane = cuda.threadIdx.x & 31
        even, odd = cuda.shfl_sync(ALL, factor, 8 * (lane & 3)), cuda.shfl_sync(ALL, factor, 8 * (lane & 3) + 4)
        b = half2_from_floats(p[0], p[1]), half2_from_floats(p[2], p[3])
        for c in range(width // 64):
            v, w = scaled(values, scales, 0, c), scaled(values, scales, 1, c)
            x, y = scaled(values, scales, 2, c), scaled(values, scales, 3, c)
            for j in range(4):
                a = (
                    pick_bytes(v[j], w[j], LOWER_HALVES),
                    pick_bytes(v[j], w[j], UPPER_HALVES),
                    pick_bytes(x[j], y[j], LOWER_HALVES),
                    pick_bytes(x[j], y[j], UPPER_HALVES),
                )
                n = 4 * c + j
                sums = mma(a, b, (mixed[n, 0] * even, mixed[n, 1] * odd, mixed[n, 2] * even, mixed[n, 3] * odd))
                for e in range(4):
                    mixed[n, e] = sums[e]

    return mix


@functools.cache
def piece_walker(bits: int, width: int, stride: int):
    """Device functions ``begin`` and ``attend``: a warp's way over its pieces, every ``stride``-th from ``piece`` on.

    ``begin(k, v, s, cache, base, piece, pieces, before)`` asks for the first one's words, up to token ``before``; ``attend``
    returns maximum and sum of head g (the sum this lane's part), and leaves the mixture in ``mixed``, zero at first. Arrays
    and arguments as above; cache: see :mod:`.cache_codec`.
    """
    read_keys, read_values = piece_reader(bits, width)
    put_newest, score, mix = newest_putter(bits, width), piece_scorer(bits, width), piece_mixer(bits, width)

    @device_function
    def begin(k, v, s, cache, base, piece, pieces, before):
        if piece < pieces:
            read_keys(k, s, cache[0], cache[2], base, TOKENS * piece, before)
            read_values(v, s, cache[1], cache[3], base, TOKENS * piece, before)

    @device_function
    def attend(k, v, s, mixed, query, at, newest, newest_scales, cache, base, piece, pieces, before, position):
        largest, total = LOWEST, np.float32(0)
        while piece < pieces:
            first, following = TOKENS * piece, piece + stride
            if piece == pieces - 1:
                put_newest(k, v, s, newest, newest_scales, first, position)
            scores = score(query, at, k, s)
            if following < pieces:  # as soon as registers are free
                read_keys(k, s, cache[0], cache[2], base, TOKENS * following, before)
            p, largest, total, factor = soften(scores, first, position, largest, total)
            mix(mixed, v, s, p, factor)
            if following < pieces:
                read_values(v, s, cache[1], cache[3], base, TOKENS * following, before)
            piece = following
        return largest, total

    return begin, attend
