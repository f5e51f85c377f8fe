"""What the results of every benchmark begin with, and how they are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("tinygptq", "numpy", "numba", "llvmlite", "numba-cuda", "cupy-cuda13x", "cuda-core", "nvidia-cublas", "torch",
            "transformers", "llama-cpp-python")  # fmt: skip


def facts_of(device: str) -> dict[str, Any]:
    """The date, the device's name, and the versions of the packages that are installed."""
    return {"date": datetime.date.today().isoformat(), "device": device, "versions": versions()}


def processor() -> str:
    """Its name (virtual machines shorten it), LLVM's for its kind, and the threads: "AMD EPYC (znver4), 2 threads"."""
    from llvmlite.binding import get_host_cpu_name

    from tinygptq import threads
    from tinygptq.bench import processor_name

    return f"{processor_name()} ({get_host_cpu_name()}), {threads.count()} threads"


def card() -> str:
    from tinygptq.kernels.cuda.runtime import cupy

    return cupy().cuda.runtime.getDeviceProperties(0)["name"].decode()


def device(name: str) -> str:
    """The name of the processor for ``cpu``, of the GPU for ``cuda``."""
    return processor() if name == "cpu" else card()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def rounded(value: Any) -> Any:
    """The same with four significant digits in every float, however deep."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def save(record: dict[str, Any], path: Path | None) -> None:
    """As JSON, where a path was given."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")
