"""Does the GPU's engine say what the CPU's does? Both run one folder; the CPU's logits are float32.

    python scripts/bench/agreement.py FOLDER --text FILE.txt [--tokens 2048] [--out FILE.json]

Prints the mean and largest KL divergence a token, greedy texts side by side with the margin at their first difference, and
how far a decoded token's logits are from those of a prompt that ends in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from facts import card, facts_of, save

from tinygptq.language_model import load

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little",
    "To make a cup of tea, first",
    "The three laws of motion say that",
    "def fibonacci(n):",
)
POSITIONS = (1, 17, 500, 2047)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def divergences(cpu, gpu, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """KL(cpu || gpu) of each position, and the share of positions with the same likeliest token."""
    kl, same = [], 0
    for part in np.array_split(np.arange(len(ids)), max(1, len(ids) // 512)):
        p, q = log_softmax(cpu[part]), log_softmax(gpu[part])
        kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        same += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    return np.concatenate(kl), same / len(ids)


def greedy(model, prompt: str, tokens: int) -> tuple[list[int], list[float]]:
    """Token ids, and how far the likeliest logit was above the next."""
    engine = model.engine
    engine.reset()
    logits, ids, margins = engine.prefill(np.array(model.tokenizer.encode(prompt))), [], []
    for _ in range(tokens):
        second, first = np.partition(logits, -2)[-2:]
        ids.append(int(np.argmax(logits)))
        margins.append(float(first - second))
        logits = engine.decode(ids[-1]).copy()
    return ids, margins


def decoded_against_prompt(engine, ids: np.ndarray) -> dict[int, float]:
    """Largest difference of the logits at each position, over their spread."""
    found = {}
    for position in POSITIONS:
        if position < len(ids):
            engine.reset()
            whole = engine.prefill(ids[: position + 1]).copy()
            engine.truncate(position)
            found[position] = float(np.abs(engine.decode(int(ids[position])) - whole).max() / whole.std())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cpu, gpu = load(args.folder), load(args.folder, device="cuda", context=args.tokens)
    ids = np.array(cpu.tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.tokens])
    kl, same = divergences(cpu.forward(ids[None])[0], gpu.forward(ids[None])[0], ids)
    result = {**facts_of(card()), "model": args.folder.name, "tokens": len(ids),
              "kl_mean": float(kl.mean()), "kl_max": float(kl.max()), "same_likeliest": same}  # fmt: skip
    print(f"KL(CPU || GPU) over {len(ids)} tokens: mean {kl.mean():.2e}, largest {kl.max():.2e}; same likeliest {same:.4f}")
    result["decoded_against_prompt"] = decoded_against_prompt(gpu.engine, ids)
    print("decoded against prompt:", {k: f"{v:.1e}" for k, v in result["decoded_against_prompt"].items()})
    result["greedy"] = []
    for prompt in PROMPTS:
        (ours, margins), (theirs, _) = greedy(cpu, prompt, 64), greedy(gpu, prompt, 64)
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        result["greedy"].append(
            {"prompt": prompt, "first_difference": first, "margin": None if first is None else margins[first]}
        )
        print(
            f"{prompt!r}: "
            + ("equal for 64 tokens" if first is None else f"differs at {first}, margin {margins[first]:.3f}")
        )
    save(result, args.out)


if __name__ == "__main__":
    main()
