"""Compiles a kernel once for each kind of argument, keeps it on disk, and launches it in a few microseconds.

Numba's own dispatcher takes 40 to 70 microseconds for a launch and compiles anew in every process. Here Numba compiles a
kernel to PTX and the driver's launch call does the rest, through cuda.core. A kernel's machine code is kept under
``~/.cache/tinygptq/cuda`` (or ``$XDG_CACHE_HOME``), named after everything that it depends on: the sources of its package,
the values its function closes over, the argument types, the card and the versions of the compilers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from tinygptq.errors import TinyGPTQError
from tinygptq.kernels.cuda.runtime import capability, cuda

types = cuda.types
COMPILERS = ("numba", "numba-cuda", "llvmlite", "cuda-core", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-nvjitlink")


class Kernel:
    """A kernel: a plain Python function in the subset that numba-cuda compiles, not decorated.

    Args:
        function: may call device functions and intrinsics, and close over them and over numbers and tuples of numbers.
        launch_bounds: (most threads in a block, fewest blocks that must fit on a multiprocessor), or the first alone.
        specific: it uses instructions that cards of exactly this compute capability have, and no later ones (sm_90a).

    Arguments of a call are C-contiguous CuPy arrays, int (64 bits), NumPy scalars, and tuples of these.
    """

    def __init__(
        self, function: Callable[..., None], launch_bounds: int | tuple[int, ...] | None = None, specific: bool = False
    ) -> None:
        self.function, self.launch_bounds, self.specific = function, launch_bounds, specific
        self._loaded: dict[tuple, Any] = {}  # kinds of arguments -> cuda.core's Kernel
        self._allowed: dict[tuple, int] = {}  # ... -> dynamic shared memory that it may have, in bytes

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        stream: Any,
        *arguments: Any,
        dependent: bool = False,
        shared_bytes: int = 0,
    ) -> None:
        """Put the kernel on a CuPy stream; may be recorded in a CUDA graph once it has run for these kinds of arguments.

        Args:
            grid, block: blocks, and threads of a block, up to three dimensions.
            dependent: the kernel may begin while the one before it still runs (programmatic dependent launch, from sm_90):
                it has to wait by itself, with ``wait_for_dependencies``, before it touches what others write.
            shared_bytes: dynamic shared memory, in bytes.
        """
        from cuda.core import launch

        flat: list[Any] = []
        kinds = _read(arguments, flat)
        kernel = self._kernel(kinds)
        if shared_bytes > self._allowed.get(kinds, 0):
            _allow_shared(kernel, shared_bytes)
            self._allowed[kinds] = shared_bytes
        launch(_core_stream(stream.ptr), _launch_config(grid, block, dependent, shared_bytes), kernel, *flat)

    def prepare(self, *arguments: Any) -> None:
        """Compile (or find) and load the kernel for arguments of these kinds, without running it."""
        self._kernel(_read(arguments, []))

    def ptx(self, signature: tuple, capability: tuple[int, int]) -> str:
        """The kernel as PTX text for Numba's types of its arguments; needs no GPU."""
        text, _ = cuda.compile(
            self.function, types.void(*signature), cc=capability, output="ptx", device=False, abi="numba",
            launch_bounds=self.launch_bounds,
        )  # fmt: skip
        target = architecture(capability)
        return text.replace(f".target {target}", f".target {target}a", 1) if self.specific else text

    def _kernel(self, kinds: tuple) -> Any:
        kernel = self._loaded.get(kinds)
        if kernel is None:
            kernel = self._loaded[kinds] = self._load(tuple(map(_numba_type, kinds)))
        return kernel

    def _load(self, signature: tuple) -> Any:
        from cuda.core import ObjectCode

        card = capability()
        path = _cache_folder() / f"{self._name(signature, card)}.cubin"
        try:
            code = path.read_bytes()
        except OSError:
            code = assemble(self.ptx(signature, card), card, self.specific)
            _keep(path, code)
        entry = self._entry(code)
        return ObjectCode.from_cubin(code).get_kernel(entry)

    def _entry(self, code: bytes) -> str:
        """The kernel's mangled name: unlike helpers beside it, a kernel has a section ``.nv.constant0.NAME``."""
        mark = b"\0.nv.constant0."
        start = code.index(mark) + len(mark)
        return code[start : code.index(b"\0", start)].decode()

    def _name(self, signature: tuple, card: tuple[int, int]) -> str:
        seen: dict[int, Any] = {}
        parts = (
            _describe(self.function, seen),
            self.launch_bounds,
            self.specific,
            [str(kind) for kind in signature],
            card,
            _surroundings(),
        )
        return f"{self.function.__name__}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"


