"""``convert``: look at what the source is, and put the right reader and writer together."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinygptq.convert.awq import awq_facts, read_awq
from tinygptq.convert.gguf_model import convert_gguf
from tinygptq.convert.pickles import pickle_files, refuse, write_safetensors
from tinygptq.convert.source import Source, source_of
from tinygptq.convert.writers import write_dense, write_gptq
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.folders.export import copy_companions, new_folder

log = logging.getLogger(__name__)

DTYPES = {"fp16": "float16", "fp32": "float32"}
FORMATS = ("gptq", "gptq_v2")
TARGETS = (*FORMATS, *DTYPES)
CONFIGS = ("config.json", "quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Converted:
    """What was read, what was written, and anything the user should know about it ('' if nothing)."""

    folder: Path
    kind: str
    target: str
    note: str = ""


def convert(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    allow_pickle: bool = False,
    max_shard_size: int | None = None,
) -> Converted:
    """Convert a model into the new folder ``out``, whole or not at all.

    Args:
        source: a GGUF file, a folder (AWQ, any generation of GPTQ, a Hugging Face folder of safetensors or of pickles), or
            one .safetensors or pickle file beside its config.json.
        to: ``gptq``, ``gptq_v2``, ``fp16`` or ``fp32``. None: gptq for quantised sources (gptq_v2 for AWQ with a zero point
            of 0), fp16 for GGUF, and for pickles of floats the dtypes they have.
        allow_pickle: open PyTorch pickles with ``torch.load(weights_only=True)``.
        max_shard_size: bytes of tensors in a file of the output; None writes one file.

    Raises:
        TinyGPTQError: nothing to convert, or a source that cannot be read or written in that form; one line says why.
    """
    source = Path(source)
    if to is not None and to not in TARGETS:
        raise TinyGPTQError(f"cannot convert to {to!r}, expected one of {', '.join(TARGETS)}")
    if not source.exists():
        raise TinyGPTQError(f"{source}: no such file or folder")
    gguf, pickles = _gguf_file(source), []
    if gguf is None:
        pickles = [] if _has_safetensors(source) else pickle_files(source)
    if pickles and not allow_pickle:
        refuse(pickles)
    with new_folder(out) as folder:
        if gguf is not None:
            found = _from_gguf(gguf, folder, to, max_shard_size)
        elif pickles:
            found = _from_pickles(pickles, folder, to, max_shard_size)
        else:
            with _as_folder(source) as place:
                found = _from_folder(place, folder, to, max_shard_size)
    kind, target, note = found
    return Converted(Path(out), kind, target, note)


# ---------------------------------------------------------------------------------------------------- what a source is


def _gguf_file(source: Path) -> Path | None:
    """The source itself, or the one GGUF file of a folder that holds no other weights."""
    if source.is_file():
        with open(source, "rb") as file:
            return source if file.read(4) == b"GGUF" or source.suffix == ".gguf" else None
    files = sorted(source.glob("*.gguf"))
    if not files or _has_safetensors(source):
        return None
    if len(files) > 1:
        raise TinyGPTQError(f"{source}: holds several GGUF files ({', '.join(path.name for path in files[:4])}); give one")
    return files[0]


def _has_safetensors(source: Path) -> bool:
    return source.suffix == ".safetensors" if source.is_file() else any(source.glob("*.safetensors"))


@contextmanager
def _as_folder(source: Path) -> Iterator[Path]:
    """The source, or for one .safetensors file a folder with it and the small files beside it."""
    if source.is_dir():
        yield source
        return
    if source.suffix != ".safetensors":
        raise TinyGPTQError(f"{source}: not a GGUF, safetensors or PyTorch file")
    with _staging(source) as folder:
        (folder / source.name).symlink_to(source.resolve())
        yield folder


@contextmanager
def _staging(file: Path, beside: Path | None = None) -> Iterator[Path]:
    """A temporary folder named like the file's model, with the configs and the tokenizer found beside the file."""
    home = file.resolve().parent
    if not (home / "config.json").is_file():
        raise TinyGPTQError(f"{file}: there is no config.json beside it; put the original model's there")
    with tempfile.TemporaryDirectory(prefix=".tinygptq-", dir=beside) as scratch:
        folder = Path(scratch) / (home.name if file.stem.startswith(("model", "pytorch_model")) else file.stem)
        folder.mkdir()
        _copy_small_files(home, folder)
        yield folder


def _copy_small_files(home: Path, folder: Path) -> None:
    copy_companions(home, folder)
    for name in CONFIGS:
        if (home / name).is_file():
            (folder / name).write_bytes((home / name).read_bytes())


# ---------------------------------------------------------------------------------------------------------- the roads


def _from_gguf(path: Path, folder: Path, to: str | None, max_shard_size: int | None) -> tuple[str, str, str]:
    if to in FORMATS:
        raise TinyGPTQError(f"{path}: GGUF becomes fp16 or fp32; tinygptq quantize makes {to} from that, with calibration")
    target = to or "fp16"
    convert_gguf(path, folder, DTYPES[target], max_shard_size)
    return "gguf", target, ""


def _from_pickles(files: list[Path], folder: Path, to: str | None, max_shard_size: int | None) -> tuple[str, str, str]:
    """To safetensors beside the output first; that is the result for floats as they are, and a source for the rest."""
    with _staging(files[0], beside=folder.parent) as staged:
        names = write_safetensors(files, staged, max_shard_size)
        if to is not None or any(name.endswith(".qweight") for name in names):
            kind, target, note = _from_folder(staged, folder, to, max_shard_size)
            return f"pickle ({kind})", target, note
        load_checkpoint(staged)  # shapes and names, before anybody trusts the folder
        for path in staged.iterdir():
            path.replace(folder / path.name)
    return "pickle", "safetensors", ""


def _from_folder(place: Path, folder: Path, to: str | None, max_shard_size: int | None) -> tuple[str, str, str]:
    facts = awq_facts(place)
    source = read_awq(place, facts) if facts is not None else source_of(load_checkpoint(place))
    if source.quantization is None:
        if to is None:
            raise TinyGPTQError(
                f"{place}: is an unquantised Hugging Face folder already; --to fp16 or fp32 changes its "
                "dtype, tinygptq quantize quantises it"
            )
        kind = "dense"
    else:
        kind = "awq" if facts is not None else source.quantization.checkpoint_format
    if to in DTYPES:
        write_dense(source, folder, DTYPES[to], max_shard_size)
        return kind, to, ""
    target, note = _format_for(source, to, is_awq=facts is not None)
    write_gptq(source, folder, target, max_shard_size)
    return kind, target, note


def _format_for(source: Source, to: str | None, is_awq: bool) -> tuple[str, str]:
    """The GPTQ format to write and why, where the choice is not the user's."""
    if to is not None:
        return to, ""
    if is_awq and any((zeros == 0).any() for _, zeros in source.zeros()):
        return "gptq_v2", "a zero point of 0, which format gptq cannot hold, asks for gptq_v2"
    return "gptq", ""
