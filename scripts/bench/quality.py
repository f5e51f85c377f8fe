"""Perplexity of SmolLM2-135M quantised here, beside what the original GPTQ implementation gave on the same tokens.

    python scripts/bench/quality.py MODEL_DIR --reference original_gptq.json --ids smollm2_ids.npz
                                    [--recipes fast plain torch] [--orders N] [--only NAME ...] [--out RESULTS.json]

The reference file holds the original's perplexities and says the protocol; the ids file holds the calibration windows
[32, 512] and the evaluation windows [12, 2048]. Each configuration is quantised in memory by rounding and by GPTQ, once for
each recipe. What RESULTS.json holds already of other recipes stays there, and so does rounding.

GPTQ is chaotic: a sum taken in another order moves one code, and that code every one after it. With ``--orders N`` the
calibration windows also come in N - 1 other orders, which is the same problem but for the rounding of sums, and how far the
perplexities lie apart is what one of them alone cannot tell. The recipe ``torch`` is the paper's algorithm in torch
(torch_gptq.py): it says how far apart another implementation's are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from facts import facts_of, processor, save
from torch_gptq import peer

from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.measure.evaluate import perplexity
from tinygptq.quantization.blocks import quantize_blocks
from tinygptq.quantization.placement import fast_model
from tinygptq.weights import DenseLinear, Linear


class Subject:
    """The model that is quantised in every way, and the text that tells how well."""

    def __init__(self, folder: Path, calibration: np.ndarray, evaluation: np.ndarray) -> None:
        self.folder, self.calibration, self.evaluation = folder, calibration, evaluation
        self.source = load_checkpoint(folder)

    def perplexity(self, linears: Mapping[str, Linear]) -> float:
        model = fast_model(self.source, dict(linears))
        return perplexity(model, self.evaluation.ravel(), self.evaluation.shape[1]).perplexity

    def unquantised(self) -> float:
        return self.perplexity(self.source.weights.linears)

    def rounded(self, settings: dict) -> float:
        return self.perplexity(self._quantise(QuantizeConfig(**settings | {"desc_act": False}), None)[0])

    def quantised(self, recipe: str, settings: dict, order: np.ndarray) -> tuple[float, float, dict[str, float] | None]:
        """Perplexity, seconds, and the losses of the first block's linears where the recipe knows them."""
        started, losses = time.perf_counter(), None
        if recipe == "torch":
            linears = self._quantise_in_torch(settings, self.calibration[order])
        else:
            config = QuantizeConfig(**settings, recipe=RECIPES[recipe])
            linears, losses = self._quantise(config, self.calibration[order])
        seconds = time.perf_counter() - started
        return self.perplexity(linears), seconds, losses

    def _quantise(self, config: QuantizeConfig, windows: np.ndarray | None) -> tuple[dict[str, Linear], dict[str, float]]:
        model = fast_model(self.source, dict(self.source.weights.linears))
        reports = [report for _, _, report in quantize_blocks(model, windows, config)]
        return model.weights.linears, {r.name.removeprefix("model.layers."): r.loss for r in reports[:7]}

    def _quantise_in_torch(self, settings: dict, windows: np.ndarray) -> dict[str, Linear]:
        assert settings["sym"], "the peer knows symmetric grids alone"
        chosen = settings["bits"], settings["group_size"], settings["desc_act"]
        model, _ = peer(str(self.folder), windows.tolist(), os.cpu_count(), *chosen)
        return {
            name: DenseLinear(model.get_submodule(name).weight.numpy(force=True)) for name in self.source.weights.linears
        }


def main() -> None:
    args = arguments()
    reference, ids = json.loads(args.reference.read_text()), np.load(args.ids)
    subject = Subject(args.model, ids["calibration"].astype(np.int64), ids["evaluation"].astype(np.int64))
    baseline = subject.unquantised()
    print(f"fp32: {baseline:.4f} (reference {reference['perplexity_fp32']})\n")
    print(f"{'':22} {'recipe':8} {'here':>9} {'original':>9} {'ratio':>7} {'seconds':>8}")
    rows = {row["name"]: row for row in earlier(args.out)}
    rounded = {(row["bits"], row["group_size"]): row["rtn"]["perplexity"] for row in rows.values()}  # it knows no order
    for want in reference["configs"]:
        if args.only and want["name"] not in args.only:
            continue
        settings = {key: want[key] for key in ("bits", "group_size", "sym", "desc_act")}
        row = rows.setdefault(want["name"], {"name": want["name"], **settings})
        key = want["bits"], want["group_size"]
        if key not in rounded:
            rounded[key] = subject.rounded(settings)
        report(want["name"], "rounding", rounded[key], want["perplexity_rtn"])
        row["rtn"] = {"perplexity": rounded[key], "original": want["perplexity_rtn"]}
        for recipe in args.recipes:
            for i, order in enumerate(orders(len(subject.calibration), args.orders)):
                found, seconds, losses = subject.quantised(recipe, settings, order)
                report(want["name"], recipe, found, want["perplexity_gptq"], f"{seconds:8.1f}")
                if i == 0:
                    row[recipe] = {"perplexity": found, "original": want["perplexity_gptq"], "layer0_losses": losses}
                else:
                    row[recipe].setdefault("in_other_orders", []).append(found)
                if args.out:
                    save_all(args.out, reference, baseline, list(rows.values()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=(*RECIPES, "torch"), default=["fast", "plain"])
    parser.add_argument("--orders", type=int, default=1, help="of the calibration windows (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="just these configurations of the reference")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def earlier(out: Path | None) -> list[dict]:
    """The configurations that a file of results holds already."""
    return json.loads(out.read_text())["configs"] if out and out.exists() else []


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
