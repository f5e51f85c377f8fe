"""The device layout and mma's fragments, proved in NumPy: a warp's registers, multiplied as drawn in ``ptx``, give x @ W."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from tinygptq.kernels import reference
from tinygptq.kernels.cuda import layout
from tinygptq.packing import PackedLinear, pack

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # of each lane


def random_linear(rng, k, n, bits, group_size) -> PackedLinear:
    groups = -(-k // group_size)
    return PackedLinear(
        qweight=pack(rng.integers(0, 1 << bits, (k, n)), bits),
        scales=rng.uniform(0.5, 1.5, (groups, n)).astype(np.float16),
        zeros=rng.integers(0, (1 << bits) + 1, (groups, n)).astype(np.uint16),
        bits=bits,
        group_size=group_size,
    )


def warp_mma(a, b, c):
    """mma.m16n8k16 of one warp from its registers: a [lane, 4, 2], b [lane, 2, 2], c [lane, 4] -> [lane, 4]."""
    tile_a, tile_b, tile_c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for half in range(2):  # of a half2
        for upper in range(2):  # k 8 further
            k = 2 * T + 8 * upper + half
            tile_a[G, k], tile_a[G + 8, k] = a[:, 2 * upper, half], a[:, 2 * upper + 1, half]
            tile_b[k, G] = b[:, upper, half]
    for half in range(2):
        tile_c[G, 2 * T + half], tile_c[G + 8, 2 * T + half] = c[:, half], c[:, 2 + half]
    tile_c += tile_a @ tile_b
    return np.stack([tile_c[G + 8 * (i // 2), 2 * T + i % 2] for i in range(4)], axis=1)  # (32, 4)


def lane_codes(words, bits):
    """The codes a lane finds in its words of one chunk [bits, lane, column] -> [lane, column c, pair, which]."""
    codes = np.zeros((32, 4, 16, 2), np.int64)
    for pair in range(16):
        place = layout.place_of(bits, pair // 4, pair % 4)
        for which in range(2):
            if place is None:
                codes[:, :, pair, which] = sum((words[b] >> (15 + 16 * which) & 1) << b for b in range(3))
            else:
                codes[:, :, pair, which] = words[place[0]] >> (place[1] + 16 * which) & ((1 << bits) - 1)
    return codes


def warp_product(x, layer: layout.DeviceLinear):
    """What the matvec kernel's warps do, float64: x [8, K padded] -> [8, N padded]."""
    chunks, strips, bits = layer.codes.shape[:3]
    y, together = np.zeros((8, strips * 32)), layout.groups_together(layer.group_size)
    for strip in range(strips):
        sums = np.zeros((32, 2, 4))  # lane, tile of 16 columns, C's registers
        for chunk in range(chunks):
            codes = lane_codes(layer.codes[chunk, strip].astype(np.int64), bits)
            for unit in range(4):
                group = (128 * chunk + 32 * unit) // layer.group_size
                columns = 4 * G[:, None] + np.arange(4)  # (32, 4)
                groups, group = divmod(group, together)
                zero = layer.zeros[groups, strip, group].astype(np.int64)[columns]
                level = codes[:, :, 4 * unit : 4 * unit + 4] - zero[:, :, None, None]  # (32, 4 columns, 4 pairs, 2)
                k = 128 * chunk + 32 * unit + 8 * T[:, None] + np.arange(8)
                b = x[G[:, None], k].reshape(32, 4, 2)
                scale = layer.scales[groups, strip, group].astype(np.float64)[columns]
                for tile in range(2):
                    part = np.zeros((32, 4))
                    for step in range(2):
                        pairs = level[:, 2 * tile : 2 * tile + 2, 2 * step : 2 * step + 2]  # (32, 2 columns, 2 pairs, 2)
                        a = pairs.transpose(0, 2, 1, 3).reshape(32, 4, 2)
                        part = warp_mma(a, b[:, 2 * step : 2 * step + 2], part)
                    sums[:, tile] += part * np.repeat(scale[:, 2 * tile : 2 * tile + 2], 2, axis=1)
        for tile in range(2):
            for i in range(4):
                y[2 * T + i % 2, 32 * strip + 4 * G + 2 * tile + i // 2] = sums[:, tile, i]
    return y


@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16])
@pytest.mark.parametrize(("inner", "slots"), [(256, 2), (288, 3), (448, 3)])
def test_what_lanes_copy_of_x_they_find_as_fragments(rows, inner, slots, monkeypatch):
    """The ring's own functions, run lane by lane: :mod:`~tinygptq.kernels.cuda.activations`."""
    activations = pytest.importorskip("tinygptq.kernels.cuda.activations", exc_type=ImportError)
    x = np.random.default_rng(rows).standard_normal((rows, inner)).astype(np.float16)
    words, row_tiles, warps = x.ravel().view(np.uint32), 1 if rows <= 8 else 2, 3
    shared = np.full(activations.ring_bytes(warps, row_tiles, slots) // 4, 0x7E007E00, np.uint32)  # NaN

    def copy_pair(further):
        def copy(shared, to, array, index, wanted, first, second):
            for piece, inside in ((0, first), (32, second)):
                if wanted:
                    at = to + further // 4 + piece
                    shared[at : at + 4] = array[index + piece : index + piece + 4] if inside else 0

        return copy

    monkeypatch.setattr(activations, "device_function", lambda function: function)
    monkeypatch.setattr(activations, "copy_async_pair_if", copy_pair)
    monkeypatch.setattr(activations, "copy_async_commit", lambda: None)
    monkeypatch.setattr(activations, "load_shared", lambda shared, at: tuple(shared[at : at + 4]))
    locate, copy, take = activations.ring.__wrapped__(row_tiles, slots, inner % 128 > 0)
    chunks = -(-inner // 128)
    padded = np.zeros((16, 128 * chunks), np.float16)
    padded[:rows, :inner] = x
    places = {}
    for warp, lane in np.ndindex(warps, 32):
        monkeypatch.setattr(activations, "cuda", SimpleNamespace(threadIdx=SimpleNamespace(x=32 * warp + lane)))
        places[warp, lane] = locate(np.int32(rows), np.int32(inner))
        for slot in range(slots):
            copy(shared, places[warp, lane], words, (warp + slot) % chunks, chunks, slot)
    for (warp, lane), place in places.items():
        for slot in range(slots):
            found = np.array(take(shared, place, slot), np.uint32).view(np.float16).reshape(row_tiles, 4, 8)
            k = 128 * ((warp + slot) % chunks) + 32 * np.arange(4)[:, None] + 8 * T[lane] + np.arange(8)
            for tile in range(row_tiles):
                if G[lane] + 8 * tile < rows:
                    np.testing.assert_array_equal(found[tile], padded[G[lane] + 8 * tile, k])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "group_size"), [(256, 32), (288, 64), (416, 128), (160, 160)])
