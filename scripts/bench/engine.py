"""The GPU's engine on whole models: loading, prompts, decoding, memory; one row a model, cache and number of sequences.

    python scripts/bench/engine.py FOLDER [FOLDER ...] [--rows 1,8] [--contexts 256,1900] [--out FILE.json]

Each folder (scripts/make_synthetic_model.py writes one in LLaMA-7B's shape) is measured by ``tinygptq bench`` in a process
of its own, with a 16-bit cache, and the first one with an 8-bit cache too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("tinygptq", "numpy", "numba", "numba-cuda", "cupy-cuda13x", "cuda-core")


def measure(folder: Path, options: list[str]) -> list[dict[str, Any]]:
    """``tinygptq bench --json`` of one folder."""
    command = [sys.executable, "-m", "tinygptq.cli", "bench", str(folder), "--device", "cuda", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--contexts", default="256,1900")
    parser.add_argument("--prompt-tokens", default="1920")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for number, folder in enumerate(args.folders):
        for cache_bits in (16, 8) if number == 0 else (16,):
            options = ["--rows", args.rows, "--context", args.contexts, "--prompt-tokens", args.prompt_tokens,
                       "--cache-bits", str(cache_bits), "--tokens", "64", "--profile"]  # fmt: skip
            for found in measure(folder, options):
                results.append({"model": folder.name, "cache_bits": cache_bits, **rounded(found)})
                print(line(results[-1]), flush=True)
    if args.out:
        facts = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "device": results[0]["device"]}
        args.out.write_text(json.dumps({**facts, "versions": versions(), "results": results}, indent=1) + "\n")


def line(found: dict[str, Any]) -> str:
    decoding = ", ".join(f"{d['tokens_per_second']:.1f} after {d['context']}" for d in found["decoding"])
    prefill = ", ".join(f"{p['tokens_per_second']:.0f} of {p['tokens']}" for p in found["prefill"])
    kernels = ", ".join(f"{name} {us:.0f}" for name, us in found["kernels"].items())
    rows = found["decoding"][0]["rows"] if found["decoding"] else 0
    speeds = f"{found['model']}, cache {found['cache_bits']}, {rows} at once: {decoding} tok/s; prompt {prefill} tok/s"
    memory = f"{found['device_bytes'] * 1e-9:.3f} GB"
    return f"{speeds}; loaded in {found['load_seconds']:.1f} s, {memory}; us a step: {kernels}"


if __name__ == "__main__":
    main()
