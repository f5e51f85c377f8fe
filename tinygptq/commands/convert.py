"""``convert`` and ``recover``: other people's files to folders of floats or GPTQ, and a weight diff to its model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tinygptq.commands.arguments import add_json, add_revision

SHARD_HELP = "cut the weights into files of at most this many bytes of tensors (5GB, 500MB); one file otherwise"


def register(command: Callable) -> None:
    """Add ``convert`` and ``recover``; ``command(name, function, help)`` makes a subparser."""
    convert = command("convert", _convert, "GGUF, AWQ, any GPTQ file or a PyTorch pickle to GPTQ or to fp16")
    add = convert.add_argument
    add("src", metavar="SRC", help="a .gguf, .safetensors or pickle file, a folder, or a repository of the hub")
    add("out", metavar="OUT", help="new folder to write")
    add("--to", choices=("gptq", "gptq_v2", "fp16", "fp32"), help="gptq for quantised sources, fp16 for GGUF, unless given")
    add("--allow-pickle", action="store_true", help="open PyTorch pickles, by torch.load(weights_only=True)")
    add("--max-shard-size", metavar="SIZE", help=SHARD_HELP)
    add_revision(convert)
    add_json(convert)

    recover = command("recover", _recover, "a model from its original and a weight diff: tuned = raw + diff")
    add = recover.add_argument
    add("--path-raw", "--path_raw", required=True, metavar="FOLDER", help="the original model")
    add("--path-diff", "--path_diff", required=True, metavar="FOLDER", help="the published difference")
    add("--path-tuned", "--path_tuned", required=True, metavar="OUT", help="new folder to write")
    add("--dtype", default="float16", choices=("float16", "float32"), help="of the result (default: %(default)s)")
    add("--max-shard-size", metavar="SIZE", help=SHARD_HELP)
    add("--check", action="store_true", help="read the result again and compare raw with tuned - diff")
    add_json(recover)


def _convert(args: argparse.Namespace) -> None:
    from tinygptq.convert import convert
    from tinygptq.release.hub import resolve

    source = Path(args.src)
    if not source.is_file():
        source = resolve(args.src, args.revision)
    done = convert(
        source, args.out, args.to, allow_pickle=args.allow_pickle, max_shard_size=_shard_size(args.max_shard_size)
    )
    if args.json:
        print(json.dumps({"folder": str(done.folder), "from": done.kind, "to": done.target, "note": done.note}))
        return
    if done.note:
        print(f"{done.folder}: {done.note}", file=sys.stderr)
    print(f"{done.folder}: {done.kind} to {done.target}")


def _recover(args: argparse.Namespace) -> None:
    from tinygptq.release.weight_diff import recover

    done = recover(
        args.path_raw,
        args.path_diff,
        args.path_tuned,
        dtype=args.dtype,
        max_shard_size=_shard_size(args.max_shard_size),
        check=args.check,
    )
    if args.json:
        difference = {"largest_difference": done.largest_difference} if args.check else {}
        print(json.dumps({"folder": str(done.folder), "tensors": done.tensors, "pad_row": done.pad_row, **difference}))
        return
    print(f"{done.folder}: {done.tensors} tensors" + (", a row for [PAD] added" if done.pad_row else ""))
    if args.check:
        print(f"raw = tuned - diff within rounding of {args.dtype}; largest difference {done.largest_difference:.3g}")


def _shard_size(text: str | None) -> int | None:
    from tinygptq.folders.shards import parse_size

    return None if text is None else parse_size(text)
