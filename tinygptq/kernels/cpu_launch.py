"""The one door between Python and the compiled kernels: every parallel region of the package is :func:`launch`.

Numba takes a second or more to compile each parallel region and each function with array arguments, so there is one region,
with one array argument, a *job*: what to do, then addresses and sizes. It is compiled once and cached on disk; Numba renews
the cache when this file changes, and ``_fingerprint`` makes it notice the others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numba import njit, prange

from tinygptq.kernels import cpu_attention, cpu_decode, cpu_layout, cpu_rows
from tinygptq.kernels.simd import get, inner

# What a job does; its other numbers are named where the job is made, in cpu.py and cpu_plan.py
DECODE, REPACK, INTEGERS, TILES, DEQUANTIZE, WIDEN, SOFTMAX, RMS_NORM, SWIGLU, ROPE = range(10)


def run(op: int, parts: int, *numbers: int | np.ndarray, number: float = 0.0) -> None:
    """Do ``parts`` parts of a job in parallel; an array among ``numbers`` stands for its address."""
    job = [n.ctypes.data if isinstance(n, np.ndarray) else n for n in numbers]
    launch(np.array([op, *job], np.int64), parts, np.float32(number))


@inner
def _run_part(job, part, number):
    """Part ``part`` of the job at an address."""
    op = get(job, 0)
    if op == DECODE:
        cpu_decode.run_tasks(job, part, number)
    elif op == REPACK:
        cpu_layout.repack_tile(job, part)
    elif op == INTEGERS:
        cpu_rows.integers_of_row(job, part)
    elif op == TILES:
        cpu_rows.tiles_of_rows(job, part)
    elif op == DEQUANTIZE:
        cpu_layout.dequantized_tile(get(job, 1), part, get(job, 2), get(job, 3))
    elif op == WIDEN:
        cpu_rows.widen_row(job, part)
    elif op == SOFTMAX:
        cpu_attention.causal_softmax_row(job, part)
    elif op == RMS_NORM:
        cpu_rows.rms_norm_row(job, part, number)
    elif op == SWIGLU:
        cpu_rows.swiglu_part(job, part)
    elif op == ROPE:
        cpu_rows.rotate_row(job, part)


def _fingerprint() -> int:
    """A number that changes with any source the kernels are compiled from."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


def _make_launch(sources: int):
    """``launch``, as a closure over ``sources``: Numba's cache distinguishes closures by the values they hold."""

    @njit("void(int64[::1], int64, float32)", parallel=True, cache=True)
    def launch(job, parts, number):
        address = np.int64(job.ctypes.data)
        if sources < 0:
            return
        for part in prange(parts):
            _run_part(address, part, number)

    return launch


launch = _make_launch(_fingerprint())
