"""Quantising that survives a crash: work goes on beside OUT, with what is needed to continue at the block it had reached.

For ``models/out`` the place is ``models/.out.unfinished``::

    folder/            OUT in the making: its weights file has its full size, and finished blocks are in their place
    activations-12     the residual stream after 12 blocks: float32, one batch after another; nothing for rounding to nearest
    state.json         blocks done, checksums of their tensors, reports, fingerprint of model, text and config
    lock               held by the process at work, and let go by the system when that process dies, however it dies

A state is saved in this order, each step flushed to the disk before the next: tensors, activations under a new name,
state.json (written aside, then renamed), and only then are the older activations removed. So a state that can be read is
true at whatever moment the process is killed; tensors of later blocks are simply written again.

Saving is always on, because nobody thinks of it before the crash. It may take SAVE_SHARE of the time: after a save that
took a second, the next one comes a hundred seconds later at the soonest, at the end of a block. A crash costs no more than
that and the block at hand, whatever the size of the model and the speed of the disk.

What stays: of a run with ``resume``, the last state, whatever stops it. Of one without, nothing, unless it is killed in a
way that no program can catch; the next run then says that there is something to continue. A finished run leaves only OUT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinygptq import threads
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.export import no_empty_parents, require_free
from tinygptq.folders.tensorfile import TensorFile
from tinygptq.release.facts import made_by

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing then keeps two runs from one OUT
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("tinygptq")

FORMAT = 2
SAVE_SHARE = 0.01  # of the time; SmolLM2-135M with 32 windows of 512: a save takes 0.04 s (38 MB), a block 2 s


@dataclass(frozen=True)
class State:
    """What state.json holds.

    tensors: CRC-32 of each tensor of the finished blocks. linears: their reports, as dicts. shapes, crc32: of the batches
    of activations, and of their bytes. threads: on which the work was done; sums depend on it in their last bits.
    """

    fingerprint: dict[str, Any]
    blocks: int
    tensors: dict[str, int]
    linears: list[dict[str, Any]]
    shapes: list[list[int]]
    crc32: int
    seconds: float
    threads: int
    format: int = FORMAT


def place_of(out: Path) -> Path:
    """Where the work on ``out`` goes on."""
    out = out.resolve()  # "." has no name
    return out.with_name(f".{out.name}.unfinished")


@contextlib.contextmanager
def unfinished_folder(out: str | Path, resume: bool = False) -> Iterator[Progress]:
    """Where to work on ``out``; at the end of the ``with`` block it becomes ``out`` in one rename.

    Raises:
        TinyGPTQError: ``out`` is taken; another process is at work on it; an unfinished run is there and ``resume`` is
            False; what is there is damaged; the disk refuses.
    """
    out = Path(out)
    remove_leftovers(out)
    require_free(out)
    work = place_of(out)
    with no_empty_parents(work), _at_work(out, work, resume) as progress:
        yield progress


@contextlib.contextmanager
def _at_work(out: Path, work: Path, resume: bool) -> Iterator[Progress]:
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _locked(work, out):
            progress = Progress(out)
            if progress.blocks and not resume:
                raise TinyGPTQError(
                    f"{out}: an earlier run was cut off after {progress.blocks} blocks; add --resume to the same command to "
                    f"continue it, or remove {work} to start over"
                )
            try:
                yield progress
                os.replace(progress.folder, out.resolve())
            except BaseException:
                _after_failure(progress, resume)
                raise
            _remove(work)
    except OSError as error:
        if not (work / "folder").exists():  # a disk too full for the lock itself: there is nothing here to continue
            _remove(work)
        raise TinyGPTQError(f"{out}: cannot be written ({error.strerror or error})") from None


def remove_leftovers(out: Path) -> None:
    """Of a run that was killed after its last step, the rename: OUT is complete, and its folder is no longer here."""
    work = place_of(out)
    if out.is_dir() and any(out.iterdir()) and work.is_dir() and not (work / "folder").exists():
        _remove(work)


def _after_failure(progress: Progress, resume: bool) -> None:
    if not resume or not progress.blocks:
        _remove(progress.work)
    elif progress.begun:  # else what is here was refused, and the error says why
        log.info("%s: %d blocks are done and kept; the same command continues", progress.out, progress.blocks)


def _remove(work: Path) -> None:
    with contextlib.suppress(OSError):
        (work / "state.json").unlink()  # first: if this is cut off, what remains must not look like work to continue
    shutil.rmtree(work, ignore_errors=True)


class Writer(Protocol):
    """What writes the folder in the making: a QuantizedFolderWriter, or a WriteBehind in front of one."""

    @property
    def checksums(self) -> Mapping[str, int]: ...

    def flush(self) -> None: ...


class Progress:
    """The work on one folder: what an earlier run left, and saving what this one does.

    folder: OUT in the making. blocks: finished and saved. tensors, linears: of those blocks, see State.
    begun: whether what was here is what this run goes on with.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.work = out, place_of(out)
        self.folder = self.work / "folder"
        self._state = self._read() if self.folder.is_dir() else None
        self._earlier = self._state.seconds if self._state else 0.0
        self._started = self._saved = time.perf_counter()
        self._cost = 0.0  # seconds of the last save
        self._fingerprint: dict[str, Any] = {}
        self.begun = False

    @property
    def blocks(self) -> int:
        return self._state.blocks if self._state else 0

    @property
    def tensors(self) -> Mapping[str, int]:
        return self._state.tensors if self._state else {}

    @property
    def linears(self) -> list[dict[str, Any]]:
        return list(self._state.linears) if self._state else []

    @property
    def seconds(self) -> float:
        """Of work on this folder, this run and the saved part of earlier ones."""
        return self._earlier + time.perf_counter() - self._started

    # ---------------------------------------------------------------------------------- what an earlier run left

    def begin(self, fingerprint: dict[str, Any]) -> list[np.ndarray] | None:
        """Go on with what is here, or make an empty folder.

        Returns:
            The residual stream after the finished blocks, batch by batch, each float32 (B, T, C); None if nothing is done.
        Raises:
            TinyGPTQError: what is here was begun with another model, text or config, or is damaged.
        """
        self._fingerprint = fingerprint = json.loads(json.dumps(fingerprint))  # as it will be read: no tuples
        if self._state is None:
            for path in self.work.iterdir():  # of a run that was killed in its first block
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.folder.mkdir()
            self.begun = True
            return None
        if differing := _difference(self._state.fingerprint, fingerprint):
            found = f"its unfinished run was begun with {differing}"
            raise TinyGPTQError(f"{self.out}: {found}; remove {self.work} to start over")
        self._require_intact_tensors()
        hidden = self._read_activations()
        log.info("%s: %d blocks are done; continuing", self.out, self.blocks)
        if self._state.threads != threads.count() and fingerprint["device"] == "cpu":
            log.warning("%s: begun on %d threads, continued on %d; weights may differ in a few codes from those of one run",
                        self.out, self._state.threads, threads.count())  # fmt: skip
        self.begun = True
        return hidden

    def _read_activations(self) -> list[np.ndarray]:
        state, path, batches, crc = self._state, self._activations(self.blocks), [], 0
        assert state is not None  # `begin` looked
        sizes = [prod(shape) for shape in state.shapes]
        if not path.is_file() or path.stat().st_size != 4 * sum(sizes):
            raise self._damaged(path)
        with open(path, "rb") as file:
            for shape, size in zip(state.shapes, sizes, strict=True):
                batches.append(np.fromfile(file, np.float32, size).reshape(shape))
                crc = zlib.crc32(batches[-1], crc)
        if crc != state.crc32:
            raise self._damaged(path)
        return batches

    def _require_intact_tensors(self) -> None:
        path = self.folder / "model.safetensors"
        try:
            tensors = TensorFile(path)
            intact = all(zlib.crc32(np.ascontiguousarray(tensors[name])) == crc for name, crc in self.tensors.items())
        except (TinyGPTQError, KeyError):
            intact = False
        if not intact:
            raise self._damaged(path)

    def _read(self) -> State | None:
        path = self.work / "state.json"
        try:
            whole = json.loads(path.read_bytes())
            if whole["sha256"] != _digest(whole["state"]):
                raise self._damaged(path)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._damaged(path) from None
        if whole["state"].get("format") != FORMAT:
            raise TinyGPTQError(f"{path}: was written by another version of tinygptq; remove {self.work} to start over")
        return State(**whole["state"])

    def _damaged(self, path: Path) -> TinyGPTQError:
        return TinyGPTQError(f"{path}: is damaged, the unfinished run cannot be continued; remove {self.work} to start over")

    def _activations(self, blocks: int) -> Path:
        return self.work / f"activations-{blocks}"

    # ---------------------------------------------------------------------------------- saving

    def save(self, blocks: int, hidden: Sequence[np.ndarray], writer: Writer, linears: Sequence[dict[str, Any]]) -> None:
        """Save that ``blocks`` blocks are done, unless the last save is too recent. A disk too full for it is no failure.

        Args:
            hidden: the residual stream after them, batches of float32 (B, T, C); empty for rounding to nearest.
        """
        started = time.perf_counter()
        if self._cost and started - self._saved < self._cost / SAVE_SHARE:
            return
        writer.flush()
        path = self._activations(blocks)
        try:
            crc = _write_batches(path, hidden)
            shapes = [list(batch.shape) for batch in hidden]
            state = State(self._fingerprint, blocks, dict(writer.checksums), list(linears), shapes, crc, self.seconds,
                          threads.count())  # fmt: skip
            self._replace_state(state)
        except OSError as error:
            path.unlink(missing_ok=True)
            log.warning("%s: progress cannot be saved after block %d (%s)", self.out, blocks, error.strerror or error)
        else:
            older, self._state = self.blocks, state
            if older:
                self._activations(older).unlink(missing_ok=True)
        self._saved = time.perf_counter()
        self._cost = self._saved - started

    def _replace_state(self, state: State) -> None:
        aside, whole = self.work / "state.json.new", asdict(state)
        with open(aside, "w", encoding="utf-8") as file:
            json.dump({"sha256": _digest(whole), "state": whole}, file)
            _to_disk(file)
        os.replace(aside, self.work / "state.json")
        _names_to_disk(self.work)


