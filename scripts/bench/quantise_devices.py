"""Perplexity of SmolLM2-135M quantised on the CPU and on the GPU, and what the GPU's arithmetic changes.

    python scripts/bench/quantise_devices.py MODEL_DIR --ids smollm2_ids.npz [--branches main ...] [--json RESULTS.json]

The ids file holds calibration windows [32, 512] and evaluation windows [12, 2048]. Both models are evaluated by the same
forward pass, on the GPU: fp16 weights, float32 logits. For the first branch the calibration pass is varied too: a float32
residual stream, and a Hessian of float32 activations summed in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from quantise_7b import facts_of_machine

from tinygptq import placement_cuda
from tinygptq.branches import BRANCHES
from tinygptq.checkpoint import Checkpoint, load_checkpoint
from tinygptq.config import QuantizeConfig
from tinygptq.gptq import Hessian, Solution
from tinygptq.kernels.cuda import calibration
from tinygptq.kernels.cuda.cublas import cublas
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.model import Llama
from tinygptq.placement import Host
from tinygptq.placement_cuda import Card, on_card
from tinygptq.quantization import quantize_blocks
from tinygptq.weights import DenseLinear, Weights

Solutions = dict[str, Solution]


class WideHessian(Card):
    """A GPU whose Hessians are sums of float32 products of float32 numbers."""

    def hessian(self, in_features: int) -> Hessian:
        return Hessian(in_features)


def solutions_of(
    place: Host, source: Checkpoint, ids: np.ndarray, config: QuantizeConfig, most: int | None = None
) -> tuple[Solutions, float]:
    """Every linear's solution (or the first few), arrays NumPy's, and the seconds it took."""
    started, found = time.perf_counter(), {}
    with place.session():
        solved = quantize_blocks(place.model(source), ids, config, place=place)
        for name, solution, _ in itertools.islice(solved, most):
            arrays = (getattr(solution, part) for part in ("codes", "scales", "zeros", "g_idx"))
            host = (array if isinstance(array, np.ndarray) else array.get() for array in arrays)
            found[name] = Solution(*host, solution.loss, solution.damp)
        solved.close()
    return found, time.perf_counter() - started


def perplexity(source: Checkpoint, solutions: Solutions, ids: np.ndarray) -> float:
    """Over windows ids [n, T], each alone; the first token of each is not predicted."""
    cp, linears = cupy(), {}
    for name, linear in source.weights.linears.items():
        weight = solutions[name].dequantize() if name in solutions else np.asarray(linear.weight, np.float32)
        linears[name] = DenseLinear(cp.asarray(np.ascontiguousarray(weight, np.float16)))
    norms = {name: cp.asarray(np.asarray(norm, np.float32)) for name, norm in source.weights.norms.items()}
    table, head = on_card(source.weights.embedding), on_card(source.weights.head).astype(np.float16)
    nats, stream = [], cp.cuda.Stream(non_blocking=True)
    with stream:
        model = Llama(source.config, Weights(table, head, norms, linears), calibration)
        for window in ids:
            x = calibration.rms_norm(model.hidden(cp.asarray(window[None])), norms["model.norm"], source.config.rms_norm_eps)
            logits = cp.empty((len(window), len(head)), np.float32)
            cublas().multiply_transposed(x[0], head, logits, stream.ptr)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[cp.arange(len(window) - 1), cp.asarray(window[1:])]
            nats.append((cp.log(cp.exp(logits[:-1]).sum(axis=1)) - chosen).get())
    return float(np.exp(np.concatenate(nats).astype(np.float64).mean()))


def equal_share(a: Solutions, b: Solutions, parts: tuple[str, ...]) -> dict[str, float]:
    """The share of equal codes, for the first block's linears named."""
    names = [f"model.layers.0.self_attn.{part}_proj" for part in parts]
    return {name.rpartition(".")[2]: float((a[name].codes == b[name].codes).mean()) for name in names}


def same_bits(a: Solutions, b: Solutions) -> bool:
    parts = ("codes", "scales", "zeros", "g_idx")
    return all(np.array_equal(getattr(a[name], part), getattr(b[name], part)) for name in a for part in parts)


def compare(
    source: Checkpoint, branch: str, windows: np.ndarray, text: np.ndarray, whole: int, codes: dict[str, np.ndarray]
) -> dict[str, Any]:
    """whole: how many linears are quantised on the CPU too, at least the first four; 0 for none, whose GPU codes go to
    ``codes`` for a comparison elsewhere."""
    config = BRANCHES[branch]
    there, seconds = solutions_of(Card(), source, windows, config)
    again, _ = solutions_of(Card(), source, windows, config)
    row: dict[str, Any] = {"perplexity_gpu": perplexity(source, there, text), "seconds_gpu": seconds}
    row["two_runs_equal"] = same_bits(there, again)
    if whole:
        here, host_seconds = solutions_of(Host(), source, windows, config, whole)
        row["equal_codes"] = equal_share(here, there, ("q", "k", "v", "o"))
        if len(here) == len(there):
            row |= {"perplexity_cpu": perplexity(source, here, text), "seconds_cpu": host_seconds}
    else:
        codes |= {f"{branch} {name}": solution.codes for name, solution in itertools.islice(there.items(), 4)}
    print(branch, row, flush=True)
    return row


def vary(source: Checkpoint, branch: str, windows: np.ndarray, text: np.ndarray) -> dict[str, Any]:
    """Other widths of the calibration pass, beside the usual ones."""
    config, rows = BRANCHES[branch], {}
    usual, _ = solutions_of(Card(), source, windows, config)
    for name, kind, residual in (("float32 residual", Card, np.float32), ("float32 Hessian", WideHessian, np.float16),
                                 ("both", WideHessian, np.float32)):  # fmt: skip
        placement_cuda.RESIDUAL, kept = residual, placement_cuda.RESIDUAL
        try:
            found, _ = solutions_of(kind(), source, windows, config)
        finally:
            placement_cuda.RESIDUAL = kept
        equal = equal_share(usual, found, ("q", "k", "v", "o"))
        rows[name] = {"perplexity": perplexity(source, found, text), "equal_codes": equal}
        print(f"{name:32} {rows[name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--branches", nargs="+", choices=tuple(BRANCHES), default=list(BRANCHES))
    parser.add_argument("--cpu-linears", type=int, default=10**6, metavar="N", help="how many are quantised on the CPU too")
    parser.add_argument("--codes", type=Path, help="with --cpu-linears 0: keep the GPU's codes of four linears here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ids, source, codes = np.load(args.ids), load_checkpoint(args.model), {}
    windows, text = ids["calibration"].astype(np.int64), ids["evaluation"].astype(np.int64)
    result = {**facts_of_machine(), "perplexity_fp16": perplexity(source, {}, text)}
    print(f"unquantised {result['perplexity_fp16']:.4f}", flush=True)
    result["varied"] = {args.branches[0]: vary(source, args.branches[0], windows, text)}
    result["branches"] = {
        branch: compare(source, branch, windows, text, args.cpu_linears, codes) for branch in args.branches
    }
    if args.codes:
        np.savez_compressed(args.codes, **codes)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
