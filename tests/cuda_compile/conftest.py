"""What holds for every kernel that a test here compiles."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def every_kernel_has_a_name_on_disk(monkeypatch):
    """Which tells all that its code depends on, and no place in memory, which is another in the next process."""
    if importlib.util.find_spec("numba_cuda") is None:
        return
    from tinygptq.kernels.cuda import launch

    compile_to_ptx = launch.Kernel.ptx

    def ptx(self, signature, capability):
        assert self._name(signature, capability)
        assert " at 0x" not in repr(launch._describe(self.function, {}))
        return compile_to_ptx(self, signature, capability)

    monkeypatch.setattr(launch.Kernel, "ptx", ptx)
