"""Quantise a model: one block at a time, calibrate each linear on what its quantised predecessors give it, solve, write.

The loop in :func:`quantize_blocks` is the original implementation's, with one saving: it walks a block stage by stage
(see model.py) and keeps each stage's activations, so that every linear runs over the calibration text once, not five
times.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tinygptq import memory
from tinygptq.checkpoint import Checkpoint, load_checkpoint
from tinygptq.config import QuantizeConfig
from tinygptq.errors import TinyGPTQError
from tinygptq.export import QuantizedFolderWriter, gptq_tensors, require_packable
from tinygptq.facts import calibration_facts, made_by
from tinygptq.gptq import Hessian, Solution, prepare, round_to_nearest, solve
from tinygptq.gptq_files import from_gptq
from tinygptq.hub import model_name, resolve
from tinygptq.model import Llama
from tinygptq.packing import PackedLinear
from tinygptq.resume import Progress, fingerprint, unfinished_folder
from tinygptq.weights import Linear, Weights

log = logging.getLogger("tinygptq")

TOKENS_AT_ONCE = 8192  # calibration tokens that go through a stage together; enough to keep BLAS busy
KEEP_BYTES = 4 << 30  # activations of one stage are kept up to this size, and recomputed when needed beyond it

QKV = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")  # the order in which AutoGPTQ solves them
GATE_UP = ("mlp.up_proj", "mlp.gate_proj")


@dataclass(frozen=True)
class LinearReport:
    """How one linear fared: loss as in :class:`tinygptq.gptq.Solution`, damping actually used, seconds of solving."""

    name: str
    loss: float
    damp: float
    seconds: float


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize` did: the folder, seconds of work (of a resumed run, both parts), one entry for each linear."""

    folder: Path
    seconds: float
    linears: list[LinearReport]


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
) -> QuantizeReport:
    """Quantise the model ``src`` (fp16, bf16 or fp32; a folder, or ``owner/name:branch``) into the new folder ``out``.

    Args:
        dataset: what :func:`tinygptq.calibrate.calibration_windows` takes: a .txt or .jsonl file, or a named set.
        nsamples, seqlen: calibration windows and the tokens of each.
        seed: which windows of a named set are drawn.
        template: prompt template that instruction sets are rendered with.
        method: ``gptq``, or ``rtn`` for rounding to nearest (no calibration text is read).
        revision: branch, tag or commit when ``src`` is a repository.
        resume: go on where an earlier run with the same arguments was cut off, if there was one (see tinygptq/resume.py);
            on as many threads as that one, the folder is bit for bit what an uninterrupted run writes.

    Raises:
        TinyGPTQError: anything the user can mend; nothing half-written stays behind, but with ``resume`` the blocks done.
    """
    if device != "cpu":
        raise TinyGPTQError(f"device {device!r} is not available for quantising; use 'cpu'")
    if method not in ("gptq", "rtn"):
        raise TinyGPTQError(f"method is {method!r}, expected 'gptq' or 'rtn'")
    if seed < 0:
        raise TinyGPTQError(f"seed is {seed}, expected at least 0")
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
        reports = _solve_and_write(progress, source, ids, config, facts)
    return QuantizeReport(Path(out), progress.seconds, reports)


@memory.kept()
def _solve_and_write(
    progress: Progress, source: Checkpoint, ids: np.ndarray | None, config: QuantizeConfig, facts: dict[str, Any]
) -> list[LinearReport]:
    """Begin the folder, or go on with what is done of it, to its end."""
    hidden = progress.begin(fingerprint(source.folder, ids, config))
    reports = [LinearReport(**linear) for linear in progress.linears]
    with QuantizedFolderWriter(progress.folder, source, config, facts, progress.tensors) as writer:

        def save(done: int, hidden: list[np.ndarray]) -> None:
            progress.save(done, hidden, writer, [asdict(report) for report in reports])

        model = fast_model(source, dict(source.weights.linears))
        for name, solution, report in quantize_blocks(model, ids, config, progress.blocks, hidden, after_block=save):
            writer.write(name, solution)
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


def fast_model(source: Checkpoint, linears: dict[str, Linear]) -> Llama:
    """The definition of the forward pass with the CPU kernels plugged in, over its own dict of linears."""
    from tinygptq.kernels import cpu  # only here: importing Numba takes a while

    weights = Weights(source.weights.embedding, source.weights.head, source.weights.norms, linears)
    return Llama(source.config, weights, cpu)


# -------------------------------------------------------------------------------------------------- the block loop


def quantize_blocks(
    model: Llama,
    ids: np.ndarray | None,
    config: QuantizeConfig,
    done: int = 0,
    hidden: list[np.ndarray] | None = None,
    after_block: Callable[[int, list[np.ndarray]], None] | None = None,
) -> Iterator[tuple[str, Solution, LinearReport]]:
    """Solve every linear, in the order in which the model runs them, replacing each in ``model`` by its packed form.

    Args:
        ids: calibration windows int [samples, T]; None rounds to nearest instead.
        done, hidden: begin after this many blocks, with the residual stream that their quantised forms give.
        after_block: called between two blocks with what ``done`` and ``hidden`` would be to begin there; it may not keep
            the arrays, which the next block changes.
    """
    blocks = model.config.num_hidden_layers
    if hidden is None:
        hidden = [] if ids is None else [model.embed(batch) for batch in _batches(ids)]  # each (B, T, C)
    with tqdm(total=7 * blocks, initial=7 * done, desc="quantise", unit="linear", disable=None) as bar:
        for layer in range(done, blocks):
            if ids is None:
                solved = _round_block(model, layer, config)
            elif config.true_sequential:
                solved = _solve_block_in_stages(model, layer, hidden, config)
            else:
                solved = _solve_block_at_once(model, layer, hidden, config)
            for name, solution, report in solved:
                log.debug("%s: loss %.4g, damping %g, %.2f s", name, report.loss, report.damp, report.seconds)
                bar.set_postfix_str(f"block {layer} {name.rpartition('.')[2]} loss {report.loss:.3g}")
                bar.update()
                yield name, solution, report
            if after_block is not None and layer + 1 < blocks:
                after_block(layer + 1, hidden)


