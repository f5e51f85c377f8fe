"""Time to quantise a model on the CPU: tinygptq beside the paper's algorithm in torch over transformers' own blocks.

    python scripts/bench/quantise_cpu.py MODEL --text FILE.txt [--nsamples 32] [--seqlen 512] [--group-size 128]
        [--threads 2] [--recipes fast plain] [--out FILE.json]

Both sides see the same tokens, each in a process of its own, one after the other: the peer first, between the recipes, and
last, so that a machine whose speed drifts shows it. The peer is driven as well as it can be: one stage of a block at a time,
so that every linear runs once over the text; attention by scaled_dot_product_attention; corrections in blocks of 128
columns, as in Algorithm 1 of Frantar et al. 2022. It keeps its codes and writes no file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from facts import facts_of, processor, save

BLOCK = 128  # columns whose corrections are gathered before the others get them
AT_ONCE = 16  # windows that go through a stage together


# ------------------------------------------------------------------------------------------------ the peer


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


# ------------------------------------------------------------------------------------------------ the comparison


def ours(args: argparse.Namespace, recipe: str) -> float:
    """Seconds of a whole `tinygptq quantize`, from its start to the closed folder."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"dataset": args.text, "nsamples": args.nsamples, "seqlen": args.seqlen, "group-size": args.group_size}
        command = [sys.executable, "-m", "tinygptq.cli", "quantize", args.model, f"{folder}/out", "--recipe", recipe]
        command += [f"--{name}={value}" for name, value in settings.items()]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"NUMBA_NUM_THREADS": str(args.threads)})
        return time.perf_counter() - started


def theirs(args: argparse.Namespace) -> float:
    run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peer"], check=True, stdout=subprocess.PIPE)
    return float(run.stdout)


def windows_of(args: argparse.Namespace) -> list[list[int]]:
    from tinygptq.calibrate import calibration_windows
    from tinygptq.tokenizer import Tokenizer

    ids = calibration_windows(str(args.text), Tokenizer.from_folder(args.model), args.nsamples, args.seqlen, 0)
    return ids.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["fast", "plain"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        print(peer(args.model, windows_of(args), args.threads, 4, args.group_size)[1])
        return
    peers, found = [theirs(args)], {}
    for recipe in args.recipes:
        found[recipe] = ours(args, recipe)
        peers.append(theirs(args))
    result = {
        **facts_of(processor()), "threads": args.threads, "model": Path(args.model).name,
        "tokens": args.nsamples * args.seqlen, "bits": 4, "group_size": args.group_size,
        "seconds": found, "torch_seconds": peers,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    save(result, args.out)


if __name__ == "__main__":
    main()
