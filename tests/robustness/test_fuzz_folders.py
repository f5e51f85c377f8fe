"""Damaged folders: each either loads to finite weights or ends in TinyGPTQError, and `inspect` agrees with the loader.

Seeded: case N is always the same. TINYGPTQ_FUZZ_CASES sets how many (300 by default); TINYGPTQ_FUZZ_FIRST the first one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import writers
from golden.writers import random_model
from helpers import random_llama_folder

from tinygptq import threads
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.release.inspect_folder import as_dict, as_text, inspect_folder

CASES = int(os.environ.get("TINYGPTQ_FUZZ_CASES", "300"))
FIRST = int(os.environ.get("TINYGPTQ_FUZZ_FIRST", "0"))
CHUNKS = 10
SECONDS = 10

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 31, 33, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, math.nan, math.inf, "",
    "4", "gptq", "gptq_v2", "../x.safetensors", "\0", "é" * 300, [], [4], {}, {"a": 1}, [[]], "F16", "I32", "F8_E4M3",
    [0, 0], [2**62, 2**62], [-8, 8],
)  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[Path]:
    """Folders of several generations, dense ones, sharded ones."""
    threads.share(1, 0, lambda rows: None)  # what it looks up once, it reads from outside the folders
    root = tmp_path_factory.mktemp("bases")
    for name, writer in writers.WRITERS.items():
        model = random_model(3 if "3" in name else 4, -1 if writer.one_group_only else 32, sym=writer.sym_only,
                             desc_act=not writer.in_order_only)  # fmt: skip
        writer.write(model, root / name)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
             "vocab_size": 16, "num_hidden_layers": 1}  # fmt: skip
    random_llama_folder(root / "dense", dtype="bfloat16", **sizes)
    random_llama_folder(root / "dense sharded", dtype="float16", sharded=True, attention_bias=True, **sizes)
    return sorted(root.iterdir())


# ------------------------------------------------------------------------------------------------ ways to damage a file


def flip_bytes(rng: np.random.Generator, data: bytearray) -> None:
    """A few bytes anywhere, or near the start, where headers and configs are."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 4096)
    for at in rng.integers(0, max(end, 1), int(rng.integers(1, 9))):
        if at < len(data):
            data[at] = int(rng.integers(256))


def cut(rng: np.random.Generator, data: bytearray) -> None:
    del data[int(rng.integers(0, len(data) + 1)) :]


def lengthen(rng: np.random.Generator, data: bytearray) -> None:
    data += rng.bytes(int(rng.integers(1, 200)))


