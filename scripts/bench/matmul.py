"""The quantised product on one GPU: tinygptq's kernels through their dispatch, beside cuBLAS fp16 and the copy bandwidth.

    python scripts/bench/matmul.py [--variants NAME ...] [--rows M ...] [--out FILE.json]
    python scripts/bench/matmul.py --plot FILE.json OUT.png
    python scripts/bench/matmul.py --table FILE.json

Every figure is the median over replays of a CUDA graph that runs the product once for each of several weights, together
larger than the L2 cache by far, so that weights come from memory as they do in a model. Beside each timed figure stands the
relative error of that same layer against float64, on fresh random numbers. Act-order layers are timed with x's columns in
the order of the sorted rows, as the kernel before writes them. Up to 16 rows there are two times: each product launched
after the one before it has ended ("us"), and with programmatic dependent launch, as the decoding engine does it, so that a
product asks for its first weights while the one before it ends ("us_dependent"). Variants are compiled side by side, then
measured one after another, each by a process of its own that has the GPU to itself.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from facts import card, facts_of, rounded, save

# K, N of LLaMA-7B: q/k/v/o, gate or up, down, gate and up together
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 22016))
ROWS = (1, 8, 16, 64, 256, 512, 2048)
ROTATED_BYTES = 256 << 20  # of weights in one graph: several times the L2
VARIANTS: dict[str, dict[str, Any]] = {
    "4-bit g128": {"bits": 4, "group_size": 128},
    "4-bit g64": {"bits": 4, "group_size": 64},
    "4-bit g32 act-order": {"bits": 4, "group_size": 32, "act_order": True},
    "4-bit g128 asymmetric": {"bits": 4, "group_size": 128, "symmetric": False},
    "8-bit g-1": {"bits": 8, "group_size": -1},
    "8-bit g128": {"bits": 8, "group_size": 128},
    "3-bit g128": {"bits": 3, "group_size": 128},
    "2-bit g128": {"bits": 2, "group_size": 128},
}


def graph_time(work: Any, calls: int, replays: int = 9) -> float:
    """Microseconds of one call, when ``work(stream)`` makes ``calls`` of them."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        work(stream)  # compiles, and sizes workspaces
        stream.synchronize()
        stream.begin_capture()
        work(stream)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
        times = []
        for _ in range(replays):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end))
    return statistics.median(times) * 1e3 / calls


