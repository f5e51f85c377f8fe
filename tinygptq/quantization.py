"""Quantise a model: one block at a time, calibrate each linear on what its quantised predecessors give it, solve, write.

The loop in :func:`quantize_blocks` is the original implementation's, with one saving: it walks a block stage by stage
(see model.py) and keeps each stage's activations, so that every linear runs over the calibration text once, not five
times.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from tinygptq import memory
from tinygptq.checkpoint import Checkpoint, load_checkpoint
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.export import QuantizedFolderWriter, require_packable
from tinygptq.facts import calibration_facts, made_by
from tinygptq.gptq import Hessian, Solution, drift, feedback, prepare, round_to_nearest, solve
from tinygptq.gptq.hessian import shrink
from tinygptq.gptq.refine import product, refine
from tinygptq.hub import model_name, resolve
from tinygptq.model import Llama
from tinygptq.ops import array_module
from tinygptq.placement import Host, fast_model, packed
from tinygptq.quantize_report import (
    DeadInputs,
    LinearReport,
    plot,
    require_plot,
    rounding_loss,
    warn_of_little_text,
    write_log,
)
from tinygptq.resume import Progress, fingerprint, unfinished_folder
from tinygptq.stages import WRITERS, Activations, Teacher
from tinygptq.weights import Weights
from tinygptq.write_behind import WriteBehind

__all__ = ["LinearReport", "QuantizeReport", "fast_model", "packed", "quantize", "quantize_blocks", "quantize_weights"]

log = logging.getLogger("tinygptq")

QKV = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")  # the order in which AutoGPTQ solves them
GATE_UP = ("mlp.up_proj", "mlp.gate_proj")


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
        resume: go on where an earlier run with the same arguments was cut off, if there was one (see tinygptq/resume.py);
            on as many threads as that one, or on the same GPU, the folder is bit for bit what an uninterrupted run writes
            (but for the seconds in quantize_log.csv).
        report: a PNG to draw the errors to, of each linear beside those of rounding to nearest (needs the extra [plot]).

    Raises:
        TinyGPTQError: anything the user can mend; nothing half-written stays behind, but with ``resume`` the blocks done.
    """
    place = place_named(device)
    if method not in ("gptq", "rtn"):
        raise TinyGPTQError(f"method is {method!r}, expected 'gptq' or 'rtn'")
    if seed < 0:
        raise TinyGPTQError(f"seed is {seed}, expected at least 0")
    if report is not None and method != "gptq":
        raise TinyGPTQError("rounding to nearest measures no errors that a report could show")
    if report is not None:
        require_plot(report)
    config = config or QuantizeConfig()
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
        from tinygptq.placement_cuda import Card  # only here: it needs packages of the extra [cuda]

        return Card()
    raise TinyGPTQError(f"device {device!r} is not available for quantising; use 'cpu' or 'cuda'")


# -------------------------------------------------------------------------------------------------- the block loop


def quantize_blocks(
    model: Llama,
    ids: np.ndarray | None,
    config: QuantizeConfig,
    done: int = 0,
    hidden: Any = None,
    after_block: Callable[[int, Any], None] | None = None,
    place: Host | None = None,
) -> Iterator[tuple[str, Solution, LinearReport]]:
    """Solve every linear, in the order in which the model runs them, replacing each in ``model`` by its packed form.

    Args:
        ids: calibration windows int [samples, T]; None rounds to nearest instead.
        done, hidden: begin after this many blocks, with the residual stream that their quantised forms give.
        after_block: called between two blocks with what ``done`` and ``hidden`` would be to begin there; it may not keep
            the arrays, which the next block changes.
        place: where the model's arrays are and the work is done; this machine's processor by default.
    """
    place, blocks, dead = place or Host(), model.config.num_hidden_layers, DeadInputs()
    if hidden is None:
        hidden = [] if ids is None else place.embed(model, ids)  # each (B, T, C)
    teacher = Teacher(model, ids, config.recipe, place, done) if ids is not None and config.recipe.follows else None
    with tqdm(total=7 * blocks, initial=7 * done, desc="quantise", unit="linear", disable=None) as bar:
        for layer in range(done, blocks):
            with place.block(model, layer):
                if teacher is not None:
                    teacher.enter(model, layer)
                stream = hidden if ids is not None else None
                for name, solution, report in _solve_block(model, layer, stream, config, place, teacher):
                    log.debug("%s", report)
                    bar.set_postfix_str(f"block {layer} {report.linear} loss {report.loss:.3g}")
                    bar.update()
                    dead.add(name, report.dead, solution.codes.shape[1])
                    yield name, solution, report
            if after_block is not None and layer + 1 < blocks:
                after_block(layer + 1, hidden)
    dead.sum_up()


