"""A notebook as a page: its text, its code and the outputs kept in it, pictures as files beside the page."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from repository_pages import relink


def pages(path: Path) -> dict[str, str | bytes]:
    """``{place in the site: content}`` of one notebook and its pictures."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    made: dict[str, str | bytes] = {}
    text = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text.append(relink(source, "notebooks", "course"))
            continue
        text.append(f"```python\n{source}\n```")
        text += [_output(output, f"{path.stem}_{number}_{i}", made) for i, output in enumerate(cell["outputs"])]
    note = f"*This page is the notebook `notebooks/{path.name}` with the outputs kept in it; it runs in a minute or two.*"
    text.insert(1, note)
    return {f"course/{path.stem}.md": "\n\n".join(part for part in text if part), **made}


def _output(output: dict, name: str, made: dict[str, str | bytes]) -> str:
    if output["output_type"] == "stream":
        return _block("".join(output["text"])) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        made[f"course/{name}.png"] = base64.b64decode(data["image/png"])
        return f'<div class="output" markdown>\n![what the code above draws]({name}.png)\n</div>'
    return _block("".join(data.get("text/plain", "")))


def _block(text: str) -> str:
    """Printed text, as it is: no Markdown inside."""
    escaped = html.escape(text.rstrip("\n")).replace("$", "&#36;")
    lines = escaped.replace("\n\n", "\n&nbsp;\n")  # an empty line would end the HTML block
    return f'<div class="output"><pre>{lines}</pre></div>'
