"""Algorithms as pure functions of public weights, whatever the order of answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.study import Algorithm
from server.algorithms import Update, algorithm_of, fedavg


def updates(count: int, seed: int = 0, weights: list[int] | None = None) -> list[Update]:
    random = np.random.default_rng(seed)
    return [
        Update(
            f"site-{i}",
            weights[i] if weights else int(random.integers(1, 10_000)),
            {"w": random.normal(size=(3, 2)).astype(np.float32), "b": random.normal(size=2)},
        )
        for i in range(count)
    ]


START = {"w": np.full((3, 2), 0.1, np.float32), "b": np.ones(2)}


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 8), seed=st.integers(0, 1000), rate=st.sampled_from([0.1, 1.0, 2.5]))
def test_fedavg_is_the_weighted_mean(count: int, seed: int, rate: float) -> None:
    given_updates = updates(count, seed)
    state, after = fedavg(rate).apply({}, START, given_updates)
    assert state == {}
    for name, value in START.items():
        weights = [u.weight for u in given_updates]
        mean = np.average([u.delta[name].astype(np.float64) for u in given_updates], axis=0, weights=weights)
        assert after[name].dtype == value.dtype
        assert np.allclose(after[name], value + rate * mean, rtol=1e-6, atol=1e-7)


def test_every_order_gives_the_same_bits() -> None:
    given_updates = updates(5)
    _, expected = fedavg().apply({}, START, given_updates)
    for order in itertools.permutations(given_updates):
        _, found = fedavg().apply({}, START, order)
        assert all(found[n].tobytes() == expected[n].tobytes() for n in START)


def test_it_changes_nothing_that_it_was_given() -> None:
    start = {n: a.copy() for n, a in START.items()}
    given_updates = updates(3)
    before = [{n: a.copy() for n, a in u.delta.items()} for u in given_updates]
    fedavg().apply({}, start, given_updates)
    assert all((start[n] == START[n]).all() for n in START)
    for update, old in zip(given_updates, before, strict=True):
        assert all((update.delta[n] == old[n]).all() for n in old)


def test_only_the_proportions_of_weights_count() -> None:
    one, thousand = updates(3, weights=[1, 2, 5]), updates(3, weights=[1000, 2000, 5000])
    for name in START:
        a, b = (fedavg().apply({}, START, u)[1][name] for u in (one, thousand))
        assert np.allclose(a, b, rtol=1e-7)


def test_a_study_finds_its_algorithm() -> None:
    algorithm = algorithm_of(Algorithm(rounds=3, server_learning_rate=0.5))
    _, after = algorithm.apply(algorithm.init(START), START, updates(1))
    assert after["b"] == pytest.approx(START["b"] + 0.5 * updates(1)[0].delta["b"])
