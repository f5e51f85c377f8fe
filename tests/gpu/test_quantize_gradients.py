"""The backward pass over arrays on the device against the same over the processor's."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_layers import fresh_generator, relative_error
from helpers import random_llama_folder

from tinygptq.backward import block_gradients
from tinygptq.folders.checkpoint import load_checkpoint
from tinygptq.gptq.feedback import factor_outputs, solve_in_parts
from tinygptq.ops import array_module
from tinygptq.quantization.placement import Host
from tinygptq.quantization.sensitivity import output_matrices

IDS = np.random.default_rng(0).integers(0, 120, (16, 64))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    random_llama_folder(folder, dtype="float16")
    return load_checkpoint(folder)


def test_gradients_of_a_block(source):
    from tinygptq.kernels.cuda.runtime import cupy
    from tinygptq.quantization.placement_cuda import Card

    cp, rng, place = cupy(), fresh_generator(), Card()
    h, d = (rng.normal(size=(2, 40, source.config.hidden_size)).astype(np.float16) for _ in range(2))
    d = d.astype(np.float32) * np.float32(1e-4)  # as small as real ones: fp16 could not hold what they become
    dh, outputs = block_gradients(Host().model(source), 1, h.astype(np.float32), d)
    with place.session():
        model = place.model(source)
        with place.block(model, 1, -1):
            found_dh, found = block_gradients(model, 1, cp.asarray(h), cp.asarray(d))
    assert relative_error(found_dh.get(), dh) < 2e-2
    for name, dy in outputs.items():
        assert found[name].dtype == np.float32
        assert relative_error(found[name].get(), dy) < 2e-2, name


def test_sums_of_gradients(source):
    """Not the same: fp16's rounding has other tokens drawn here and there."""
    from tinygptq.quantization.placement_cuda import Card

    place, expected = Card(), output_matrices(Host().model(source), IDS, Host())
    with place.session():
        found = output_matrices(place.model(source), IDS, place)
    assert list(found) == list(expected)
    for name, blocks in expected.items():
        for A, B in zip(blocks, found[name], strict=True):
            assert relative_error(B, A) < 0.3, name
            assert B.trace() == pytest.approx(A.trace(), rel=0.05)


def test_feedback_starts_parts_where_the_definition_does():
    from tinygptq.config import QuantizeConfig
    from tinygptq.gptq import prepare, solve
    from tinygptq.kernels.cuda import solver
    from tinygptq.kernels.cuda.runtime import cupy

    cp, rng, config = cupy(), fresh_generator(), QuantizeConfig(4, 32)
    W, x, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((96, 64), (300, 64), (300, 96)))
    H, A = x.T @ x, (dy + dy[:, :1]).T @ (dy + dy[:, :1])

    def starts(move, method) -> list[np.ndarray]:
        seen, w, h = [], move(W), move(H)
        factor, outputs = prepare(h, config, method=method), factor_outputs(move(A), 0.5, method=method)

        def rounded(rows):
            seen.append(rows.copy())
            # codes of the definition, that one which falls on the other side for rounding does not spread
            part = solve(rows if method == "definition" else rows.get(), H, config, method="definition")
            moved = {field: move(getattr(part, field)) for field in ("codes", "scales", "zeros", "g_idx")}
            return type(part)(**moved, loss=part.loss, damp=part.damp)

        solve_in_parts(w, h, factor, [outputs], rounded, rows=32)
        return [rows if array_module(rows) is np else rows.get() for rows in seen]

    for one, other in zip(starts(np.asarray, "definition"), starts(cp.asarray, solver), strict=True):
        assert (np.abs(one - other) < 1e-3).mean() > 0.95
