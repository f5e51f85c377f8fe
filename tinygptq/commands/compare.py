"""``tinygptq compare``: two models on the same text."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tinygptq.commands.arguments import MODEL, add_device, add_json
from tinygptq.errors import TinyGPTQError


def register(command) -> None:
    """Add the subcommand to the parser; see the package."""
    parser = command("compare", _compare, "two models on the same text: perplexity, KL, agreement, errors block by block")
    add = parser.add_argument
    add("a", metavar="A", help=f"the reference: {MODEL}")
    add("b", metavar="B", help="the other, for instance its quantised folder, likewise")
    add("--text", required=True, metavar="FILE", help="a .txt or .jsonl file, or a named set as for perplexity")
    add("--seqlen", type=int, default=512, help="tokens in a window (default: %(default)s)")
    add("--max-windows", type=int, metavar="N", help="stop after N windows")
    add("--worst", type=int, default=10, metavar="N", help="show the N tokens of largest KL (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE.png", help="draw the errors by block and the distribution of KL")
    add_json(parser)
    add_device(parser)


def _compare(args: argparse.Namespace) -> None:
    import numpy as np

    from tinygptq.calibrate import evaluation_text
    from tinygptq.language_model import load
    from tinygptq.measure.compare import compare, plot
    from tinygptq.pictures import require_picture

    if args.plot is not None:
        require_picture(args.plot, "--plot")
    if args.worst < 0:
        raise TinyGPTQError(f"--worst is {args.worst}, expected at least 0")
    a, b = (load(source, device=args.device, context=2) for source in (args.a, args.b))
    text = evaluation_text(args.text, a.tokenizer)
    ids = a.tokenizer.encode(text)
    if b.tokenizer.encode(text) != ids:
        raise TinyGPTQError(f"the tokenizers of {args.a} and {args.b} read the text differently: nothing can be compared")
    found = compare(a.engine.model, b.engine.model, np.asarray(ids, np.int64), a.tokenizer, args.seqlen, args.max_windows,
                    args.worst)  # fmt: skip
    if args.plot is not None:
        plot(found, args.plot, (Path(args.a).name, Path(args.b).name))
    if args.json:
        fields = {name: value for name, value in asdict(found).items() if name != "kl"}
        print(json.dumps({"a": args.a, "b": args.b, **fields}))
        return
    _print(found)


def _print(found) -> None:
    print(f"perplexity      {found.perplexity_a:.4f}  ->  {found.perplexity_b:.4f}   "
          f"({100 * (found.perplexity_b / found.perplexity_a - 1):+.2f} %, {found.tokens:,} tokens)")  # fmt: skip
    print(f"KL(A || B)      mean {found.kl_mean:.5f} nats, 99th percentile {found.kl_p99:.5f}")
    print(f"same top token  {100 * found.top1_agreement:.2f} %")
    print("\nrelative error of the hidden states")
    for layer, error in enumerate(found.hidden_error):
        print(f"  {'embedding' if layer == 0 else f'block {layer - 1}':<10} {100 * error:9.4f} %")
    if found.worst:
        print("\ntokens of largest KL: the text, then what A and B hold for most likely")
    for one in found.worst:
        print(f"  {one.kl:8.4f}  ...{one.context!r} {one.actual!r}:  A {one.a!r} {one.probability_a:.2f}, "
              f"B {one.b!r} {one.probability_b:.2f}")  # fmt: skip
