"""Pictures as PNG files, drawn by matplotlib (extra [plot])."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from tinygptq.errors import TinyGPTQError


def require_picture(path: str | Path, option: str) -> None:
    """Raise TinyGPTQError, naming the option, if no picture could be written to ``path``: better now than after the work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise TinyGPTQError(f"{option} needs the package matplotlib: pip install tinygptq[plot]") from None
    if Path(path).suffix.lower() != ".png":
        raise TinyGPTQError(f"{option} {path}: expected a name that ends in .png")
    if not Path(path).resolve().parent.is_dir():
        raise TinyGPTQError(f"{option} {path}: there is no such folder")


def save_picture(figure: Any, path: str | Path, option: str) -> None:
    """Write a matplotlib figure whole or not at all; a disk that refuses is a TinyGPTQError."""
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(path).unlink()
        raise TinyGPTQError(f"{option} {path}: cannot be written ({error.strerror or error})") from None
