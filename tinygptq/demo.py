"""``tinygptq demo``: the whole road on the embedded model, in one table and a story."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.export import require_free, tensor_layout
from tinygptq.language_model import load
from tinygptq.quantization.run import quantize

EMBEDDED = Path(__file__).parent / "assets" / "storyteller"
GROUP_SIZE, NSAMPLES, SEQLEN, WINDOWS = 64, 32, 256, 32
FROM_CACHE_SECONDS = 3.0  # longer than loading compiled kernels takes
OPENING = "Once upon a time, there was a little"


def run(out: Path | None = None, seed: int = 0) -> None:
    """Quantise the embedded model at 4, 3 and 2 bits by rounding and by GPTQ, print a table, tell a story.

    Args:
        out: where to keep the 4-bit folder; None keeps nothing.
    """
    if out is not None:
        require_free(out)
    started = time.perf_counter()
    print("A small LLaMA, quantised by rounding to nearest (RTN) and by GPTQ; perplexity on stories it never saw.\n")
    text = (EMBEDDED / "heldout.txt").read_text(encoding="utf-8")
    with solver_compiled_beside():
        baseline = load(EMBEDDED).perplexity(text, SEQLEN, WINDOWS).perplexity
    print(f"{'bits':>4} {'bytes':>10} {'of fp16':>8} {'perplexity':>11} {'RTN':>8} {'GPTQ':>8}")
    dense = linear_bytes(None)
    print(f"{16:>4} {dense:>10,} {'100 %':>8} {baseline:>11.3f} {'':>8} {'':>8}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for bits in (4, 3, 2):
            config = QuantizeConfig(bits=bits, group_size=GROUP_SIZE)
            after = []
            for method in ("rtn", "gptq"):
                folder = Path(scratch) / f"{method}-{bits}bit"
                quantize_embedded(folder, config, method)
                after.append(load(folder).perplexity(text, SEQLEN, WINDOWS).perplexity)
            size = linear_bytes(config)
            share = f"{100 * size / dense:.0f} %"
            print(f"{bits:>4} {size:>10,} {share:>8} {baseline:>11.3f} {after[0]:>8.3f} {after[1]:>8.3f}", flush=True)
        folder = Path(scratch) / "gptq-4bit"
        if out is not None:
            folder = out
            quantize_embedded(out, QuantizeConfig(bits=4, group_size=GROUP_SIZE), "gptq")
        print(f"\nThe 4-bit one tells a story (seed {seed}):\n")
        tell(folder, seed)
    print(f"\n{time.perf_counter() - started:.1f} s in all" + (f"; the 4-bit folder is {out}" if out else ""))


@contextmanager
def solver_compiled_beside() -> Iterator[None]:
    """Where this process has to compile the kernels first, another one leaves the compiled solver in Numba's cache.

    So both cores are at work. What that one cannot do (no folder to keep a cache in, say) this one does later.
    """
    command = [sys.executable, "-c", "from tinygptq.demo import compile_solver; compile_solver()"]
    started: list[subprocess.Popen[bytes]] = []
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    timer = threading.Timer(FROM_CACHE_SECONDS, lambda: started.append(subprocess.Popen(command, **quiet)))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for process in started:
            process.wait()


def compile_solver() -> None:
    """Solve a small problem."""
    from tinygptq.gptq import solve

    solve(np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32), QuantizeConfig(group_size=GROUP_SIZE))


def quantize_embedded(out: Path, config: QuantizeConfig, method: str) -> None:
    """Quantise the embedded model into a new folder; warnings about so little calibration text are for larger models."""
    calibration, log = str(EMBEDDED / "calibration.txt"), logging.getLogger("tinygptq")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        quantize(EMBEDDED, out, config, dataset=calibration, nsamples=NSAMPLES, seqlen=SEQLEN, method=method)
    finally:
        log.setLevel(level)


def linear_bytes(config: QuantizeConfig | None) -> int:
    """Bytes of the seven linears of every block, in fp16 or packed: what quantising changes."""
    model = load_checkpoint(EMBEDDED)
    if config is None:
        return sum(2 * linear.in_features * linear.out_features for linear in model.weights.linears.values())
    layout = tensor_layout(model.config, config)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return sum(
        dtype.itemsize * shape[0] * (shape[1] if len(shape) > 1 else 1)
        for name, (dtype, shape) in layout.items()
        if name.rpartition(".")[2] in parts
    )


def tell(folder: Path, seed: int) -> None:
    """Stream a story to stdout."""
    print(OPENING, end="")
    for piece in load(folder).stream(OPENING, max_new_tokens=200, temperature=0.7, top_p=0.95, seed=seed):
        print(piece, end="", flush=True)
    print()
