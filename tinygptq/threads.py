"""Matrix products on all cores without threads that spin.

BLAS keeps its threads spinning between calls, and so does OpenMP under Numba's parallel loops. Each set takes the cores from
the other, and from everything else on the machine: measured on two busy cores, a forward pass took thirty times as long as
on one. So OpenMP is asked to sleep (below, before Numba starts it), BLAS is held to one thread within the calls here, and
the rows of a product are shared out among plain Python threads, which NumPy runs side by side.

At the end of each product every thread waits for the slowest. Where work goes on item by item, `in_teams` splits the
threads: each team shares its own products, and the teams wait for each other only when all items are done.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the OpenMP library is loaded, at Numba's first launch

SLICES = 4  # of the rows, for each thread: whoever is done first takes the next, so that none waits long for another ...
SLICE_ROWS = 512  # ... but no smaller ones: BLAS rearranges the whole right-hand matrix anew for each slice
WORTH_SHARING = 1 << 22  # multiplications below which one thread is done before a second has started
TEAMS = 2  # more would leave each a smaller part of what is in memory at once, and save less than the second does

_within = threading.local()  # of each thread: its team's size, and whether BLAS is held to one thread


def count() -> int:
    """Threads to use: those of the caller's team, or all."""
    return getattr(_within, "team", None) or _all()


def _all() -> int:
    """NUMBA_NUM_THREADS if set, else the cores this process may run on."""
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
    parts: dict[int, np.ndarray] = {}

    def part(rows: slice) -> None:
        parts[rows.start] = x[rows].T @ x[rows]

    share(x.shape[0], x.size * x.shape[1] // 2, part)
    ordered = [parts[start] for start in sorted(parts)]
    return functools.reduce(lambda total, part: np.add(total, part, out=total), ordered)


def share(rows: int, work: int, product: Callable[[slice], None], slices: int = 1) -> None:
    """Call ``product`` for consecutive slices that cover ``rows``, at once; BLAS runs on one thread meanwhile.

    There are ``slices`` for each thread, or as many as leave each WORTH_SHARING.
    """
    threads = max(1, min(count(), rows)) if work >= WORTH_SHARING else 1
    parts = max(threads, min(rows, threads * slices, work // WORTH_SHARING))
    bounds = [rows * i // parts for i in range(parts + 1)]
    left = iter([slice(start, end) for start, end in itertools.pairwise(bounds)])

    def take() -> None:
        for rows in left:  # a list's iterator hands out each slice once, whichever threads ask
            product(rows)

    with alone():
        others = [_pool(_all()).submit(take) for _ in range(threads - 1)]
        take()
        for other in others:
            other.result()


def in_teams(items: int, do: Callable[[int, int], None], teams: int = TEAMS) -> None:
    """Call ``do(team, i)`` for i = 0 .. items-1: each team has a run of items, done in order, side by side, on its threads.

    Who does what depends on nothing but the numbers, so that what each team adds up is always the same. With too few
    threads, or an odd number, the caller does everything, in order. Once a call has failed, no team begins another item.
    """
    runs = [range(items * team // teams, items * (team + 1) // teams) for team in range(teams)]
    if teams == 1 or items < teams or within_team() or count() % teams:
        for team, run in enumerate(runs):
            for i in run:
                do(team, i)
        return
    size, failed = count() // teams, threading.Event()

    def work(team: int) -> None:
        with _team(size):
            for i in runs[team]:
                if failed.is_set():
                    return
                try:
                    do(team, i)
                except BaseException:
                    failed.set()
                    raise

    with alone():
        others = [_team_pool(teams - 1).submit(work, team) for team in range(1, teams)]
        try:
            work(0)
        finally:
            wait(others)
        for other in others:
            other.result()


def within_team() -> bool:
    """Whether the calling thread is at work for a team."""
    return getattr(_within, "team", None) is not None


def share_of_all() -> float:
    """What part of all threads the caller may use."""
    return count() / _all()


@contextlib.contextmanager
def _team(size: int) -> Iterator[None]:
    """Within it, the calling thread works for a team of so many; who made the team holds BLAS to one thread."""
    was_alone = getattr(_within, "alone", False)
    _within.team, _within.alone = size, True
    try:
        yield
    finally:
        _within.team, _within.alone = None, was_alone


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


@functools.cache
def _team_pool(threads: int) -> ThreadPoolExecutor:
    """For those who lead a team: were they of `_pool`, they could wait for the very threads they take up."""
    return ThreadPoolExecutor(threads, thread_name_prefix="tinygptq-team")
