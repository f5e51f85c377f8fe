"""The ``tinygptq`` command. Each subcommand is a few lines that join the modules below; results go to stdout, the rest to
stderr. A mistake of the user's is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tinygptq import __version__
from tinygptq.commands import bench, chat, compare, convert, evaluate, inspect, perplexity, publish, validate
from tinygptq.commands.arguments import MODEL, add_cache_bits, add_device, add_json, add_model, add_revision, add_sampling
from tinygptq.config import RECIPES, SUPPORTED_BITS, QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.templates import FOLDER_TEMPLATE, TEMPLATES, render

FAMILIES: tuple = (chat, perplexity, evaluate, compare, validate, publish, convert, inspect, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("tinygptq").setLevel(logging.DEBUG if args.verbose else logging.INFO)
    try:
        args.run(args)
        if sys.stdout is not None:  # as it is where a shell has closed it
            sys.stdout.flush()
    except TinyGPTQError as error:
        return _fail(error)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        _silence_stdout()
        return 141
    except OSError as error:  # a file or folder that the system refuses, and our output among them
        _silence_stdout()
        return _fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def _fail(error: Exception) -> int:
    print(f"tinygptq: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _silence_stdout() -> None:
    """If what is still to be written cannot be, it goes nowhere: the flush at the very end must not complain again."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------------------------------------- commands


def _demo(args: argparse.Namespace) -> None:
    from tinygptq.demo import run

    run(out=args.out, seed=args.seed)


def _quantize(args: argparse.Namespace) -> None:
    from tinygptq.quantization.run import quantize

    report = quantize(
        args.src,
        args.out,
        _quantize_config(args),
        dataset=args.dataset,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        seed=args.seed,
        template=args.template,
        method=args.method,
        device=args.device,
        revision=args.revision,
        resume=args.resume,
        report=args.report,
    )
    size = (report.folder / "model.safetensors").stat().st_size
    if args.json:
        facts = {"folder": str(report.folder), "bytes": size, "seconds": report.seconds, "stages": report.stages}
        print(json.dumps(facts | {"linears": [linear.to_json() for linear in report.linears]}))
    else:
        print(f"{report.folder}: {size:,} bytes, {len(report.linears)} linears in {report.seconds:.1f} s")


def _generate(args: argparse.Namespace) -> None:
    from tinygptq.conversation import encode_messages
    from tinygptq.language_model import load

    text = _standard_input() if args.prompt == "-" else args.prompt
    if args.greedy and args.temperature is not None:
        raise TinyGPTQError("--greedy and --temperature contradict each other")
    options = {"cache_bits": args.cache_bits}
    model = load(args.model, device=args.device, context=args.context, revision=args.revision, **options)
    own = args.template == FOLDER_TEMPLATE
    pieces = model.stream(
        encode_messages(model, args.template, [{"role": "user", "content": text}]) if own else render(args.template, text),
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _standard_input() -> str:
    if sys.stdin is None:
        raise TinyGPTQError("--prompt - reads standard input, which is closed")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise TinyGPTQError("--prompt -: standard input is not valid UTF-8") from None


# --------------------------------------------------------------------------------------------------------- parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake; argparse would print the whole usage before it."""
        self.exit(2, f"tinygptq: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tinygptq", description="GPTQ and LLaMA in NumPy and Numba.")
    parser.add_argument("--version", action="version", version=f"tinygptq {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="say more on stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, parents=[common])
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "quantise the embedded model at 4, 3 and 2 bits, compare, and let it tell a story")
    demo.add_argument("--out", type=Path, help="keep the 4-bit folder here")
    demo.add_argument("--seed", type=int, default=0, help="of the story (default: %(default)s)")

    _add_quantize(command("quantize", _quantize, "quantise a Hugging Face folder by GPTQ into a new folder"))
    _add_generate(command("generate", _generate, "continue a prompt, streaming to the terminal"))
    for family in FAMILIES:
        family.register(command)
    return parser


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    default = QuantizeConfig()
    add = parser.add_argument
    add("src", metavar="SRC", help=f"the model in fp16, bf16 or fp32: {MODEL}")
    add_revision(parser)
    add("out", metavar="OUT", help="new folder to write")
    add("--bits", type=int, default=default.bits, choices=SUPPORTED_BITS, help="bits a weight (default: %(default)s)")
    add("--group-size", type=int, default=default.group_size, metavar="N", help="rows that share a scale, -1 for all (128)")
    add("--desc-act", action="store_true", help="act-order: quantise columns by descending diag(H)")
    add("--asym", action="store_true", help="asymmetric: a zero point of its own for each group")
    add("--damp-percent", type=float, default=default.damp_percent, metavar="F", help="damping (default: %(default)s)")
    add("--static-groups", action="store_true", help="scales from the uncorrected weights")
    add("--no-true-sequential", action="store_true", help="calibrate a whole block on its unquantised self")
    add(
        "--dataset",
        default="wikitext2",
        metavar="NAME|FILE",
        help="wikitext2[:split], c4, ptb, databricks-dolly-15k, "
        "oasst1, CodeAlpaca-20k, or a .txt or .jsonl file (default: %(default)s)",
    )
    add("--nsamples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    add("--seqlen", type=int, default=2048, metavar="N", help="tokens in each (default: %(default)s)")
    add("--seed", type=int, default=0, help="which windows of a named set (default: %(default)s)")
    add("--template", default="tulu", choices=sorted(TEMPLATES), help="prompt template of instruction sets (tulu)")
    add("--method", default="gptq", choices=("gptq", "rtn"), help="rtn rounds to nearest, without calibration")
    add(
        "--recipe",
        default="fast",
        choices=tuple(RECIPES),
        help="plain is the paper's algorithm; fast searches each "
        "group's scale and quantises the most important columns first; best also makes up for what earlier linears "
        "changed and for other outputs' errors, and moves scales and codes once more, in three to four times the time "
        "(default: %(default)s)",
    )
    add("--checkpoint-format", default="gptq", choices=("gptq", "gptq_v2"), help="how zero points are stored (gptq)")
    add(
        "--resume",
        action="store_true",
        help="continue an earlier run that was cut off, at the block it had reached; "
        "also keep what this one has done if an error or Ctrl-C stops it (one that is killed can be continued in any case)",
    )
    add("--report", metavar="FILE.png", help="draw every linear's error, beside that of rounding to nearest ([plot])")
    add_json(parser)
    add_device(parser, choices=("cpu", "cuda"))


def _quantize_config(args: argparse.Namespace) -> QuantizeConfig:
    return QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        desc_act=args.desc_act,
        sym=not args.asym,
        damp_percent=args.damp_percent,
        static_groups=args.static_groups,
        true_sequential=not args.no_true_sequential,
        checkpoint_format=args.checkpoint_format,
        recipe=RECIPES[args.recipe],
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model(parser)
    add("--prompt", required=True, metavar="TEXT", help="- reads it from standard input")
    known = [FOLDER_TEMPLATE, *sorted(TEMPLATES)]
    add("--template", default="none", choices=known, help="wrap the prompt; folder: in the folder's own (default: none)")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="(default: %(default)s)")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add_sampling(parser)
    add("--greedy", action="store_true", help="always the most likely token")
    add("--seed", type=int, help="same seed, same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)")
    add("--context", type=int, metavar="N", help="room for prompt and answer together (default: the model's maximum)")
    add_cache_bits(parser)
    add_device(parser, choices=("cpu", "cuda"))


if __name__ == "__main__":
    sys.exit(main())
