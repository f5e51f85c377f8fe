"""The paper's algorithm in torch over transformers' own blocks: what quantise_cpu.py and quality.py compare with.

Driven as well as it can be: one stage of a block at a time, so that every linear runs once over the text; attention by
scaled_dot_product_attention; corrections in blocks of 128 columns, as in Algorithm 1 of Frantar et al. 2022. It keeps its
codes and writes no file.
"""

from __future__ import annotations

import time

BLOCK = 128  # columns whose corrections are gathered before the others get them
AT_ONCE = 16  # windows that go through a stage together


def gptq(W, H, bits: int, group_size: int, desc_act: bool = False):
    """Algorithm 1 in torch float32, symmetric: W [out, in] becomes what its codes stand for, in place."""
    import torch

    if desc_act:  # columns by falling diagonal, groups in that order
        order = H.diagonal().argsort(descending=True)
        sorted_W = W[:, order]
        gptq(sorted_W, H[order][:, order], bits, group_size)
        W[:, order] = sorted_W
        return
    columns, half = W.shape[1], 2 ** (bits - 1)
    H[range(columns), range(columns)] += 0.01 * H.diagonal().mean()
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        w, inverse = W[:, start:end].clone(), Hinv[start:end, start:end]
        errors = torch.zeros_like(w)
        for i in range(end - start):
            if (start + i) % group_size == 0:
                group = w[:, i : i + group_size]
                scale = (2 * group.abs().amax(1) / (2 * half - 1)).clamp(min=1e-8)
            column = w[:, i]
            rounded = scale * (torch.round(column / scale).clamp(-half, half - 1))
            error = (column - rounded) / inverse[i, i]
            w[:, i:] -= error[:, None] * inverse[i, i:]
            W[:, start + i], errors[:, i] = rounded, error
        W[:, end:] -= errors @ Hinv[start:end, end:]


def solve(linears, inputs: list, *settings) -> None:
    """Quantise linears that share their inputs, a list of [B, T, in]."""
    H = sum((2 / sum(len(x) for x in inputs)) * (x.flatten(0, 1).T @ x.flatten(0, 1)) for x in inputs)
    for linear in linears:
        gptq(linear.weight.data, H.clone(), *settings)


def peer(folder: str, windows: list[list[int]], threads: int, *settings):
    """(transformers' model, its linears quantised; seconds from the loaded one to that). Settings as :func:`gptq`'s."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    started = time.perf_counter()
    with torch.no_grad():
        batches = torch.tensor(windows).split(AT_ONCE)
        hidden = [model.model.embed_tokens(batch) for batch in batches]
        turn = model.model.rotary_emb(hidden[0], torch.arange(len(windows[0]))[None])
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            x = [block.input_layernorm(h) for h in hidden]
            solve((attention.k_proj, attention.v_proj, attention.q_proj), x, *settings)
            for i, one in enumerate(x):
                q, k, v = (linear(one).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                           for linear in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
                q, k = apply_rotary_pos_emb(q, k, *turn)
                mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                x[i] = mixed.transpose(1, 2).flatten(2)
            solve((attention.o_proj,), x, *settings)
            hidden = [h + attention.o_proj(one) for h, one in zip(hidden, x, strict=True)]
            x = [block.post_attention_layernorm(h) for h in hidden]
            solve((mlp.up_proj, mlp.gate_proj), x, *settings)
            x = [mlp.act_fn(mlp.gate_proj(one)) * mlp.up_proj(one) for one in x]
            solve((mlp.down_proj,), x, *settings)
            hidden = [h + mlp.down_proj(one) for h, one in zip(hidden, x, strict=True)]
    return model, time.perf_counter() - started
