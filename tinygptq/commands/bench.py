"""``tinygptq bench``: how fast a model runs here, and ``tinygptq doctor``: what this machine has to run it on."""

from __future__ import annotations

import argparse
import json
import time

from tinygptq.commands.arguments import add_cache_bits, add_device, add_json, add_model


def register(command) -> None:
    """Add the subcommands to the parser; see the package."""
    parser = command("bench", _bench, "how fast a model loads, reads prompts and decodes here, beside the memory's speed")
    add = parser.add_argument
    add_model(parser)
    add("--context", type=_numbers, default=(256,), metavar="N,N", help="tokens before those decoded (default: 256)")
    add("--prompt-tokens", type=_numbers, default=(512,), metavar="N,N", help="lengths of prompts (default: 512)")
    add("--rows", type=_numbers, default=(1,), metavar="N,N", help="sequences decoded together (default: 1; more on a GPU)")
    add("--tokens", type=_number, default=64, metavar="N", help="decoded in each run (default: %(default)s)")
    add_cache_bits(parser)
    add("--profile", action="store_true", help="also time the kernels of a step (GPU)")
    add_json(parser)
    add_device(parser)
    doctor = command("doctor", _doctor, "what this machine has to run models on, and what is missing")
    add_json(doctor)


def _numbers(text: str) -> tuple[int, ...]:
    """``256,1900`` as numbers, each at least 1."""
    try:
        return tuple(_number(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers from 1 on, with commas between them") from None


def _number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected at least 1")
    return number


def _bench(args: argparse.Namespace) -> None:
    from tinygptq.bench import WARM_UP, bench
    from tinygptq.language_model import load

    context = max(max(args.context) + args.tokens + WARM_UP, *args.prompt_tokens)
    found = []
    for rows in args.rows:
        start = time.perf_counter()
        options = {"rows": rows, "cache_bits": args.cache_bits}
        model = load(args.model, device=args.device, context=context, revision=args.revision, **options)
        seconds = time.perf_counter() - start
        found.append(bench(model, seconds, args.context, args.prompt_tokens, args.tokens, profile=args.profile))
        del model
    if args.json:
        print(json.dumps([one.to_json() for one in found]))
        return
    first = found[0]
    memory = "" if first.device_bytes is None else f", {first.device_bytes * 1e-9:.2f} GB of device memory"
    print(f"{first.device}: loaded in {first.load_seconds:.1f} s{memory}; memory at {first.memory_gb_per_second:.0f} GB/s")
    for prompt in first.prefill:
        print(f"prompt of {prompt.tokens:6,}                  {prompt.tokens_per_second:9,.0f} tok/s")
    for one in found:
        for d in one.decoding:
            share = d.gb_per_second / one.memory_gb_per_second
            speed = f"{d.tokens_per_second:9,.1f} tok/s {d.gb_per_second:8,.0f} GB/s {share:5.0%} of the memory's"
            print(f"decoding after {d.context:6,}, {d.rows:2} at once {speed}")
    for kind, microseconds in first.kernels.items():
        print(f"  {kind:12} {microseconds:9.1f} us a step")


def _doctor(args: argparse.Namespace) -> None:
    from tinygptq.doctor import examine

    found = examine()
    if args.json:
        print(json.dumps([{"what": c.what, "ok": c.ok, "found": c.found, "mend": c.mend} for c in found]))
        return
    for check in found:
        print(f"{'ok     ' if check.ok else 'missing'}  {check.what:14} {check.found}")
        if check.mend:
            print(f"         {'':14} {check.mend}")
