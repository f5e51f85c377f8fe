"""Teams of threads: who does what, and that a failure ends the work of all."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tinygptq import threads


@pytest.fixture(params=["1", "2", "3", "4", "8"])
def number(request, monkeypatch) -> int:
    monkeypatch.setenv("NUMBA_NUM_THREADS", request.param)
    return int(request.param)


@pytest.mark.parametrize("items", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("teams", [1, 2, 4])
def test_each_team_does_its_items_in_order(number: int, items: int, teams: int) -> None:
    done: dict[int, list[int]] = {team: [] for team in range(teams)}
    threads.in_teams(items, lambda team, i: done[team].append(i), teams)
    assert [i for team in range(teams) for i in done[team]] == list(range(items))
    assert {len(some) for some in done.values()} <= {items // teams, -(-items // teams)}


def test_a_team_has_its_share_of_the_threads(number: int) -> None:
    seen = []
    threads.in_teams(4, lambda team, i: seen.append((threads.within_team(), threads.count(), threads.share_of_all())))
    split = number % threads.TEAMS == 0
    assert set(seen) == {(split, number // 2 if split else number, 0.5 if split else 1.0)}
    assert (threads.within_team(), threads.count(), threads.share_of_all()) == (False, number, 1.0)


def test_two_teams_are_at_work_at_once(monkeypatch) -> None:
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    both = threading.Barrier(2, timeout=60)
    threads.in_teams(2, lambda team, i: both.wait())  # one alone would wait in vain


def test_products_within_a_team(number: int) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 1000, 70), (70, 90)))
    products, grams = np.empty((5, 1000, 90), np.float32), np.empty((5, 70, 70), np.float32)

    def do(team: int, i: int) -> None:
        products[i], grams[i] = threads.matmul(x[i], w), threads.gram(x[i])

    threads.in_teams(5, do)
    np.testing.assert_allclose(products, x @ w, atol=1e-4)
    np.testing.assert_allclose(grams, x.swapaxes(1, 2) @ x, atol=1e-3)


def test_no_team_begins_another_item_after_a_failure(number: int) -> None:
    begun, second = [], threading.Event()

    def do(team: int, i: int) -> None:
        begun.append(i)
        if i == 500:
            second.set()
            raise ZeroDivisionError
        if threads.within_team():
            assert second.wait(60)  # else one team could be done before the other has begun

    with pytest.raises(ZeroDivisionError):
        threads.in_teams(1000, do)
    assert len(begun) < 1000
    assert not threads.within_team() and threads.count() == number
