"""How much the model's prediction depends on each linear's outputs, measured on calibration text before any is quantised."""

from __future__ import annotations

import itertools
import logging

import numpy as np
from tqdm import tqdm

from tinygptq.backward import output_gradients
from tinygptq.gptq import Hessian
from tinygptq.model import Llama
from tinygptq.ops import array_module, to_numpy
from tinygptq.quantization.placement import Host

TOKENS = 4096  # of the calibration text: twice as many lower the divergence by 3 % more, and take as long as all of GPTQ
TOKENS_AT_ONCE = 2048
WIDTH = 768  # outputs in a block, at most
SEED = 0  # of the tokens drawn from the model's predictions

log = logging.getLogger("tinygptq")


def output_matrices(model: Llama, ids: np.ndarray, place: Host) -> dict[str, list[np.ndarray]]:
    """``A = sum over tokens of dy dy^T / |dy|`` for every linear, dy the gradient of its output (see backward.py).

    The plain sum would be the Fisher information itself. But some tokens' gradients are a thousand times as long as others',
    and it would be about these few alone; with each divided by its length once, A says the same of text it was not measured
    on to a larger part, and from fewer tokens.

    Args:
        model: the unquantised one. ids: calibration windows int [samples, T], of which whole ones are used, evenly spaced,
            as many as hold TOKENS tokens.
    Returns:
        By the linear's full name, A's blocks along the diagonal: NumPy's float32 [n, n], n about equal and at most WIDTH.
    """
    count = min(len(ids), max(1, TOKENS // ids.shape[1]))
    ids = ids[np.arange(count) * len(ids) // count]
    size, layers = max(1, TOKENS_AT_ONCE // ids.shape[1]), model.config.num_hidden_layers
    hidden = [batch for i in range(0, count, size) for batch in place.embed(model, ids[i : i + size])]
    kept = sum((b - a) ** 2 for _, out in model.config.linear_shapes().values() for a, b in block_bounds(out))
    stream = sum(h.nbytes for h in hidden)
    log.info("gradients: of %d tokens; about %.1f GB for a time, the residual stream at every block, and %.1f GB of sums",
             ids.size, layers * stream / 1e9, layers * 4 * kept / 1e9)  # fmt: skip
    gradients = output_gradients(
        place.with_head(model), hidden, np.random.default_rng(SEED), lambda layer, step: place.block(model, layer, step)
    )
    found: dict[str, list[Hessian]] = {}
    with tqdm(total=len(hidden) * layers, desc="gradients", unit="block", disable=None, leave=False) as bar:
        for layer, outputs in place.clock.each("backward", gradients):
            with place.clock("backward"):
                for name, dy in outputs.items():
                    bounds, dy = block_bounds(dy.shape[-1]), tempered(dy)
                    blocks = found.setdefault(f"model.layers.{layer}.{name}", [Hessian(b - a) for a, b in bounds])
                    for hessian, (a, b) in zip(blocks, bounds, strict=True):
                        hessian.add(dy[..., a:b])
            bar.update()
    return {name: [to_numpy(hessian.H) for hessian in blocks] for name, blocks in found.items()}


def block_bounds(out: int) -> list[tuple[int, int]]:
    """Where the blocks of a matrix of so many outputs begin and end."""
    count = -(-out // WIDTH)
    return list(itertools.pairwise(out * i // count for i in range(count + 1)))


def tempered(dy: np.ndarray) -> np.ndarray:
    """``dy / sqrt(|dy|)`` of each token, [B, T, out]: in a sum of its squares it weighs as much as it is long."""
    xp = array_module(dy)
    length = xp.sqrt((dy * dy).sum(axis=-1, keepdims=True))
    return dy / xp.sqrt(xp.where(length > 0, length, 1))
