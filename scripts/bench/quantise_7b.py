"""How long quantising a LLaMA-7B takes on a GPU, of what parts, and how much memory; weights and text are random.

    python scripts/bench/quantise_7b.py make MODEL [--layers 32]            (13.5 GB; use a file system in memory)
    python scripts/bench/quantise_7b.py run MODEL OUT [--branches main ...] [--recipe fast] [--json RESULTS.json]

Each branch is quantised by a process of its own, timed from its start to its end, when OUT's file is closed and on the disk.
The tokenizer is passed by: windows of random ids are calibrated on, drawn from a small part of the vocabulary, so that the
Hessians are no multiples of the identity; some norms' gains are far from 1, as trained models' are.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from facts import card, facts_of, save

from tinygptq.branches import BRANCHES
from tinygptq.config import RECIPES, LlamaConfig, QuantizeConfig
from tinygptq.folders.checkpoint import linear_names, norm_names
from tinygptq.folders.export import new_folder, write_json
from tinygptq.folders.tensorfile import TensorFileWriter
from tinygptq.kernels.cuda.runtime import cupy
from tinygptq.quantization import run as quantizing
from tinygptq.quantization.resume import place_of
from tinygptq.release.facts import made_by

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_synthetic_model import LLAMA_7B

PARTS = ("reading", "forward", "Hessian", "Cholesky", "solver", "comparison with RTN", "pack", "write", "read")


def make(folder: Path, layers: int) -> None:
    """fp16 weights, Gaussian, of the width that keeps activations as they are."""
    cp, raw = cupy(), {**LLAMA_7B, "num_hidden_layers": layers}
    config, half = LlamaConfig.from_dict(raw), np.dtype(np.float16)
    C, vocab = config.hidden_size, config.vocab_size
    layout = {"model.embed_tokens.weight": (half, (vocab, C)), "lm_head.weight": (half, (vocab, C))}
    layout |= {f"{name}.weight": (half, (n, k)) for name, (k, n) in linear_names(config)}
    layout |= {f"{name}.weight": (half, (C,)) for name in norm_names(config)}
    rng = cp.random.default_rng(0)
    with new_folder(folder) as partial, TensorFileWriter(partial / "model.safetensors", layout) as file:
        write_json(partial / "config.json", raw)
        for name, (_, shape) in layout.items():
            values = rng.standard_normal(shape, dtype=np.float32)
            if len(shape) == 1:
                values = cp.exp(0.5 * values)
                values[:4] *= 20
            else:
                values *= 1 if "embed" in name else shape[1] ** -0.5
            file.write(name, values.astype(np.float16).get())


def run_one(model: Path, out: Path, branch: str, recipe: str, samples: int, tokens: int, resume: bool) -> None:
    """In a process of its own: quantise, and print what was measured as one line of JSON."""

    def random_windows(source: Any, *_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        words = np.random.default_rng(1).zipf(1.2, (samples, tokens)) % source.config.vocab_size
        return words.astype(np.int64), made_by()

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quantizing._calibration = random_windows
    config = QuantizeConfig(**{**vars(BRANCHES[branch]), "recipe": RECIPES[recipe]})
    with LeastFree() as memory:
        report = quantizing.quantize(model, out, config, dataset="random", device="cuda", resume=resume)
    ratio = float(np.mean([linear.loss_over_rtn for linear in report.linears]))
    facts = {"seconds": report.seconds, "stages": report.stages, "device_peak": memory.used, "loss_over_rtn": ratio}
    facts |= {"device_peak_pool": memory.pool, "device_peak_arrays": memory.arrays}
    print(json.dumps(facts), flush=True)


class LeastFree(threading.Thread):
    """Looks at the card's memory every few milliseconds; ``used``: the most that was in use, CUDA's own included, ``pool``:
    what CuPy's pool held of it, and ``arrays`` what arrays took of that."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used, self.pool, self.arrays, self._ended = 0, 0, 0, threading.Event()
        self._look()

    def _look(self) -> None:
        (free, total), pool = cupy().cuda.runtime.memGetInfo(), cupy().get_default_memory_pool()
        self.used, self.pool = max(self.used, total - free), max(self.pool, pool.total_bytes())
        self.arrays = max(self.arrays, pool.used_bytes())

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self._look()

    def __enter__(self) -> LeastFree:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def timed(words: list[str]) -> dict[str, Any]:
    """Run this script again with these words; its figures, wall-clock seconds and the most private memory it held."""
    started, host = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            host = max(host, 1024 * int(fields["RssAnon"].split()[0]))  # pages of files, in memory anyway, are not counted
        except (OSError, KeyError, ValueError):
            pass
        time.sleep(0.05)
    wall, output = time.perf_counter() - started, process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{words}: exit code {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "wall_seconds": wall, "host_peak_private": host}


def killed(words: list[str], whole: Path, seconds: float) -> dict[str, Any]:
    """The same run, ended by SIGKILL after so many seconds and continued; whether its file is the whole run's."""
    out = whole.with_name(f"{whole.name}-killed")
    shutil.rmtree(out, ignore_errors=True)
    words = [*words[:2], str(out), *words[3:], "--resume"]
    process = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.DEVNULL)
    time.sleep(seconds)
    process.kill()
    process.wait()
    state = place_of(out) / "state.json"
    blocks = json.loads(state.read_text())["state"]["blocks"] if state.exists() else 0
    rest = timed(words)["wall_seconds"]
    same = filecmp.cmp(whole / "model.safetensors", out / "model.safetensors", shallow=False)
    shutil.rmtree(out)
    return {"after_seconds": seconds, "blocks_saved": blocks, "rest_wall_seconds": rest, "same_file": same}


def run(args: argparse.Namespace) -> None:
    rows = {}
    print(f"{'branch':32} {'wall':>7} {'GPU GB':>7} {'host GB':>7}  " + " ".join(f"{part[:9]:>9}" for part in PARTS))
    for branch in args.branches:
        shutil.rmtree(args.out, ignore_errors=True)
        words = ["one", str(args.model), str(args.out), "--branches", branch, "--recipe", args.recipe,
                 "--samples", str(args.samples), "--tokens", str(args.tokens)]  # fmt: skip
        row = rows[branch] = timed(words)
        parts = " ".join(f"{row['stages'].get(part, 0):9.2f}" for part in PARTS)
        if args.kill_after and branch == args.branches[0]:
            row["killed"] = killed(words, args.out, args.kill_after)
            print(row["killed"], flush=True)
        memory = f"{row['device_peak'] / 1e9:7.2f} {row['host_peak_private'] / 1e9:7.2f}"
        print(f"{branch:32} {row['wall_seconds']:7.1f} {memory}  {parts}", flush=True)
        shutil.rmtree(args.out)
    if args.json:
        protocol = f"LLaMA-7B shapes, random weights; {args.samples} windows of {args.tokens} random tokens"
        layers = LlamaConfig.from_folder(args.model).num_hidden_layers
        about = {"protocol": protocol, "layers": layers, "recipe": args.recipe}
        save({**facts_of(card()), **about, "branches": rows}, args.json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "run", "one"), help="one is what run calls")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--branches", nargs="+", choices=tuple(BRANCHES), default=list(BRANCHES))
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="fast")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-after", type=float, help="also kill the first branch's run after so many seconds")
    args = parser.parse_args()
    if args.what == "make":
        make(args.model, args.layers)
    elif args.what == "one":
        run_one(args.model, args.out, args.branches[0], args.recipe, args.samples, args.tokens, args.resume)
    else:
        run(args)


if __name__ == "__main__":
    main()
