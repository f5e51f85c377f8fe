"""LLaMA's backward pass, as far as the outputs of its linears: what a change of each output does to the model's prediction.

Read beside model.py, of whose four stages these are the derivatives, in reverse. No gradient of a weight is formed: of each
linear's output y there is dy, the gradient of a loss with respect to it, and ``dy @ W`` hands it on to the input. Of the
activations only the residual stream at the blocks' borders is kept; a block is run once more when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from tinygptq import ops, threads
from tinygptq.model import Llama
from tinygptq.threads import product
from tinygptq.weights import DenseLinear

QUERIES = 128  # rows of the attention matrix formed together: keys beyond the last of them are left out
TOKENS = 32  # whose activations a thread works on together, in the processor's cache
PREDICTIONS = 8  # positions whose probabilities it works on together


def output_gradients(
    model: Llama,
    hidden: Sequence[np.ndarray],
    rng: np.random.Generator,
    within: Callable[[int, int], AbstractContextManager] = lambda layer, step: nullcontext(),
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Gradients of ``-log p(t)`` with respect to every linear's output, t drawn from the model's own prediction p.

    With t drawn so, the expected ``dy dy^T`` is the Fisher information: to second order, an error e of an output changes
    the prediction by the Kullback-Leibler divergence ``1/2 e^T E[dy dy^T] e`` (Martens 2020, arXiv 1412.1193).

    Args:
        model: its linears dense. hidden: what `Llama.embed` gives, [B, T, C] each; every position predicts. rng: draws the
            tokens. within: entered for each block, with its number and how far it is to the next one's.
    Yields:
        The blocks from the last to the first, and within a block the batches in their order: the block's number, and float32
        [B, T, out] for each linear's name within the block.
    """
    layers, stream = range(model.config.num_hidden_layers), [list(hidden)]
    for layer in layers:
        with within(layer, 1):
            stream.append([model.block(layer, h) for h in stream[-1]])
    d = [_prediction_gradient(model, h, rng) for h in stream.pop()]
    for layer in reversed(layers):
        with within(layer, -1):
            for i, h in enumerate(stream.pop()):
                d[i], outputs = block_gradients(model, layer, h, d[i])
                yield layer, outputs


