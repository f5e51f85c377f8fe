"""A tuned model from its original and a published difference: tuned = raw + diff, tensor by tensor in float32.

The form of open-instruct's (and Stanford Alpaca's) ``weight_diff.py``: weights whose original may not be passed on are
published as tuned - raw, in a Hugging Face folder of the tuned model's shapes, with the tuned model's tokenizer. Where the
original's tokenizer had no padding token, "[PAD]" was added before tuning: the embedding and the head got one more row, the
mean of the old rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.folders.export import new_folder, to_half, write_configs
from tinygptq.folders.shards import ShardedWriter
from tinygptq.tokenizer_rules import FolderRules
from tinygptq.weights import DenseLinear

PADDED = ("model.embed_tokens.weight", "lm_head.weight")  # the two that get a row for "[PAD]"
VALUES_AT_ONCE = 1 << 16  # compared together in float64: a few MB


@dataclass(frozen=True)
class Recovered:
    """tensors: how many were added. pad_row: whether "[PAD]" got a row. largest_difference: of the check, else None."""

    folder: Path
    tensors: int
    pad_row: bool
    largest_difference: float | None


def recover(
    path_raw: str | Path,
    path_diff: str | Path,
    path_tuned: str | Path,
    *,
    dtype: str = "float16",
    max_shard_size: int | None = None,
    check: bool = False,
) -> Recovered:
    """Add a weight diff to the original model, into a new folder with the diff's configuration and tokenizer.

    Args:
        dtype: float16 or float32, of the result; the sum is formed in float32 either way.
        max_shard_size: bytes of tensors in one file; None writes one.
        check: read the result again and compare raw with tuned - diff, value by value.

    Raises:
        TinyGPTQError: a tensor that only one side has or of another shape (other than the row for "[PAD]"), a sum that fp16
            cannot hold, or a value further off than its rounding. No folder is left behind.
    """
    raw, diff = load_checkpoint(path_raw), load_checkpoint(path_diff)
    before, change = named_tensors(raw), named_tensors(diff)
    padded = match(raw, before, diff, change)
    kind = np.dtype(dtype)
    with new_folder(path_tuned) as folder:
        write_configs(diff.folder, folder, dtype)
        with ShardedWriter(folder, {name: (kind, array.shape) for name, array in change.items()}, max_shard_size) as file:
            for name, array in change.items():
                tuned = raw_tensor(before, name, padded)
                tuned += array.astype(np.float32)
                file.write(name, to_half(tuned, name) if kind == np.float16 else tuned)
        largest = None
        if check:
            stored = named_tensors(load_checkpoint(folder))
            largest = max(compare(name, raw_tensor(before, name, padded), stored[name], change[name]) for name in change)
    return Recovered(Path(path_tuned), len(change), bool(padded), largest)


def named_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of an unquantised folder by its full name, memory-mapped, in any of the three float dtypes."""
    weights = checkpoint.weights
    tensors = {"model.embed_tokens.weight": weights.embedding}
    tensors |= {f"{name}.weight": norm for name, norm in weights.norms.items()}
    for name, linear in weights.linears.items():
        if not isinstance(linear, DenseLinear):
            raise TinyGPTQError(f"{checkpoint.folder}: {name} is quantised; a weight diff is between float models")
        tensors[f"{name}.weight"] = linear.weight
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias
    if not checkpoint.config.tie_word_embeddings:
        tensors["lm_head.weight"] = weights.head
    return tensors


def match(raw: Checkpoint, before: dict[str, np.ndarray], diff: Checkpoint, change: dict[str, np.ndarray]) -> frozenset[str]:
    """Check that the two belong together; returns the names whose original lacks the row for "[PAD]".

    Raises:
        TinyGPTQError: naming the first tensor that only one side has, or whose shapes differ otherwise.
    """
    for name in [*change, *before]:
        if name not in before or name not in change:
            lacks, has = (raw, diff) if name in change else (diff, raw)
            raise TinyGPTQError(f"{lacks.folder}: tensor {name} is missing; {has.folder} has it")
    differing = {name for name in change if before[name].shape != change[name].shape}
    pad_token = FolderRules.read(raw.folder).named.get("pad_token")
    for name in sorted(differing):
        old, new = before[name].shape, change[name].shape
        if name not in PADDED or (old[0] + 1, *old[1:]) != new:
            why = ""
        elif pad_token is not None:
            why = f"; no row is added for [PAD], since the raw tokenizer has the padding token {pad_token.content!r}"
        else:
            continue
        raise TinyGPTQError(f"tensor {name} has shape {list(old)} in {raw.folder} and {list(new)} in {diff.folder}{why}")
    return frozenset(differing)


def raw_tensor(before: dict[str, np.ndarray], name: str, padded: frozenset[str]) -> np.ndarray:
    """One tensor of the original in float32, with the mean of its rows as one more row where that is missing."""
    old = before[name]
    if name not in padded:
        return old.astype(np.float32)
    out = np.empty((len(old) + 1, *old.shape[1:]), np.float32)
    out[:-1] = old
    out[-1] = out[:-1].mean(axis=0, dtype=np.float64)
    return out


def compare(name: str, raw: np.ndarray, tuned: np.ndarray, diff: np.ndarray) -> float:
    """The largest ``|raw - (tuned - diff)|``; every value must lie within the rounding of its sum.

    The sum was rounded to float32 (half a unit in the last place, 2^-24 of it), and to fp16 if tuned is (2^-11 of it, or
    2^-25 for subnormals). tuned - diff is formed in float64, where it is exact enough not to count.

    Shapes: all three the same. Raises TinyGPTQError naming the tensor.
    """
    largest = 0.0
    flat = [array.reshape(-1) for array in (raw, tuned, diff)]
    relative, absolute = (2**-11 + 2**-23, 2**-25) if tuned.dtype == np.float16 else (2**-23, 2**-149)
    for start in range(0, flat[0].size, VALUES_AT_ONCE):
        before, after, change = (part[start : start + VALUES_AT_ONCE].astype(np.float64) for part in flat)
        error = np.abs(before - (after - change))
        if not (error <= relative * np.abs(after) + absolute).all():  # also true of NaN
            worst = int(np.argmax(np.nan_to_num(error - relative * np.abs(after), nan=np.inf)))
            raise TinyGPTQError(
                f"tensor {name}: raw is {before[worst]:.9g} and tuned - diff is "
                f"{after[worst] - change[worst]:.9g}, which is more than rounding"
            )
        largest = max(largest, float(error.max(initial=0.0)))
    return largest
