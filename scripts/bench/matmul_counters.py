"""What limits the quantised products: hardware counters of one launch each, read by Nsight Compute.

    python scripts/bench/matmul_counters.py [--out FILE.json]         (needs ``ncu`` on the PATH, and leave to read counters)

Every launch begins with empty caches, at whatever clock the card has; so times are longer than those of matmul.py, whose
launches follow one another, and are there to be compared with each other. By launch: microseconds; bytes read from the
memory and bytes that went through the L2; how busy the memory, the L2 and the L1 were, in % of what they can do; the share
of a multiprocessor's 64 warps that were there; registers of a thread; instructions a cycle on each multiprocessor; and for
how many cycles a warp waited before each instruction, by the most important reasons: for data from memory, for a barrier,
for shared memory, for the tensor cores.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from facts import rounded, save
from matmul import SHAPES, VARIANTS, Case, describe

CASES = [("4-bit g128", *shape, (1, 8, 16, 64)) for shape in SHAPES]
CASES += [("8-bit g128", 4096, 4096, (1, 8, 64)), ("4-bit g64", 11008, 4096, (1, 16))]
CASES += [("4-bit g32 act-order", 11008, 4096, (1, 16))]
BUSY, WAITED = "avg.pct_of_peak_sustained_elapsed", "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "memory_bytes": "dram__bytes_read.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "memory_percent": f"dram__throughput.{BUSY}",
    "l2_percent": f"lts__throughput.{BUSY}",
    "l1_percent": f"l1tex__throughput.{BUSY}",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "instructions_a_cycle": "sm__inst_executed.avg.per_cycle_elapsed",
    "waited_for_memory": WAITED.format("long_scoreboard"),
    "waited_at_barriers": WAITED.format("barrier"),
    "waited_for_shared_memory": WAITED.format("short_scoreboard"),
    "waited_for_tensor_cores": WAITED.format("math_pipe_throttle"),
}


def launch_all() -> None:
    """One launch of each case, in order, and nothing else whose kernel is named so."""
    from tinygptq.kernels.cuda import dispatch
    from tinygptq.kernels.cuda.runtime import cupy

    for name, k, n, rows in CASES:
        case = Case(k, n, copies=1, **VARIANTS[name])
        for m in rows:
            x = cupy().asarray(case.rng.normal(size=(m, k)).astype(np.float16))
            dispatch.linear(x, case.layers[0], gathered=True)
    cupy().cuda.Device().synchronize()


def read(text: str) -> list[dict[str, Any]]:
    """Nsight Compute's table, one line of which gives units, to a record for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches = [row for row in csv.DictReader(lines) if row["ID"]]
    labels = [(name, k, n, m) for name, k, n, rows in CASES for m in rows]
    found = []
    for (name, k, n, m), launch in zip(labels, launches, strict=True):
        numbers = {key: float(launch[counter].replace(",", "")) for key, counter in COUNTERS.items()}
        numbers["us"] /= 1000
        kernel = launch["Kernel Name"].split(":")[0]
        found.append({"variant": name, "k": k, "n": n, "rows": m, "kernel": kernel, **rounded(numbers)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.launch:
        launch_all()
        return
    if shutil.which("ncu") is None:
        raise SystemExit("ncu (Nsight Compute) is not on the PATH")
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base", "-k", "regex:mat"]
    command = ["ncu", *options, "--metrics", ",".join(COUNTERS.values()), sys.executable, __file__, "--launch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ncu: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    record = {**describe(), "launches": read(done.stdout)}
    save(record, args.out)
    print(f"{'':34}" + "".join(f"{key.replace('_', ' ')[:15]:>16}" for key in COUNTERS))
    for one in record["launches"]:
        label = f"{one['variant']} {one['k']}x{one['n']} M={one['rows']}"
        print(f"{label:34}" + "".join(f"{one[key]:16g}" for key in COUNTERS))


if __name__ == "__main__":
    main()