def copy_bandwidth() -> float:
    """Bytes read plus bytes written by a copy of 4 GB from device to device, in TB/s: the best of ten."""
    import cupy

    size, stream = 4 << 30, cupy.cuda.Stream(non_blocking=True)
    source, target = cupy.ones(size, np.uint8), cupy.empty(size, np.uint8)
    cupy.cuda.Device().synchronize()
    times = []
    for _ in range(10):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        target.data.copy_from_device_async(source.data, size, stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return 2 * size / min(times) * 1e-9


def cublas_times(rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """fp16 weights [N, K] and activations, float32 sums: what the same layers cost unquantised."""
    import cupy

    from tinygptq.kernels.cuda.cublas import cublas

    results = []
    for k, n in SHAPES:
        copies = max(2, -(-ROTATED_BYTES // (2 * k * n)))
        weights = [cupy.random.uniform(-1, 1, (n, k), np.float32).astype(np.float16) for _ in range(copies)]
        for m in rows:
            x = cupy.random.uniform(-1, 1, (m, k), np.float32).astype(np.float16)
            out = cupy.empty((m, n), np.float16)

            def work(stream: Any, weights: Any = weights, x: Any = x, out: Any = out) -> None:
                for weight in weights:
                    cublas().multiply_transposed(x, weight, out, stream.ptr)

            results.append({"variant": "cuBLAS fp16", "k": k, "n": n, "rows": m, "us": graph_time(work, copies),
                            "bytes": 2 * (k * n + m * k + m * n)})  # fmt: skip
    return results


def random_layer(
    rng: np.random.Generator, k: int, n: int, bits: int, group_size: int, symmetric: bool = True, act_order: bool = False
) -> Any:
    """A packed linear of random words (every word is valid codes)."""
    from tinygptq.packing import PackedLinear

    group_size = k if group_size == -1 else group_size
    groups = -(-k // group_size)
    zeros = np.full((groups, n), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (groups, n))
    return PackedLinear(
        qweight=rng.integers(0, 1 << 32, (k * bits // 32, n), np.uint32),
        scales=rng.uniform(1e-3, 1e-2, (groups, n)).astype(np.float16),
        zeros=zeros.astype(np.uint16),
        bits=bits,
        group_size=group_size,
        perm=rng.permutation(k).astype(np.int32) if act_order else None,
    )


def relative_error(x: np.ndarray, packed: Any, out: np.ndarray) -> float:
    """Of 128 columns spread over the layer, against float64."""
    columns = np.linspace(0, packed.out_features - 1, 128).astype(int)
    part = {name: getattr(packed, name)[:, columns] for name in ("qweight", "scales", "zeros")}
    exact = x.astype(np.float64) @ replace(packed, **part).dequantize().astype(np.float64)
    return float(np.linalg.norm(out[:, columns] - exact) / np.linalg.norm(exact))


class Case:
    """One variant at one shape: a layer, and copies of it with other codes to rotate through."""

    def __init__(self, k: int, n: int, copies: int = 0, **variant: Any) -> None:
        import cupy

        from tinygptq.kernels.cuda.layout import to_device

        self.rng = np.random.default_rng()
        self.packed = random_layer(self.rng, k, n, **variant)
        first = to_device(self.packed)
        copies = copies or max(2, -(-ROTATED_BYTES // first.nbytes))
        words = [cupy.random.randint(0, 1 << 32, first.codes.shape, dtype=np.uint32) for _ in range(copies - 1)]
        self.layers = [first] + [replace(first, codes=codes, scales=first.scales.copy()) for codes in words]

    def product(self, rows: int) -> tuple[np.ndarray, Any, Any]:
        """The first layer's, with fresh random x: x float16 [rows, K] on the host and on the GPU, and the result."""
        import cupy

        from tinygptq.kernels.cuda import dispatch

        layer = self.layers[0]
        host = self.rng.normal(size=(rows, layer.in_features)).astype(np.float16)
        x, out = cupy.asarray(host), cupy.full((rows, layer.out_features), np.nan, np.float16)
        return host, x, dispatch.linear(x, layer, out)

    def measure(self, rows: int) -> dict[str, Any]:
        """Check one product, and time it."""
        from tinygptq.kernels.cuda import dispatch
        from tinygptq.kernels.cuda.runtime import capability, multiprocessors

        layer, (host, x, out) = self.layers[0], self.product(rows)
        sizes = layer.in_features, layer.out_features, layer.bits, layer.group_size
        result = {
            "k": layer.in_features,
            "n": layer.out_features,
            "rows": rows,
            "kernel": dispatch.choose(capability(), rows, *sizes, multiprocessors()),
            "bytes": layer.nbytes + x.nbytes + out.nbytes,
            "relative_error": relative_error(host, self.packed, out.get()),
        }

        def work(stream: Any, dependent: bool = False) -> None:
            for each in self.layers:
                dispatch.linear(x, each, out, stream, gathered=True, dependent=dependent)

        result["us"] = graph_time(work, len(self.layers))
        if result["kernel"] == "matvec" and capability() >= (9, 0):
            result["us_dependent"] = graph_time(functools.partial(work, dependent=True), len(self.layers))
        return result


def compile_variant(name: str, rows: tuple[int, ...]) -> None:
    """Run every kernel of a variant once: the next process finds it in the cache on the disk."""
    for k, n in SHAPES:
        case = Case(k, n, copies=1, **VARIANTS[name])
        for m in rows:
            case.product(m)


def measure_variant(name: str, rows: tuple[int, ...]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for k, n in SHAPES:
        case = Case(k, n, **VARIANTS[name])
        results += [{"variant": name, **case.measure(m)} for m in rows]
        del case
    return results


def measure_cublas(rows: tuple[int, ...]) -> dict[str, Any]:
    return {**describe(), "copy_tb_per_s": copy_bandwidth(), "results": cublas_times(rows)}


def measure(variants: list[str], rows: tuple[int, ...]) -> dict[str, Any]:
    """Everything, as it is written to the file."""
    context, jobs = multiprocessing.get_context("spawn"), [(name, rows) for name in variants]
    with context.Pool(len(variants)) as pool:
        pool.starmap(compile_variant, jobs, chunksize=1)
    with context.Pool(1, maxtasksperchild=1) as pool:  # nobody else has anything on the GPU
        record = pool.apply(measure_cublas, (rows,))
        record["results"] += itertools.chain(*pool.starmap(measure_variant, jobs, chunksize=1))
    order = ["cuBLAS fp16", *VARIANTS]
    record["results"].sort(key=lambda result: order.index(result["variant"]))
    for result in record["results"]:
        result["gb_per_s"] = result["bytes"] / result["us"] * 1e-3
        result["of_copy"] = result["gb_per_s"] * 1e-3 / record["copy_tb_per_s"]
        if "us_dependent" in result:
            result["of_copy_dependent"] = result["of_copy"] * result["us"] / result["us_dependent"]
        result["tflop_per_s"] = 2 * result["k"] * result["n"] * result["rows"] / result["us"] * 1e-6
        result |= rounded(result)
    return record


def describe() -> dict[str, Any]:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    driver = cupy.cuda.runtime.driverGetVersion()
    return {
        **facts_of(card()),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
    }


def cell(result: dict[str, Any] | None, cublas_us: float) -> str:
    if result is None:
        return " " * 33
    early = f" ({result['us_dependent']:5.2f} {result['of_copy_dependent']:4.2f})" if "us_dependent" in result else " " * 13
    return f"{result['us']:9.2f} {result['of_copy']:4.2f} {cublas_us / result['us']:5.2f}{early}"


def print_table(record: dict[str, Any]) -> None:
    """us, GB/s, fraction of the copy bandwidth, and time of cuBLAS fp16 over ours."""
    results = record["results"]
    cublas = {(r["k"], r["n"], r["rows"]): r["us"] for r in results if r["variant"] == "cuBLAS fp16"}
    print(f"{record['device']}, {record['date']}; copy {record['copy_tb_per_s']:.2f} TB/s; versions {record['versions']}")
    print("each cell: us, fraction of the copy bandwidth, cuBLAS fp16's time over ours; in brackets us and fraction with")
    print("programmatic dependent launch; the last column the largest error\n")
    shapes = "".join(f"{f'{k}x{n}':>33}" for k, n in SHAPES)
    print(f"{'variant':24}{'rows':>5} {'kernel':21}{shapes}")
    for variant in dict.fromkeys(r["variant"] for r in results):
        for rows in dict.fromkeys(r["rows"] for r in results):
            cells = {(r["k"], r["n"]): r for r in results if (r["variant"], r["rows"]) == (variant, rows)}
            line = "".join(cell(cells.get(shape), cublas[(*shape, rows)]) for shape in SHAPES)
            kernel = "/".join(dict.fromkeys(c.get("kernel", "") for c in cells.values()))
            error = max((c.get("relative_error", 0) for c in cells.values()), default=0)
            print(f"{variant:24}{rows:5} {kernel:21}{line}{f'  {error:.1e}' if error else ''}")


def plot(record: dict[str, Any], path: Path) -> None:
    """The roofline: arithmetic done per second against arithmetic per byte, both counted from what a product must do."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    bandwidth = record["copy_tb_per_s"]
    results = record["results"]
    peak = max(r["tflop_per_s"] for r in results if r["variant"] == "cuBLAS fp16")
    intensity = np.geomspace(0.5, 6000, 200)
    axes.set(xscale="log", yscale="log", xlim=(0.5, 6000), ylim=(bandwidth * 0.4, peak * 1.6))
    axes.plot(intensity, np.minimum(bandwidth * intensity, peak), color="0.3", lw=1.2, zorder=1)
    axes.annotate(f"cuBLAS fp16 at its best, {peak:.0f} TFLOP/s", (8, peak * 1.06), color="0.3", fontsize=9)
    figure.draw_without_rendering()  # the angle of the slope is known once the axes have their size
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    angle = float(np.degrees(np.arctan2(y1 - y0, x1 - x0)))
    axes.text(1.3, 1.3 * bandwidth * 1.2, f"copy bandwidth, {bandwidth:.2f} TB/s", rotation=angle, rotation_mode="anchor",
              color="0.3", fontsize=9)  # fmt: skip
    present = {r["variant"] for r in results}
    shown = [name for name in ("cuBLAS fp16", "4-bit g128", "8-bit g128", "2-bit g128") if name in present]
    k, n = SHAPES[-1]
    for name, colour, marker in zip(shown, ("#777777", "#1f6fb4", "#c8511b", "#2c8c4a"), "sovD", strict=False):
        points = sorted((r for r in results if (r["variant"], r["k"], r["n"]) == (name, k, n)), key=lambda r: r["rows"])
        x = [2 * k * n * r["rows"] / r["bytes"] for r in points]
        y = [r["tflop_per_s"] for r in points]
        axes.plot(x, y, marker=marker, color=colour, lw=1, ms=6, label=name, zorder=2)
        early = [(place, r["tflop_per_s"] * r["us"] / r["us_dependent"]) for place, r in zip(x, points, strict=True)
                 if "us_dependent" in r]  # fmt: skip
        if early:
            axes.plot(*zip(*early, strict=True), marker, color=colour, ms=6, mfc="white", ls="none", zorder=2)
        if name in ("cuBLAS fp16", "4-bit g128"):
            for place, value, r in zip(x, y, points, strict=True):
                if r["rows"] in (128, 1024):  # there would be no room
                    continue
                offset, side = ((-6, 7), "right") if name == "cuBLAS fp16" else ((6, -12), "left")
                label = f"M={r['rows']}"
                axes.annotate(label, (place, value), offset, textcoords="offset points", ha=side, color=colour, fontsize=8)
    axes.set(xlabel="FLOP per byte of weights, x and y", ylabel="TFLOP/s",
             title=f"x [M, {k}] times W [{k}, {n}] on {record['device']}, {record['date']}\n"
                   "hollow: with programmatic dependent launch")  # fmt: skip
    axes.grid(which="major", color="0.9")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("FILE.json", "OUT.png"), help="draw earlier figures")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print earlier figures")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads(arguments.plot[0].read_text()), arguments.plot[1])
    elif arguments.table:
        print_table(json.loads(arguments.table.read_text()))
    else:
        record = measure(arguments.variants, tuple(arguments.rows))
        save(record, arguments.out)
        print_table(record)


if __name__ == "__main__":
    main()
