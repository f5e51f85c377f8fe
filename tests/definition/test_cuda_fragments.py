"""The device layout and mma's fragments, proved in NumPy: a warp's registers, multiplied as drawn in ``ptx``, give x @ W."""

from __future__ import annotations

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
    for i in range(16):
        pair = 4 * (i // 4) + (0, 2, 1, 3)[i % 4]
        for which in range(2):
            if bits == 3 and i == 15:
                codes[:, :, pair, which] = sum((words[b] >> (15 + 16 * which) & 1) << b for b in range(3))
            else:
                word, place = divmod(i, 16 // bits)
                codes[:, :, pair, which] = words[word] >> (bits * place + 16 * which) & ((1 << bits) - 1)
    return codes


def warp_product(x, layer: layout.DeviceLinear):
    """What the matvec kernel's warps do, float64: x [8, K padded] -> [8, N padded]."""
    strips, chunks, bits = layer.codes.shape[:3]
    y = np.zeros((8, strips * 32))
    for strip in range(strips):
        sums = np.zeros((32, 2, 4))  # lane, tile of 16 columns, C's registers
        for chunk in range(chunks):
            codes = lane_codes(layer.codes[strip, chunk].astype(np.int64), bits)
            for unit in range(4):
                group = (128 * chunk + 32 * unit) // layer.group_size
                columns = 4 * G[:, None] + np.arange(4)  # (32, 4)
                zero = layer.zeros[strip, group].astype(np.int64)[columns]
                level = codes[:, :, 4 * unit : 4 * unit + 4] - zero[:, :, None, None]  # (32, 4 columns, 4 pairs, 2)
                k = 128 * chunk + 32 * unit + 8 * T[:, None] + np.arange(8)
                b = x[G[:, None], k].reshape(32, 4, 2)
                scale = layer.scales[strip, group].astype(np.float64)[columns]
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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("k", "group_size"), [(256, 32), (288, 64), (416, 128), (160, 160)])
def test_a_warp_multiplies_its_registers_to_the_right_product(bits, k, group_size):
    rng = np.random.default_rng(bits * 1000 + k)
    linear = random_linear(rng, k, 40, bits, group_size)
    layer = layout.to_device(linear, array=np.asarray)
    x = rng.standard_normal((8, k))
    padded = np.zeros((8, layer.codes.shape[1] * layout.ROWS))
    padded[:, :k] = x
    np.testing.assert_allclose(warp_product(padded, layer)[:, :40], reference.matmul(x, linear), rtol=1e-5, atol=1e-4)


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