def assemble(ptx: str, capability: tuple[int, int], specific: bool = False) -> bytes:
    """PTX text to machine code (a cubin); needs no GPU."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=architecture(capability) + "a" * specific)
    return bytes(Program(ptx, "ptx", options).compile("cubin").code)


def architecture(capability: tuple[int, int]) -> str:
    """What compilers call a compute capability: (9, 0) is sm_90."""
    return f"sm_{capability[0]}{capability[1]}"


# ---------------------------------------------------------------------------------------------- kinds of arguments


def _read(argument: Any, flat: list[Any]) -> Any:
    """Append an argument to ``flat`` as Numba's kernels take it, and return its kind: what the kernel's code depends on.

    An array is two unused words, size, item size, address, shape and strides; its kind is (dtype, dimensions). A scalar's
    kind is its type, a tuple's that of its parts. Called for every launch, hence in one pass and by classes: asking an
    instance for ``__cuda_array_interface__`` would make a dict.
    """
    kind = type(argument)
    if kind is tuple:
        return tuple([_read(part, flat) for part in argument])
    if hasattr(kind, "__cuda_array_interface__"):
        dtype, shape = argument.dtype, argument.shape
        if not argument.flags.c_contiguous:
            raise ValueError("a kernel's arrays must be C-contiguous")
        flat += (0, 0, argument.size, dtype.itemsize, argument.data.ptr, *shape, *argument.strides)
        return dtype.char, len(shape)
    if isinstance(argument, int):
        flat.append(argument)
    elif isinstance(argument, np.generic):
        flat.append(_scalar(argument))
    else:
        raise TypeError(f"a kernel takes arrays, ints, NumPy scalars and tuples of them, not {kind.__name__}")
    return kind


def _numba_type(kind: Any) -> Any:
    if isinstance(kind, type):
        return types.int64 if issubclass(kind, int) else _from_dtype(np.dtype(kind))
    if len(kind) == 2 and isinstance(kind[0], str):
        return types.Array(_from_dtype(np.dtype(kind[0])), kind[1], "C")
    return types.Tuple.from_types(tuple(map(_numba_type, kind)))


def _from_dtype(dtype: np.dtype) -> Any:
    from numba.cuda.np.numpy_support import from_dtype

    return from_dtype(dtype)


def _scalar(number: np.generic) -> Any:
    if number.dtype == np.float16:
        return ctypes.c_uint16(int(number.view(np.uint16)))
    return np.ctypeslib.as_ctypes_type(number.dtype)(number.item())


# ---------------------------------------------------------------------------------------------- launching


@functools.lru_cache(maxsize=4096)
def _launch_config(grid: Any, block: Any, dependent: bool, shared_bytes: int) -> Any:
    from cuda.core import LaunchConfig

    options: dict[str, Any] = {"programmatic_stream_serialization": True} if dependent else {}
    return LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes, **options)


def _allow_shared(kernel: Any, size: int) -> None:
    """Let a kernel have so much dynamic shared memory, which is asked for where it makes more than 48 KB with the static.

    (cuda.core has a name for this only in newer versions.)
    """
    from cuda.bindings import driver

    name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    device = driver.CUdevice(cuda.get_current_device().id)
    (status,) = driver.cuKernelSetAttribute(name, size, driver.CUkernel(int(kernel._handle)), device)
    if status:
        raise TinyGPTQError(f"the GPU gives a kernel no {size >> 10} KB of shared memory ({status.name})")


@functools.lru_cache(maxsize=64)
def _core_stream(pointer: int) -> Any:
    from cuda.core import Device, Stream

    Device().set_current()
    return Stream.from_handle(pointer)


# ---------------------------------------------------------------------------------------------- the cache on disk


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygptq" / "cuda"


def _keep(path: Path, code: bytes) -> None:
    """Write the file whole or not at all; a folder that cannot be written to costs the next process a compilation."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)


@functools.cache
def _surroundings() -> tuple:
    """Versions of the compilers, and the sources of this package."""
    versions = []
    for package in COMPILERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append((package, importlib.metadata.version(package)))
    return sys.version_info[:2], tuple(versions), tuple(map(_digest, sorted(Path(__file__).parent.glob("*.py"))))


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _describe(value: Any, seen: dict[int, Any]) -> Any:
    """What distinguishes a function, device function or intrinsic: where it stands, and what it closes over."""
    function = getattr(value, "py_func", None) or getattr(value, "_defn", None) or value
    if not isinstance(function, FunctionType):  # Numba's and LLVM's types can be called too
        if isinstance(value, (tuple, list)):
            return [_describe(part, seen) for part in value]
        return repr(value)
    if id(function) in seen:
        return seen[id(function)]
    seen[id(function)] = name = (function.__module__, function.__qualname__)
    cells = [_describe(cell.cell_contents, seen) for cell in function.__closure__ or ()]
    source = sys.modules[function.__module__].__file__
    seen[id(function)] = description = (*name, _digest(Path(source)), cells)
    return description
