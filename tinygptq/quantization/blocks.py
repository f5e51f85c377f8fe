"""The block loop: calibrate each linear on what its quantised predecessors give it, and solve it.

:func:`quantize_blocks` is the original implementation's loop, with one saving: it walks a block stage by stage (see
model.py) and keeps each stage's activations, so that every linear runs over the calibration text once, not five times.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.gptq import Hessian, Solution, drift, feedback, prepare, round_to_nearest, solve
from tinygptq.gptq.hessian import shrink
from tinygptq.gptq.refine import refine
from tinygptq.model import Llama
from tinygptq.ops import array_module
from tinygptq.quantization.placement import Host
from tinygptq.quantization.report import (
    DeadInputs,
    LinearReport,
    rounding_loss,
)
from tinygptq.quantization.stages import WRITERS, Activations, Teacher
from tinygptq.threads import product

log = logging.getLogger("tinygptq")

QKV = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")  # the order in which AutoGPTQ solves them
GATE_UP = ("mlp.up_proj", "mlp.gate_proj")


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
        room, uses = place.room_of_inputs(), 2 if teacher is None else 3  # for the Hessian, for the drift, and to be mixed
        inputs = Activations(place, count, functools.partial(_through, begin, layer, hidden), room, uses)
        wanted = None if teacher is None else teacher.inputs(readers[0], None)
        cross = _cross(teacher, readers[0], inputs, wanted, hidden)
        yield from _solve(model, layer, readers, inputs, config, place, cross, outputs)
        room = place.room(widths[writer]) / (1 if teacher is None else 2)
        mixed = Activations(place, count, functools.partial(_through, mix, layer, inputs), room)
        wanted = None if teacher is None else teacher.inputs(writer, wanted, room)
        cross = _cross(teacher, writer, mixed, wanted, hidden)
        yield from _solve(model, layer, (writer,), mixed, config, place, cross, outputs)
        if writer == "self_attn.o_proj" or not last:  # nobody reads the last block's output
            _add_to(hidden, model, layer, writer, mixed, place)
            if teacher is not None and wanted is not None:
                teacher.write(writer, wanted)
        del mixed, wanted  # their memory, before the next stage needs some


def _through(stage: Callable[[int, np.ndarray], np.ndarray], layer: int, given: Any, i: int) -> np.ndarray:
    """Batch i of what a stage makes of what it is given."""
    return stage(layer, given[i])


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
            if R is not None and cross is not None:
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
