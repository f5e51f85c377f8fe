"""Tests on an NVIDIA GPU: skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest

from tinygptq.errors import TinyGPTQError


def _reason_to_skip() -> str | None:
    try:
        from tinygptq.kernels.cuda.runtime import cupy

        cupy()
    except TinyGPTQError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is marked ``gpu``."""
    mine = [item for item in items if "gpu" in item.path.parent.parts[-1:]]
    reason = _reason_to_skip() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
