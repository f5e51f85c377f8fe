"""Perplexity of SmolLM2-135M quantised here, beside what the original GPTQ implementation gave on the same tokens.

    python scripts/bench/quality.py MODEL_DIR --reference original_gptq.json --ids smollm2_ids.npz [--out RESULTS.json]

The reference file holds the original's perplexities and says the protocol; the ids file holds the calibration windows
[32, 512] and the evaluation windows [12, 2048]. Each configuration is quantised in memory by rounding and by GPTQ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import numba
import numpy as np

from tinygptq import __version__
from tinygptq.checkpoint import load_checkpoint
from tinygptq.config import QuantizeConfig
from tinygptq.evaluate import perplexity
from tinygptq.quantization import fast_model, quantize_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=int, help="just the first N configurations")
    args = parser.parse_args()
    reference, ids = json.loads(args.reference.read_text()), np.load(args.ids)
    calibration, evaluation = ids["calibration"].astype(np.int64), ids["evaluation"].astype(np.int64)
    source = load_checkpoint(args.model)

    def measure(model) -> float:
        return perplexity(model, evaluation.ravel(), evaluation.shape[1]).perplexity

    baseline = measure(fast_model(source, dict(source.weights.linears)))
    print(f"fp32: {baseline:.4f} (reference {reference['perplexity_fp32']})\n")
    print(f"{'':22} {'RTN':>9} {'original':>9} | {'GPTQ':>9} {'original':>9} {'ratio':>7} | {'quantise, s':>11}")
    rows = []
    for want in reference["configs"][: args.only]:
        config = QuantizeConfig(want["bits"], want["group_size"], desc_act=want["desc_act"], sym=want["sym"])
        row = {"name": want["name"], "original_gptq": want["perplexity_gptq"], "original_rtn": want["perplexity_rtn"]}
        for method, windows in (("rtn", None), ("gptq", calibration)):
            model = fast_model(source, dict(source.weights.linears))
            started = time.perf_counter()
            reports = [report for _, _, report in quantize_blocks(model, windows, config)]
            seconds = time.perf_counter() - started
            row[f"{method}_perplexity"] = measure(model)
            if method == "gptq":
                row["layer0_losses"] = {r.name.removeprefix("model.layers."): r.loss for r in reports[:7]}
        rows.append(row)
        ratio = row["gptq_perplexity"] / row["original_gptq"]
        print(
            f"{row['name']:22} {row['rtn_perplexity']:9.3f} {row['original_rtn']:9.3f} | {row['gptq_perplexity']:9.3f} "
            f"{row['original_gptq']:9.3f} {ratio:7.4f} | {seconds:11.1f}",
            flush=True,
        )
    if args.out:
        versions = {"tinygptq": __version__, "numpy": np.__version__, "numba": numba.__version__}
        versions["python"] = platform.python_version()
        facts = {"date": datetime.date.today().isoformat(), "device": cpu_name(), "versions": versions}
        result = {**facts, "protocol": reference["protocol"], "perplexity_fp32": baseline, "configs": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def cpu_name() -> str:
    """The processor's name, as the system gives it, and how many cores of it."""
    names = [platform.processor()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    return f"{names[0]}, {numba.config.NUMBA_NUM_THREADS} cores"


if __name__ == "__main__":
    main()
