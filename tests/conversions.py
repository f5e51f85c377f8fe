"""What the tests of conversions share: quantised folders with known zero points, their tensors, and the command."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from helpers import random_llama_folder, random_solutions, save_byte_tokenizer, save_safetensors, write_quantized

from tinygptq.cli import main
from tinygptq.config import QuantizeConfig
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.gptq import Solution
from tinygptq.packing import unpack

Q_PROJ = "model.layers.0.self_attn.q_proj"
ASYM = QuantizeConfig(group_size=32, sym=False)


def with_zeros(least: int, most: int):
    """Random solutions whose zero points take every value from ``least`` to ``most``."""

    def solve(source: Checkpoint, config: QuantizeConfig, seed: int) -> dict[str, Solution]:
        rng = np.random.default_rng(seed)
        found = random_solutions(source, config, seed)
        return {
            name: replace(solution, zeros=rng.integers(least, most + 1, solution.zeros.shape).astype(np.uint16))
            for name, solution in found.items()
        }

    return solve


def quantized(path: Path, config: QuantizeConfig, solve=random_solutions, **overrides) -> dict[str, Solution]:
    """A quantised folder at ``path``; its unquantised source is beside it."""
    source = path.with_name(path.name + "-source")
    random_llama_folder(source, dtype="float16", **overrides)
    save_byte_tokenizer(source)
    return write_quantized(source, path, config, solve)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for path in folder.glob("*.safetensors") for name, array in TensorFile(path).items()}


def rewrite(folder: Path, changes: dict[str, np.ndarray | None], name: str = "model.safetensors") -> None:
    """Replace tensors of a one-file folder, or take them out (None)."""
    changed = {key: array for key, array in (tensors(folder) | changes).items() if array is not None}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_safetensors(changed, folder / name)


def edit(path: Path, **changes) -> None:
    """Fields of a JSON file; None takes one out."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: field for key, field in value.items() if field is not None}))


def assert_same_model(one: Path, other: Path) -> None:
    """Every weight dequantises to the same values, bit for bit."""
    first, second = load_checkpoint(one).weights, load_checkpoint(other).weights
    assert np.array_equal(first.embedding, second.embedding) and np.array_equal(first.head, second.head)
    assert first.linears.keys() == second.linears.keys()
    for name, linear in first.linears.items():
        assert np.array_equal(linear.dequantize(), second.linears[name].dequantize()), name


def run(capsys, *words: str | Path) -> tuple[int, str, str]:
    code = main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *words: str | Path) -> str:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert not Path(words[1]).exists()
    return err


def stored_zeros(words: np.ndarray, bits: int) -> np.ndarray:
    """qzeros int32 [G, N*bits/32] -> codes [N, G] as stored."""
    return unpack(np.ascontiguousarray(words.T), bits, words.shape[1] * 32 // bits)


def peak_memory(action: Callable[[], object]) -> int:
    """Bytes that Python and NumPy held at most during ``action``; memory-mapped files do not count."""
    action()  # imports and caches belong to the first call
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
