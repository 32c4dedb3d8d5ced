"""Every patient lands at exactly one site, and the same seed gives the same sites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DatasetError
from simulations.partition import Indices, by_column, by_sizes, dirichlet, iid


def covers(parts: Sequence[Indices], patients: int) -> bool:
    return np.array_equal(np.sort(np.concatenate(list(parts))), np.arange(patients))


@settings(deadline=None)
@given(
    patients=st.integers(200, 500),
    shares=st.lists(st.floats(0.5, 10), min_size=1, max_size=10),
    seed=st.integers(0, 100),
)
def test_shares_are_met_to_one_patient(patients: int, shares: list[float], seed: int) -> None:
    parts = by_sizes(patients, shares, np.random.default_rng(seed))
    exact = patients * np.array(shares) / np.sum(shares)
    assert covers(parts, patients)
    assert all(abs(len(p) - e) < 1 for p, e in zip(parts, exact, strict=True))
    again = by_sizes(patients, shares, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None)
@given(patients=st.integers(1, 200), sites=st.integers(1, 20))
def test_iid_sites_differ_by_one_patient_at_most(patients: int, sites: int) -> None:
    if sites > patients:
        with pytest.raises(DatasetError):
            iid(patients, sites, np.random.default_rng(0))
        return
    sizes = [len(p) for p in iid(patients, sites, np.random.default_rng(0))]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == patients


@settings(deadline=None)
@given(
    concentration=st.floats(0.3, 100),
    sites=st.integers(1, 6),
    classes=st.integers(1, 5),
    seed=st.integers(0, 50),
)
def test_dirichlet_places_every_patient_once(
    concentration: float, sites: int, classes: int, seed: int
) -> None:
    labels = np.arange(300) % classes
    parts = dirichlet(labels, sites, concentration, np.random.default_rng(seed))
    assert len(parts) == sites
    assert min(len(p) for p in parts) >= 1
    assert covers(parts, 300)


def test_small_concentration_means_skewed_labels() -> None:
    labels = np.repeat(np.arange(10), 200)

    def skew(concentration: float) -> float:
        parts = dirichlet(labels, 5, concentration, np.random.default_rng(1))
        shares = [np.bincount(labels[p], minlength=10) / len(p) for p in parts]
        return float(np.mean([np.abs(s - 0.1).sum() for s in shares]))

    assert skew(0.1) > 2 * skew(10) > 2 * skew(10_000)


def test_columns_give_natural_sites() -> None:
    parts = by_column(["b", "a", "b", "c"])
    assert {k: v.tolist() for k, v in parts.items()} == {"a": [1], "b": [0, 2], "c": [3]}


@pytest.mark.parametrize("shares", [(), (1, 0), (1, -1), (1, float("nan")), (1, float("inf")), (1000, 1)])
def test_impossible_shares_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(DatasetError):
        by_sizes(10, shares, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("sites", "concentration"), [(3, 0.0), (3, -1.0), (3, float("nan")), (0, 1.0), (50, 1.0)]
)
def test_impossible_draws_are_refused(sites: int, concentration: float) -> None:
    with pytest.raises(DatasetError):
        dirichlet(np.zeros(20, dtype=np.int64), sites, concentration, np.random.default_rng(0))
