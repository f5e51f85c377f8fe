"""Perplexity of SmolLM2-135M quantised here, beside what the original GPTQ implementation gave on the same tokens.

    python scripts/bench/quality.py MODEL_DIR --reference original_gptq.json --ids smollm2_ids.npz [--recipes fast plain torch]
                                    [--orders N] [--only NAME ...] [--out RESULTS.json]

The reference file holds the original's perplexities and says the protocol; the ids file holds the calibration windows
[32, 512] and the evaluation windows [12, 2048]. Each configuration is quantised in memory by rounding and by GPTQ, once for
each recipe. What RESULTS.json holds already of other recipes stays there, and so does rounding.

GPTQ is chaotic: a sum taken in another order moves one code, and that code every one after it. With ``--orders N`` the
calibration windows also come in N - 1 other orders, which is the same problem but for the rounding of sums, and how far the
perplexities lie apart is what one of them alone cannot tell. The recipe ``torch`` is the paper's algorithm in torch, driven
by quantise_cpu.py: it says how far apart another implementation's are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from facts import facts_of, processor, save
from quantise_cpu import peer

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.measure.evaluate import perplexity
from tinygptq.quantization.blocks import quantize_blocks
from tinygptq.quantization.placement import fast_model
from tinygptq.weights import DenseLinear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=(*RECIPES, "torch"), default=["fast", "plain"])
    parser.add_argument("--orders", type=int, default=1, help="of the calibration windows (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="just these configurations of the reference")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    reference, ids = json.loads(args.reference.read_text()), np.load(args.ids)
    calibration, evaluation = ids["calibration"].astype(np.int64), ids["evaluation"].astype(np.int64)
    source = load_checkpoint(args.model)

    def measure(model) -> float:
        return perplexity(model, evaluation.ravel(), evaluation.shape[1]).perplexity

    def quantized(windows, **choices):
        """A model quantised in memory (rounded without windows), its linears' reports, and the seconds it took."""
        model = fast_model(source, dict(source.weights.linears))
        started = time.perf_counter()
        reports = [report for _, _, report in quantize_blocks(model, windows, QuantizeConfig(**choices))]
        return model, reports, time.perf_counter() - started

    def quantized_in_torch(windows, bits, group_size, desc_act):
        """The same by the peer, its weights evaluated here."""
        model, seconds = peer(str(args.model), windows.tolist(), os.cpu_count(), bits, group_size, desc_act)
        linears = {name: DenseLinear(model.get_submodule(name).weight.numpy(force=True)) for name in source.weights.linears}
        return fast_model(source, linears), seconds

    baseline = measure(fast_model(source, dict(source.weights.linears)))
    print(f"fp32: {baseline:.4f} (reference {reference['perplexity_fp32']})\n")
    print(f"{'':22} {'recipe':8} {'here':>9} {'original':>9} {'ratio':>7} {'seconds':>8}")
    known = json.loads(args.out.read_text())["configs"] if args.out and args.out.exists() else []
    rows = {row["name"]: row for row in known}
    rounded = {(row["bits"], row["group_size"]): row["rtn"]["perplexity"] for row in known}  # rounding knows no order
    for want in reference["configs"]:
        if args.only and want["name"] not in args.only:
            continue
        choices = {key: want[key] for key in ("bits", "group_size", "sym")}
        row = rows.setdefault(want["name"], {"name": want["name"], **choices, "desc_act": want["desc_act"]})
        key = want["bits"], want["group_size"]
        if key not in rounded:
            rounded[key] = measure(quantized(None, **choices)[0])
        report(want["name"], "rounding", rounded[key], want["perplexity_rtn"])
        row["rtn"] = {"perplexity": rounded[key], "original": want["perplexity_rtn"]}
        for recipe in args.recipes:
            found = []
            for order in orders(len(calibration), args.orders):
                windows, losses = calibration[order], None
                if recipe == "torch":
                    model, seconds = quantized_in_torch(windows, want["bits"], want["group_size"], want["desc_act"])
                else:
                    model, reports, seconds = quantized(windows, desc_act=want["desc_act"], recipe=RECIPES[recipe], **choices)
                    losses = {r.name.removeprefix("model.layers."): r.loss for r in reports[:7]}
                found.append(measure(model))
                report(want["name"], recipe, found[-1], want["perplexity_gptq"], f"{seconds:8.1f}")
                if len(found) == 1:
                    row[recipe] = {"perplexity": found[0], "original": want["perplexity_gptq"], "layer0_losses": losses}
                else:
                    row[recipe]["in_other_orders"] = found[1:]
                if args.out:
                    save_all(args.out, reference, baseline, list(rows.values()))


def orders(windows: int, count: int) -> list[np.ndarray]:
    """So many orders of the windows, the first as they are."""
    random = np.random.default_rng(0)
    return [np.arange(windows)] + [random.permutation(windows) for _ in range(count - 1)]


def save_all(out: Path, reference: dict, baseline: float, rows: list[dict]) -> None:
    found = {"protocol": reference["protocol"], "perplexity_fp32": baseline, "configs": rows}
    save({**facts_of(processor()), **found}, out)


def report(name: str, recipe: str, found: float, original: float, seconds: str = "") -> None:
    print(f"{name:22} {recipe:8} {found:9.3f} {original:9.3f} {found / original:7.4f} {seconds}", flush=True)


if __name__ == "__main__":
    main()