def block_gradients(model: Llama, layer: int, h: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Through one block: h its input and d the gradient of its output, float32 [B, T, C], to the gradient of h.

    Returns:
        That, and the gradients of the seven linears' outputs by their names within the block, each [B, T, out].
    """
    config, functions, xp = model.config, model.functions, ops.array_module(h)
    prefix, B, T = f"model.layers.{layer}.", h.shape[0], h.shape[1]
    grads: dict[str, np.ndarray] = {}

    def back(name: str, dy: np.ndarray) -> np.ndarray:
        grads[name] = dy
        linear = model.weights.linears[prefix + name]
        assert isinstance(linear, DenseLinear)
        return product(dy, _wide(xp.asarray(linear.weight)))

    def heads(name: str, count: int) -> np.ndarray:
        return model.linear(layer, name, x).reshape(B, T, count, -1).swapaxes(1, 2)  # (B, count, T, D)

    x = model.attention_input(layer, h)
    cos, sin = ops.rope_tables(xp.asarray(ops.rope_frequencies(config, T)), 0, T)
    q = functions.apply_rope(heads("self_attn.q_proj", config.num_attention_heads), cos, sin)
    k = functions.apply_rope(heads("self_attn.k_proj", config.num_key_value_heads), cos, sin)
    v = heads("self_attn.v_proj", config.num_key_value_heads)
    middle = h + model.linear(layer, "self_attn.o_proj", functions.causal_attention(q, k, v))

    x = model.mlp_input(layer, middle)
    gate, up = (model.linear(layer, name, x) for name in ("mlp.gate_proj", "mlp.up_proj"))
    dgate, dup = swiglu_gradient(_wide(gate), _wide(up), back("mlp.down_proj", d))
    dx = back("mlp.gate_proj", dgate) + back("mlp.up_proj", dup)
    d = d + rms_norm_gradient(middle, model.weights.norms[prefix + "post_attention_layernorm"], config.rms_norm_eps, dx)

    dq, dk, dv = attention_gradient(_wide(q), _wide(k), _wide(v), back("self_attn.o_proj", d))
    dq, dk = ops.apply_rope(dq, cos, -sin), ops.apply_rope(dk, cos, -sin)  # a rotation's transpose turns back
    dq, dk, dv = (dy.swapaxes(1, 2).reshape(B, T, -1) for dy in (dq, dk, dv))
    dx = back("self_attn.q_proj", dq) + back("self_attn.k_proj", dk) + back("self_attn.v_proj", dv)
    return d + rms_norm_gradient(h, model.weights.norms[prefix + "input_layernorm"], config.rms_norm_eps, dx), grads


def rms_norm_gradient(x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    """Of `ops.rms_norm`, all [..., C]: with ``r = 1 / sqrt(mean(x^2) + eps)``, ``dx = r g - r^3 x mean(g x)``, g = w dy."""
    xp, x = ops.array_module(x), _wide(x)
    g = dy * _wide(xp.asarray(weight))
    r = 1 / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return r * (g - x * (r * r * xp.mean(g * x, axis=-1, keepdims=True)))


def swiglu_gradient(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ``silu(gate) * up``, all [..., I]: ``silu' = s (1 + gate (1 - s))``, s the sigmoid of gate."""
    xp, width, shape = ops.array_module(gate), gate.shape[-1], gate.shape
    gate, up, dy = (x.reshape(-1, width) for x in (gate, up, dy))
    dgate, dup = xp.empty_like(gate), xp.empty_like(gate)

    def part(rows: slice) -> None:
        with np.errstate(over="ignore"):
            s = 1 / (1 + xp.exp(-gate[rows]))
        dup[rows] = dy[rows] * (gate[rows] * s)
        dgate[rows] = dy[rows] * up[rows] * (s * (1 + gate[rows] * (1 - s)))

    share(xp, len(gate), gate.size, part, at_once=TOKENS)
    return dgate.reshape(shape), dup.reshape(shape)


def attention_gradient(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of `ops.causal_attention`: with ``P = softmax(q k^T / sqrt(D))`` and ``y = P v``,

        dP = dy v^T,  dS = P (dP - sum(P dP)) / sqrt(D),  dq = dS k,  dk = dS^T q,  dv = P^T dy.

    Args:
        q: [B, H, T, D]. k, v: [B, G, T, D], each for H/G heads in a row. dy: [B, T, H * D].
    Returns:
        The gradients of q, k and v, in their shapes.
    """
    xp, (B, H, T, D), G = ops.array_module(q), q.shape, k.shape[1]
    q = q.reshape(B * G, H // G, T, D)
    dy = dy.reshape(B, T, G, H // G, D).transpose(0, 2, 3, 1, 4).reshape(q.shape)
    k, v = (x.reshape(B * G, 1, T, D) for x in (k, v))
    dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)

    def part(groups: slice) -> None:
        for start in range(0, T, QUERIES):
            rows, seen = slice(start, start + QUERIES), slice(0, min(start + QUERIES, T))
            q1, dy1, k1, v1 = q[groups, :, rows], dy[groups, :, rows], k[groups, :, seen], v[groups, :, seen]
            scores = q1 @ k1.swapaxes(-1, -2) * np.float32(D**-0.5)  # (groups, H/G, rows, seen)
            future = xp.arange(scores.shape[3]) > xp.arange(start, scores.shape[3])[:, None]
            P = ops.softmax(xp.where(future, np.float32(-np.inf), scores))
            dP = dy1 @ v1.swapaxes(-1, -2)
            dS = P * (dP - (P * dP).sum(axis=-1, keepdims=True)) * np.float32(D**-0.5)
            dq[groups, :, rows] = dS @ k1
            dk[groups, :, seen] += (dS.swapaxes(-1, -2) @ q1).sum(axis=1, keepdims=True)
            dv[groups, :, seen] += (P.swapaxes(-1, -2) @ dy1).sum(axis=1, keepdims=True)

    share(xp, B * G, 6 * q.size * T, part)
    return dq.reshape(B, H, T, D), dk.reshape(B, G, T, D), dv.reshape(B, G, T, D)


def _prediction_gradient(model: Llama, h: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gradient of ``-log p(t)`` with respect to the last block's output h [B, T, C], t drawn from p at each position."""
    xp = ops.array_module(h)
    head, draws = _wide(xp.asarray(model.weights.head)), xp.asarray(rng.random((*h.shape[:2], 1), np.float32))
    d = xp.empty(h.shape, np.float32)
    for b in range(len(h)):  # a window's logits at a time
        p = _wide(model.logits(h[b : b + 1])[0])  # (T, vocab)

        def part(rows: slice, p: Any = p, b: int = b) -> None:
            p[rows] = ops.softmax(p[rows])
            t = (xp.cumsum(p[rows], axis=-1) < draws[b, rows]).sum(axis=-1)
            p[rows][xp.arange(len(t)), xp.minimum(t, p.shape[1] - 1)] -= 1

        share(xp, len(p), p.size, part, at_once=PREDICTIONS)
        d[b] = product(p, head)
    return rms_norm_gradient(h, model.weights.norms["model.norm"], model.config.rms_norm_eps, d)


def _wide(x: Any) -> Any:
    """In float32, which gradients need; on a GPU activations may be in float16."""
    return x.astype(np.float32, copy=False)


def share(xp: Any, rows: int, work: int, part: Any, at_once: int = 1) -> None:
    """Call ``part`` for slices that cover so many rows, on a processor about ``at_once`` in each."""
    if xp is np:
        threads.share(rows, work, part, slices=max(1, rows // (at_once * threads.count())))
    else:
        part(slice(0, rows))
