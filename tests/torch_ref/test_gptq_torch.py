"""GPTQ against torch code written from the paper: one column at a time, every correction applied at once."""

from __future__ import annotations

import numpy as np
import pytest

from tinygptq.config import RECIPES, QuantizeConfig, Recipe
from tinygptq.gptq import solve

torch = pytest.importorskip("torch")


def torch_grid(W, bits: int, sym: bool, storage: str):
    """Scale (an fp16 value) and zero of each row of W [rows, group]."""
    maxq = 2**bits - 1
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    exact = (high - low) / maxq
    scale = exact.half()
    if sym:
        scale = (scale.view(torch.int16) - (scale.to(W.dtype) > exact).short()).view(torch.float16)  # fp16, downwards
        return scale.to(W.dtype), torch.full_like(exact, 2 ** (bits - 1))
    scale = scale.to(W.dtype)
    zero = torch.round(-low / scale)
    if storage == "gptq":
        scale = torch.where(zero < 1, (high / (maxq - 1)).half().to(W.dtype), scale)
        zero = zero.clamp(min=1)
    return scale, zero


def torch_clip(W, scale, zero, bits: int, importance):
    """Of 24 widths from 1 down in steps of 1/40, the scale with the least weighted rounding error, row by row."""
    shrunk = [(scale * (1 - step / 40)).half().to(W.dtype) for step in range(1, 24)]
    tried = torch.stack([scale, *shrunk])[..., None]  # (24, rows, 1)
    middle = zero[:, None]
    rounded = tried * ((torch.round(W / tried) + middle).clamp(0, 2**bits - 1) - middle)  # (24, rows, group)
    losses = (W - rounded) ** 2 @ importance  # (24, rows)
    return tried[losses.argmin(0), torch.arange(len(W)), 0]


def torch_gptq(W, H, config: QuantizeConfig):
    """Codes [out, in] in the original column order, scales and zeros [out, G], g_idx [in], loss."""
    W, H, columns = W.clone(), H.clone(), W.shape[1]
    size, maxq = config.rows_per_group(columns), config.max_code
    groups = torch.arange(columns) // size
    act_order = config.desc_act or config.recipe.act_order
    static = config.static_groups or (config.recipe.act_order and not config.desc_act)
    importance = H.diagonal() + config.damp_percent * H.diagonal().mean()

    def find(chunk, weight):
        scale, zero = torch_grid(chunk, config.bits, config.sym, config.checkpoint_format)
        return (torch_clip(chunk, scale, zero, config.bits, weight) if config.recipe.clip else scale), zero

    grids = {}
    if static:
        for g, (chunk, weight) in enumerate(zip(W.split(size, dim=1), importance.split(size), strict=True)):
            grids[g] = find(chunk, weight)
    perm = torch.arange(columns)
    if act_order:
        perm = torch.argsort(H.diagonal(), descending=True, stable=True)
        W, H, importance = W[:, perm], H[perm][:, perm], importance[perm]
        groups = groups[perm] if static else groups
    H += config.damp_percent * H.diagonal().mean() * torch.eye(columns, dtype=H.dtype)
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    codes, loss = torch.empty(W.shape, dtype=torch.uint8), 0.0
    for i in range(columns):
        g = int(groups[i])
        if not static and i % size == 0:
            grids[g] = find(W[:, i : i + size], importance[i : i + size])
        scale, zero = grids[g]
        code = (torch.round(W[:, i] / scale) + zero).clamp(0, maxq)
        err = (W[:, i] - scale * (code - zero)) / Hinv[i, i]
        W[:, i:] -= err[:, None] * Hinv[i, i:]
        codes[:, perm[i]] = code.to(torch.uint8)
        loss += float((err**2).sum()) / 2
    g_idx = torch.empty(columns, dtype=torch.int32)
    g_idx[perm] = groups.to(torch.int32)
    scales, zeros = (torch.stack([grids[g][k] for g in sorted(grids)], dim=1) for k in (0, 1))
    return codes, scales, zeros, g_idx, loss


def problem(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = np.eye(columns) + rng.standard_normal((columns, columns)) / np.sqrt(columns)
    X = rng.standard_normal((3 * columns, columns)) @ mix * np.exp(rng.standard_normal(columns) / 2)
    W = rng.standard_normal((rows, columns)) * 0.02
    W[::5] = abs(W[::5])
    return W, X.T @ X / 8


@pytest.mark.parametrize("recipe", [RECIPES["plain"], RECIPES["fast"], Recipe(clip=True)], ids=["plain", "fast", "clip"])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("sym", "storage"), [(True, "gptq"), (False, "gptq"), (False, "gptq_v2")])
@pytest.mark.parametrize(("bits", "group_size"), [(2, -1), (3, 16), (4, 48), (4, 128), (8, 32)])
def test_codes_are_equal_in_float64(
    bits: int, group_size: int, sym: bool, storage: str, desc_act: bool, static_groups: bool, recipe: Recipe
) -> None:
    config = QuantizeConfig(bits, group_size, desc_act, sym, 0.01, static_groups, checkpoint_format=storage, recipe=recipe)
    W, H = problem(20, 160, seed=bits)
    codes, scales, zeros, g_idx, loss = torch_gptq(torch.from_numpy(W), torch.from_numpy(H), config)
    for method in ("definition", "numba"):
        ours = solve(W, H, config, method=method, dtype=np.float64)
        assert np.array_equal(ours.g_idx, g_idx.numpy())
        assert np.array_equal(ours.scales, scales.numpy().astype(np.float16))
        assert np.array_equal(ours.zeros, zeros.numpy().astype(np.uint16))
        assert np.array_equal(ours.codes, codes.numpy())
        assert ours.loss == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (4, 32), (4, 48), (8, -1)])
def test_losses_are_equal_in_float32(bits: int, group_size: int, desc_act: bool) -> None:
    config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=desc_act, recipe=RECIPES["plain"])
    W, H = (array.astype(np.float32) for array in problem(256, 288, seed=bits))
    loss = torch_gptq(torch.from_numpy(W), torch.from_numpy(H), config)[-1]
    assert solve(W, H, config).loss == pytest.approx(loss, rel=1e-3)
