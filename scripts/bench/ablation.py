"""What each part of a recipe is worth: one model quantised with the parts added one after another.

    python scripts/bench/ablation.py MODEL_DIR --calibration TEXT --evaluation TEXT [--nsamples 32] [--seqlen 512]
                                     [--windows 12] [--window 2048] [--branches ...] [--rungs ...] [--out RESULTS.json]
    python scripts/bench/ablation.py MODEL_DIR --ids smollm2_ids.npz

Texts are encoded as `tinygptq quantize` does; an ids file holds the windows themselves, under ``calibration`` and
``evaluation``. Nothing is written but the results: models are quantised in memory.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path

import numba
import numpy as np
from quality import cpu_name

from tinygptq import __version__
from tinygptq.calibrate import calibration_windows
from tinygptq.checkpoint import load_checkpoint
from tinygptq.config import RECIPES, QuantizeConfig
from tinygptq.evaluate import perplexity
from tinygptq.quantization import fast_model, quantize_blocks
from tinygptq.tokenizer import Tokenizer

BRANCHES = {  # bits, group size, act-order: the six published permutations, and two narrower ones
    "main": (4, 128, False),
    "gptq-4bit-32g-actorder_True": (4, 32, True),
    "gptq-4bit-64g-actorder_True": (4, 64, True),
    "gptq-4bit-128g-actorder_True": (4, 128, True),
    "gptq-8bit--1g-actorder_True": (8, -1, True),
    "gptq-8bit-128g-actorder_False": (8, 128, False),
    "3-bit g128 act-order": (3, 128, True),
    "2-bit g64 act-order": (2, 64, True),
}
FAST, BEST = RECIPES["fast"], RECIPES["best"]
RUNGS = {  # each adds one part to the one before it
    "plain": RECIPES["plain"],
    "clip": replace(RECIPES["plain"], clip=True),
    "act-order": replace(FAST, shrink=0.0),
    "shrink (fast)": FAST,
    "refine": replace(FAST, refine=BEST.refine),
    "drift": replace(BEST, residual=0.0),
    "residual (best)": BEST,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    for name, default in (("nsamples", 32), ("seqlen", 512), ("windows", 12), ("window", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--branches", nargs="+", choices=tuple(BRANCHES), default=list(BRANCHES))
    parser.add_argument("--rungs", nargs="+", choices=tuple(RUNGS), default=list(RUNGS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = load_checkpoint(args.model)
    calibration, evaluation = texts(args)

    def measure(model) -> float:
        return perplexity(model, evaluation.ravel(), evaluation.shape[1]).perplexity

    unquantised = measure(fast_model(source, dict(source.weights.linears)))
    print(f"unquantised: {unquantised:.4f}\n{'':30} " + " ".join(f"{name:>16}" for name in args.rungs))
    rows = []
    for branch in args.branches:
        bits, group_size, desc_act = BRANCHES[branch]
        print(f"{branch:30}", end=" ", flush=True)
        for rung in args.rungs:
            config = QuantizeConfig(bits=bits, group_size=group_size, desc_act=desc_act, recipe=RUNGS[rung])
            model, started = fast_model(source, dict(source.weights.linears)), time.perf_counter()
            for _ in quantize_blocks(model, calibration, config):
                pass
            seconds = time.perf_counter() - started
            found = measure(model)
            print(f"{found:9.3f} {seconds:4.0f} s", end=" ", flush=True)
            rows.append(
                {"branch": branch, "rung": rung, "recipe": asdict(RUNGS[rung]), "perplexity": found, "seconds": seconds}
            )
        print()
    if args.out:
        write(args.out, unquantised, rows)


def texts(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Calibration windows and evaluation windows, each int [windows, tokens]."""
    if args.ids:
        ids = np.load(args.ids)
        return ids["calibration"].astype(np.int64), ids["evaluation"].astype(np.int64)
    if not args.calibration or not args.evaluation:
        raise SystemExit("give --ids, or --calibration and --evaluation")
    tokenizer = Tokenizer.from_folder(args.model)
    return (
        calibration_windows(args.calibration, tokenizer, args.nsamples, args.seqlen),
        calibration_windows(args.evaluation, tokenizer, args.windows, args.window),
    )


def write(path: Path, unquantised: float, rows: list[dict]) -> None:
    versions = {"tinygptq": __version__, "numpy": np.__version__, "numba": numba.__version__}
    versions["python"] = platform.python_version()
    facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "versions": versions}
    path.write_text(json.dumps({**facts, "perplexity_unquantised": unquantised, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
