"""Freed memory is kept within, and handed back after."""

from __future__ import annotations

import resource
import sys

import numpy as np
import pytest

from tinygptq import memory

MIB = 1 << 20


def faults(times: int) -> int:
    """Pages that the system had to supply while an array of 64 MiB was made, filled and freed so often."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.empty(64 * MIB, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(memory._glibc() is None or not sys.platform.startswith("linux"), reason="needs glibc")
def test_the_same_pages_serve_again() -> None:
    with memory.kept():
        first, again = faults(1), faults(10)
    assert again < max(first, 16)
    assert faults(10) > 10  # even large pages are 2 MiB


def test_without_glibc_nothing_happens(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory.kept():
        assert np.empty(MIB).nbytes == 8 * MIB


def test_it_is_left_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), memory.kept():
        raise ZeroDivisionError
