"""What each part of a recipe is worth: one model quantised with the parts added one after another, and with one part off.

    python scripts/bench/ablation.py run MODEL_DIR --calibration TEXT --evaluation wiki=TEXT [other=TEXT ...]
        [--nsamples 32] [--seqlen 512] [--windows 12] [--window 2048] [--branches ...] [--rungs ...] [--device cpu|cuda]
        [--about WORDS] [--out RESULTS.json] [--seconds N]
    python scripts/bench/ablation.py table RESULTS.json ... [--reference original_gptq.json] [--times TIMES.json ...]

Texts are encoded as `tinygptq quantize` does. Nothing is written but the results, after each cell: what they hold already is
not done again, and after so many seconds the rest is left for another run. Models are quantised in memory; on a GPU they are
evaluated there too, with fp16 weights and float32 logits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from facts import device, facts_of

from tinygptq.calibrate import calibration_windows
from tinygptq.config import RECIPES, QuantizeConfig, Recipe
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.measure.evaluate import perplexity
from tinygptq.quantization.blocks import quantize_blocks
from tinygptq.quantization.placement import fast_model
from tinygptq.tokenizer import Tokenizer

BRANCHES = {  # bits, group size, act-order: the six published permutations, and two narrower ones
    "main": (4, 128, False),
    "gptq-4bit-32g-actorder_True": (4, 32, True),
    "gptq-4bit-64g-actorder_True": (4, 64, True),
    "gptq-4bit-128g-actorder_True": (4, 128, True),
    "gptq-8bit--1g-actorder_True": (8, -1, True),
    "gptq-8bit-128g-actorder_False": (8, 128, False),
    "3-bit g128 act-order": (3, 128, True),
    "2-bit g64 act-order": (2, 64, True),
}
BEST, NONE = RECIPES["best"], RECIPES["plain"]
# the parts of a recipe in the order in which they are added; of the first three `fast` is made
PARTS = {"clip": "clip", "act_order": "act-order", "shrink": "shrink (fast)", "refine": "refine", "drift": "drift",
         "residual": "residual", "outputs": "outputs"}  # fmt: skip
USED = [part for part in PARTS if getattr(BEST, part) != getattr(NONE, part)]
LADDER = {"plain": NONE} | {
    PARTS[part]: replace(NONE, **{name: getattr(BEST, name) for name in USED[: i + 1]}) for i, part in enumerate(USED)
}
LAST = list(LADDER)[-1]  # `best`
RUNGS = LADDER | {f"{LAST} without {part}": replace(BEST, **{part: getattr(NONE, part)}) for part in USED}
SHORT = ("plain", "shrink (fast)", *list(LADDER)[-2:])  # what is shown of texts of another kind
Measure = Callable[[Recipe, tuple], tuple[dict[str, float], float]]


def run(args: argparse.Namespace) -> None:
    started, source, tokenizer = time.perf_counter(), load_checkpoint(args.model), Tokenizer.from_folder(args.model)
    calibration = calibration_windows(args.calibration, tokenizer, args.nsamples, args.seqlen).astype(np.int64)
    texts = dict(item.split("=", 1) for item in args.evaluation)
    windows = {name: calibration_windows(path, tokenizer, args.windows, args.window).astype(np.int64)
               for name, path in texts.items()}  # fmt: skip
    unquantised, measure = (on_card if args.device == "cuda" else on_host)(source, calibration, windows)
    result = {**facts(args), "unquantised": unquantised, "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    done = {(row["branch"], row["rung"]) for row in result["rows"]}
    for branch in args.branches:
        for rung in args.rungs:
            if (branch, rung) in done or same_as_before(branch, rung):
                continue
            if args.seconds and time.perf_counter() - started > args.seconds:
                print(f"left for another run: {branch}, {rung}", flush=True)
                continue
            found, seconds = measure(RUNGS[rung], BRANCHES[branch])
            row = {"branch": branch, "rung": rung, "recipe": asdict(RUNGS[rung]), "perplexity": found, "seconds": seconds}
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            shown = " ".join(f"{name} {value:.4f}" for name, value in found.items())
            print(f"{branch:30} {rung:24} {shown} {seconds:.1f} s", flush=True)


def same_as_before(branch: str, rung: str) -> bool:
    """Whether it is another rung again: files with act-order, for one, are quantised in that order by any recipe."""
    ordered = BRANCHES[branch][2] and rung in ("act-order", f"{LAST} without act_order")
    return ordered or rung == f"{LAST} without {USED[-1]}"


def config_of(recipe: Recipe, branch: tuple) -> QuantizeConfig:
    bits, group_size, desc_act = branch
    return QuantizeConfig(bits=bits, group_size=group_size, desc_act=desc_act, recipe=recipe)


def on_host(source: Checkpoint, calibration: np.ndarray, windows: dict[str, np.ndarray]) -> tuple[dict, Measure]:
    def perplexities(model: Any) -> dict[str, float]:
        return {name: perplexity(model, ids.ravel(), ids.shape[1]).perplexity for name, ids in windows.items()}

    def measure(recipe: Recipe, branch: tuple) -> tuple[dict[str, float], float]:
        model, started = fast_model(source, dict(source.weights.linears)), time.perf_counter()
        for _ in quantize_blocks(model, calibration, config_of(recipe, branch)):
            pass
        seconds = time.perf_counter() - started
        return perplexities(model), seconds

    return perplexities(fast_model(source, dict(source.weights.linears))), measure


def on_card(source: Checkpoint, calibration: np.ndarray, windows: dict[str, np.ndarray]) -> tuple[dict, Measure]:
    from quantise_devices import dense_on_card
    from quantise_devices import perplexity as perplexity_there

    from tinygptq.quantization.placement_cuda import Card
    from tinygptq.weights import DenseLinear

    def perplexities(linears: dict) -> dict[str, float]:
        return {name: perplexity_there(source, linears, ids) for name, ids in windows.items()}

    def measure(recipe: Recipe, branch: tuple) -> tuple[dict[str, float], float]:
        place, config, linears, started = Card(), config_of(recipe, branch), {}, time.perf_counter()
        with place.session():
            model = place.model(source)
            place.announce(source, calibration, config)
            for name, solution, _ in quantize_blocks(model, calibration, config, place=place):
                linears[name] = DenseLinear(solution.dequantize().astype(np.float16))
        seconds = time.perf_counter() - started
        return perplexities(linears), seconds

    return perplexities(dense_on_card(source)), measure


def facts(args: argparse.Namespace) -> dict[str, Any]:
    protocol = (
        f"calibrated on the first {args.nsamples} windows of {args.seqlen} tokens of {Path(args.calibration).name}; "
        f"perplexity over the first {args.windows} windows of {args.window} tokens of each text"
    )
    common = {"model": args.name or args.model.name, "protocol": protocol + args.about}
    common["texts"] = [f"{name}: {Path(path).name}" for name, path in (item.split("=", 1) for item in args.evaluation)]
    return {**facts_of(device(args.device)), **common}


# ----------------------------------------------------------------------------------------------------------- the table


def table(args: argparse.Namespace) -> None:
    """Results of one model in several files are joined."""
    models: dict[str, dict[str, Any]] = {}
    for path in args.results:
        result = json.loads(path.read_text())
        joined = models.setdefault(result["model"], {**result, "rows": [], "device": ""})
        rungs = ", ".join(map(title, dict.fromkeys(row["rung"] for row in result["rows"])))
        joined["device"] += f"{result['device']}. " if not joined["rows"] else f"On {result['device']}: {rungs}. "
        joined["rows"] += result["rows"]
    for model, result in models.items():
        protocol = result["protocol"][0].upper() + result["protocol"][1:]
        print(f"# {model}\n\n{protocol} ({'; '.join(result['texts'])}). {result['device'].rstrip()}\n")
        for number, text in enumerate(result["unquantised"]):
            originals = originals_of(model, args.reference) if number == 0 else {}
            print_text(result, text, originals, list(LADDER if number == 0 else SHORT))
        print_without(result)
    print_times([json.loads(path.read_text()) for path in args.times])


def originals_of(model: str, path: Path | None) -> dict[tuple, float]:
    """What the original implementation made of the same model, by branch."""
    reference = json.loads(path.read_text()) if path else {"model": ""}
    if not reference["model"].startswith(model):
        return {}
    return {(c["bits"], c["group_size"], c["desc_act"]): c["perplexity_gptq"] for c in reference["configs"]}


def title(rung: str) -> str:
    return f"{rung} (best)" if rung == LAST else rung


def print_times(results: list[dict[str, Any]]) -> None:
    """Of main, each quantised with nothing beside it; the last of several runs, when everything is compiled."""
    if not results:
        return
    heads = ["model", "device", *map(title, SHORT)]
    print("# Seconds to quantise main\n\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for result in results:
        seconds = {row["rung"]: row["seconds"] for row in result["rows"]}
        numbers = " | ".join(f"{seconds[rung]:.2f}" if rung in seconds else "" for rung in SHORT)
        print(f"| {result['model']} | {result['device']} | {numbers} |")


def cells(result: dict[str, Any], text: str) -> dict[tuple[str, str], float]:
    """Perplexities by branch and rung; what is the same as another rung stands under both."""
    found = {(row["branch"], row["rung"]): row["perplexity"][text] for row in result["rows"]}
    for branch in BRANCHES:
        if same_as_before(branch, "act-order") and (branch, "clip") in found:
            found[branch, "act-order"] = found[branch, "clip"]
    return found


def print_text(result: dict[str, Any], text: str, originals: dict[tuple, float], rungs: list[str]) -> None:
    found, unquantised = cells(result, text), result["unquantised"][text]
    rungs = [rung for rung in rungs if any((branch, rung) in found for branch in BRANCHES)]
    print(f"## Perplexity on {text}; unquantised {unquantised:.3f}\n")
    heads = ["branch", *map(title, rungs)] + (["original GPTQ", f"of its loss removed by {rungs[-1]}"] if originals else [])
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for branch, key in BRANCHES.items():
        numbers = [f"{found[branch, rung]:.3f}" if (branch, rung) in found else "" for rung in rungs]
        if originals:
            original, best = originals.get(key), found.get((branch, rungs[-1]))
            numbers.append(f"{original:.3f}" if original else "")
            numbers.append(f"{100 * (original - best) / (original - unquantised):.0f} %" if original and best else "")
        if any((branch, rung) in found for rung in rungs):
            print(f"| {branch} | " + " | ".join(numbers) + " |")
    print()


def print_without(result: dict[str, Any]) -> None:
    """For every rung of which it was measured what it is without one of its parts."""
    text = next(iter(result["unquantised"]))
    found = cells(result, text)
    for i, top in enumerate(list(LADDER)[1:]):
        parts = [f"{top} without {part}" for part in USED[: i + 1]]
        branches = [branch for branch in BRANCHES if any((branch, part) in found for part in parts)]
        if not branches:
            continue
        heads = ["branch", title(top), *(f"no {part}" for part in USED[: i + 1])]
        print(f"## {title(top)}: one part off, perplexity on {text}\n")
        print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        for branch in branches:
            found[branch, parts[-1]] = found[branch, list(LADDER)[i]]
            numbers = (f"{found[branch, rung]:.3f}" if (branch, rung) in found else "" for rung in [top, *parts])
            print(f"| {branch} | " + " | ".join(numbers) + " |")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("run")
    one.add_argument("model", type=Path)
    one.add_argument("--name", help="the model's name in the results; the folder's by default")
    one.add_argument("--about", default="", help="what else the protocol has to say, of the texts for example")
    one.add_argument("--calibration", type=Path, required=True)
    one.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=TEXT")
    for name, default in (("nsamples", 32), ("seqlen", 512), ("windows", 12), ("window", 2048)):
        one.add_argument(f"--{name}", type=int, default=default)
    one.add_argument("--branches", nargs="+", choices=tuple(BRANCHES), default=list(BRANCHES))
    one.add_argument("--rungs", nargs="+", choices=tuple(RUNGS), default=list(LADDER))
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--seconds", type=float)
    one.set_defaults(do=run)
    other = kinds.add_parser("table")
    other.add_argument("results", nargs="+", type=Path)
    other.add_argument("--reference", type=Path)
    other.add_argument("--times", nargs="*", type=Path, default=[])
    other.set_defaults(do=table)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
