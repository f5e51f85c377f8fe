"""Perplexity of SmolLM2-135M quantised on the CPU and on the GPU, and what the GPU's arithmetic changes.

    python scripts/bench/quantise_devices.py cpu MODEL_DIR KEPT.npz --ids smollm2_ids.npz [--branches main ...]
    python scripts/bench/quantise_devices.py gpu MODEL_DIR KEPT.npz --ids smollm2_ids.npz [--branches main ...] [--vary]
                                             [--json RESULTS.json]

``cpu`` quantises on this machine's processor and keeps perplexities and the codes of block 0's attention; ``gpu`` does the
same on the GPU, twice, and compares. The ids file holds calibration windows [32, 512] and evaluation windows [12, 2048]. All
models are evaluated by the same forward pass, on the GPU: fp16 weights, float32 logits. With --vary the first branch is
quantised with other widths too: a float32 residual stream, and Hessians by tensor cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from facts import card, facts_of, save

from tinygptq.branches import BRANCHES
from tinygptq.config import QuantizeConfig
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.gptq import Hessian
from tinygptq.kernels.cuda import calibration
from tinygptq.kernels.cuda.cublas import cublas
from tinygptq.kernels.cuda.hessian import HalfHessian
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.model import Llama
from tinygptq.ops import to_numpy
from tinygptq.quantization import placement_cuda
from tinygptq.quantization.blocks import quantize_blocks
from tinygptq.quantization.placement import Host
from tinygptq.quantization.placement_cuda import Card, on_card
from tinygptq.weights import DenseLinear, Weights

FIRST = [f"model.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "o")]
Outcome = tuple[dict[str, Any], dict[str, np.ndarray], float]


class Halves(Card):
    """A GPU that makes all Hessians on tensor cores, as it does those of wider inputs than this model's."""

    def hessian(self, in_features: int) -> Hessian:
        return HalfHessian(in_features)


def dense_on_card(source: Checkpoint) -> dict[str, DenseLinear]:
    """The unquantised linears."""
    return {name: DenseLinear(on_card(linear.weight).astype(np.float16)) for name, linear in source.weights.linears.items()}


def quantised(place: Host, source: Checkpoint, ids: np.ndarray, config: QuantizeConfig) -> Outcome:
    """The quantised linears in fp16 on the GPU, all codes and grids as NumPy arrays, and the seconds it took."""
    cp, started = cupy(), time.perf_counter()
    with place.session():
        model = place.model(source)
        place.announce(source, ids, config)
        solutions = {name: solution for name, solution, _ in quantize_blocks(model, ids, config, place=place)}
    seconds, linears, arrays = time.perf_counter() - started, {}, {}
    for name, solution in solutions.items():
        linears[name] = DenseLinear(cp.asarray(np.ascontiguousarray(to_numpy(solution.dequantize()), np.float16)))
        arrays |= {f"{name}.{part}": to_numpy(getattr(solution, part)) for part in ("codes", "scales", "zeros", "g_idx")}
    return linears, arrays, seconds


def perplexity(source: Checkpoint, linears: dict[str, DenseLinear], ids: np.ndarray) -> float:
    """Over windows ids [n, T], each alone; the first token of each is not predicted."""
    cp = cupy()
    norms = {name: cp.asarray(np.asarray(norm, np.float32)) for name, norm in source.weights.norms.items()}
    table, head = on_card(source.weights.embedding), on_card(source.weights.head).astype(np.float16)
    nats, stream = [], cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        model = Llama(source.config, Weights(table, head, norms, linears), calibration)
        for window in ids:
            x = calibration.rms_norm(model.hidden(cp.asarray(window[None])), norms["model.norm"], source.config.rms_norm_eps)
            logits = cp.empty((len(window), len(head)), np.float32)
            cublas().multiply_transposed(x[0].astype(np.float16), head, logits, stream.ptr)
            logits -= logits.max(axis=1, keepdims=True)
            chosen = logits[cp.arange(len(window) - 1), cp.asarray(window[1:])]
            nats.append((cp.log(cp.exp(logits[:-1]).sum(axis=1)) - chosen).get())
    return float(np.exp(np.concatenate(nats).astype(np.float64).mean()))


