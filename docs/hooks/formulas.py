"""$TeX$ to MathML, so that a page needs no script and nobody else's server to show a formula."""

from __future__ import annotations

import re

from latex2mathml.converter import convert

CODE = re.compile(r"(^```.*?^```$|^<pre.*?</pre>$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?=\S)([^$\n]+?)(?<=\S)\$", re.DOTALL)


def to_mathml(markdown: str) -> str:
    """Convert every formula outside of code."""
    parts = CODE.split(markdown)
    parts[::2] = [FORMULA.sub(_convert, part) for part in parts[::2]]
    return "".join(parts)


def _convert(found: re.Match) -> str:
    display, inline = found.groups()
    math = convert(display or inline, display="block" if display else "inline").replace("\n", " ")
    return math if display else f"<span>{math}</span>"  # at the start of a line, bare <math> would end the paragraph