def move_block(rng: np.random.Generator, data: bytearray) -> None:
    """Two stretches of the same length change places."""
    size = int(rng.integers(1, 64))
    a, b = (int(at) for at in rng.integers(0, max(len(data) - size, 1), 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def extreme_floats(rng: np.random.Generator, data: bytearray) -> None:
    """NaN, infinity or the largest finite number of some width, in the data."""
    pattern = [b"\x00\x7c", b"\xff\xff", b"\x80\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\xff\xfb"][rng.integers(6)]
    at = int(rng.integers(len(data) // 2, max(len(data) - 4, len(data) // 2 + 1))) // 4 * 4
    data[at : at + len(pattern)] = pattern


def header_length(rng: np.random.Generator, data: bytearray) -> None:
    value = [0, 1, 7, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1, 10**8][rng.integers(9)]
    data[:8] = value.to_bytes(8, "little")


def edit(rng: np.random.Generator, value: Any) -> Any:
    """Change one place of a JSON value: an odd value, two values swapped, a key gone, renamed or doubled."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return ODD_VALUES[rng.integers(len(ODD_VALUES))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    a, b = keys[rng.integers(len(keys))], keys[rng.integers(len(keys))]
    kind = rng.integers(6)
    if kind == 0:
        value[a], value[b] = value[b], value[a]
    elif kind == 1:
        del value[a]
    elif kind == 2 and isinstance(value, dict):
        value[str(ODD_VALUES[rng.integers(len(ODD_VALUES))])] = value.pop(a)
    elif kind == 3 and isinstance(value[a], int):
        value[a] += int(rng.integers(-40, 40))
    else:
        value[a] = edit(rng, value[a])
    return value


def edit_json(rng: np.random.Generator, data: bytearray) -> None:
    value = json.loads(bytes(data))
    for _ in range(int(rng.integers(1, 3))):
        value = edit(rng, value)
    data[:] = json.dumps(value).encode()


def edit_header(rng: np.random.Generator, data: bytearray) -> None:
    """The same, in a safetensors header that stays well-formed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    header = edit(rng, header)
    text = json.dumps(header).encode()
    data[: 8 + length] = len(text).to_bytes(8, "little") + text


def legal_header(rng: np.random.Generator, data: bytearray) -> None:
    """A header that stays true to the file: tensors swap names, or one takes another name, shape or dtype of its size."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    names = [name for name in header if name != "__metadata__"]
    a, b = names[rng.integers(len(names))], names[rng.integers(len(names))]
    entry, kind = header[a], rng.integers(5)
    if kind == 0:
        header[a], header[b] = header[b], header[a]
    elif kind == 1:
        header[f"{a}x" if rng.random() < 0.5 else a.replace("0", "1")] = header.pop(a)
    elif kind == 2:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 3:
        count = math.prod(entry["shape"])
        entry["shape"] = [[count], [1, count], [count, 1], [2, count // 2], [1, *entry["shape"]]][rng.integers(5)]
    else:
        widths = (("F16", "BF16", "I16"), ("I32", "F32", "U32"))
        same = next(width for width in widths if entry["dtype"] in width)
        entry["dtype"] = same[rng.integers(3)]
    text = json.dumps(header).encode()
    data[: 8 + length] = len(text).to_bytes(8, "little") + text


def flip_data(rng: np.random.Generator, data: bytearray) -> None:
    """A few bytes behind the header."""
    start = 8 + int.from_bytes(data[:8], "little")
    for at in rng.integers(start, len(data), int(rng.integers(1, 9))):
        data[at] = int(rng.integers(256))


def nudge(rng: np.random.Generator, data: bytearray) -> None:
    """One field of a config: a number a little off, a flag turned, a name changed, or two fields swapped."""
    value = whole = json.loads(bytes(data))
    while isinstance(inner := value[key := list(value)[rng.integers(len(value))]], dict) and inner:
        value = inner
    if isinstance(inner, bool):
        value[key] = not inner
    elif isinstance(inner, (int, float)):
        value[key] = inner + int(rng.integers(-2, 3)) if rng.random() < 0.5 else inner * 2
    elif isinstance(inner, str):
        value[key] = "gptq_v2" if rng.random() < 0.5 else inner[1:]
    data[:] = json.dumps(whole).encode()


COARSE = (flip_bytes, cut, lengthen, move_block)
IN_WEIGHTS = (flip_data, flip_data, flip_data, legal_header, legal_header, extreme_floats, edit_header, header_length)
IN_CONFIGS = (nudge, nudge, nudge, edit_json, edit_json)


def damage(folder: Path, rng: np.random.Generator) -> str:
    """One or two changes; returns what was done, for the message of a failure."""
    done = []
    for _ in range(int(rng.integers(1, 3))):
        files = sorted(folder.iterdir(), key=lambda path: (path.suffix, path.name))
        weights = [path for path in files if path.suffix == ".safetensors"]
        among = weights if weights and rng.random() < 0.5 else files
        path = among[rng.integers(len(among))]
        kinds = COARSE if rng.random() < 0.15 else IN_WEIGHTS if path.suffix == ".safetensors" else IN_CONFIGS
        kind = kinds[rng.integers(len(kinds))]
        data = bytearray(path.read_bytes())
        try:
            kind(rng, data)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration):
            continue  # damaged beyond editing by the change before
        path.write_bytes(data)
        done.append(f"{kind.__name__} {path.name}")
    if rng.random() < 0.02:
        files = sorted(folder.iterdir())
        path = files[rng.integers(len(files))]
        path.unlink()
        done.append(f"removed {path.name}")
    return ", ".join(done)


# ------------------------------------------------------------------------------------------------------------ the check

OPENED: list[str] | None = None  # paths opened, while a case runs


def _audit(event: str, args: tuple) -> None:
    if event == "open" and OPENED is not None and isinstance(args[0], (str, os.PathLike)):
        OPENED.append(os.fspath(args[0]))


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the paths that are opened; ends a case that hangs."""
    global OPENED

    def late(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    OPENED = []
    try:
        yield OPENED
    finally:
        OPENED = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path) -> str:
    """``loads`` or the error's message; anything else is a failure of the test."""
    try:
        weights = load_checkpoint(folder).weights
    except TinyGPTQError as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
        return str(error)
    for array in (weights.embedding, weights.head, *weights.norms.values()):
        assert np.isfinite(array.astype(np.float32)).all()
    for linear in weights.linears.values():
        assert np.isfinite(linear.dequantize()).all()
        assert linear.bias is None or np.isfinite(linear.bias).all()
    return "loads"


def run_case(base: Path, folder: Path, seed: int) -> str:
    shutil.copytree(base, folder)
    done = damage(folder, np.random.default_rng(seed))
    try:
        with watched() as opened:
            result = outcome(folder)
            found = inspect_folder(folder)
            as_text(found)
            json.loads(json.dumps(as_dict(found)))
        assert (result == "loads") == (not found.problems), f"{result}; inspect: {found.problems}"
        package = [path for path in opened if path.endswith((".py", ".pyc"))]
        outside = [path for path in opened if not Path(path).is_relative_to(folder) and path not in package]
        assert outside == []
    except Exception as error:
        raise AssertionError(f"case {seed} ({base.name}: {done}): {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(folder)
    return result


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_damaged_folders(tmp_path: Path, bases, chunk):
    outcomes = {"loads": 0, "refused": 0}
    for seed in range(FIRST + chunk, FIRST + CASES, CHUNKS):
        result = run_case(bases[seed % len(bases)], tmp_path / "case", seed)
        outcomes["loads" if result == "loads" else "refused"] += 1
    print(outcomes)
    assert outcomes["refused"] > 0
    assert outcomes["loads"] > 0 or CASES < 100  # else the damage is too coarse to test anything but the first check


def test_undamaged_folders_load(bases):
    for base in bases:
        assert outcome(base) == "loads"
        assert inspect_folder(base).problems == []
