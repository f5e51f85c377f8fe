"""``tinygptq.quantize``: a folder and a text in, a quantised folder out; whole, or unfinished and to be resumed."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq import memory
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.folders.export import QuantizedFolderWriter, require_packable
from tinygptq.pictures import require_picture
from tinygptq.quantization.blocks import quantize_blocks
from tinygptq.quantization.placement import Host, fast_model
from tinygptq.quantization.report import (
    LinearReport,
    plot,
    warn_of_little_text,
    write_log,
)
from tinygptq.quantization.resume import Progress, fingerprint, unfinished_folder
from tinygptq.quantization.write_behind import WriteBehind
from tinygptq.release.facts import calibration_facts, made_by
from tinygptq.release.hub import model_name, resolve
from tinygptq.weights import Weights
from tinygptq.windows import warn_of_long_windows

log = logging.getLogger("tinygptq")


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize` did: the folder, seconds of work (of a resumed run, both parts), one entry for each linear.

    stages: seconds of this run by the kind of work; packing and writing (and on a GPU, reading) go on beside the rest.
    """

    folder: Path
    seconds: float
    linears: list[LinearReport]
    stages: dict[str, float] = field(default_factory=dict)


def quantize(
    src: str | Path,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    dataset: str = "wikitext2",
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    template: str = "tulu",
    method: str = "gptq",
    device: str = "cpu",
    revision: str | None = None,
    resume: bool = False,
    report: str | Path | None = None,
) -> QuantizeReport:
    """Quantise the model ``src`` (fp16, bf16 or fp32; a folder, or ``owner/name:branch``) into the new folder ``out``.

    Args:
        dataset: what :func:`tinygptq.calibrate.calibration_windows` takes: a .txt or .jsonl file, or a named set.
        nsamples, seqlen: calibration windows and the tokens of each.
        seed: which windows of a named set are drawn.
        template: prompt template that instruction sets are rendered with.
        method: ``gptq``, or ``rtn`` for rounding to nearest (no calibration text is read).
        device: ``cpu``, or ``cuda`` for an NVIDIA GPU (needs the extra [cuda]).
        revision: branch, tag or commit when ``src`` is a repository.
        resume: go on where an earlier run with the same arguments was cut off, if there was one (see resume.py); on as many
            threads as that one, or on the same GPU, the folder is bit for bit what an uninterrupted run writes (but for the
            seconds in quantize_log.csv).
        report: a PNG to draw the errors to, of each linear beside those of rounding to nearest (needs the extra [plot]).

    Raises:
        TinyGPTQError: anything the user can mend; nothing half-written stays behind, but with ``resume`` the blocks done.
    """
    place = place_named(device)
    if method not in ("gptq", "rtn"):
        raise TinyGPTQError(f"method is {method!r}, expected 'gptq' or 'rtn'")
    if report is not None and method != "gptq":
        raise TinyGPTQError("rounding to nearest measures no errors that a report could show")
    if report is not None:
        require_picture(report, "--report")
    config = config or QuantizeConfig()
    if not isinstance(config, QuantizeConfig):
        raise TinyGPTQError(f"config is {type(config).__name__}, expected a QuantizeConfig")
    nsamples, seqlen, seed = (_whole(n, v) for n, v in (("nsamples", nsamples), ("seqlen", seqlen), ("seed", seed)))
    source = load_checkpoint(resolve(src, revision))
    if source.quantization is not None:
        raise TinyGPTQError(f"{src}: is quantised already ({source.quantization.bits} bits)")
    require_packable(source.config, config)
    with unfinished_folder(out, resume) as progress:
        text = (dataset, nsamples, seqlen, seed, template) if method == "gptq" else None
        ids, meta = _calibration(source, *text) if text else (None, made_by())
        meta |= {"recipe": asdict(config.recipe)} if text else {}
        facts = {"meta": meta, "model_name_or_path": model_name(source.folder)}
        reports = _solve_and_write(progress, source, ids, config, facts, place)
        if text:
            write_log(reports, progress.folder)
    if report is not None:
        plot(reports, report, f"{model_name(source.folder)}, {config.bits} bits, groups of {config.group_size}")
    return QuantizeReport(Path(out), progress.seconds, reports, place.clock.seconds)


@memory.kept()
def _solve_and_write(
    progress: Progress,
    source: Checkpoint,
    ids: np.ndarray | None,
    config: QuantizeConfig,
    facts: dict[str, Any],
    place: Host,
) -> list[LinearReport]:
    """Begin the folder, or go on with what is done of it, to its end."""
    saved = progress.begin(fingerprint(source.folder, ids, config, place.name))
    reports = [LinearReport(**linear) for linear in progress.linears]
    if ids is not None:
        warn_of_little_text(*ids.shape)
        warn_of_long_windows(source.config, ids.shape[1])
    with (
        place.session(),
        QuantizedFolderWriter(progress.folder, source, config, facts, progress.tensors) as file,
        WriteBehind(file, place.clock.add) as writer,
    ):
        model, hidden = place.model(source), None
        place.announce(source, ids, config)
        if saved is not None:
            hidden = place.restored(saved, model, ids, config, progress.blocks, progress.folder)

        def save(done: int, hidden: Any) -> None:
            progress.save(done, place.saved(hidden), writer, [asdict(report) for report in reports])

        for name, solution, report in quantize_blocks(model, ids, config, progress.blocks, hidden, save, place):
            writer.write(name, place.tensors(solution, config))
            reports.append(report)
    return reports


def _whole(name: str, value: Any) -> int:
    """A whole number of Python's, at least 0, of whatever kind of integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TinyGPTQError(f"{name} is {value!r}, expected a whole number")
    if value < 0:
        raise TinyGPTQError(f"{name} is {value}, expected at least 0")
    return int(value)


def _calibration(source: Checkpoint, dataset: str, *settings) -> tuple[np.ndarray, dict[str, Any]]:
    """The windows, int [samples, T], and what the folder will say of them."""
    from tinygptq.calibrate import calibration_windows  # only here: it may import tokenizers and datasets
    from tinygptq.tokenizer import Tokenizer

    ids = calibration_windows(dataset, Tokenizer.from_folder(source.folder), *settings)
    return ids, calibration_facts(dataset, *settings)


@memory.kept()
def quantize_weights(source: Checkpoint, ids: np.ndarray | None, config: QuantizeConfig) -> Weights:
    """The same in memory: weights whose linears are packed. ``ids`` int [samples, T], or None to round to nearest."""
    require_packable(source.config, config)
    model = fast_model(source, dict(source.weights.linears))
    for _ in quantize_blocks(model, ids, config):
        pass
    return model.weights


def place_named(device: str) -> Host:
    """``cpu`` or ``cuda``.

    Raises:
        TinyGPTQError: another name; no GPU, or a package of the extra [cuda] is missing.
    """
    if device == "cpu":
        return Host()
    if device == "cuda":
        from tinygptq.quantization.placement_cuda import Card  # only here: it needs packages of the extra [cuda]

        return Card()
    raise TinyGPTQError(f"device {device!r} is not available for quantising; use 'cpu' or 'cuda'")
