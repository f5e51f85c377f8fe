"""How quantising fared, linear by linear: errors beside those of rounding, ``quantize_log.csv``, a picture, and warnings."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygptq.config import QuantizeConfig
from tinygptq.gptq import Factor
from tinygptq.gptq.grid import dequantize, quantize
from tinygptq.ops import array_module
from tinygptq.pictures import require_picture, save_picture
from tinygptq.quantization.placement import Host

log = logging.getLogger("tinygptq")

LOG_NAME = "quantize_log.csv"
ROWS_COMPARED = 128  # of a linear, with rounding to nearest
LOG_COLUMNS = ("block", "linear", "loss", "rtn_loss", "loss_over_rtn", "damp_percent", "dead_inputs", "seconds")
FEW_SAMPLES = 64  # below it a warning; the GPTQ paper calibrates on 128


@dataclass(frozen=True)
class LinearReport:
    """How one linear fared.

    loss: as in :class:`tinygptq.gptq.Solution`. rtn_loss: the same of the same weights rounded to nearest, on min-max grids,
    estimated from some 128 rows.
    damp: the damping actually used. dead: inputs that were zero in all of the calibration text. seconds: of solving. All
    but seconds are NaN or 0 for rounding to nearest, which sees no text.
    """

    name: str
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    seconds: float

    @property
    def block(self) -> int:
        """Which block, from 0."""
        return int(self.name.split(".")[2])

    @property
    def linear(self) -> str:
        """The last part of the name: ``q_proj`` and so on."""
        return self.name.rpartition(".")[2]

    @property
    def loss_over_rtn(self) -> float:
        """The error left, as a share of RTN's; NaN where RTN makes none."""
        return self.loss / self.rtn_loss if self.rtn_loss else math.nan

    def to_json(self) -> dict[str, Any]:
        """Its fields; JSON has no NaN."""
        fields = asdict(self)
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in fields.items()}


def rounding_loss(W: np.ndarray, H: np.ndarray, factor: Factor, config: QuantizeConfig, place: Host) -> float:
    """The loss that rounding to nearest has under the same damped H; `gptq.round_to_nearest` says the same in float64.

    It is measured on ROWS_COMPARED rows or a few more, spread evenly, and scaled up: all of them would take a tenth of the
    whole run on a processor, for a figure that is only looked at.

    Args: W: float32 [out, in]. H: undamped, float32 [in, in]. factor: what `gptq.prepare` made of it. NumPy or CuPy arrays.
    """
    xp, size, losses = array_module(W), config.rows_per_group(W.shape[1]), {}
    all_rows, W = len(W), xp.ascontiguousarray(W[:: max(1, len(W) // ROWS_COMPARED)])
    grids = place.static_grids(W, config)  # scales and zeros, each (out, G)
    if W.shape[1] % size:
        grids, size = tuple(xp.repeat(grid, size, axis=1)[:, : W.shape[1]] for grid in grids), 1
    damping = xp.where(factor.dead, 0, factor.importance - H.diagonal()).astype(W.dtype)  # (in,)
    some_dead = bool(factor.dead.any())

    def part(rows: slice) -> None:
        w = W[rows].reshape(-1, W.shape[1] // size, size)
        scale, zero = (grid[rows][..., None] for grid in grids)
        error = (w - dequantize(quantize(w, scale, zero, config.max_code), scale, zero)).reshape(-1, W.shape[1])
        if some_dead:
            error[:, factor.dead] = 0
        changed = place.matmul(error, H) * error
        changed += error * error * damping
        losses[rows.start] = changed.sum(dtype=np.float64)

    place.share(len(W), W.size * W.shape[1], part)
    return float(sum(losses[start] for start in sorted(losses))) / 2 * all_rows / len(W)


def write_log(reports: Sequence[LinearReport], folder: Path) -> None:
    """``quantize_log.csv`` in ``folder``: one row for each linear, in the order in which they were solved."""
    with open(folder / LOG_NAME, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LOG_COLUMNS)
        for r in reports:
            numbers = (f"{r.loss:.6g}", f"{r.rtn_loss:.6g}", f"{r.loss_over_rtn:.4f}", f"{r.damp:g}")
            writer.writerow((r.block, r.linear, *numbers, r.dead, f"{r.seconds:.4f}"))


def plot(reports: Sequence[LinearReport], path: str | Path, title: str = "") -> None:
    """Two panels as a PNG: each linear's loss over the blocks, GPTQ beside RTN, and what share of RTN's that is."""
    require_picture(path, "--report")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, linear in enumerate(dict.fromkeys(report.linear for report in reports)):
        rows = sorted((r for r in reports if r.linear == linear), key=lambda r: r.block)
        blocks, color = [r.block for r in rows], f"C{i}"
        left.plot(blocks, [r.loss for r in rows], color=color, marker="o", ms=3, label=linear)
        left.plot(blocks, [r.rtn_loss for r in rows], color=color, ls=":", marker="x", ms=3)
        right.plot(blocks, [100 * r.loss_over_rtn for r in rows], color=color, marker="o", ms=3, label=linear)
    left.set(xlabel="block", ylabel="loss (solid: GPTQ, dotted: RTN)", yscale="log")
    right.set(xlabel="block", ylabel="loss as a share of RTN's, %")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle(title)
    save_picture(figure, path, "--report")


def warn_of_little_text(samples: int, tokens: int) -> None:
    """Log a warning where there are too few windows for a Hessian to be trusted."""
    if samples < FEW_SAMPLES:
        log.warning("calibrating on %d windows of %d tokens; with fewer than %d, codes fit the sample, not the language",
                    samples, tokens, FEW_SAMPLES)  # fmt: skip


class DeadInputs:
    """Warns when it first meets a linear with inputs that are zero in all of the text, and sums up at the end."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, int]] = {}  # name -> dead inputs, all inputs

    def add(self, name: str, dead: int, inputs: int) -> None:
        if dead and not self.found:
            log.warning("%s: %d of %d inputs are zero in all of the calibration text, so that their weights become zero; "
                        "text of more kinds would reach them", name, dead, inputs)  # fmt: skip
        if dead:
            self.found[name] = dead, inputs

    def sum_up(self) -> None:
        if len(self.found) > 1:
            worst = max(self.found, key=lambda name: self.found[name][0] / self.found[name][1])
            log.warning("%d linears have inputs that are zero in all of the calibration text; the most has %s: %d of %d",
                        len(self.found), worst, *self.found[worst])  # fmt: skip
