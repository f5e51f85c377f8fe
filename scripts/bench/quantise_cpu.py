"""Time to quantise a model on the CPU: tinygptq beside the paper's algorithm in torch over transformers' own blocks.

    python scripts/bench/quantise_cpu.py MODEL --text FILE.txt [--nsamples 32] [--seqlen 512] [--group-size 128]
        [--threads 2] [--recipes fast plain] [--out FILE.json]

Both sides see the same tokens, each in a process of its own, one after the other: the peer first, between the recipes, and
last, so that a machine whose speed drifts shows it. The peer is in torch_gptq.py.
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
from torch_gptq import peer


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
