"""Fixtures shared by all tests: where the data, the real model and the embedded model are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SMOLLM2_FILES)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Texts and reference numbers: TINYGPTQ_DATA, else `shared/data` beside the checkout."""
    folder = Path(os.environ.get("TINYGPTQ_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set TINYGPTQ_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in fp16: TINYGPTQ_SMOLLM2, else `.cache/smollm2`, fetched there on first use."""
    given = os.environ.get("TINYGPTQ_SMOLLM2")
    folder = Path(given) if given else ROOT / ".cache" / "smollm2"
    if _complete(folder):
        return folder
    if given:
        pytest.skip(f"TINYGPTQ_SMOLLM2={given} is not a complete model folder")
    script = ROOT / "scripts" / "fetch_smollm2.py"
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
    if done.returncode and not _complete(folder):  # another worker may have been first
        pytest.skip(f"SmolLM2 could not be fetched: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return folder


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The small model that is part of the package."""
    folders = sorted(path.parent for path in (ROOT / "tinygptq" / "assets").rglob("config.json"))
    if not folders:
        pytest.skip("the package holds no embedded model")
    return folders[0]
