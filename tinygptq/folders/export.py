"""A quantised model to a folder that AutoGPTQ, GPTQModel, ExLlama, TGI, vLLM and transformers load.

One ``model.safetensors``, ``quantize_config.json``, ``config.json`` with the same facts under ``quantization_config``,
and the tokenizer's files. The folder appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import LlamaConfig, QuantizeConfig, read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, linear_names, norm_names
from tinygptq.folders.tensorfile import TensorFileWriter
from tinygptq.gptq import Solution
from tinygptq.ops import array_module
from tinygptq.packing import pack, unpack

# Copied as they are. Weights and both configs are written anew; anything else in the source folder stays there.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

KOBOLD_KEYS = ("gptq_bits", "gptq_groupsize")  # of a config.json that KoboldAI's fork reads; they describe other weights


def require_free(out: Path) -> None:
    """Raise if ``out`` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TinyGPTQError(f"{out}: already exists and is not an empty folder; remove it or choose another")


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill; on success it becomes ``out`` in one rename, on any failure nothing of it stays.

    Raises:
        TinyGPTQError: ``out`` exists and is not an empty folder, or the disk refuses (no permission, no room).
    """
    out = Path(out)
    require_free(out)
    place = out.resolve()  # "." has no name to put the partial folder beside
    partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
    with no_empty_parents(partial):
        try:
            _remove_abandoned(place)
            partial.mkdir(parents=True)
            yield partial
            os.replace(partial, place)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise TinyGPTQError(f"{out}: cannot be written ({error.strerror or error})") from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def no_empty_parents(path: Path) -> Iterator[None]:
    """Folders above ``path`` that are made within the block go again at its end, if there is nothing in them."""
    missing = [parent for parent in path.parents if not parent.exists()]  # the nearest first
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # one that is not empty, nor are those above it
            for parent in missing:
                parent.rmdir()


def _remove_abandoned(place: Path) -> None:
    """What processes left that were killed while they wrote here."""
    for partial in place.parent.glob(f"{glob.escape(f'.{place.name}.partial-')}*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdecimal() and not _runs(int(pid)):
            shutil.rmtree(partial, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # somebody else's process, or a system that does not say
        return True
    return True


def tensor_layout(config: LlamaConfig, quantization: QuantizeConfig) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """``{name: (dtype, shape)}`` of every tensor of a quantised folder, in file order; from the configs alone."""
    vocab, hidden, bits, dense = config.vocab_size, config.hidden_size, quantization.bits, np.dtype(np.float16)
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {"model.embed_tokens.weight": (dense, (vocab, hidden))}
    for name in norm_names(config):
        layout[f"{name}.weight"] = (dense, (hidden,))
    for name, (in_features, out_features) in linear_names(config):
        groups, integer = quantization.num_groups(in_features), np.dtype(np.int32)
        layout[f"{name}.qweight"] = (integer, (in_features * bits // 32, out_features))
        layout[f"{name}.qzeros"] = (integer, (groups, out_features * bits // 32))
        layout[f"{name}.scales"] = (np.dtype(np.float16), (groups, out_features))
        layout[f"{name}.g_idx"] = (integer, (in_features,))
        if config.has_bias(name):
            layout[f"{name}.bias"] = (dense, (out_features,))
    if not config.tie_word_embeddings:
        layout["lm_head.weight"] = (dense, (vocab, hidden))
    return layout


def require_packable(config: LlamaConfig, quantization: QuantizeConfig) -> None:
    """Raise unless every linear's sizes fill whole 32-bit words at this width."""
    for name, (in_features, out_features) in linear_names(config):
        for axis, size in (("input", in_features), ("output", out_features)):
            if size * quantization.bits % 32:
                raise TinyGPTQError(f"{name}: {size} {axis} features of {quantization.bits} bits do not fill 32-bit words")


def gptq_tensors(solution: Solution, quantization: QuantizeConfig) -> dict[str, np.ndarray]:
    """The four tensors of one linear as files hold them; the solver's own codes, never re-derived ones. NumPy or CuPy.

    Raises:
        TinyGPTQError: format ``gptq`` stores ``zero - 1`` and so cannot hold a zero point of 0, nor one of 2^bits: its
            stored form is what a wrapped 0 looks like, and readers disagree which it is.
    """
    xp, bits, stored = array_module(solution.codes), quantization.bits, solution.zeros.T.astype(np.int64)  # (G, N)
    if quantization.checkpoint_format == "gptq":
        if (stored < 1).any():
            raise TinyGPTQError("a zero point of 0 cannot be written in format 'gptq'; use 'gptq_v2'")
        if (stored > quantization.max_code).any():
            raise TinyGPTQError(f"a zero point of {stored.max()} is beyond the largest code of {bits} bits")
        stored = stored - 1
    return {
        "qweight": pack(xp.ascontiguousarray(solution.codes.T), bits).view(np.int32),  # (K*bits/32, N)
        "qzeros": xp.ascontiguousarray(pack(stored.T, bits).T).view(np.int32),  # (G, N*bits/32)
        "scales": xp.ascontiguousarray(solution.scales.T),  # (G, N)
        "g_idx": solution.g_idx.astype(np.int32),
    }


