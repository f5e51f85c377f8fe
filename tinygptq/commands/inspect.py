"""``tinygptq inspect`` and ``tinygptq size``: what a folder is, and how large a model is or would be."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tinygptq.branches import BRANCHES
from tinygptq.commands.arguments import add_json, add_model, add_revision
from tinygptq.config import SUPPORTED_BITS, LlamaConfig, QuantizeConfig, read_json
from tinygptq.errors import TinyGPTQError


def register(command: Callable) -> None:
    """Add ``inspect`` and ``size``; ``command(name, function, help)`` makes a subparser."""
    inspect = command("inspect", _inspect, "what a folder is, every problem found, and who can load it")
    add_model(inspect)
    add_json(inspect)

    size = command("size", _size, "bytes on disk and in memory, from the configuration alone")
    add = size.add_argument
    add("model", metavar="CONFIG_OR_MODEL", help="a config.json, a folder that holds one, or a repository of the hub")
    add_revision(size)
    add("--all-branches", action="store_true", help="the six published permutations, as in the model card")
    add("--bits", type=int, choices=SUPPORTED_BITS, help="as if quantised with so many bits")
    add("--group-size", type=int, metavar="N", help="rows that share a scale, -1 for all")
    add("--context", type=int, default=2048, metavar="N", help="tokens a GPU makes room for (default: %(default)s)")
    add_json(size)


def _inspect(args: argparse.Namespace) -> None:
    from tinygptq.release.hub import resolve
    from tinygptq.release.inspect_folder import as_dict, as_text, inspect_folder

    found = inspect_folder(resolve(args.model, args.revision))
    print(json.dumps(as_dict(found)) if args.json else as_text(found))
    if found.problems:
        count = f"{len(found.problems)} problem{'s' * (len(found.problems) > 1)}"
        raise TinyGPTQError(f"{found.folder}: cannot be loaded, {count}; the first: {found.problems[0]}")


def _size(args: argparse.Namespace) -> None:
    from tinygptq.cuda.memory import predict
    from tinygptq.folders.sizes import sizes

    if args.all_branches and (args.bits is not None or args.group_size is not None):
        raise TinyGPTQError("--all-branches has bits and group sizes of its own; leave out --bits and --group-size")
    if args.context < 1:
        raise TinyGPTQError(f"--context is {args.context}, expected at least 1")
    path = _config_path(args.model, args.revision)
    config = LlamaConfig.from_dict(read_json(path), str(path))
    if args.all_branches:
        _print_branches(config, args.json)
        return
    quantization = _quantization(path, args.bits, args.group_size)
    found = sizes(config, quantization)
    on_gpu = {bits: predict(config, quantization, args.context, cache_bits=bits).total for bits in (16, 8)}
    if args.json:
        gpu = {"context": args.context, "device_bytes": on_gpu[16], "device_bytes_with_8_bit_cache": on_gpu[8]}
        print(json.dumps({"quantization": quantization and asdict(quantization), **asdict(found), **gpu}))
        return
    group = quantization and (f"group {quantization.group_size}" if quantization.group_size != -1 else "no groups")
    print(f"{path}: {f'{quantization.bits} bits, {group}' if quantization else 'fp16'}")
    for name, value in (("weights file", found.file), ("memory to load", found.weights),
                        ("KV cache per 1,000 tokens", found.kv_per_1000_tokens),
                        (f"on a GPU, {args.context:,} tokens", on_gpu[16]),
                        ("  with an 8-bit cache", on_gpu[8])):  # fmt: skip
        print(f"  {name:<26} {value:>17,} bytes  {value / 1e9:8.3f} GB")


def _config_path(model: str, revision: str | None) -> Path:
    """The config.json that CONFIG_OR_MODEL means; weights are neither needed nor fetched."""
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        return path / "config.json"
    from tinygptq.release.hub import resolve

    return resolve(model, revision, weights=False) / "config.json"


def _quantization(path: Path, bits: int | None, group: int | None) -> QuantizeConfig | None:
    """As the options say, else as the folder says it is quantised; None for fp16."""
    from tinygptq.folders.gptq_configs import find_quantize_config

    stated = find_quantize_config(path.parent) if path.name == "config.json" else None
    if bits is None and group is None:
        return stated
    base = stated or QuantizeConfig()
    return QuantizeConfig(bits or base.bits, base.group_size if group is None else group)


def _print_branches(config: LlamaConfig, as_json: bool) -> None:
    """The model card's table, its sizes in decimal GB."""
    from tinygptq.folders.sizes import sizes
    from tinygptq.release.loaders import Loadable, who_can_load

    rows = []
    for name, branch in BRANCHES.items():
        shapes = {f"model.layers.0.{linear}": shape for linear, shape in config.linear_shapes().items()}
        reasons = who_can_load(Loadable(branch, shapes))["ExLlama v2"]
        rows.append({"branch": name, "bits": branch.bits, "group_size": branch.group_size, "desc_act": branch.desc_act,
                     "damp_percent": branch.damp_percent, **asdict(sizes(config, branch)), "exllama": not reasons,
                     "exllama_reasons": reasons})  # fmt: skip
    if as_json:
        print(json.dumps({"branches": rows}))
        return
    width = max(len(row["branch"]) for row in rows)
    print(f"{'branch':<{width}}  bits  GS    act order  damp %  size                      ExLlama")
    for row in rows:
        group = "None" if row["group_size"] == -1 else row["group_size"]
        size = f"{row['file'] / 1e9:.2f} GB {row['file']:>15,}"
        print(f"{row['branch']:<{width}}  {row['bits']:<4}  {group:<4}  {'Yes' if row['desc_act'] else 'No':<9}  "
              f"{row['damp_percent']:<6}  {size:<24}  {'Yes' if row['exllama'] else 'No'}")  # fmt: skip
