"""The GPU's engine on whole models: loading, prompts, decoding, memory, and what has to hold over thousands of tokens.

    python scripts/bench/engine.py FOLDER [FOLDER ...] [--rows 1,8] [--contexts 256,1900] [--checks] [--out FILE.json]

Each folder (scripts/make_synthetic_model.py writes one in LLaMA-7B's shape, of any branch) is measured by ``tinygptq bench``
in a process of its own: the first one for each number of sequences and both caches, the others for one sequence and 16 bits.
With ``--checks``, the first one also has to show, each in a process of its own (the functions below say what is done):

    first_token      seconds until it has loaded and drawn a token, with an empty kernel cache and then with that one
    crowded          the same while all but 6 GB of the card are taken by something else
    positions        decoding equals a prompt of the same tokens at positions 1, 17, 500 and 2,047
    many_tokens      ten thousand tokens in one process: device memory and the process's own after each thousand
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from facts import facts_of, rounded, save

CONTEXT, POSITIONS = 2048, (1, 17, 500, 2047)
FREE = 6 * 10**9  # bytes of the card that are left to the crowded process
MANY, AT_A_TIME = 10_000, 1_000


# ---------------------------------------------------------------------------------------------- checks, as child processes


def load(folder: Path) -> Any:
    """The engine of a folder, with room for 2,048 tokens."""
    from tinygptq.language_model import load

    return load(str(folder), device="cuda", context=CONTEXT).engine


def first_token(folder: Path) -> dict[str, float]:
    """Seconds to load, and from there to the first token after a prompt of 256 and to the 16th."""
    from tinygptq.bench import SAMPLING
    from tinygptq.kernels.cuda.runtime import cupy
    from tinygptq.sampling import Sampler

    before, start = free_memory(), time.perf_counter()
    engine = load(folder)
    loaded = time.perf_counter()
    vocab, times = engine.config.vocab_size, []
    engine.prefill(some_ids(vocab, 256))
    for _ in engine.draw_ahead(Sampler(SAMPLING, vocab, (), seed=0), 16):
        times.append(time.perf_counter() - loaded)
    pool = cupy().get_default_memory_pool()
    pool.free_all_blocks()
    return {"free_bytes_before": before, "load_seconds": loaded - start, "first_token_seconds": times[0],
            "token_16_seconds": times[-1], "device_bytes": pool.total_bytes()}  # fmt: skip


def positions(folder: Path) -> list[dict[str, Any]]:
    """Logits of one token decoded, and of a prompt that ends with it: their distance (root mean square, over the logits'
    spread), the KL divergence of the two, and whether the likeliest token is the same."""
    engine, found = load(folder), []
    ids = some_ids(engine.config.vocab_size, CONTEXT)
    for position in POSITIONS:
        engine.reset()
        prompt = engine.prefill(ids[: position + 1]).astype(np.float64)
        engine.truncate(position)
        step = engine.decode(int(ids[position])).astype(np.float64)
        log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (prompt, step))
        found.append({
            "position": position, "distance": float(np.sqrt(np.mean((prompt - step) ** 2)) / prompt.std()),
            "kl": float((np.exp(log_p) * (log_p - log_q)).sum()), "same_token": bool(prompt.argmax() == step.argmax()),
        })  # fmt: skip
    return found


def many_tokens(folder: Path) -> list[dict[str, int]]:
    """Device memory in use (all processes) and resident host memory, in bytes, after each thousand tokens, sampling on."""
    from tinygptq.bench import SAMPLING
    from tinygptq.sampling import Sampler

    engine, found = load(folder), []
    vocab = engine.config.vocab_size
    while len(found) * AT_A_TIME < MANY:
        engine.reset()
        engine.prefill(some_ids(vocab, 256))
        tokens = sum(1 for _ in engine.draw_ahead(Sampler(SAMPLING, vocab, (), seed=len(found)), AT_A_TIME))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        done = (found[-1]["tokens"] if found else 0) + tokens
        found.append({"tokens": done, "device_free_bytes": free_memory(), "resident_bytes": resident})
    return found


def occupy(folder: Path) -> None:
    """Take all of the card but 6 GB, say so, and wait to be ended."""
    from tinygptq.kernels.cuda.runtime import cupy

    held = cupy().cuda.alloc(free_memory() - FREE)
    print(json.dumps({"bytes": held.mem.size}), flush=True)
    sys.stdin.read()


def free_memory() -> int:
    from tinygptq.kernels.cuda.runtime import cupy

    return int(cupy().cuda.Device().mem_info[0])


def some_ids(vocab: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, count)


PARTS = {part.__name__: part for part in (first_token, positions, many_tokens, occupy)}


# ---------------------------------------------------------------------------------------------- running them


def child(command: list[str], **environment: str) -> Any:
    """What a child process prints, as JSON."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def part(name: str, folder: Path, **environment: str) -> Any:
    """One of the functions above in a process of its own."""
    return child([__file__, str(folder), "--part", name], **environment)