def solution_of(tensors: Mapping[str, np.ndarray], quantization: QuantizeConfig) -> Solution:
    """The inverse of :func:`gptq_tensors`; loss and damping, which files do not hold, are NaN."""
    bits, outputs = quantization.bits, tensors["scales"].shape[1]
    codes = unpack(tensors["qweight"], bits, len(tensors["g_idx"])).T  # (N, K)
    stored = unpack(tensors["qzeros"].T.copy(), bits, outputs)  # (N, G)
    zeros = stored.astype(np.uint16) + np.uint16(quantization.checkpoint_format == "gptq")
    return Solution(codes, tensors["scales"].T, zeros, tensors["g_idx"], np.nan, np.nan)


class QuantizedFolderWriter:
    """Fills a new folder: first what stays dense, then one linear after another as the solver finishes it.

    Args:
        finished: tensors of linears that an earlier writer left in this folder, with the CRC-32 of each; they are kept.

    ``checksums`` is such a dict, of all linears written so far.
    """

    def __init__(
        self,
        folder: Path,
        source: Checkpoint,
        quantization: QuantizeConfig,
        facts: Mapping[str, Any] | None = None,
        finished: Mapping[str, int] | None = None,
    ) -> None:
        self.quantization, config, weights = quantization, source.config, source.weights
        biases = {name: linear.bias for name, linear in weights.linears.items() if linear.bias is not None}
        layout = tensor_layout(config, quantization)
        for name, bias in biases.items():
            layout[f"{name}.bias"] = (np.dtype(np.float16), bias.shape)
        facts = quantization.to_dict(model_name=source.folder.resolve().name) | dict(facts or {})
        write_configs(source.folder, folder, "float16", facts)
        self.checksums = dict(finished or {})
        with ExitStack() as stack:
            self._file = stack.enter_context(TensorFileWriter(folder / "model.safetensors", layout, keep=self.checksums))
            self._file.write("model.embed_tokens.weight", to_half(weights.embedding, "model.embed_tokens.weight"))
            for name, norm in weights.norms.items():
                self._file.write(f"{name}.weight", to_half(norm, name))
            if not config.tie_word_embeddings:
                self._file.write("lm_head.weight", to_half(weights.head, "lm_head.weight"))
            for name, bias in biases.items():
                self._file.write(f"{name}.bias", to_half(bias, name))
            stack.pop_all()  # nothing was refused: the file stays open

    def write(self, name: str, solution: Solution) -> None:
        self.write_tensors(name, gptq_tensors(solution, self.quantization))

    def write_tensors(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """One linear, from what :func:`gptq_tensors` made of it."""
        for part, tensor in tensors.items():
            self._file.write(f"{name}.{part}", tensor)
            self.checksums[f"{name}.{part}"] = zlib.crc32(np.ascontiguousarray(tensor))

    def flush(self) -> None:
        """What was written so far is on the disk when this returns."""
        self._file.flush()

    def __enter__(self) -> QuantizedFolderWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def to_half(array: np.ndarray, name: str) -> np.ndarray:
    """fp16, refusing values that would become infinite."""
    if array.dtype == np.float16:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise TinyGPTQError(f"tensor {name} holds values that fp16 cannot (NaN, or beyond 65504)")
    return half


def write_configs(
    source: Path,
    folder: Path,
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """config.json of ``source`` for weights of another dtype, and the tokenizer's files.

    Args:
        dtype: of the tensors that are not quantised: ``float16`` or ``float32``.
        quantization: the dict that quantize_config.json holds and config.json repeats; None for an unquantised folder.
        changes: other entries of config.json.
    """
    dropped = ("quantization_config", "dtype", *KOBOLD_KEYS)
    raw = {key: value for key, value in read_json(source / "config.json").items() if key not in dropped}
    raw |= {"torch_dtype": dtype, **(changes or {})}
    if quantization is not None:
        write_json(folder / "quantize_config.json", dict(quantization))
        raw["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", raw)
    copy_companions(source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """The tokenizer's files and the sampling defaults, as they are."""
    for name in COMPANIONS:
        if (source / name).is_file():
            try:
                content = (source / name).read_bytes()
            except OSError as error:
                raise TinyGPTQError(f"{source / name}: cannot be read ({error.strerror or error})") from None
            (folder / name).write_bytes(content)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
