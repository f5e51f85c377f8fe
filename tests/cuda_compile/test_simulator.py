"""The plain kernel in Numba's simulator, which needs no GPU, against the definition."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed (extra [cuda])", allow_module_level=True)

# The simulator is chosen by a variable that must be set before Numba is imported, hence a process of its own.
SCRIPT = """
import numpy as np
from cuda_layers import fresh_generator, random_linear, random_rows, relative_error
from tinygptq.kernels import reference
from tinygptq.kernels.cuda import plain
from tinygptq.kernels.cuda.layout import to_device

rng = fresh_generator()
for rows, layer in (
    (3, (4, 32, True, True, 160, 40)),
    (9, (3, 48, False, False, 192, 8)),  # groups that end within a run of 32 rows, two blocks of rows
    (1, (2, 20, False, True, 64, 40)),
    (2, (8, 96, False, False, 96, 72)),
):
    packed = random_linear(rng, *layer, bias=True)
    device = to_device(packed, np.asarray)
    x = random_rows(rng, rows, packed.in_features)
    found = np.full((rows, packed.out_features), np.nan, np.float32)
    sorted_x = x.copy()
    if packed.perm is not None:
        plain.gather_columns[2, 16](x, device.perm, sorted_x)
    kernel = plain.plain_kernel(device.bits, device.group_size, device.zero)
    grid, block = plain.grid_of(*found.shape)
    zeros = device.scales if device.zeros is None else device.zeros
    kernel[grid, block](sorted_x, device.codes, device.scales, zeros, found)
    plain.add_bias[2, 16](found, device.bias)
    error = relative_error(found, reference.matmul(x.astype(np.float64), packed))
    assert error <= 1e-6, (rows, layer, error)
print("right")
"""


def test_plain_kernel_in_the_simulator():
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join((str(root), str(root / "tests")))
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "right"