def test_a_warp_multiplies_its_registers_to_the_right_product(bits, k, group_size):
    rng = np.random.default_rng(bits * 1000 + k)
    linear = random_linear(rng, k, 40, bits, group_size)
    layer = layout.to_device(linear, array=np.asarray)
    x = rng.standard_normal((8, k))
    padded = np.zeros((8, layer.chunks * layout.ROWS))
    padded[:, :k] = x
    np.testing.assert_allclose(warp_product(padded, layer)[:, :40], reference.matmul(x, linear), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_word_is_finished_once_and_not_needed_after_that(bits):
    finished = [layout.finished_words(bits, unit) for unit in range(4)]
    assert sorted(sum(finished, ())) == list(range(bits))
    for unit in range(4):
        places = [layout.place_of(bits, unit, pair) for pair in range(4)]
        needed = set(range(bits)) if None in places else {word for word, _ in places}
        assert needed.isdisjoint(sum(finished[:unit], ()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layout_keeps_the_size(bits):
    linear = random_linear(np.random.default_rng(bits), 256, 64, bits, 64)
    layer = layout.to_device(linear, array=np.asarray)
    assert layer.codes.nbytes == linear.qweight.nbytes
    assert layer.codes.dtype == np.uint32 and layer.codes.flags.c_contiguous


def test_equal_zeros_are_kept_as_one_number():
    linear = random_linear(np.random.default_rng(0), 128, 32, 4, 32)
    linear.zeros[:] = 8
    layer = layout.to_device(linear, array=np.asarray)
    assert (layer.zero, layer.zeros) == (8, None)


def lanes(operand, dtype):
    """A register, or a constant of LLVM's builder, as an array over the lanes."""
    return np.full(32, operand.constant, dtype) if hasattr(operand, "constant") else operand


class NumpyBuilder:
    """LLVM's builder as far as products need it, computing at once: a register is an array over the lanes."""

    def lshr(self, a, b):
        return a >> lanes(b, np.uint32)

    def shl(self, a, b):
        return a << lanes(b, np.uint32)

    def and_(self, a, b):
        return a & lanes(b, np.uint32)

    def or_(self, a, b):
        return lanes(a, np.uint32) | b

    def fadd(self, a, b):
        return a + b

    def fsub(self, a, b):
        return lanes(a, np.float32) - b

    def fmul(self, a, b):
        return a * lanes(b, np.float32)

    def fma(self, a, b, c):
        return (a.astype(np.float64) * lanes(b, np.float64) + c).astype(np.float32)


def numpy_mma(builder, a, b, c):
    """products.mma_assembly: half2 registers to fp16 numbers, the products exact, the sums rounded to float32."""
    a, b = (np.stack([lanes(r, np.uint32).view(np.float16).reshape(32, 2) for r in registers], 1) for registers in (a, b))
    sums = warp_mma(a.astype(np.float64), b.astype(np.float64), np.stack([lanes(r, np.float64) for r in c], 1))
    return list(sums.astype(np.float32).T)


def lane_words(codes, bits):
    """[128, 32] codes of a chunk -> the words of each lane, [4 * bits][lane]."""
    return [w.ravel() for w in layout.tile(pack(codes, bits), bits)[0, 0].transpose(0, 2, 1).reshape(-1, 32)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_exact_subnormals(bits):
    products = pytest.importorskip("tinygptq.kernels.cuda.products", exc_type=ImportError)
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (128, 32))
    codes[:, 5], codes[:, 6] = (1 << bits) - 1, 0
    words = lane_words(codes, bits)
    for unit, pair, c, which in np.ndindex(4, 4, 4, 2):
        found = products._codes(NumpyBuilder(), words, c, bits, unit, pair).view(np.float16).reshape(32, 2)[:, which]
        offset = products.offset_of(bits, unit, pair // 2)
        expected = codes[32 * unit + 8 * T + 2 * pair + which, 4 * G + c] * 2.0 ** (offset - 24)
        np.testing.assert_array_equal(found.astype(np.float64), expected)
        assert offset + bits <= 10  # of the mantissa


def numpy_call(builder, text, *operands):
    """unpack._call: the instructions it has, on two fp16 numbers at once as the GPU rounds them."""
    a, b, c, *_ = [lanes(operand, np.uint32) for operand in operands] + [None]
    if text.startswith("lop3.b32") and "0xEA" in text:
        return a & b | c
    a, b = a.view(np.float16), b.view(np.float16)
    if text.startswith("sub.rn.f16x2"):
        return (a - b).view(np.uint32)
    assert text.startswith("fma.rn.f16x2"), text
    return (a.astype(np.float64) * b + c.view(np.float16)).astype(np.float16).view(np.uint32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_exact(bits, monkeypatch):
    unpack = pytest.importorskip("tinygptq.kernels.cuda.unpack", exc_type=ImportError)
    monkeypatch.setattr(unpack, "_call", numpy_call)
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (128, 32))
    codes[:, 5], codes[:, 6] = (1 << bits) - 1, 0
    words = lane_words(codes, bits)
    for zero, unit, pair, c in itertools.product((0, 1, 1 << bits - 1, 1 << bits), range(4), range(4), range(4)):
        offsets = [[np.full(32, offset, np.uint32)] * 4 for offset in unpack.constant_offsets(bits, zero)]
        found = unpack.emit_level(NumpyBuilder(), bits, unit, words, c, pair, offsets).view(np.float16)
        for which in range(2):
            expected = codes[32 * unit + 8 * T + 2 * pair + which, 4 * G + c] - zero
            np.testing.assert_array_equal(found.reshape(32, 2)[:, which], expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("units", [4, 2, 1])
@pytest.mark.parametrize("row_tiles", [1, 2])
def test_the_instructions_of_a_run_give_its_product(bits, units, row_tiles, monkeypatch):
    """The very code that emits them, with NumPy for LLVM: codes as subnormals for 8 rows of x, as levels for 16."""
    products = pytest.importorskip("tinygptq.kernels.cuda.products", exc_type=ImportError)
    from tinygptq.kernels.cuda import unpack

    monkeypatch.setattr(products, "mma_assembly", numpy_mma)
    monkeypatch.setattr(unpack, "_call", numpy_call)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (128, 32))
    x = rng.standard_normal((8 * row_tiles, 128)) * 10.0 ** rng.integers(-6, 3, (8 * row_tiles, 1))  # fp16's subnormals too
    x = x.astype(np.float16)
    scales = rng.uniform(1e-3, 1e-2, (4, 32)).astype(np.float32)
    zeros = rng.integers(0, (1 << bits) + 1, (4, 32)).astype(np.float32)
    k = 32 * np.arange(4)[:, None, None] + 8 * T[:, None] + np.arange(8)  # (unit, lane, 8)
    rows = [x[8 * tile + G[:, None], k[unit]] for tile in range(row_tiles) for unit in range(4)]
    rows = [r.copy() for eight in rows for r in np.ascontiguousarray(eight).view(np.uint32).T]
    total, expected = [np.zeros(32, np.float32)] * (8 * row_tiles), np.zeros((8 * row_tiles, 32))
    for run in range(0, 4, units):
        span, part, words = range(run, run + units), slice(32 * run, 32 * (run + units)), lane_words(codes, bits)
        scale, zero = ([table[run, 4 * G + c] for c in range(4)] for table in (scales, zeros))
        if row_tiles == 1:
            ones, zero = products.emit_sums(NumpyBuilder(), span, rows), [z / np.float32(products.UNIT) for z in zero]
            total = products.emit_codes(NumpyBuilder(), bits, span, total, words, scale, zero, rows, ones)
        else:
            of_lanes = [[unpack.constant_offsets(bits, int(z)) for z in column] for column in zero]
            offsets = np.ascontiguousarray(np.array(of_lanes, np.uint32).transpose(2, 0, 1))  # [place][column][lane]
            total = products.emit_levels(NumpyBuilder(), bits, span, total, words, scale, offsets, rows)
        expected += x[:, part].astype(np.float64) @ (scales[run] * (codes[part] - zeros[run].astype(np.float64)))
    for place, found in enumerate(total):
        tile, half, i = np.unravel_index(place, (row_tiles, 2, 4))
        row, column = 8 * tile + 2 * T + i % 2, 4 * G + 2 * half + i // 2
        found, bound = found * (products.UNIT if row_tiles == 1 else 1), 2e-6 * np.linalg.norm(expected[row], axis=1)
        assert (np.abs(found - expected[row, column]) <= bound).all(), place


def lossy_mma(builder, a, b, c):
    """:func:`numpy_mma` with sums as a tensor core takes them: products, and C, cut off 24 bits below the largest exponent.

    A subnormal's exponent is that of 2^-14, whatever its size. (Hopper seems to keep one bit more.)
    """

    def exponent(numbers, lowest):
        return np.where(numbers == 0, lowest, np.maximum(np.frexp(numbers)[1] - 1, lowest))

    a, b = (np.stack([lanes(r, np.uint32).view(np.float16).reshape(32, 2) for r in registers], 1) for registers in (a, b))
    tile_a, tile_b = np.zeros((16, 16)), np.zeros((16, 8))
    for half, upper in np.ndindex(2, 2):
        k = 2 * T + 8 * upper + half
        tile_a[G, k], tile_a[G + 8, k], tile_b[k, G] = a[:, 2 * upper, half], a[:, 2 * upper + 1, half], b[:, upper, half]
    tile_c = np.zeros((16, 8))
    for i in range(4):
        tile_c[G + 8 * (i // 2), 2 * T + i % 2] = lanes(c[i], np.float64)
    terms = np.concatenate([tile_a[:, :, None] * tile_b[None], tile_c[:, None]], 1)  # (16, 17, 8)
    exponents = exponent(tile_a, -14)[:, :, None] + exponent(tile_b, -14)[None]
    quantum = 2.0 ** (np.maximum(exponents.max(1), exponent(tile_c, -126)) - 24)
    sums = (np.trunc(terms / quantum[:, None]) * quantum[:, None]).sum(1)
    return [sums[G + 8 * (i // 2), 2 * T + i % 2].astype(np.float32) for i in range(4)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_tensor_cores_drop_of_subnormals_is_little(bits, monkeypatch):
    products = pytest.importorskip("tinygptq.kernels.cuda.products", exc_type=ImportError)
    monkeypatch.setattr(products, "mma_assembly", lossy_mma)
    rng = np.random.default_rng(bits)
    codes, x = rng.integers(0, 1 << bits, (128, 32)), rng.standard_normal((8, 128)).astype(np.float16)
    zero = np.full(32, 2.0 ** (bits - 1) / products.UNIT, np.float32)
    rows = [r.copy() for u in range(4) for r in x[G[:, None], 32 * u + 8 * T[:, None] + np.arange(8)].view(np.uint32).T]
    total, words = [np.zeros(32, np.float32)] * 8, lane_words(codes, bits)
    ones, tables = products.emit_sums(NumpyBuilder(), range(4), rows), ([np.ones(32, np.float32)] * 4, [zero] * 4)
    total = products.emit_codes(NumpyBuilder(), bits, range(4), total, words, *tables, rows, ones)
    expected = x.astype(np.float64) @ (codes - 2.0 ** (bits - 1))
    found = np.zeros((8, 32))
    for place, values in enumerate(total):
        found[2 * T + place % 2, 4 * G + place // 2] = values * products.UNIT
    assert np.linalg.norm(found - expected) <= 5e-6 * np.linalg.norm(expected)


def tensor_cores_b(tile, step):
    """What wgmma finds as B in a tile of 32 k, uint32 [tokens * 16]: half2 [token, 8] of 16 k, by the manual's swizzle.

    Of the address in bytes, bits 4 and 5 are those of the logical one exclusive-or bits 7 and 8.
    """
    token, half2 = np.ogrid[: len(tile) // 16, :8]
    logical = 64 * token + 32 * step + 4 * half2
    return tile[(logical ^ (logical >> 7 & 3) << 4) // 4]


def test_warpgroups_find_in_tiles_of_x_what_their_words_are_multiplied_by():
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import warpgroup

    tokens = 16
    x = np.arange(tokens * 16).reshape(tokens, 16)  # half2 number i of a token's 32 k
    tile = np.full(tokens * 16, -1)
    for token in range(tokens):
        for quarter in range(4):
            at = warpgroup.place_in_tile(token, quarter)
            tile[at : at + 4] = [x[token, warpgroup.source_of(quarter, j)] for j in range(4)]
    assert sorted(tile) == sorted(x.ravel())
    for step in range(2):
        b = tensor_cores_b(tile, step)  # (token, half2 of 16 k)
        for t in range(4):
            # lane 4g + t holds k 8t .. 8t + 7: pairs 2 step and 2 step + 1 of these four meet in one product
            assert np.array_equal(b[:, t], x[:, 4 * t + 2 * step])
            assert np.array_equal(b[:, 4 + t], x[:, 4 * t + 2 * step + 1])


def test_a_descriptor_is_the_manuals():
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (extra [cuda])")
    from tinygptq.kernels.cuda import hopper

    bits = int(np.int64(hopper.describe(0x12345)).view(np.uint64))
    assert bits & 0x3FFF == 0x12345 >> 4  # bits 0-13, the address
    assert bits >> 32 & 0x3FFF == 512 >> 4  # bits 32-45, from eight columns to the next eight
    assert bits >> 62 == 2  # swizzle 64 bytes
