"""``tinygptq perplexity``: how well a model predicts a text."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from tinygptq.commands.arguments import add_device, add_json, add_model
from tinygptq.errors import TinyGPTQError


def register(command) -> None:
    """Add the subcommand to the parser; see the package."""
    parser = command("perplexity", _perplexity, "perplexity over windows of a text, as papers measure it")
    add = parser.add_argument
    add_model(parser)
    add(
        "--dataset",
        required=True,
        metavar="NAME|FILE",
        help="wikitext2, ptb or c4 in its published form (the test split; "
        "of c4 256 windows of the validation split), or a .txt or .jsonl file as it is",
    )
    add(
        "--protocol",
        choices=("wikitext2",),
        help="read FILE as WikiText-2's raw split and join its rows by blank lines, as for the published figures",
    )
    add("--seqlen", type=int, help="tokens in a window (default: 2048, or the model's maximum if that is less)")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="windows begin N tokens apart, and a token is predicted in the first that reaches it (default: no overlap)",
    )
    add("--max-windows", type=int, metavar="N", help="stop after N windows")
    add_json(parser)
    add_device(parser)


def _perplexity(args: argparse.Namespace) -> None:
    from tinygptq.calibrate import PUBLISHED, evaluation_text, parse_dataset
    from tinygptq.language_model import load

    name = parse_dataset(args.dataset).name
    if args.protocol is not None and name is not None:
        raise TinyGPTQError(f"--protocol says how to read a file; the set {name} is read in its published form as it is")
    protocol = args.protocol or name
    most = args.max_windows
    if most is None and name is not None:
        most = PUBLISHED[name].windows if name in PUBLISHED else None
    model = load(args.model, device=args.device, context=2, revision=args.revision)
    text = evaluation_text(args.dataset, model.tokenizer, args.protocol)
    result = model.perplexity(text, args.seqlen, most, args.stride)
    if args.json:
        print(json.dumps({**asdict(result), "protocol": protocol}))
        return
    windows = f"{result.windows} x {result.seqlen}" + (f", {result.stride} apart" if args.stride else "")
    print(f"perplexity {result.perplexity:.4f} over {result.tokens:,} tokens ({windows})")
    if protocol is not None and protocol in PUBLISHED:
        print(f"  {PUBLISHED[protocol].about}")
