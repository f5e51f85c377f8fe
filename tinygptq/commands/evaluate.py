"""``tinygptq eval``: benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tinygptq.commands.arguments import add_device, add_json, add_model
from tinygptq.errors import TinyGPTQError


def register(command) -> None:
    """Add the subcommand to the parser; see the package."""
    parser = command("eval", _eval, "benchmarks through lm-evaluation-harness: its tasks, and the card's table as suites")
    add = parser.add_argument
    add_model(parser, nargs="?")
    add("--tasks", metavar="NAME,...", help="suites (see --list) or tasks of the harness")
    add("--list", action="store_true", help="list the suites and stop")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: as the task or suite says)")
    add("--limit", type=float, metavar="N", help="only the first N documents of a task, or that share of them if below 1")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="sequences scored in one pass at most (default: as many as pay), and "
        "on a GPU answered together, 16 at most (default: 1, for each takes a cache of its own)",
    )
    add(
        "--apply-chat-template",
        nargs="?",
        const="folder",
        metavar="NAME",
        help="write prompts as conversations, in the folder's chat template or a named one",
    )
    add("--system", metavar="TEXT", help="a system message")
    add("--no-multiturn", action="store_true", help="all examples in one user message, with a chat template")
    add("--gen-kwargs", metavar="KEY=VALUE,...", help="generation settings that override the tasks'")
    add("--include-path", type=Path, metavar="FOLDER", help="more tasks, as YAML files")
    add("--output", type=Path, metavar="FOLDER", help="write results and every sample there, in the harness's form")
    add(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep answers as they come in FILE-..., a file for each model, and go on from it",
    )
    add("--seed", type=int, default=1234, help="of the choice of examples (default: %(default)s)")
    add("--run-code", action="store_true", help="allow tasks to run programs that the model writes, unprotected")
    add_json(parser)
    add_device(parser)


def _eval(args: argparse.Namespace) -> None:
    from tinygptq.language_model import load
    from tinygptq.measure.benchmarks import SUITES
    from tinygptq.measure.harness_run import Options, run_tasks

    if args.list:
        for name, suite in SUITES.items():
            print(f"{name:<18} {suite.about}")
        return
    if args.model is None:
        raise TinyGPTQError("a MODEL is missing")
    names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if not names:
        raise TinyGPTQError("--tasks names nothing to evaluate; --list shows the suites")
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise TinyGPTQError(f"--limit is {args.limit}, expected a number of documents, or a share of them below 1")
    options = Options(
        fewshot=args.num_fewshot,
        limit=args.limit if args.limit is None or args.limit < 1 else int(args.limit),
        batch_size=args.batch_size,
        template=args.apply_chat_template,
        system=args.system,
        multiturn=not args.no_multiturn,
        gen_kwargs=_settings(args.gen_kwargs),
        include=args.include_path,
        seed=args.seed,
        run_code=args.run_code,
        cache=args.cache,
    )
    if options.limit is not None and options.limit <= 0:
        raise TinyGPTQError(f"--limit is {options.limit:g}, expected more than 0")
    rows = min(max(args.batch_size or 1, 1), 16) if args.device == "cuda" else 1
    model = load(args.model, device=args.device, revision=args.revision, rows=rows)
    outcome = run_tasks(model, names, options, args.output)
    if args.json:
        print(json.dumps({name: {key: found.get(key) for key in ("results", "groups", "n-samples", "n-shot", "versions")}
                          for name, found in outcome.results.items()}, default=str))  # fmt: skip
        return
    for name, table in outcome.tables.items():
        print(f"{name}: {SUITES[name].about}" if name in SUITES else "tasks")
        print(table)
    if args.output:
        print(f"results and samples: {args.output}", file=sys.stderr)


def _settings(text: str | None) -> dict[str, Any] | None:
    """``temperature=0.8,do_sample=true`` as a dict; values are JSON where they can be."""
    if text is None:
        return None
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        if not sign or not name.strip():
            raise TinyGPTQError(f"--gen-kwargs has {part!r}, expected KEY=VALUE,...")
        try:
            settings[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[name.strip()] = value
    return settings
