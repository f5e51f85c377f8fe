"""Matrix products on all cores without threads that spin.

BLAS keeps its threads spinning between calls, and so does OpenMP under Numba's parallel loops. Each set takes the cores from
the other, and from everything else on the machine: measured on two busy cores, a forward pass took thirty times as long as
on one. So OpenMP is asked to sleep (below, before Numba starts it), BLAS is held to one thread within the calls here, and
the rows of a product are shared out among plain Python threads, which NumPy runs side by side.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the OpenMP library is loaded, at Numba's first launch

SLICES = 4  # of the rows, for each thread: whoever is done first takes the next, so that none waits long for another ...
SLICE_ROWS = 512  # ... but no smaller ones: BLAS rearranges the whole right-hand matrix anew for each slice
SHRINKS = 4  # how many of the smallest slices each thread should have rows for, where slices shrink
WORTH_SHARING = 1 << 22  # multiplications below which one thread is done before a second has started


def count() -> int:
    """Threads to use: NUMBA_NUM_THREADS if set, else the cores this process may run on."""
    given = os.environ.get("NUMBA_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b``: float32 [..., M, K] and [..., K, N] with equal leading axes (or b without them) -> [..., M, N]."""
    out = np.empty((*a.shape[:-1], b.shape[-1]), np.result_type(a, b))

    def part(rows: slice) -> None:
        np.matmul(a[..., rows, :], b, out=out[..., rows, :])

    slices = min(SLICES, a.shape[-2] // (SLICE_ROWS * count()))
    share(a.shape[-2], a.size * b.shape[-1], part, slices=max(1, slices))
    return out


def product(a: Any, b: Any) -> Any:
    """``a [..., M, K] @ b``, b [K, N] or [..., K, N], on all cores where arrays are NumPy's; CuPy's know how themselves."""
    if not isinstance(a, np.ndarray):
        return a @ b
    if b.ndim > 2:
        return matmul(a, b)
    return matmul(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])


def gram(x: np.ndarray) -> np.ndarray:
    """``x.T @ x`` of [T, K] -> [K, K]; NumPy gives each share to BLAS's syrk, half the work of a product.

    The sum's order is that of the rows, whichever thread is done first; it does depend on the number of threads.
    """
    return total(x.shape[0], x.size * x.shape[1] // 2, lambda rows: x[rows].T @ x[rows])


def total(rows: int, work: int, part: Callable[[slice], np.ndarray]) -> np.ndarray:
    """The sum of what ``part`` gives for slices that cover ``rows``, at once, in their order; see :func:`share`."""
    parts: dict[int, np.ndarray] = {}

    def keep(some: slice) -> None:
        parts[some.start] = part(some)

    share(rows, work, keep)
    ordered = [parts[start] for start in sorted(parts)]
    return functools.reduce(lambda total, part: np.add(total, part, out=total), ordered)


def share(rows: int, work: int, product: Callable[[slice], None], slices: int = 1, smallest: int = 0) -> None:
    """Call ``product`` for consecutive slices that cover ``rows``, at once; BLAS runs on one thread meanwhile.

    There are ``slices`` for each thread, or as many as leave each WORTH_SHARING. With ``smallest``, where there are several
    times as many rows for each thread, slices shrink down to it instead: few of them, and at the end nobody waits for long.
    """
    threads = min(count(), rows) if work >= WORTH_SHARING else 1
    if smallest and threads > 1 and rows >= threads * SHRINKS * smallest:
        bounds = _shrinking(rows, threads, smallest)
    else:
        parts = max(threads, min(rows, threads * slices, work // WORTH_SHARING))
        bounds = [rows * i // parts for i in range(parts + 1)]
    left = iter([slice(start, end) for start, end in itertools.pairwise(bounds)])

    def take() -> None:
        for rows in left:  # a list's iterator hands out each slice once, whichever threads ask
            product(rows)

    with alone():
        others = [_pool(threads).submit(take) for _ in range(threads - 1)]
        take()
        for other in others:
            other.result()


def _shrinking(rows: int, threads: int, smallest: int) -> list[int]:
    """Where slices begin, and the end: each takes half of an even share of what is left, but not fewer than ``smallest``.

    (Polychronopoulos and Kuck 1987, guided self-scheduling.)
    """
    bounds = [0]
    while (left := rows - bounds[-1]) > 0:
        bounds.append(bounds[-1] + min(left, max(smallest, left // (2 * threads))))
    return bounds


_within = threading.local()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, BLAS and LAPACK run on one thread: for small matrices, where others to wake take longer than they help.

    Asking BLAS takes as long as a small product; a thread that is within one already does not ask again.
    """
    if getattr(_within, "alone", False):
        yield
        return
    with _blas().limit(limits=1, user_api="blas"):
        _within.alone = True
        try:
            yield
        finally:
            _within.alone = False


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tinygptq")
