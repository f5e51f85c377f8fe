"""The documentation builds strictly, says what the command line says, and none of its links leads nowhere."""

from __future__ import annotations

import argparse
import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tinygptq.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package, reason=f"the site needs {package}: pip install tinygptq[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's notice about MkDocs 2, which is not used
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_front_page_shows_what_the_readme_shows():
    table = re.compile(r"^bits +bytes.*?(?=\n```)", re.MULTILINE | re.DOTALL)
    front, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/index.md", "README.md"))
    assert table.findall(front) == table.findall(readme) != []


class Page(HTMLParser):
    """What a page links to and can be linked to by, and its text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag in ("code", "pre", "script", "style", "math"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)


def test_every_link_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            checked += 1
            if not target.is_file() or (parts.fragment and target in pages and parts.fragment not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)} -> {link}")
    assert not broken
    assert checked > 1000


def test_a_reader_is_sent_to_nobody_elses_server(site):
    """Fonts, scripts and pictures are part of the site; only links that a reader follows lead out of it."""
    fetched = re.compile(r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"?(https?://[^\s\">]+)")
    for path in site.rglob("*.html"):
        assert not [url for url in fetched.findall(path.read_text(encoding="utf-8")) if "canonical" not in url], path


def test_every_page_was_made_and_shows_its_pictures(site):
    for name in ("quick-start", "small-gpus", "serving", "measured", "formats", "commands", "architecture", "contributing"):
        assert (site / name / "index.html").is_file(), name
    notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    for name in notebooks:
        page = Page(site / "course" / name / "index.html")
        assert any(link.endswith(".png") for link in page.links) or name == "1_sizes", name
        assert not [text for text in page.text if re.search(r"\$[^$ ]+\$", text)], f"{name} shows TeX"


def test_the_commands_page_has_every_option(site):
    text = html.unescape((site / "commands" / "index.html").read_text(encoding="utf-8"))
    commands = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        assert f'id="{name}"' in text
        for action in parser._actions:
            for option in action.option_strings:
                assert f"<code>{option}</code>" in text or option in ("-h", "--help"), f"{name} {option}"


def test_the_python_pages_have_the_public_names(site):
    names = {anchor for path in (site / "api").rglob("*.html") for anchor in Page(path).anchors}
    for name in ("language_model.load", "language_model.LanguageModel", "quantization.run.quantize", "config.QuantizeConfig",
                 "gptq.solver.solve", "packing.pack", "packing.PackedLinear", "kernels.reference.matmul",
                 "kernels.cuda.layout.to_device"):  # fmt: skip
        assert f"tinygptq.{name}" in names
