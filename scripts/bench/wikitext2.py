"""Perplexity by the published protocol, the whole raw test split of WikiText-2, beside transformers in float32.

    python scripts/bench/wikitext2.py MODEL --text wiki.test.raw [--device cpu|cuda] [--reference-device cpu|cuda]
        [--max-windows N] [--out FILE.json]

MODEL is a folder in fp16 or fp32, which both load; the windows are of 2,048 tokens and do not overlap. Both sides see the
same token ids. With --device cuda the engine's fp16 arithmetic is beside transformers' float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from facts import device, facts_of, save
from transformers import LlamaForCausalLM

import tinygptq
from tinygptq.calibrate import evaluation_text
from tinygptq.measure.evaluate import perplexity

SEQLEN = 2048


def reference(folder: str, ids: np.ndarray, windows: int, device: str) -> float:
    """What transformers finds for the first windows, in float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    nats = []
    with torch.no_grad():
        for window in torch.tensor(ids[: windows * SEQLEN]).reshape(windows, 1, SEQLEN).to(device):
            nats.append(model(window, labels=window).loss.item())
    return float(np.exp(np.mean(nats)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--reference-device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = tinygptq.load(args.model, device=args.device, context=2)
    ids = np.asarray(model.tokenizer.encode(evaluation_text(args.text, model.tokenizer, protocol="wikitext2")))
    started = time.perf_counter()
    found = perplexity(model.engine.model, ids, SEQLEN, args.max_windows)
    seconds = time.perf_counter() - started
    expected = reference(args.model, ids, found.windows, args.reference_device)
    result = {
        **facts_of(device(args.device)), "model": Path(args.model).name,
        "windows": found.windows, "tokens": found.tokens, "seconds": seconds, "perplexity": found.perplexity,
        "transformers": expected, "relative_difference": found.perplexity / expected - 1,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    save(result, args.out)


if __name__ == "__main__":
    main()