def _write_batches(path: Path, batches: Sequence[np.ndarray]) -> int:
    """The arrays' bytes one after another, on disk when this returns; their CRC-32."""
    crc = 0
    with open(path, "wb") as file:
        for batch in batches:
            data = np.ascontiguousarray(batch, np.float32)
            file.write(data.data)
            crc = zlib.crc32(data, crc)
        _to_disk(file)
    return crc


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _names_to_disk(folder: Path) -> None:
    """Flush a folder's own entries, on systems and file systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest(value: Any) -> str:
    """SHA-256 of a JSON value; reading and writing it again gives the same text."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextlib.contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Keep another process from working here."""
    if fcntl is None:
        yield
        return
    with open(work / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise TinyGPTQError(f"{out}: {file.read().strip() or 'another process'} is at work on it") from None
        except OSError:  # a network file system without locks
            log.debug("%s: no lock to be had", work, exc_info=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


# -------------------------------------------------------------------------------------------------- the fingerprint


def fingerprint(source: Path, ids: np.ndarray | None, config: QuantizeConfig, device: str = "cpu") -> dict[str, Any]:
    """What must be the same for two runs to do the same.

    The model is told by the sizes and times of change of its files, as make does: reading 13 GB twice to hash them would
    take minutes, and another model, or the same one trained on, differs in them. A copy whose times are new is refused,
    which costs a message; contents changed under the old time and size are taken for the same.

    Args:
        ids: the calibration windows, int [samples, T], or None for rounding to nearest; their tokens stand for text,
            tokenizer, seed, template and lengths together.
        device: where the work is done; another one rounds sums in another way.
    """
    files = sorted([source / "config.json", *source.glob("*.safetensors")])
    stats = {path.name: path.stat() for path in files}
    return {
        "version": made_by()["quantizer"][0],
        "device": device,
        "model": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "text": None if ids is None else [list(ids.shape), hashlib.sha256(np.ascontiguousarray(ids, np.int64)).hexdigest()],
        "config": asdict(config),
    }


def _difference(begun: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing that differs, in words; None if nothing does."""
    if begun["version"] != now["version"]:
        return f"{begun['version']}, and this is {now['version']}"
    if begun["device"] != now["device"]:
        return f"device {begun['device']}, not {now['device']}"
    for name in sorted({*begun["model"], *now["model"]}):
        if begun["model"].get(name) != now["model"].get(name):
            return f"another model ({name} has another size or time of change)"
    for name, value in now["config"].items():
        if begun["config"].get(name) != value:
            return f"{name} {begun['config'].get(name)}, not {value}"
    if (begun["text"] is None) != (now["text"] is None):
        return f"the method {'rtn' if begun['text'] is None else 'gptq'}"
    return "another calibration text" if begun["text"] != now["text"] else None
