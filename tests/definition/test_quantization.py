"""The block loop against the loop it stands for: for every linear, run the whole model again and look at its input."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_llama_folder

from tinygptq import ops
from tinygptq.config import RECIPES, QuantizeConfig, Recipe
from tinygptq.errors import TinyGPTQError
from tinygptq.folders.checkpoint import Checkpoint, load_checkpoint
from tinygptq.gptq import Hessian, Solution, drift, prepare, round_to_nearest, solve
from tinygptq.gptq.feedback import factor_outputs, solve_in_parts
from tinygptq.gptq.hessian import shrink
from tinygptq.gptq.refine import refine
from tinygptq.model import Llama
from tinygptq.quantization import placement
from tinygptq.quantization.blocks import quantize_blocks
from tinygptq.quantization.placement import Host, packed
from tinygptq.quantization.report import LinearReport
from tinygptq.quantization.sensitivity import output_matrices
from tinygptq.quantization.stages import Activations
from tinygptq.weights import Weights

STAGES = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)
IDS = np.random.default_rng(3).integers(0, 120, (6, 40))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("source")
    random_llama_folder(folder)
    return load_checkpoint(folder)


def model_of(source: Checkpoint, functions=ops) -> Llama:
    """With a dict of linears of its own, which the loop replaces one by one."""
    weights = source.weights
    return Llama(source.config, Weights(weights.embedding, weights.head, weights.norms, dict(weights.linears)), functions)


def input_of(model: Llama, name: str) -> np.ndarray:
    """What the linear ``name`` is given when the model runs over the calibration text, [samples, T, K]."""
    seen = []

    def recording(x, layer):
        if layer is model.weights.linears[name]:
            seen.append(x.copy())
        return ops.linear(x, layer)

    functions = SimpleNamespace(**{**vars(ops), "linear": recording})
    Llama(model.config, model.weights, functions).forward(IDS)
    (x,) = seen
    return x


def target_of(teacher: Llama, model: Llama, name: str, H: np.ndarray, config: QuantizeConfig) -> np.ndarray:
    """The weights that `gptq.drift` has quantised in place of the teacher's, from forward passes of both models."""
    W = np.asarray(teacher.weights.linears[name].weight, np.float32)
    x, wanted = input_of(model, name), input_of(teacher, name)
    E = config.recipe.drift * (wanted - x) @ W.T
    if name.endswith(("o_proj", "down_proj")):
        E += config.recipe.residual * (residual_at(teacher, name) - residual_at(model, name))
    cross = drift.Cross()
    cross.add(E, x)
    return drift.target(W, cross.C, drift.inverse(H))


def residual_at(model: Llama, name: str) -> np.ndarray:
    """The residual stream that the linear ``name`` adds to, [samples, T, C]."""
    layer, h = int(name.split(".")[2]), model.embed(IDS)
    for earlier in range(layer):
        h = model.block(earlier, h)
    if name.endswith("down_proj"):
        mixed = model.attention_mix(layer, model.attention_input(layer, h))
        h = h + model.linear(layer, "self_attn.o_proj", mixed)
    return h


def plain_loop(source: Checkpoint, config: QuantizeConfig, taken: dict[str, Solution]) -> dict[str, Solution]:
    """No activation is kept: each linear's input comes from a forward pass of its own.

    What a linear becomes is ``taken``, the solution under test: GPTQ is chaotic, and so each linear is compared given the
    same predecessors.
    """
    model, solutions = model_of(source), {}
    matrices = output_matrices(model_of(source), IDS, Host()) if config.recipe.outputs else {}
    for layer in range(source.config.num_hidden_layers):
        prefix, found = f"model.layers.{layer}", {}
        for stage in STAGES:
            for name in stage:
                full = f"{prefix}.{name}"
                hessian = Hessian(model.weights.linears[full].in_features)
                hessian.add(input_of(model, full))
                W = np.asarray(source.weights.linears[full].weight, np.float32)
                if config.recipe.follows:
                    W = target_of(model_of(source), model, full, hessian.H, config)
                H = shrink(hessian.H, config.recipe.shrink)
                factor = prepare(H, config, method="definition")

                def solved(W: np.ndarray, H=H, factor=factor) -> Solution:
                    solution = solve(W, factor, config, method="definition")
                    return refine(W, H, solution, factor, config, method="definition") if config.recipe.refine else solution

                share = config.recipe.outputs
                blocks = [factor_outputs(A, share, method="definition") for A in matrices.get(full, ())]
                found[full] = solve_in_parts(W, H, factor, blocks, solved) if blocks else solved(W)
            if config.true_sequential:
                model.weights.linears.update({name: packed(taken[name], config) for name in found})
        model.weights.linears.update({name: packed(taken[name], config) for name in found})
        solutions |= found
    return solutions


