"""Weight diffs: tuned = raw + diff, the row for "[PAD]", what does not belong together, and the check."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conversions import peak_memory
from helpers import random_llama_folder, save_byte_tokenizer, save_safetensors

from tinygptq.cli import main
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.release.weight_diff import compare, recover

Q_PROJ = "model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for path in folder.glob("*.safetensors") for name, array in TensorFile(path).items()}


def pair(root: Path, padded: bool = False, dtype: str = "float16", sharded: bool = False, **overrides):
    """Folders ``raw`` and ``diff`` under ``root``; returns the two as float32 tensors, raw without the row for "[PAD]"."""
    raw = random_llama_folder(root / "raw", seed=1, dtype=dtype, sharded=sharded, **overrides)
    vocabulary = {"vocab_size": 121} if padded else {}
    diff = random_llama_folder(root / "diff", seed=2, dtype=dtype, sharded=sharded, **overrides | vocabulary)
    save_byte_tokenizer(root / "diff")
    (root / "diff" / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    (root / "raw" / "tokenizer_config.json").write_text("{}")
    return (*({name: array.astype(np.float32) for name, array in part.items()} for part in (raw, diff)),)


def padded_rows(array: np.ndarray) -> np.ndarray:
    """One row more, the mean of the others."""
    return np.concatenate([array, array.astype(np.float64).mean(axis=0, keepdims=True).astype(np.float32)])


def run(capsys, root: Path, *words: str) -> tuple[int, str, str]:
    paths = ["--path-raw", str(root / "raw"), "--path-diff", str(root / "diff"), "--path-tuned", str(root / "tuned")]
    code = main(["recover", *paths, *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, root: Path, *words: str) -> str:
    code, out, err = run(capsys, root, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert sorted(path.name for path in root.iterdir()) == ["diff", "raw"]
    return err


def edit(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    changed = {name: array for name, array in (tensors(folder) | changes).items() if array is not None}
    save_safetensors(changed, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True])
def test_tuned_is_raw_plus_diff(tmp_path: Path, dtype, padded):
    raw, diff = pair(tmp_path, padded, dtype, sharded=True)
    for result in ("float16", "float32"):
        done = recover(tmp_path / "raw", tmp_path / "diff", tmp_path / result, dtype=result, check=True)
        assert (done.tensors, done.pad_row) == (len(diff), padded)
        assert done.largest_difference < (2e-3 if result == "float16" else 1e-6)
        after = tensors(tmp_path / result)
        assert after.keys() == diff.keys()
        for name, change in diff.items():
            before = padded_rows(raw[name]) if padded and name in (EMBEDDING, HEAD) else raw[name]
            wanted = (before + change).astype(result)
            assert after[name].dtype == wanted.dtype and np.array_equal(after[name], wanted), name
    load_checkpoint(tmp_path / "float16")


def test_config_and_tokenizer_are_the_diffs(tmp_path: Path, capsys):
    pair(tmp_path, padded=True, dtype="float32")
    code, out, _ = run(capsys, tmp_path, "--check")
    assert code == 0
    assert out.splitlines()[0] == f"{tmp_path / 'tuned'}: 21 tensors, a row for [PAD] added"
    assert out.splitlines()[1].startswith("raw = tuned - diff within rounding of float16; largest difference 0.0")
    raw = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert raw == json.loads((tmp_path / "diff" / "config.json").read_text()) | {"torch_dtype": "float16"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (tmp_path / "diff" / name).read_bytes()


def test_the_original_spelling_of_the_flags(tmp_path: Path, capsys):
    pair(tmp_path)
    paths = ["--path_raw", str(tmp_path / "raw"), "--path_diff", str(tmp_path / "diff")]
    assert main(["recover", *paths, "--path_tuned", str(tmp_path / "tuned"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "tuned"), "tensors": 21, "pad_row": False}


def test_shards_in_and_out(tmp_path: Path, capsys):
    pair(tmp_path, sharded=True)
    assert run(capsys, tmp_path, "--max-shard-size", "60KB", "--dtype", "float32")[0] == 0
    shards = sorted((tmp_path / "tuned").glob("*.safetensors"))
    assert len(shards) > 3
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "one", dtype="float32")
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "tuned")
    assert one.keys() == many.keys() and all(np.array_equal(one[name], many[name]) for name in one)
    load_checkpoint(tmp_path / "tuned")


def test_memory_for_one_tensor_at_a_time(tmp_path: Path):
    """The whole is 31 MB in float32, a linear of the MLP 1 MB."""
    sizes = {"num_hidden_layers": 7, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8}
    pair(tmp_path, dtype="float16", **sizes)
    outs = iter(("first", "second"))
    peak = peak_memory(lambda: recover(tmp_path / "raw", tmp_path / "diff", tmp_path / next(outs), check=True))
    largest = 256 * 1024 * 4
    total = sum(array.size * 4 for array in tensors(tmp_path / "raw").values())
    assert peak < 6 * largest < total / 4


def test_a_tied_model(tmp_path: Path):
    raw, diff = pair(tmp_path, padded=True, tied=True)
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "tuned", dtype="float32", check=True)
    after = tensors(tmp_path / "tuned")
    assert HEAD not in after
    assert np.array_equal(after[EMBEDDING], padded_rows(raw[EMBEDDING]) + diff[EMBEDDING])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_no_row_is_added_where_the_raw_tokenizer_pads(tmp_path: Path, capsys):
    pair(tmp_path, padded=True)
    (tmp_path / "raw" / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    message = refused(capsys, tmp_path)
    assert f"tensor {HEAD} has shape [120, 96]" in message and "has the padding token '<pad>'" in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"vocab_size": 122}, [HEAD, "[120, 96]", "[122, 96]"]),
        ({"vocab_size": 119}, [HEAD, "[120, 96]", "[119, 96]"]),
        ({"intermediate_size": 192}, ["mlp.down_proj.weight", "[96, 160]", "[96, 192]"]),
        ({"num_key_value_heads": 3}, ["self_attn.k_proj.weight", "[32, 96]", "[48, 96]"]),
        ({"num_hidden_layers": 3}, ["raw: tensor model.layers.2.", "is missing"]),
        ({"num_hidden_layers": 1}, ["diff: tensor model.layers.1.", "is missing"]),
        ({"tied": True}, ["diff: tensor lm_head.weight is missing"]),
        ({"attention_bias": True}, [f"raw: tensor {Q_PROJ}.bias is missing"]),
    ],
)
def test_what_does_not_belong_together(tmp_path: Path, capsys, overrides, parts):
    random_llama_folder(tmp_path / "raw", seed=1)
    random_llama_folder(tmp_path / "diff", seed=2, **overrides)
    message = refused(capsys, tmp_path)
    for part in parts:
        assert part in message


def test_a_missing_tensor(tmp_path: Path, capsys):
    pair(tmp_path)
    edit(tmp_path / "diff", {f"{Q_PROJ}.weight": None})
    assert f"tensor {Q_PROJ}.weight is missing" in refused(capsys, tmp_path)


def test_a_sum_that_fp16_cannot_hold(tmp_path: Path, capsys):
    raw, _ = pair(tmp_path, dtype="float32")
    edit(tmp_path / "diff", {f"{Q_PROJ}.weight": np.full_like(raw[f"{Q_PROJ}.weight"], 1e5)})
    assert f"tensor {Q_PROJ}.weight holds values that fp16 cannot" in refused(capsys, tmp_path)
    assert run(capsys, tmp_path, "--dtype", "float32", "--check")[0] == 0


def test_the_check_sees_a_wrong_value(tmp_path: Path, capsys, monkeypatch):
    """One value of the written file a little beyond its rounding."""
    pair(tmp_path, dtype="float32")
    write = "tinygptq.release.weight_diff.to_half"

    def off(array: np.ndarray, name: str) -> np.ndarray:
        half = array.astype(np.float16)
        if name == f"{Q_PROJ}.weight":
            half[3, 5] = np.nextafter(np.nextafter(half[3, 5], np.float16(9)), np.float16(9))
        return half

    monkeypatch.setattr(write, off)
    message = refused(capsys, tmp_path, "--check")
    assert f"tensor {Q_PROJ}.weight: raw is " in message and "more than rounding" in message


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rounding_never_fails_the_check(dtype):
    rng = np.random.default_rng(0)
    raw, diff = (np.float32(rng.normal(size=100_000) * 10.0 ** rng.uniform(-9, 3, 100_000)) for _ in range(2))
    diff[:100] = -raw[:100]  # sums of 0
    tuned = (raw + diff).astype(dtype)
    assert np.isfinite(tuned).all()
    assert 0 < compare("x", raw, tuned, diff) < 1
    broken = tuned.copy()
    broken[500] = np.nan
    with pytest.raises(ValueError, match="tensor x: raw is"):
        compare("x", raw, broken, diff)