def _batches(ids: np.ndarray) -> list[np.ndarray]:
    """Whole windows, about TOKENS_AT_ONCE tokens together."""
    size = max(1, TOKENS_AT_ONCE // ids.shape[1])
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _round_block(model: Llama, layer: int, config: QuantizeConfig):
    for name in model.config.linear_shapes():
        yield _replace(model, layer, name, config, lambda W, full: round_to_nearest(W, config, name=full))


def _solve_block_in_stages(model: Llama, layer: int, hidden: list[np.ndarray], config: QuantizeConfig):
    """True-sequential: each stage sees the quantised linears before it. ``hidden`` becomes the block's output, in place."""
    inputs = Activations(lambda: (model.attention_input(layer, h) for h in hidden))
    yield from _solve(model, layer, QKV, inputs, config)
    mixed = Activations(lambda: (model.attention_mix(layer, x) for x in inputs), hidden[0].nbytes * len(hidden))
    yield from _solve(model, layer, ("self_attn.o_proj",), mixed, config)
    _add_to(hidden, (model.linear(layer, "self_attn.o_proj", x) for x in mixed))
    inputs = Activations(lambda: (model.mlp_input(layer, h) for h in hidden))
    yield from _solve(model, layer, GATE_UP, inputs, config)
    widening = model.config.intermediate_size / model.config.hidden_size
    mixed = Activations(lambda: (model.mlp_mix(layer, x) for x in inputs), hidden[0].nbytes * len(hidden) * widening)
    yield from _solve(model, layer, ("mlp.down_proj",), mixed, config)
    if layer + 1 < model.config.num_hidden_layers:  # nobody reads the last block's output
        _add_to(hidden, (model.linear(layer, "mlp.down_proj", x) for x in mixed))


def _solve_block_at_once(model: Llama, layer: int, hidden: list[np.ndarray], config: QuantizeConfig):
    """All seven linears calibrated on the unquantised block; then ``hidden`` goes through the quantised one."""
    shapes = model.config.linear_shapes()
    stages = (QKV, ("self_attn.o_proj",), GATE_UP, ("mlp.down_proj",))
    hessians = [Hessian(shapes[names[0]][0]) for names in stages]
    for h in hidden:
        attention = model.attention_input(layer, h)
        mixed = model.attention_mix(layer, attention)
        after = h + model.linear(layer, "self_attn.o_proj", mixed)
        mlp = model.mlp_input(layer, after)
        for hessian, x in zip(hessians, (attention, mixed, mlp, model.mlp_mix(layer, mlp)), strict=True):
            _add(hessian, x, layer)
    for names, hessian in zip(stages, hessians, strict=True):
        yield from _solve_with(model, layer, names, hessian, config)
    for i, h in enumerate(hidden):
        hidden[i] = model.block(layer, h)


class Activations:
    """One stage's activations, batch by batch: computed once and kept, or computed at each pass when too large to keep."""

    def __init__(self, compute: Callable[[], Iterator[np.ndarray]], nbytes: float = np.inf) -> None:
        self._compute, self._keep = compute, nbytes <= KEEP_BYTES
        self._kept: list[np.ndarray] | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        if not self._keep:
            return self._compute()
        if self._kept is None:
            self._kept = list(self._compute())
        return iter(self._kept)


def _add_to(hidden: list[np.ndarray], updates: Iterator[np.ndarray]) -> None:
    for i, update in enumerate(updates):
        hidden[i] += update


def _add(hessian: Hessian, x: np.ndarray, layer: int) -> None:
    try:
        hessian.add(x)
    except TinyGPTQError as error:
        raise TinyGPTQError(f"block {layer}: {error}") from None


# -------------------------------------------------------------------------------------------------- one linear


def _solve(model: Llama, layer: int, names: tuple[str, ...], inputs: Activations, config: QuantizeConfig):
    """Solve the linears that share ``inputs``."""
    hessian = Hessian(model.config.linear_shapes()[names[0]][0])
    for x in inputs:
        _add(hessian, x, layer)
    yield from _solve_with(model, layer, names, hessian, config)


def _solve_with(model: Llama, layer: int, names: tuple[str, ...], hessian: Hessian, config: QuantizeConfig):
    shared = f"model.layers.{layer}.{' '.join(names)}"
    factor = prepare(hessian.H, config, name=shared)
    for name in names:
        yield _replace(model, layer, name, config, lambda W, full: solve(W, factor, config, name=full))


def _replace(
    model: Llama, layer: int, name: str, config: QuantizeConfig, solver: Callable[[np.ndarray, str], Solution]
) -> tuple[str, Solution, LinearReport]:
    """Solve one linear and put exactly what the file will hold in its place."""
    full = f"model.layers.{layer}.{name}"
    started, dense = time.perf_counter(), model.weights.linears[full]
    W = np.asarray(dense.weight, np.float32)  # (out, in)
    solution = solver(W, full)
    model.weights.linears[full] = packed(solution, config, dense.bias)
    return full, solution, LinearReport(full, solution.loss, solution.damp, time.perf_counter() - started)


def packed(solution: Solution, config: QuantizeConfig, bias: np.ndarray | None = None) -> PackedLinear:
    """A solution as kernels see it, by way of the tensors that are written."""
    return from_gptq(gptq_tensors(solution, config), config, bias)