def run(source: Checkpoint, config: QuantizeConfig, ids=IDS) -> tuple[Llama, dict[str, Solution], list[LinearReport]]:
    model = model_of(source)
    results = list(quantize_blocks(model, ids, config))
    assert len({name for name, _, _ in results}) == len(results) == 14
    return model, {name: solution for name, solution, _ in results}, [report for _, _, report in results]


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(4, 32, desc_act=True),
        QuantizeConfig(3, 64, sym=False, true_sequential=False),
        QuantizeConfig(4, 32, recipe=RECIPES["best"]),
        QuantizeConfig(3, 64, sym=False, desc_act=True, recipe=Recipe(drift=1.0, residual=0.5)),
        QuantizeConfig(4, 32, recipe=Recipe(outputs=0.5)),
    ],
    ids=["true-sequential", "a block at once", "best", "drift alone", "outputs alone"],
)
def test_each_linear_is_calibrated_on_what_its_quantised_predecessors_give(source, config):
    _, found, _ = run(source, config)
    expected = plain_loop(source, config, found)
    assert list(found) == list(expected)  # AutoGPTQ's order
    for name, solution in expected.items():
        # batches add up in another order; a rounding that changes one code changes later ones of its row
        assert (solution.codes == found[name].codes).mean() > 0.99, name
        assert np.isclose(solution.loss, found[name].loss, rtol=0.01), name


def test_true_sequential_matters(source):
    one, other = (run(source, QuantizeConfig(3, 32, true_sequential=flag))[1] for flag in (True, False))
    first = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(one[first].codes, other[first].codes)  # nothing comes before it
    last = "model.layers.1.mlp.down_proj"
    assert not np.array_equal(one[last].codes, other[last].codes)


@pytest.mark.parametrize("change", [{"KEEP_BYTES": 0}, {"TOKENS_AT_ONCE": 1}, {"TOKENS_AT_ONCE": 100}])
def test_memory_settings_change_nothing_but_rounding(source, monkeypatch, change):
    config = QuantizeConfig(4, 32, recipe=RECIPES["plain"])  # act-order would turn rounding into another order
    _, expected, _ = run(source, config)
    for name, value in change.items():
        monkeypatch.setattr(placement, name, value)
    _, found, _ = run(source, config)
    for name, solution in expected.items():
        assert (solution.codes == found[name].codes).mean() > (0.99 if "TOKENS_AT_ONCE" in change else 0.9999), name


def test_the_model_holds_exactly_what_is_written(source):
    config = QuantizeConfig(4, 64, desc_act=True, sym=False)
    model, solutions, reports = run(source, config)
    for name, solution in solutions.items():
        assert np.array_equal(model.weights.linears[name].dequantize(), solution.dequantize().T)
    assert [report.name for report in reports] == list(solutions)
    assert all(report.loss > 0 and report.damp == 0.01 and report.seconds > 0 for report in reports)


def test_rounding_reads_no_text(source):
    config = QuantizeConfig(3, 32)
    _, solutions, reports = run(source, config, ids=None)
    for name, solution in solutions.items():
        expected = round_to_nearest(np.asarray(source.weights.linears[name].weight, np.float32), config)
        assert np.array_equal(solution.codes, expected.codes)
        assert np.array_equal(solution.scales, expected.scales)
    assert all(np.isnan(report.loss) for report in reports)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_keeps_the_model_closer_than_rounding(source, bits):
    config = QuantizeConfig(bits, 32, sym=False)
    expected = model_of(source).hidden(IDS)
    errors = [np.square(run(source, config, ids)[0].hidden(IDS) - expected).mean() for ids in (IDS, None)]
    assert errors[0] < errors[1]


def test_broken_activations_name_the_block(source):
    norms = {**source.weights.norms, "model.layers.1.input_layernorm": np.full(96, np.nan, np.float32)}
    broken = Checkpoint(source.folder, source.config, None, Weights(source.weights.embedding, source.weights.head, norms,
                                                                    source.weights.linears))  # fmt: skip
    with np.errstate(invalid="ignore"), pytest.raises(TinyGPTQError, match="block 1: activations hold NaN"):
        run(broken, QuantizeConfig(4, 32))


@pytest.mark.parametrize(("room", "uses", "computed"), [(0, 2, 3), (99, 2, 2), (99, 3, 1), (99, math.inf, 1), (10, 3, 3)])
def test_activations_are_kept_while_there_is_room_and_use_for_them(room, uses, computed):
    asked, batch = [], np.ones(8, np.float32)  # 32 bytes

    def compute(i):
        asked.append(i)
        return batch * i

    activations = Activations(Host(), 2, compute, room, uses)
    for _ in range(3):
        assert [x[0] for x in activations] == [0, 1]
    assert asked.count(0) == asked.count(1) == computed