def _solve_block(model: Llama, layer: int, hidden: Any, config: QuantizeConfig, place: Host, teacher: Teacher | None):
    if hidden is None:
        return _round_block(model, layer, config, place)
    if config.true_sequential:
        return _solve_block_in_stages(model, layer, hidden, config, place, teacher)
    return _solve_block_at_once(model, layer, hidden, config, place)


def _round_block(model: Llama, layer: int, config: QuantizeConfig, place: Host):
    for name in model.config.linear_shapes():
        yield _replace(model, layer, name, config, lambda W, full: round_to_nearest(W, config, name=full), place)


def _solve_block_in_stages(
    model: Llama, layer: int, hidden: Any, config: QuantizeConfig, place: Host, teacher: Teacher | None
):
    """True-sequential: each stage sees the quantised linears before it. ``hidden`` becomes the block's output, in place."""
    count, widths = len(hidden), {name: k for name, (k, _) in model.config.linear_shapes().items()}
    last, outputs = layer + 1 == model.config.num_hidden_layers, {} if teacher is None else teacher.outputs
    halves = (
        (QKV, "self_attn.o_proj", model.attention_input, model.attention_mix),
        (GATE_UP, "mlp.down_proj", model.mlp_input, model.mlp_mix),
    )
    for readers, writer, begin, mix in halves:
        inputs = Activations(place, count, lambda i, begin=begin: begin(layer, hidden[i]))
        wanted = teacher and teacher.inputs(readers[0], None)
        cross = _cross(teacher, readers[0], inputs, wanted, hidden)
        yield from _solve(model, layer, readers, inputs, config, place, cross, outputs)
        room = place.room(widths[writer]) / (1 if teacher is None else 2)
        mixed = Activations(place, count, lambda i, inputs=inputs, mix=mix: mix(layer, inputs[i]), room)
        wanted = teacher and teacher.inputs(writer, wanted, room)
        cross = _cross(teacher, writer, mixed, wanted, hidden)
        yield from _solve(model, layer, (writer,), mixed, config, place, cross, outputs)
        if writer == "self_attn.o_proj" or not last:  # nobody reads the last block's output
            _add_to(hidden, model, layer, writer, mixed, place)
            if teacher is not None:
                teacher.write(writer, wanted)
        del mixed, wanted  # their memory, before the next stage needs some


def _cross(teacher: Teacher | None, name: str, inputs: Activations, wanted: Activations | None, hidden: Any):
    """What `_solve` takes: None, or how to get what the weights are to make up for."""
    if teacher is None or wanted is None:
        return None
    return lambda: teacher.cross(name, inputs, wanted, hidden)


