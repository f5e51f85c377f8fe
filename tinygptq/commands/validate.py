"""``tinygptq validate``: the forward pass beside transformers', part by part."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from tinygptq.commands.arguments import add_json, add_model
from tinygptq.errors import TinyGPTQError

TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a small village at the foot of a mountain, and "
    "in it lived a girl who could count to 1,000,000. Water boils at 100 degrees; light travels 299,792 km in a second."
)


def register(command) -> None:
    """Add the subcommand to the parser; see the package."""
    parser = command("validate", _validate, "every linear and block beside transformers' in float32; the exit code says")
    add = parser.add_argument
    add_model(parser)
    add("--reference", metavar="MODEL", help="what transformers runs, where it is another folder: an original beside a copy")
    add("--text", default=TEXT, metavar="TEXT", help="what to run (default: a few sentences)")
    add("--tokens", type=int, default=48, metavar="N", help="its first N tokens (default: %(default)s)")
    add(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="F",
        help="largest difference allowed, as a share of the root mean square of torch's values (default: %(default)s)",
    )
    add_json(parser)


def _validate(args: argparse.Namespace) -> None:
    import numpy as np

    from tinygptq.measure.validate import validate
    from tinygptq.release.hub import resolve
    from tinygptq.tokenizer import Tokenizer

    if args.tokens < 1:
        raise TinyGPTQError(f"--tokens is {args.tokens}, expected at least 1")
    folder = resolve(args.model, args.revision)
    reference = None if args.reference is None else resolve(args.reference, None)
    ids = np.asarray(Tokenizer.from_folder(folder).encode(args.text)[: args.tokens], np.int64)
    if not len(ids):
        raise TinyGPTQError("--text holds no tokens")
    found = validate(folder, ids, args.tolerance, reference)
    if args.json:
        print(json.dumps({"tolerance": found.tolerance, "passed": found.passed, "first": found.first,
                          "rows": [asdict(row) for row in found.rows]}).replace("Infinity", "null"))  # fmt: skip
    else:
        _print(found, len(ids))
    if not found.passed:
        where = "; ".join(f"{engine} at {part}" for engine, part in found.first.items() if part)
        raise TinyGPTQError(f"differs from transformers by more than {found.tolerance:g}, first: {where}")


def _print(found, tokens: int) -> None:
    engines = list(found.rows[-1].differences)
    width = max(len(row.part) for row in found.rows)
    print(f"{tokens} tokens; largest difference from transformers in float32, and as a share of its root mean square\n")
    print(f"{'':<{width}}  " + "  ".join(f"{engine:>19}" for engine in engines))
    for row in found.rows:
        cells = []
        for engine in engines:
            one = row.differences.get(engine)
            mark = " " if one is None or one.relative <= found.tolerance else "*"
            cells.append(f"{'':>19}" if one is None else f"{one.largest:9.1e} {one.relative:8.1e}{mark}")
        print(f"{row.part:<{width}}  " + "  ".join(cells).rstrip())
    print()
    for engine, part in found.first.items():
        print(f"{engine}: " + (f"beyond {found.tolerance:g} first at {part}" if part else f"all within {found.tolerance:g}"))
