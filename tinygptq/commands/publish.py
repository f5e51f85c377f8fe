"""``tinygptq branches`` and ``tinygptq card``: everything that a published repository holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tinygptq.branches import BRANCHES
from tinygptq.commands.arguments import add_revision
from tinygptq.errors import TinyGPTQError
from tinygptq.templates import TEMPLATES

CARD_OPTIONS = {  # option: what the card shows; the names of card.ModelFacts' fields
    "base_model": "the original's repository (default: SRC's name)",
    "model_name": "the model's name (default: the last part of --base-model)",
    "model_creator": "who made the original",
    "quantized_by": "who made these files",
    "repo": "the repository that the card is for, as OWNER/NAME",
    "license": "of the original (default: what its card says, else other)",
}


def register(command: Callable) -> None:
    """Add ``branches`` and ``card``; ``command(name, function, help)`` makes a subparser."""
    branches = command("branches", _branches, "make the six published permutations, a folder for each, and the model card")
    add = branches.add_argument
    add("src", metavar="SRC", help="the model in fp16, bf16 or fp32: a folder or OWNER/NAME[:BRANCH]")
    add("out", metavar="OUT", help="folder to make the branches in; finished ones that are there already are kept")
    add_revision(branches)
    add("--dataset", default="wikitext2", metavar="NAME|FILE", help="calibration text (default: %(default)s)")
    add("--nsamples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    add("--seqlen", type=int, default=2048, metavar="N", help="tokens in each (default: %(default)s)")
    add("--seed", type=int, default=0, help="which windows of a named set (default: %(default)s)")
    add("--perplexity", metavar="NAME|FILE", help="measure each branch on this text, in windows of --seqlen")
    add("--max-windows", type=int, metavar="N", help="measure on N windows at most")
    add("--only", nargs="+", default=[], metavar="NAME", choices=tuple(BRANCHES), help="some of the branches")
    add(
        "--cluster",
        metavar="local|ADDRESS",
        help="run them as jobs on a Dask cluster: two processes of this machine, or "
        "the scheduler at ADDRESS, whose workers must share the files of SRC, OUT and the texts (a shared file system)",
    )
    _add_card_options(branches)

    card = command("card", _card, "write the model card of quantised folders, from what they hold")
    card.add_argument("folders", nargs="+", metavar="FOLDER", help="quantised folders, named as their branches")
    card.add_argument("--source", type=Path, metavar="SRC", help="the original's folder, whose README.md is quoted")
    card.add_argument("--out", type=Path, metavar="FILE", help="write it here instead of printing it")
    _add_card_options(card)


def _add_card_options(parser: argparse.ArgumentParser) -> None:
    for name, about in CARD_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=about)
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages of the original (en)")
    parser.add_argument("--trained-on", nargs="+", metavar="DATASET", help="data sets the original was trained on")
    parser.add_argument("--template", default="tulu", choices=sorted(TEMPLATES), help="prompt template (tulu)")


def _card_facts(args: argparse.Namespace) -> dict:
    given = {name: getattr(args, name) for name in CARD_OPTIONS}
    many = {"language": tuple(args.language or ()), "datasets": tuple(args.trained_on or ())}
    return {**given, **many, "template": args.template}


def _branches(args: argparse.Namespace) -> None:
    from tinygptq.release.card import readable_size
    from tinygptq.release.publish import Recipe, publish

    recipe = Recipe(args.dataset, args.nsamples, args.seqlen, args.seed, args.template, args.perplexity, args.max_windows)
    outcomes = publish(args.src, args.out, recipe, only=args.only, cluster=args.cluster, revision=args.revision,
                       card=_card_facts(args))  # fmt: skip
    for outcome in outcomes:
        if outcome.error is None:
            folder = Path(args.out) / outcome.branch
            size = (folder / "model.safetensors").stat().st_size
            print(f"{folder}: {readable_size(size)}{', kept' if outcome.kept else ''}")
    failed = [f"{outcome.branch} ({outcome.error})" for outcome in outcomes if outcome.error]
    if failed:
        raise TinyGPTQError(f"{len(failed)} of {len(outcomes)} branches failed: {'; '.join(failed)}")


def _card(args: argparse.Namespace) -> None:
    from tinygptq.release.card import ModelFacts, model_card, provided_files
    from tinygptq.release.facts import replace_text

    folders = [Path(folder) for folder in args.folders]
    files = provided_files(folders)
    if args.source is not None and not args.source.is_dir():
        raise TinyGPTQError(f"{args.source}: no such folder")
    text = model_card(ModelFacts.of(args.source or folders[0], **_card_facts(args)), files)
    if args.out is None:
        print(text, end="")
        return
    replace_text(args.out, text)
