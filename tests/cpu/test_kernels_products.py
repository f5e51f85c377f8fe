"""Products of many rows on the CPU, through panels and through BLAS, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from random_models import ACCURACY, assert_close, inputs, packed

from tinygptq import threads
from tinygptq.gptq import Hessian
from tinygptq.kernels import cpu
from tinygptq.kernels.cpu_products import DEPTH, GRAM_COLUMNS, HEIGHT, MANY, TOKENS


@pytest.fixture(params=[True, False], ids=["panels", "BLAS"])
def panels(request, monkeypatch):
    """Both ways, whichever this machine would choose."""
    monkeypatch.setattr(cpu, "panels_beat_blas", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [17, 18, 23, 48, 200, MANY - 1, 2 * MANY + 5])
@pytest.mark.parametrize(("K", "N"), [(576, 192), (40, 8), (DEPTH + 32, 24), (3 * DEPTH, 40)])
def test_product_matches_the_definition(panels, rows, K, N):
    layer = packed(K, N, 4, 32, sym=False, perm=True, bias=True)
    x = inputs(rows, K)
    assert_close(cpu.linear(x, layer), x, layer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_goes_through_panels(panels, bits):
    layer, x = packed(96, 40, bits, 48), inputs(50, 96)
    assert_close(cpu.linear(x, layer), x, layer)


def test_a_product_does_not_depend_on_threads_or_other_rows(monkeypatch):
    monkeypatch.setattr(cpu, "panels_beat_blas", lambda: True)
    layer, x = packed(2 * DEPTH, 24, 4, 64), inputs(3 * MANY + 13, 2 * DEPTH)
    together = cpu.linear(x, layer)
    assert np.array_equal(cpu.linear(x[:51], layer), together[:51])
    for count in (1, 2, 5):  # one slice, several that shrink, and one for each thread
        monkeypatch.setattr(threads, "count", lambda count=count: count)
        assert np.array_equal(cpu.linear(x, layer), together)


@pytest.mark.parametrize("rows", [1, 2, 79, 80, 81, 1000])
@pytest.mark.parametrize("smallest", [0, 10])
def test_slices_cover_all_rows_once(monkeypatch, rows, smallest):
    monkeypatch.setattr(threads, "count", lambda: 2)
    seen = np.zeros(rows, int)

    def part(some: slice) -> None:
        seen[some] += 1
        sizes.append(some.stop - some.start)

    sizes: list[int] = []
    threads.share(rows, 1 << 30, part, smallest=smallest)
    assert (seen == 1).all()
    if smallest and rows >= 80:
        assert max(sizes) == rows // 4 and sorted(sizes)[1] >= smallest  # all but the last
    else:
        assert len(sizes) == min(rows, 2)


@pytest.mark.parametrize("tokens", [1, 5, TOKENS - 1, TOKENS, TOKENS + 1, 2500])
@pytest.mark.parametrize("width", [1, HEIGHT, 16, 17, GRAM_COLUMNS, GRAM_COLUMNS + 1, 2 * GRAM_COLUMNS + 7, 200])
def test_gram_matches_float64(panels, tokens, width):
    x = inputs(tokens, width)
    result, exact = cpu.gram(x), x.astype(np.float64).T @ x
    # an entry is as exact as its row's and column's length allow
    scale = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert result.dtype == np.float32 and np.array_equal(result, result.T)
    assert np.max(np.abs(result - exact) / scale) < 4 * ACCURACY


def test_gram_of_a_view_and_of_nothing(panels):
    x = inputs(600, 3 * 64)
    assert np.allclose(cpu.gram(x[::2, 1:65]), x[::2, 1:65].T @ x[::2, 1:65], rtol=1e-4, atol=1e-4)
    assert np.array_equal(cpu.gram(x[:0]), np.zeros((192, 192), np.float32))


def test_gram_shows_bad_numbers_on_the_diagonal(panels):
    x = inputs(700, 100)
    for bad in (np.nan, np.inf, 1e30):
        x[650, 37] = bad
        with np.errstate(over="ignore", invalid="ignore"):
            diagonal = cpu.gram(x).diagonal()
        assert np.flatnonzero(~np.isfinite(diagonal)).tolist() == [37]


def test_a_hessian_sums_up_with_the_kernel():
    x = inputs(900, 96).reshape(3, 300, 96)
    fast, plain = Hessian(96, gram=cpu.gram), Hessian(96, np.float64)
    for i in range(3):
        fast.add(x[i])
        plain.add(x[i])
    assert np.allclose(fast.H, plain.H, rtol=1e-4, atol=1e-5 * plain.H.diagonal().max())
