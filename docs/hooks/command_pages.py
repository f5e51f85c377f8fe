"""The page of all commands, written from the parser itself."""

from __future__ import annotations

import argparse

from tinygptq.cli import _parser

HEAD = """# Commands

Written from the command line's own parser when the site is built; `tinygptq COMMAND --help` says the same. Results go to
standard output, everything else to standard error. A mistake ends in one line and exit code 2.
"""


def page() -> str:
    """Markdown: a list of the commands, then each with its usage and arguments."""
    commands = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    about = {choice.dest: choice.help for choice in commands._choices_actions}
    lines = [HEAD, "| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {_text(about[name])} |" for name in commands.choices]
    for name, parser in commands.choices.items():
        lines += ["", *_command(name, parser)]
    return "\n".join(lines) + "\n"


def _command(name: str, parser: argparse.ArgumentParser) -> list[str]:
    formatter = argparse.HelpFormatter(parser.prog, width=88, max_help_position=30)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    lines = [f"## {name}", "", f"{_text(parser.description)}.", "", "```text", formatter.format_help().strip(), "```", ""]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    if shown:
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| {_names(action)} | {_meaning(parser, action)} |" for action in shown]
    return lines


def _names(action: argparse.Action) -> str:
    """``--bits`` `{2,3,4,8}``, or a positional argument's name."""
    value = "" if action.nargs == 0 else _value(action)
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{option}`" for option in action.option_strings) + (f" `{value}`" if value else "")


def _value(action: argparse.Action) -> str:
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper() if action.option_strings else action.dest


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    if not action.help:
        return ""
    return _text(action.help % {**vars(action), "prog": parser.prog})


def _text(text: str | None) -> str:
    """Words of the help as Markdown: nothing in them is markup."""
    return "".join(f"\\{c}" if c in "|*_<>[]`" else c for c in text or "")
