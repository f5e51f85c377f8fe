"""A wheel and an sdist: they hold what they should, and run where nothing else is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import tinygptq

ROOT = Path(__file__).resolve().parents[2]
VERSION = tinygptq.__version__
pytestmark = pytest.mark.slow  # an environment of its own, and the kernels compiled in it
pytest.importorskip("build", reason="the wheel needs the package build: pip install tinygptq[test]")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of both; the wheel is built from the sdist, so that one cannot hold more than the other."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "tinygptq", source / "tinygptq", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # in a copy: a build leaves things beside its source
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return dist / f"tinygptq-{VERSION}-py3-none-any.whl"


def tracked(folder: str) -> set[str]:
    """Files of a folder as git has them: what lies beside them on somebody's disk is no part of the package."""
    try:
        return set(run("git", "ls-files", folder, cwd=ROOT).split())
    except (AssertionError, OSError):
        pytest.skip("not a git checkout")


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"tinygptq-{VERSION}.dist-info/METADATA").decode()
    held = {name for name in names if not name.startswith(f"tinygptq-{VERSION}.dist-info/")}
    assert {name.partition("/")[0] for name in held} == {"tinygptq"}
    assert tracked("tinygptq") <= held
    assert {"tinygptq/py.typed", "tinygptq/assets/storyteller/model.safetensors"} <= held
    assert "License-Expression: Apache-2.0" in metadata and "# tinygptq" in metadata


def test_the_sdist_holds_what_the_wheel_is_made_of(dist):
    with tarfile.open(dist / f"tinygptq-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", *tracked("tinygptq")} <= names


def test_it_runs_in_an_empty_environment(wheel, tmp_path):
    """Help, sizes, the embedded model rounded and telling a story: from the wheel and its dependencies alone."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    bin = place / ("Scripts" if os.name == "nt" else "bin")
    run(bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    away = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": "", "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}}
    assert run(bin / "tinygptq", "--version", **away).strip() == f"tinygptq {VERSION}"
    assert "quantize" in run(bin / "tinygptq", "--help", **away)
    home = Path(run(bin / "python", "-c", "import tinygptq; print(tinygptq.__path__[0])", **away).strip())
    assert home.is_relative_to(place)
    embedded = home / "assets" / "storyteller"
    assert "weights file" in run(bin / "tinygptq", "size", embedded, **away)
    run(bin / "tinygptq", "quantize", embedded, "small", "--method", "rtn", "--group-size", "64", **away)
    prompt = "Once upon a time, there was a little"
    story = run(bin / "tinygptq", "generate", "small", "--prompt", prompt, "--max-new-tokens", "16", "--greedy", **away)
    assert len(story.split()) > 5
