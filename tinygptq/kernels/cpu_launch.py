"""The one door between Python and the compiled kernels: every parallel region of the package is :func:`_launch`.

Numba takes seconds to compile a parallel region with the kernels in it, and compiles code anew for every function that
contains it. So the kernels are one C function, ``run_part``, and one tiny parallel loop calls it through its address. What
to do comes as a *job*: int64 numbers, the operation first, then addresses and sizes. Both are compiled on first use and
cached on disk (in ``__pycache__``, or where NUMBA_CACHE_DIR says).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from pathlib import Path

import numpy as np
from numba import cfunc, njit, prange

from tinygptq.kernels import cpu_decode, cpu_layout, cpu_products, cpu_prompt_attention, cpu_rows, simd
from tinygptq.kernels.simd import get

log = logging.getLogger("tinygptq")

# What a job does; its other numbers are named where they are read
DECODE, REPACK, INTEGERS, TILES, DEQUANTIZE, WIDEN = range(6)
RMS_NORM, SWIGLU, ROPE, LAY_OUT, ATTEND, PRODUCT, GRAM, MIRROR = range(6, 14)


def run(op: int, parts: int, *numbers: int | np.ndarray, number: float = 0.0) -> None:
    """Do ``parts`` parts of a job in parallel; an array among ``numbers`` stands for its address."""
    job = np.array([op, *(n.ctypes.data if isinstance(n, np.ndarray) else n for n in numbers)], np.int64)
    _launch(kernels().address, job.ctypes.data, parts, np.float32(number))


def run_here(op: int, parts: slice, *numbers: int | np.ndarray) -> None:
    """Some parts on the calling thread alone, with Python's lock released: for threads that share out larger tasks."""
    job = np.array([op, *(n.ctypes.data if isinstance(n, np.ndarray) else n for n in numbers)], np.int64)
    _launch_here(kernels().address, job.ctypes.data, parts.start, parts.stop)


@njit(nogil=True, cache=True)
def _launch_here(function, job, first, last):
    for part in range(first, last):
        simd.call(function, job, part, np.float32(0))


@njit(parallel=True, cache=True)
def _launch(function, job, parts, number):
    for part in prange(parts):
        simd.call(function, job, part, number)


@functools.cache
def kernels():
    """The compiled kernels, from the disk cache if it has them; INFO says how long that took."""
    start = time.perf_counter()
    notice = threading.Timer(1.5, log.info, ["compiling the CPU kernels: once, some 10 to 30 seconds ..."])
    notice.daemon = True
    notice.start()  # loading from the cache takes a fraction of a second
    try:
        function = _compile(_fingerprint())
    finally:
        notice.cancel()
    if function.cache_hits == 0:
        log.info("compiled the CPU kernels in %.1f s; the next start finds them on disk", time.perf_counter() - start)
    return function


def _fingerprint() -> int:
    """A number that changes with any source of this folder."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return int.from_bytes(digest.digest()[:4], "big")


def _compile(sources: int):
    """The C function; its cache depends on the values that a closure holds, so ``sources`` renews it with any source."""

    @cfunc("void(int64, int64, float32)", cache=True)
    def run_part(job, part, number):
        op = get(job, 0)
        if sources < 0:
            return
        if op == DECODE:
            cpu_decode.run_tasks(job, part, number)
        elif op == REPACK:
            cpu_layout.repack_tile(job, part)
        elif op == INTEGERS:
            cpu_rows.integers_of_row(job, part)
        elif op == TILES:
            cpu_rows.tiles_of_rows(job, part)
        elif op == DEQUANTIZE:
            cpu_layout.dequantized_tile(get(job, 1), part, get(job, 2) + part * get(job, 3), get(job, 4))
        elif op == WIDEN:
            cpu_rows.widen_row(job, part)
        elif op == RMS_NORM:
            cpu_rows.rms_norm_row(job, part, number)
        elif op == SWIGLU:
            cpu_rows.swiglu_part(job, part)
        elif op == ROPE:
            cpu_rows.rotate_row(job, part)
        elif op == LAY_OUT:
            cpu_prompt_attention.lay_out(job, part, number)
        elif op == ATTEND:
            cpu_prompt_attention.attend_part(job, part)
        elif op == PRODUCT:
            cpu_products.product_of_rows(job, part)
        elif op == GRAM:
            cpu_products.gram_of_tokens(job, part)
        elif op == MIRROR:
            cpu_products.mirror(job, part)

    return run_part
