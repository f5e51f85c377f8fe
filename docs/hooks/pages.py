"""What MkDocs calls: the pages that are made from something else, and small corrections of the text on all pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import command_pages
import formulas
import notebook_pages
import repository_pages
import size_tables
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.compile(r"^<!-- table: ([a-z-]+) -->$", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(<code>)[~.]*([^<]*</code>)")  # reST, as docstrings have it


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages and pictures."""
    made: dict[str, str | bytes] = {"commands.md": command_pages.page()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made |= notebook_pages.pages(path)
    made |= repository_pages.pages(ROOT)
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Fill in tables, and turn $formulas$ into MathML, which browsers draw themselves."""
    markdown = TABLE.sub(lambda found: size_tables.TABLES[found[1]](), markdown)
    return formulas.to_mathml(markdown)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Docstrings are written for a terminal: their reST roles and double colons have no meaning here."""
    return ROLE.sub(r"\1\2", html).replace("::</p>", ":</p>")
