"""Arguments that several subcommands have, written once."""

from __future__ import annotations

import argparse

MODEL = "a folder, or a repository of the hub as OWNER/NAME or OWNER/NAME:BRANCH"


def add_model(parser: argparse.ArgumentParser, **changes) -> None:
    """MODEL and --revision; ``changes`` are argparse's, for MODEL."""
    parser.add_argument("model", metavar="MODEL", **{"help": MODEL, **changes})
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """--revision, for any command that takes a repository of the hub."""
    parser.add_argument("--revision", metavar="BRANCH", help="branch, tag or commit of a repository")


def add_device(parser: argparse.ArgumentParser, **changes) -> None:
    """--device; without ``choices`` among the changes, loading refuses what is unknown."""
    parser.add_argument("--device", default="cpu", help="where to run (default: %(default)s)", **changes)


def add_cache_bits(parser: argparse.ArgumentParser) -> None:
    """--cache-bits, of the key-value cache."""
    text = "of keys and values on a GPU (default: %(default)s)"
    parser.add_argument("--cache-bits", type=int, default=16, choices=(8, 16), help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn; None is what generation_config.json says."""
    add = parser.add_argument
    add("--temperature", type=float, metavar="F", help="0 is greedy; what is not given comes from generation_config.json")
    add("--top-k", type=int, metavar="N")
    add("--top-p", type=float, metavar="F")
    add("--repetition-penalty", type=float, metavar="F")