def equal_share(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of equal codes, for the first block's attention."""
    return {name.rpartition(".")[2]: float((a[f"{name}.codes"] == b[f"{name}.codes"]).mean()) for name in FIRST}


def on_the_processor(args: argparse.Namespace, source: Checkpoint, windows: np.ndarray, text: np.ndarray) -> None:
    kept: dict[str, Any] = {}
    for branch in args.branches:
        linears, arrays, seconds = quantised(Host(), source, windows, BRANCHES[branch])
        kept |= {f"{branch} {name}": arrays[f"{name}.codes"] for name in FIRST}
        kept[f"{branch} perplexity"], kept[f"{branch} seconds"] = perplexity(source, linears, text), seconds
        print(f"{branch:32} cpu {kept[f'{branch} perplexity']:.4f} {seconds:.1f} s", flush=True)
    np.savez_compressed(args.kept, **kept)


def compare(source: Checkpoint, branch: str, windows: np.ndarray, text: np.ndarray, kept: Any) -> dict[str, Any]:
    """The branch on the GPU, twice, beside what the processor made of it."""
    linears, arrays, _ = quantised(Card(), source, windows, BRANCHES[branch])
    _, again, seconds = quantised(Card(), source, windows, BRANCHES[branch])
    here = {f"{name}.codes": kept[f"{branch} {name}"] for name in FIRST}
    row = {
        "perplexity": {"cpu": float(kept[f"{branch} perplexity"]), "gpu": perplexity(source, linears, text)},
        "seconds": {"cpu": float(kept[f"{branch} seconds"]), "gpu": seconds},
        "equal_codes": equal_share(here, arrays),
        "two_runs_equal": all(np.array_equal(arrays[name], again[name]) for name in arrays),
    }
    print(branch, json.dumps(row), flush=True)
    return row


def vary(source: Checkpoint, branch: str, windows: np.ndarray, text: np.ndarray, kept: Any) -> dict[str, Any]:
    """Other widths of the calibration pass, beside the processor's codes."""
    rows, here = {}, {f"{name}.codes": kept[f"{branch} {name}"] for name in FIRST}
    for name, kind, residual in (("float32 residual", Card, np.float32), ("Hessian on tensor cores", Halves, np.float16)):
        placement_cuda.RESIDUAL, usual = residual, placement_cuda.RESIDUAL
        try:
            linears, arrays, _ = quantised(kind(), source, windows, BRANCHES[branch])
        finally:
            placement_cuda.RESIDUAL = usual
        rows[name] = {"perplexity": perplexity(source, linears, text), "equal_codes": equal_share(here, arrays)}
        print(f"{name:32} {rows[name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("cpu", "gpu"))
    parser.add_argument("model", type=Path)
    parser.add_argument("kept", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--branches", nargs="+", choices=tuple(BRANCHES), default=list(BRANCHES))
    parser.add_argument("--vary", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ids, source = np.load(args.ids), load_checkpoint(args.model)
    windows, text = ids["calibration"].astype(np.int64), ids["evaluation"].astype(np.int64)
    if args.where == "cpu":
        on_the_processor(args, source, windows, text)
        return
    kept = np.load(args.kept)
    result = {**facts_of(card()), "perplexity_fp16": perplexity(source, dense_on_card(source), text)}
    print(f"unquantised {result['perplexity_fp16']:.4f}", flush=True)
    result["branches"] = {branch: compare(source, branch, windows, text, kept) for branch in args.branches}
    if args.vary:
        result["varied"] = {args.branches[0]: vary(source, args.branches[0], windows, text, kept)}
    save(result, args.json)


if __name__ == "__main__":
    main()
