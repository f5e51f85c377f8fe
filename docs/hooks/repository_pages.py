"""Pages that are a file of the repository, or a part of one, with its links pointed to where things are in the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
HOMES = {"ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
         "README.md": "index.md"}  # fmt: skip


def pages(root: Path) -> dict[str, str | bytes]:
    """``{place in the site: content}`` of them all, and of the pictures they show."""
    text = {
        name: (root / name).read_text(encoding="utf-8")
        for name in (*HOMES, "notebooks/README.md")
        if (root / name).is_file()
    }
    readme = text["README.md"]
    measured = "# Measured\n\n" + readme[_start(readme, "Quality") : _start(readme, "Read it")]
    course = "# The course\n\n" + section(readme, "Read it").partition("\n")[2]
    made: dict[str, str | bytes] = {
        "architecture.md": relink(text["ARCHITECTURE.md"], "", ""),
        "contributing.md": relink(text["CONTRIBUTING.md"], "", ""),
        "changelog.md": relink(text["CHANGELOG.md"], "", ""),
        "measured.md": relink(measured, "", ""),
        "course/index.md": relink(course, "", "course"),
    }
    for place in pictures(measured):
        made[f"assets/{posixpath.basename(place)}"] = (root / place).read_bytes()
    return made


def section(text: str, title: str) -> str:
    """A section of a Markdown text, up to the next heading of its level."""
    start = _start(text, title)
    end = text.find("\n## ", start + 1)
    return text[start:] if end < 0 else text[start : end + 1]


def _start(text: str, title: str) -> int:
    found = re.search(rf"^## {re.escape(title)}", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"README.md has no section that begins with {title!r}; docs/hooks/repository_pages.py shows it")
    return found.start()


def pictures(text: str) -> list[str]:
    return [found[3] for found in LINK.finditer(text) if found[1]]


def relink(text: str, folder: str, page_folder: str) -> str:
    """Point the links of a text of ``folder`` (in the repository) to where things are, for a page in ``page_folder``.

    What is no page of the site is named by its path in the repository.
    """

    def replace(found: re.Match) -> str:
        mark, label, target, anchor = found.groups()
        place = posixpath.normpath(posixpath.join(folder, target))
        if mark:
            return f"![{label}]({posixpath.relpath(f'assets/{posixpath.basename(place)}', page_folder or '.')})"
        home = HOMES.get(place)
        if place.startswith("notebooks/") and place.endswith(".ipynb"):
            home = f"course/{posixpath.basename(place).removesuffix('.ipynb')}.md"
        if place.startswith("docs/"):
            home = place.removeprefix("docs/")
        if home is None:
            return f"{label} (`{place}`)"
        return f"[{label}]({posixpath.relpath(home, page_folder or '.')}{anchor or ''})"

    return LINK.sub(replace, text)