def _solve_block_at_once(model: Llama, layer: int, hidden: Any, config: QuantizeConfig, place: Host):
    """All seven linears calibrated on the unquantised block; then ``hidden`` goes through the quantised one."""
    shapes = model.config.linear_shapes()
    stages = (QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",))
    hessians = [place.hessian(shapes[names[0]][0]) for names in stages]
    for inputs in place.clock.each("forward", (_stage_inputs(model, layer, h) for h in hidden)):
        for hessian, x in zip(hessians, inputs, strict=True):
            _add(hessian, x, layer, place)
    for names, hessian in zip(stages, hessians, strict=True):
        yield from _solve_with(model, layer, names, hessian, config, place)
    with place.clock("forward"):
        for i, h in enumerate(hidden):
            hidden[i] = model.block(layer, h)


def _stage_inputs(model: Llama, layer: int, h: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the four stages of a block give for one batch, the block as it is."""
    attention = model.attention_input(layer, h)
    mixed = model.attention_mix(layer, attention)
    mlp = model.mlp_input(layer, h + model.linear(layer, "self_attn.o_proj", mixed))
    return attention, mixed, mlp, model.mlp_mix(layer, mlp)


def _add_to(hidden: Any, model: Llama, layer: int, name: str, inputs: Activations, place: Host) -> None:
    """Add what a linear makes of its inputs to the residual stream."""
    with place.clock("forward"):
        for i in range(len(hidden)):
            hidden[i] += model.linear(layer, name, inputs[i])


def _add(hessian: Hessian, x: np.ndarray, layer: int, place: Host) -> None:
    with place.clock("Hessian"), _of_block(layer):
        hessian.add(x)


@contextmanager
def _of_block(layer: int) -> Iterator[None]:
    try:
        yield
    except TinyGPTQError as error:
        raise TinyGPTQError(f"block {layer}: {error}") from None


# -------------------------------------------------------------------------------------------------- one linear


def _solve(
    model: Llama,
    layer: int,
    names: tuple[str, ...],
    inputs: Activations,
    config: QuantizeConfig,
    place: Host,
    cross: Callable[[], drift.Cross] | None = None,
    outputs: Mapping[str, list[np.ndarray]] = MappingProxyType({}),
):
    """Solve the linears that share ``inputs``."""
    hessian = place.hessian(model.config.linear_shapes()[names[0]][0])
    for x in inputs:
        _add(hessian, x, layer, place)
    yield from _solve_with(model, layer, names, hessian, config, place, None if cross is None else cross().C, outputs)


def _solve_with(
    model: Llama,
    layer: int,
    names: tuple[str, ...],
    hessian: Hessian,
    config: QuantizeConfig,
    place: Host,
    cross: np.ndarray | None = None,
    outputs: Mapping[str, list[np.ndarray]] = MappingProxyType({}),
):
    with place.clock("Hessian"), _of_block(layer):
        full_H = hessian.take()
        H = shrink(full_H, config.recipe.shrink)
        R = None if cross is None else drift.inverse(full_H, method=place.solver)
        del full_H
    shared = f"model.layers.{layer}.{' '.join(names)}"
    with place.clock("Cholesky"):
        factor = prepare(H, config, method=place.solver, name=shared)
        dead = int(factor.dead.sum())
    for name in names:

        def solver(W: np.ndarray, full: str) -> Solution:
            if R is not None:
                W = drift.target(W, cross if full.endswith(WRITERS) else product(W, cross), R)
            if full not in outputs:
                return some_rows(W, full)
            share, xp = config.recipe.outputs, array_module(W)
            blocks = [feedback.factor_outputs(xp.asarray(A), share, method=place.solver, name=full) for A in outputs[full]]
            return feedback.solve_in_parts(W, H, factor, blocks, lambda rows: some_rows(rows, full))

        def some_rows(W: np.ndarray, full: str) -> Solution:
            solution = solve(W, factor, config, method=place.solver, name=full)
            return refine(W, H, solution, factor, config, method=place.solver) if config.recipe.refine else solution

        yield _replace(model, layer, name, config, solver, place, lambda W: rounding_loss(W, H, factor, config, place), dead)


def _replace(
    model: Llama,
    layer: int,
    name: str,
    config: QuantizeConfig,
    solver: Callable[[np.ndarray, str], Solution],
    place: Host,
    baseline: Callable[[np.ndarray], float] = lambda W: math.nan,
    dead: int = 0,
) -> tuple[str, Solution, LinearReport]:
    """Solve one linear and put exactly what the file will hold in its place."""
    full = f"model.layers.{layer}.{name}"
    started, dense = time.perf_counter(), model.weights.linears[full]
    with place.clock("solver"):
        W = place.weight(dense)  # (out, in)
        solution = solver(W, full)
    seconds = time.perf_counter() - started
    with place.clock("comparison with RTN"):
        rtn_loss = baseline(W)
    with place.clock("forward"):
        model.weights.linears[full] = place.replacement(full, solution, config, dense.bias)
    return full, solution, LinearReport(full, solution.loss, rtn_loss, solution.damp, dead, seconds)
