"""A Source to a folder: as GPTQ, with every code and zero point kept, or as floats. One tensor in memory at a time."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.convert.source import Source, missing_biases
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import linear_names
from tinygptq.folders.export import require_packable, to_half, write_configs
from tinygptq.folders.shards import ShardedWriter
from tinygptq.packing import PackedLinear, pack, unpack

log = logging.getLogger(__name__)


def write_gptq(source: Source, folder: Path, checkpoint_format: str, max_shard_size: int | None = None) -> QuantizeConfig:
    """Write a GPTQ folder that dequantises to the source's values; returns its quantisation config.

    Scales are stored as fp16, as every loader expects. Those of another dtype are rounded, and a warning states the
    largest relative change if there is any.

    Raises:
        TinyGPTQError: the source is not quantised, or a zero point that ``checkpoint_format`` cannot hold.
    """
    quantization = gptq_config(source, checkpoint_format)
    flags, absent = missing_biases(source.config, source.dense)
    half, integer = np.dtype(np.float16), np.dtype(np.int32)
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {name: (half, array.shape) for name, array in source.dense.items()}
    layout |= {name: (half, shape) for name, shape in absent.items()}
    for name, (in_features, out_features) in linear_names(source.config):
        if name in source.linears:
            groups, bits = quantization.num_groups(in_features), quantization.bits
            layout[f"{name}.qweight"] = (integer, (in_features * bits // 32, out_features))
            layout[f"{name}.qzeros"] = (integer, (groups, out_features * bits // 32))
            layout[f"{name}.scales"] = (half, (groups, out_features))
            layout[f"{name}.g_idx"] = (integer, (in_features,))
    facts = quantization.to_dict(model_name=source.folder.resolve().name)
    write_configs(source.folder, folder, "float16", facts, flags)
    worst, worst_name = 0.0, ""
    with ShardedWriter(folder, layout, max_shard_size) as file:
        for name, array in source.dense.items():
            file.write(name, to_half(array, name))
        for name, shape in absent.items():
            file.write(name, np.zeros(shape, half))
        for name, linear in source.linears.items():
            for part, tensor in gptq_tensors(linear, checkpoint_format, name).items():
                file.write(f"{name}.{part}", tensor)
            change = scale_change(linear.scales)
            if change > worst:
                worst, worst_name = change, name
    if worst:
        log.warning("scales rounded to fp16: the largest relative change is %.2g, in %s", worst, worst_name)
    return quantization


def gptq_config(source: Source, checkpoint_format: str) -> QuantizeConfig:
    """The source's quantisation in another format; ``sym`` is what its zero points show.

    Raises:
        TinyGPTQError: the source is not quantised, its sizes do not fill 32-bit words, or it holds a zero point that the
            format cannot store: ``gptq`` stores zero - 1 and so begins at 1; 2^bits is the wrapped 0 to some readers.
    """
    if source.quantization is None or not source.linears:
        raise TinyGPTQError(f"{source.folder}: is not quantised; tinygptq quantize would do that")
    require_packable(source.config, source.quantization)
    bits = source.quantization.bits
    symmetric = True
    for name, zeros in source.zeros():
        low, high = int(zeros.min()), int(zeros.max())
        if low < 1 and checkpoint_format == "gptq":
            raise TinyGPTQError(
                f"{source.folder}: {name} has a zero point of 0, which format 'gptq' cannot hold (it stores zero - 1); "
                "use --to gptq_v2"
            )
        if high >= 2**bits:
            raise TinyGPTQError(f"{source.folder}: {name} has a zero point of {high}, beyond what {bits} bits hold")
        symmetric = symmetric and low == high == 2 ** (bits - 1)
    return replace(source.quantization, checkpoint_format=checkpoint_format, sym=symmetric)


def gptq_tensors(linear: PackedLinear, checkpoint_format: str, name: str) -> dict[str, np.ndarray]:
    """The four tensors of one linear as files hold them, rows in the original order.

    Shapes: qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales float16 [G, N], g_idx int32 [K].
    """
    bits, in_features, qweight = linear.bits, linear.in_features, linear.qweight
    g_idx = (np.arange(in_features) // linear.group_size).astype(np.int32)
    if linear.perm is not None:  # sorted row i is input perm[i]
        place = np.argsort(linear.perm)
        qweight = pack(unpack(qweight, bits, in_features)[place], bits)
        g_idx = g_idx[place]
    stored = linear.zeros - np.uint16(checkpoint_format == "gptq")  # (G, N)
    return {
        "qweight": qweight.view(np.int32),
        "qzeros": np.ascontiguousarray(pack(stored.T, bits).T).view(np.int32),
        "scales": to_half(linear.scales, f"{name}.scales"),
        "g_idx": g_idx,
    }


def scale_change(scales: np.ndarray) -> float:
    """The largest |fp16(s) - s| / |s| over scales that are not zero; 0 for scales that fp16 holds exactly."""
    if scales.dtype == np.float16:
        return 0.0
    exact = scales[scales != 0].astype(np.float64)
    return float((np.abs(exact.astype(np.float16) - exact) / np.abs(exact)).max(initial=0.0))


def write_dense(source: Source, folder: Path, dtype: str, max_shard_size: int | None = None) -> None:
    """Write a Hugging Face folder of floats; quantised linears are dequantised in float32 and then rounded to ``dtype``.

    ``dtype`` is float16 or float32. Raises TinyGPTQError for values that fp16 cannot hold.
    """
    kind = np.dtype(dtype)
    flags, absent = missing_biases(source.config, source.dense)
    layout = {name: (kind, array.shape) for name, array in source.dense.items()}
    layout |= {name: (kind, shape) for name, shape in absent.items()}
    for name, (in_features, out_features) in linear_names(source.config):
        if name in source.linears:
            layout[f"{name}.weight"] = (kind, (out_features, in_features))
    write_configs(source.folder, folder, dtype, changes=flags)
    with ShardedWriter(folder, layout, max_shard_size) as file:
        for name, array in source.dense.items():
            file.write(name, to_dtype(array, kind, name))
        for name, shape in absent.items():
            file.write(name, np.zeros(shape, kind))
        for name, linear in source.linears.items():
            file.write(f"{name}.weight", to_dtype(linear.dequantize().T, kind, name))  # (N, K)


def to_dtype(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """float32, or fp16 if every value fits."""
    return to_half(array, name) if dtype == np.float16 else array.astype(dtype)
