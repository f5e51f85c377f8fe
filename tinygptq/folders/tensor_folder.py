"""The tensors of a folder by name: which files hold them, under the names of every tool, and which were asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinygptq import threads
from tinygptq.config import read_json
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.tensorfile import DTYPES, TensorFile

FLOATS = (DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"])
INTEGERS = (DTYPES["I32"], DTYPES["U32"])
INDEX = ".safetensors.index.json"
# "gptq_model-4bit-128g" (AutoGPTQ), "4bit-128g" (GPTQ-for-LLaMa, KoboldAI), "llama-7b-4bit", "gptq_model-8bit--1g"
GPTQ_NAME = re.compile(r"(^|[-_.])\d+bit([-_.]-?\d+g)?([-_.]|$)")
PICKLES = ("*.bin", "*.pt", "*.pth")
CHUNK = 1 << 20  # elements looked at together: both passes of is_finite then find them in the cache


def _stop(error: TinyGPTQError) -> None:
    raise error


class Tensors:
    """Every tensor of a folder by name, whether in one file or many, and which of them have been asked for."""

    def __init__(
        self, folder: Path, base_name: str | None = None, on_error: Callable[[TinyGPTQError], None] = _stop
    ) -> None:
        """Open the files of a folder.

        Args:
            base_name: the file's name without its ending, where a config gives it (``model_file_base_name``).
            on_error: given each file that cannot be opened; raises by default, a caller who goes on gets the rest.
        """
        self.folder = folder
        self.files: list[TensorFile] = []
        self._files: dict[str, TensorFile] = {}  # tensor name -> the file it is in
        for path in weight_files(folder, base_name):
            try:
                self._add(TensorFile(path))
            except TinyGPTQError as error:
                on_error(error)
        self._left = set(self._files)

    def _add(self, file: TensorFile) -> None:
        self.files.append(file)
        for name in file:
            if name in self._files:
                both = f"{self._files[name].path.name} and {file.path.name}"
                raise TinyGPTQError(f"{self.folder}: tensor {name} is in both {both}")
            self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return sorted(self._files)

    def peek(self, name: str) -> np.ndarray:
        """The tensor as it is, unchecked and still counted as not asked for."""
        return self._files[name][name]

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...] = FLOATS) -> np.ndarray:
        """The tensor ``name``, which must have this shape, one of these dtypes and, if of floats, no NaN or infinity."""
        if name not in self._files:
            raise TinyGPTQError(f"{self.folder}: tensor {name} is missing (expected shape {list(shape)})")
        tensor = self._files[name][name]
        self._left.discard(name)
        if tensor.shape != tuple(shape):
            raise TinyGPTQError(f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TinyGPTQError(f"{self.folder}: tensor {name} has dtype {tensor.dtype}, expected {expected}")
        if tensor.dtype in FLOATS and not is_finite(tensor):
            raise TinyGPTQError(f"{self.folder}: tensor {name} holds NaN or infinity; the file is damaged")
        return tensor

    def ignore(self, name: str) -> None:
        self._left.discard(name)

    def refuse_unknown(self) -> None:
        """Raise if a tensor was never asked for: the folder then holds something a LLaMA has no place for."""
        unknown = sorted(name for name in self._left if not name.endswith("rotary_emb.inv_freq"))
        if unknown:
            raise TinyGPTQError(
                f"{self.folder}: tensor {unknown[0]} has no place in this LLaMA ({len(unknown)} such tensors); "
                "is it another architecture?"
            )


def is_finite(array: np.ndarray) -> bool:
    """Whether float16, bfloat16 or float32 values [...] hold neither NaN nor infinity.

    Looks at the bits: those of +inf and of every positive NaN are, as integers, at least inf's; of the negative ones at
    least -inf's. Two maxima a chunk run at the speed of memory and copy nothing, so that a model may be looked at whole.
    """
    size = array.dtype.itemsize
    infinity = int(np.array(np.inf, array.dtype).view(f"u{size}"))
    negative = infinity | 1 << (8 * size - 1)
    flat, broken = array.reshape(-1), list[int]()

    def look(part: slice) -> None:
        for start in range(part.start, part.stop, CHUNK):
            chunk = flat[start : min(start + CHUNK, part.stop)]
            if broken or chunk.view(f"i{size}").max() >= infinity or chunk.view(f"u{size}").max() >= negative:
                broken.append(start)
                return

    threads.share(flat.size, flat.size, look)  # pages of a file come in on several threads faster, too
    return not broken


# ---------------------------------------------------------------------------------------------------- which files


def weight_files(folder: Path, base_name: str | None = None) -> list[Path]:
    """The safetensors files that hold a folder's weights, in the order in which loaders look.

    ``model.safetensors``; the shards an index names; the file a config names; the only file; the only one with a GPTQ
    name among several.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if folder / "model.safetensors" in files:
        return [folder / "model.safetensors"]
    named = [path for path in files if base_name and path.name == f"{base_name}.safetensors"]
    single = named or (files if len(files) == 1 else [path for path in files if GPTQ_NAME.search(path.stem)])
    shards = _indexed_files(folder)
    if shards is not None and (len(single) != 1 or any(path in files for path in shards)):
        return shards  # an index none of whose shards is here came along with some unquantised model's configs
    if len(single) == 1:
        return single
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise TinyGPTQError(f"{folder}: several .safetensors files and no index says how they belong together ({names})")
    raise TinyGPTQError(f"{folder}: no .safetensors file{_pickle_hint(folder)}")


def _indexed_files(folder: Path) -> list[Path] | None:
    """The shards named by the folder's index, None without one. A shard stays inside the folder."""
    indexes = sorted(folder.glob(f"*{INDEX}"), key=lambda path: (path.name != f"model{INDEX}", path.name))
    if not indexes:
        return None
    shards = read_json(indexes[0]).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise TinyGPTQError(f"{indexes[0]}: 'weight_map' should map tensor names to file names")
    for shard in shards.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):  # a path could leave the folder
            raise TinyGPTQError(f"{indexes[0]}: shard {shard!r} is not the plain name of a .safetensors file")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _pickle_hint(folder: Path) -> str:
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a PyTorch pickle, which can run code when opened: save it as safetensors, "
        "or, if you trust it, `tinygptq convert --allow-pickle`"
    )
