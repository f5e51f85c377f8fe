"""Decoding and prefill on the CPU: tinygptq beside llama.cpp and transformers, on the same machine in the same run.

    python scripts/bench/cpu_speed.py GPTQ_DIR [--gguf FILE.gguf] [--dense DIR] [--threads 2] [--rounds 7] [--out FILE]

GPTQ_DIR is a quantised folder, FILE.gguf the same model for llama.cpp (package llama-cpp-python), DIR the unquantised folder
for transformers in fp32 and bf16 and for tinygptq's own fp16. Each runner lives in a process of its own that sleeps while
the others are measured; rounds alternate between them; the table gives medians over the rounds. What is missing is named.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from facts import facts_of, processor, save

PROMPT, TOKENS, PREFILL = 16, 64, 512  # tokens before the decoding that is timed, tokens decoded, tokens of a long prompt


class TinyGPTQ:
    """The engine of this package; ``source`` is a folder."""

    def __init__(self, source: str, threads: int) -> None:
        from tinygptq.engine import CpuEngine
        from tinygptq.folders.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(source)
        self.engine = CpuEngine(checkpoint.config, checkpoint.weights, context=1024)

    def prefill(self, ids: list[int]) -> None:
        self.engine.reset()
        self.engine.prefill(np.array(ids))

    def decode(self, token: int) -> None:
        self.engine.decode(token)

    def bytes_per_token(self) -> int:
        """Bytes of weights that one decoding step reads."""
        weights = self.engine.model.weights
        return weights.head.nbytes + sum(linear.nbytes for linear in weights.linears.values())


class LlamaCpp:
    """llama.cpp through llama-cpp-python; ``source`` is a GGUF file."""

    def __init__(self, source: str, threads: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(source, n_ctx=1024, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(self, ids: list[int]) -> None:
        self.model.reset()
        self.model.eval(ids)

    def decode(self, token: int) -> None:
        self.model.eval([token])

    def bytes_per_token(self) -> int:
        return Path(self.model.model_path).stat().st_size


class Transformers:
    """transformers' LlamaForCausalLM; ``source`` is ``dtype:folder``."""

    def __init__(self, source: str, threads: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        dtype, folder = source.split(":", 1)
        self.torch = torch
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def prefill(self, ids: list[int]) -> None:
        out = self.model(self.torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def decode(self, token: int) -> None:
        self.model(self.torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)

    def bytes_per_token(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def serve(kind: type, source: str, threads: int, pipe) -> None:
    """A runner's process: measure whenever asked, send (seconds a decoded token, seconds of the prefill)."""
    try:
        runner = kind(source, threads)
    except ImportError as error:
        pipe.send(f"{error.name} is not installed")
        return
    pipe.send(runner.bytes_per_token())
    ids = np.random.default_rng(0).integers(1000, 5000, PREFILL).tolist()
    while pipe.recv():
        start = time.perf_counter()
        runner.prefill(ids)
        prefill = time.perf_counter() - start
        runner.prefill(ids[:PROMPT])
        runner.decode(ids[0])
        start = time.perf_counter()
        for token in ids[:TOKENS]:
            runner.decode(token)
        pipe.send(((time.perf_counter() - start) / TOKENS, prefill))


def measure(wanted: dict[str, tuple[type, str]], threads: int, rounds: int) -> tuple[dict, dict]:
    """Start a process for each runner, alternate between them; return figures and the reasons why some have none."""
    os.environ |= {"NUMBA_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    context = multiprocessing.get_context("spawn")
    pipes, nbytes, missing = {}, {}, {}
    for name, (kind, source) in wanted.items():
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(kind, source, threads, theirs), daemon=True).start()
        answer = ours.recv()
        if isinstance(answer, str):
            missing[name] = answer
        else:
            pipes[name], nbytes[name] = ours, answer
    seconds = {name: [] for name in pipes}
    for number in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            figures = pipe.recv()
            if number:  # the first round warms up
                seconds[name].append(figures)
        print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for pipe in pipes.values():
        pipe.send(False)
    results = {}
    for name, rows in seconds.items():
        decode, prefill = (statistics.median(column) for column in zip(*rows, strict=True))
        results[name] = {
            "decode_tokens_per_second": 1 / decode,
            "decode_gb_per_second": nbytes[name] / decode / 1e9,
            "prefill_tokens_per_second": PREFILL / prefill,
            "decode_seconds": [row[0] for row in rows],
            "prefill_seconds": [row[1] for row in rows],
        }
    return results, missing


def report(results: dict, missing: dict) -> str:
    """The table: medians, and how many times faster the first runner is than each."""
    first = next(iter(results.values()))
    lines = [f"{'':28} {'decode tok/s':>12} {'ratio':>6} {'GB/s':>6} | {'prefill tok/s':>13} {'ratio':>6}"]
    for name, row in results.items():
        decode, prefill = row["decode_tokens_per_second"], row["prefill_tokens_per_second"]
        ratios = first["decode_tokens_per_second"] / decode, first["prefill_tokens_per_second"] / prefill
        gbps = row["decode_gb_per_second"]
        lines.append(f"{name:28} {decode:12.1f} {ratios[0]:6.2f} {gbps:6.1f} | {prefill:13.1f} {ratios[1]:6.2f}")
    return "\n".join(lines + [f"{name:28} not measured: {why}" for name, why in missing.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gptq", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    wanted = {"tinygptq quantised": (TinyGPTQ, str(args.gptq))}
    if args.gguf:
        wanted["llama.cpp"] = (LlamaCpp, str(args.gguf))
    if args.dense:
        wanted["transformers fp32"] = (Transformers, f"float32:{args.dense}")
        wanted["transformers bf16"] = (Transformers, f"bfloat16:{args.dense}")
        wanted["tinygptq unquantised"] = (TinyGPTQ, str(args.dense))
    results, missing = measure(wanted, args.threads, args.rounds)
    missing |= {} if args.gguf else {"llama.cpp": "no --gguf"}
    missing |= {} if args.dense else {"transformers": "no --dense"}
    print(report(results, missing))
    save({**facts_of(processor()), "threads": args.threads, "results": results, "missing": missing}, args.out)


if __name__ == "__main__":
    main()