def checks(folder: Path) -> Iterator[tuple[str, Any]]:
    """All of them by name; the longest, which compiles every kernel anew, last."""
    yield "positions", part("positions", folder)
    yield "many_tokens", part("many_tokens", folder)
    yield "crowded", crowded(folder)
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (part("first_token", folder, XDG_CACHE_HOME=cache) for _ in range(2))
    yield "first_token", {"cold": cold, "warm": warm}


def crowded(folder: Path) -> dict[str, Any]:
    """The first token while another process holds all but 6 GB of the card."""
    command = [sys.executable, __file__, str(folder), "--part", "occupy"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as occupier:
        try:
            taken = json.loads(occupier.stdout.readline())["bytes"]
            return {"bytes_taken": taken, **part("first_token", folder)}
        finally:
            occupier.stdin.close()


def measure(folder: Path, options: list[str]) -> list[dict[str, Any]]:
    """``tinygptq bench --json`` of one folder."""
    return child(["-m", "tinygptq.cli", "bench", str(folder), "--device", "cuda", "--json", *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--cache-bits", default="16,8")
    parser.add_argument("--contexts", default="256,1900")
    parser.add_argument("--prompt-tokens", default="1920,2048")
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.part:
        found = PARTS[args.part](args.folders[0])
        if found is not None:
            print(json.dumps(found))
        return
    results: list[dict[str, Any]] = []
    shown: dict[str, Any] = {}
    for number, folder in enumerate(args.folders):
        for cache_bits in args.cache_bits.split(",") if number == 0 else ("16",):
            rows = args.rows if number == 0 else "1"
            options = ["--rows", rows, "--context", args.contexts, "--prompt-tokens", args.prompt_tokens,
                       "--cache-bits", cache_bits, "--tokens", "64", "--profile"]  # fmt: skip
            for found in measure(folder, options):
                results.append({"model": folder.name, "cache_bits": int(cache_bits), **rounded(found)})
                print(line(results[-1]), flush=True)
            save(all_of(results, shown), args.out)
    for name, found in checks(args.folders[0]) if args.checks else ():
        shown[name] = rounded(found)
        print(name, json.dumps(shown[name]), flush=True)
        save(all_of(results, shown), args.out)


def all_of(results: list[dict[str, Any]], shown: dict[str, Any]) -> dict[str, Any]:
    """All that is known so far."""
    head = {**facts_of(results[0]["device"]), "results": results}
    return {**head, "checks": shown} if shown else head


def line(found: dict[str, Any]) -> str:
    memory = found["memory_gb_per_second"]
    decoding = ", ".join(
        f"{d['tokens_per_second']:.1f} after {d['context']} ({100 * d['gb_per_second'] / memory:.0f} % of bandwidth)"
        for d in found["decoding"]
    )
    prefill = ", ".join(f"{p['tokens_per_second']:.0f} of {p['tokens']}" for p in found["prefill"])
    kernels = ", ".join(f"{name} {us:.0f}" for name, us in found["kernels"].items())
    rows = found["decoding"][0]["rows"] if found["decoding"] else 0
    speeds = f"{found['model']}, cache {found['cache_bits']}, {rows} at once: {decoding} tok/s; prompt {prefill} tok/s"
    size = f"{found['device_bytes'] * 1e-9:.3f} GB"
    return f"{speeds}; loaded in {found['load_seconds']:.1f} s, {size}; us a step: {kernels}"


if __name__ == "__main__":
    main()
