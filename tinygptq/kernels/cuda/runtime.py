"""numba-cuda and CuPy, imported in one place: a missing package or a missing GPU ends in one clear line.

Every module of this package takes ``cuda`` from here. Compiling needs neither a GPU nor CuPy; launching needs both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError

INSTALL = "install the extra: pip install 'tinygptq[cuda]'"
SIMULATOR = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def _numba_cuda() -> Any:
    """``numba.cuda`` as the package numba-cuda provides it; numba's own, older copy lacks what the kernels need."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise TinyGPTQError(f"the CUDA kernels need the package numba-cuda, which is not installed: {INSTALL}")
    from numba import cuda

    if not SIMULATOR and not hasattr(np, "row_stack"):
        # numba-cuda up to 0.30.4 names np.row_stack when it first compiles; numpy 2.5 took that alias of vstack away. Lend
        # it the name while its module loads, and no longer. To go when a numba-cuda without the name is the oldest allowed.
        np.row_stack = np.vstack
        try:
            importlib.import_module("numba.cuda.np.arrayobj")
        finally:
            del np.row_stack
    # A narrow layer makes few blocks; that is its shape, not a mistake.
    warnings.filterwarnings("ignore", message=".*Grid size .* under-utilization")
    return cuda


cuda = _numba_cuda()


@functools.cache
def cupy() -> Any:
    """The module CuPy, which holds arrays on the device.

    Raises:
        TinyGPTQError: CuPy is not installed, or no NVIDIA GPU can be used.
    """
    try:
        import cupy as module
    except ImportError as error:
        message = f"the CUDA kernels need the package CuPy, which cannot be imported ({error}): {INSTALL}"
        raise TinyGPTQError(message) from None
    require_gpu()
    return module


def require_gpu() -> None:
    """Raises TinyGPTQError when this machine has no NVIDIA GPU that can be used."""
    if not cuda.is_available():
        raise TinyGPTQError("no usable NVIDIA GPU was found (a driver for CUDA 13 is needed); use --device cpu")


@functools.cache
def capability() -> tuple[int, int]:
    """Compute capability (major, minor) of the current device: (8, 0) is an A100, (8, 9) an RTX 4090, (9, 0) an H100."""
    require_gpu()
    return tuple(cuda.get_current_device().compute_capability)


@functools.cache
def multiprocessors() -> int:
    """Number of multiprocessors of the current device."""
    require_gpu()
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


@functools.cache
def shared_memory() -> int:
    """Bytes of shared memory of a multiprocessor of the current device; a block may have 1 KB less."""
    require_gpu()
    return int(cuda.get_current_device().MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)
