"""Time to score multiple-choice questions that share worked examples, with and without computing those once.

    python scripts/bench/shared_prefix.py MODEL --text FILE [--questions 200] [--prefix 1500] [--plain 10]
        [--device cpu|cuda] [--out FILE]

As in 5-shot MMLU: every prompt is one beginning of ``--prefix`` tokens, a question of 30 to 60, and four answers of a token
or a few. The text supplies all of them. Without sharing, every question costs its whole prompt; so only the first --plain
of them are run that way, as many of either kind, and the time is scaled up (0 runs all). On the CPU times are processor
time, so that other work on the machine counts little; on a GPU they are the clock's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from facts import device, facts_of, save

import tinygptq
from tinygptq.measure.scoring import Request, Scorer


def make_requests(ids: np.ndarray, questions: int, prefix: int, seed: int = 0) -> list[list[Request]]:
    """For each question four answers; half of the questions have answers of one token, the others of two to five."""
    rng = np.random.default_rng(seed)
    beginning, made = ids[:prefix].tolist(), []
    for number in range(questions):
        start = prefix + 100 * number
        context = beginning + ids[start : start + rng.integers(30, 61)].tolist()
        length = 1 if number % 2 else int(rng.integers(2, 6))
        answers = [ids[start + 61 + 8 * i :][:length].tolist() for i in range(4)]
        made.append([Request(context, answer) for answer in answers])
    return made


def timed(scorer: Scorer, questions: list[list[Request]], clock: Callable[[], float]) -> tuple[list[float], float]:
    """The log-likelihoods, question by question, and the seconds they took."""
    started = clock()
    found = scorer.score([request for question in questions for request in question], progress=True)
    return [one.logprob for one in found], clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--prefix", type=int, default=1500)
    parser.add_argument("--plain", type=int, default=10, help="questions to time without sharing, 0 for all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = tinygptq.load(args.model, device=args.device, context=2)
    tokens = args.prefix + 100 * args.questions
    ids = np.asarray(model.tokenizer.encode(args.text.read_text(encoding="utf-8")[: 12 * tokens]))[:tokens]
    questions = make_requests(ids, args.questions, args.prefix)
    some = questions[: args.plain] if args.plain else questions
    llama, clock = model.engine.model, time.process_time if args.device == "cpu" else time.perf_counter
    timed(Scorer(llama), some[:2], clock)  # kernels are compiled and weights prepared before the clock counts
    shared, seconds = timed(Scorer(llama), questions, clock)
    plain, measured = timed(Scorer(llama, share=False), some, clock)
    result = {
        **facts_of(device(args.device)), "model": Path(args.model).name, "prefix_tokens": args.prefix,
        "questions": len(questions), "seconds_shared": seconds,
        "questions_timed_plain": len(some), "seconds_plain": measured * len(questions) / len(some),
        "largest_difference": float(np.abs(np.array(plain) - np.array(shared[: len(plain)])).max()),
    }  # fmt: skip
    result["ratio"] = result["seconds_plain"] / seconds
    print(json.dumps(result, indent=1))
    save(result, args.out)


if __name__ == "__main__":
    main()
