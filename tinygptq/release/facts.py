"""What a quantised folder says of its own making: the object ``meta`` in quantize_config.json, and again in config.json.

``meta`` is GPTQModel's name for remarks that no loader acts on: GPTQModel itself keeps them, transformers, TGI and vLLM pass
them over, and AutoGPTQ drops every field it does not know (with a warning). GPTQModel's ``quantizer`` is a list of
``name:version``; the other keys are our own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinygptq.config import read_json
from tinygptq.errors import TinyGPTQError


def made_by() -> dict[str, Any]:
    """``{"quantizer": ["tinygptq:VERSION"]}``."""
    try:
        return {"quantizer": [f"tinygptq:{version('tinygptq')}"]}
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {"quantizer": ["tinygptq"]}


def calibration_facts(dataset: str | Path, nsamples: int, seqlen: int, seed: int, template: str) -> dict[str, Any]:
    """``meta`` of a calibrated model: the text by name (of a file also its SHA-256, but not where it lies) and the windows.

    Raises:
        TinyGPTQError: ``dataset`` is neither a file nor a known set.
    """
    facts = {**made_by(), **text_facts(dataset)}
    return {**facts, "nsamples": nsamples, "seqlen": seqlen, "seed": seed, "template": template}


def text_facts(dataset: str | Path) -> dict[str, str]:
    """``{"dataset": name}`` of a named set, and of a file its last name with ``dataset_sha256``."""
    from tinygptq.calibrate import parse_dataset  # only here: it reads nothing, but its module takes a while to import

    path = parse_dataset(dataset).path
    if path is None:
        return {"dataset": str(dataset)}
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise TinyGPTQError(f"{path}: cannot be read ({error.strerror})") from None
    return {"dataset": path.name, "dataset_sha256": digest.hexdigest()}


def read_meta(folder: Path) -> dict[str, Any]:
    """``meta`` of a quantised folder; {} for one whose maker wrote none."""
    meta = read_json(folder / "quantize_config.json").get("meta")
    return meta if isinstance(meta, dict) else {}


def update_meta(folder: Path, **facts: Any) -> None:
    """Add facts to ``meta`` of a finished folder, in both of its configs, each replaced in one step."""
    for name, key in (("quantize_config.json", None), ("config.json", "quantization_config")):
        whole = read_json(folder / name)
        part = whole if key is None else whole.setdefault(key, {})
        part["meta"] = {**part.get("meta", {}), **facts}
        replace_text(folder / name, json.dumps(whole, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a disk that refuses is a TinyGPTQError.

    Where ``path`` is a link, what it points to is written; what is no file (a pipe, a terminal) takes the text as it comes.
    """
    place = path.resolve()
    if place.is_dir():
        raise TinyGPTQError(f"{path}: is a folder, expected the name of a file")
    partial = place.with_name(f".{place.name}.partial")
    try:
        if place.exists() and not place.is_file():
            place.write_text(text, encoding="utf-8")
        else:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, place)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise TinyGPTQError(f"{path}: cannot be written ({error.strerror or error})") from None
