"""GPU tests under compute-sanitizer, and at last a kernel that errs, which it must report: else it has not looked at all.

    compute-sanitizer --tool memcheck python scripts/sanitized_tests.py tests/gpu/test_matvec.py [any of pytest's arguments]

All tests run in this process, since those that pytest-xdist starts are not seen; and each array has memory of its own, for
in CuPy's pool what is written beyond one lands in its neighbour, unnoticed. A clean run reports one invalid write, the last
kernel's (memcheck alone looks for it), and what CUDA says about that from then on. Kernels that an ordinary run has left on
the disk need not be compiled.
"""

from __future__ import annotations

import sys
from typing import Any

FAR = 100_000_000  # numbers beyond the array, where nothing else is


def write_beyond() -> None:
    """The error that has to be found."""
    import cupy
    import numpy as np

    from tinygptq.kernels.cuda.runtime import cuda

    @cuda.jit
    def beyond(numbers: Any, index: int) -> None:
        numbers[index] = 1

    numbers = cupy.zeros(128, np.float32)
    beyond[1, 1](numbers, FAR)
    cupy.cuda.Device().synchronize()


def main() -> None:
    import cupy
    import pytest

    cupy.cuda.set_allocator(None)
    failed = pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]])
    if failed:
        raise SystemExit(failed)
    print("now a write that the sanitizer must report")
    write_beyond()


if __name__ == "__main__":
    main()
