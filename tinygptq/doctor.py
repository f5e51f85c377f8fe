"""What this machine has to run models on, in plain words: packages, driver, GPU, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from tinygptq.errors import TinyGPTQError

PACKAGES = ("numpy", "numba", "safetensors", "sentencepiece", "ml_dtypes")
CUDA_PACKAGES = ("numba-cuda", "cupy-cuda13x", "cuda-core")
INSTALL = "pip install 'tinygptq[cuda]'"
NEEDED = (8, 0)  # compute capability of the decoding kernels


@dataclass(frozen=True)
class Check:
    """One thing looked at: what it is, whether all is well, what was found, and what to do where it is not."""

    what: str
    ok: bool
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """Look at everything, in the order in which one thing needs the other; never raises."""
    return [*_processor(), *_packages(), *_gpu()]


def _processor() -> Iterator[Check]:
    yield Check("Python", True, platform.python_version())
    yield Check("processor", True, f"{platform.machine()}, {os.cpu_count()} logical cores")


def _packages() -> Iterator[Check]:
    for package in PACKAGES:
        yield _package(package, "pip install tinygptq")


def _package(package: str, mend: str) -> Check:
    try:
        return Check(package, True, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Check(package, False, "not installed", mend)


def _gpu() -> Iterator[Check]:
    found = [_package(package, INSTALL) for package in CUDA_PACKAGES]
    yield from found
    if importlib.util.find_spec("numba_cuda") is None:
        yield Check("GPU", False, "not looked for: numba-cuda is not installed", INSTALL)
        return
    try:
        from tinygptq.kernels.cuda.runtime import capability, cupy

        cp = cupy()
        major, minor = capability()
    except TinyGPTQError as error:
        yield Check("GPU", False, str(error), "everything runs on the processor: --device cpu")
        return
    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    driver = cp.cuda.runtime.driverGetVersion()
    yield Check("driver", True, f"for CUDA {driver // 1000}.{driver % 1000 // 10}")
    free, total = cp.cuda.Device().mem_info
    name = properties["name"].decode()
    enough = (major, minor) >= NEEDED
    mend = "" if enough else f"generating on a GPU needs {NEEDED[0]}.{NEEDED[1]} or more; use --device cpu"
    yield Check("GPU", enough, f"{name}, compute capability {major}.{minor}", mend)
    yield Check("GPU memory", True, f"{free * 1e-9:.1f} GB free of {total * 1e-9:.1f} GB")
