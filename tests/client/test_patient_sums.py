"""A cohort's sums against pandas, which sees every record; and how much one patient can change them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from described import COLUMNS, RANGES, SPANS, random_cohort, statistics_study, taken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client.statistics import patient_sums
from common.columns import NumericColumn
from common.errors import StudyError
from common.histograms import merged
from common.schema import Coded
from common.statistics import (
    QUANTILES,
    Description,
    Summary,
    cell_edges,
    describe,
    layout,
    moment_span,
    moments,
    sensitivity,
)
from common.study import Study

STUDY = statistics_study()


def exact(coded: Coded, who: np.ndarray, wanted: Study = STUDY) -> Description:
    return describe(wanted, patient_sums(wanted, coded, who), [0.0], 1)


def long(coded: Coded, who: np.ndarray, name: str) -> pd.DataFrame:
    """Every present value of a numeric column with its patient."""
    values = coded.columns[name].reshape(len(who), -1)
    frame = pd.DataFrame({"who": np.repeat(who, values.shape[1]), "value": values.reshape(-1)}).dropna()
    return frame.assign(value=frame["value"].clip(*RANGES[name]), clipped=frame["value"].clip(*SPANS[name]))


def summary(found: Description, name: str) -> Summary:
    return next(c for c in found.columns if c.name == name)


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_as_pandas_counts_them(seed: int) -> None:
    coded, who = random_cohort(seed)
    found = exact(coded, who)
    scaling = moments(STUDY, patient_sums(STUDY, coded, who), [0.0])
    for place, name in ((0, "age"), (1, "wave")):
        own, values = summary(found, name), long(coded, who, name)
        by_patient = values.groupby("who")["value"].mean()
        assert own.patients is not None
        assert own.patients.value == pytest.approx(len(by_patient))
        assert own.missing is not None
        assert own.missing.value == pytest.approx(1 - len(by_patient) / 120)
        assert own.mean is not None
        assert own.mean.value == pytest.approx(values.groupby("who")["clipped"].mean().mean(), abs=1e-6)
        assert own.clipped == SPANS[name]

        weight = 1 / values.groupby("who")["value"].transform("size")
        mean = np.average(values["clipped"], weights=weight)
        deviation = math.sqrt(np.average((values["clipped"] - mean) ** 2, weights=weight))
        assert own.standard_deviation is not None
        assert own.standard_deviation.value == pytest.approx(deviation, rel=1e-6)
        assert scaling.mean[place] == pytest.approx(mean, abs=1e-6)
        assert scaling.deviation[place] == pytest.approx(deviation, rel=1e-6)

        low, high = RANGES[name]
        assert own.quantiles is not None
        for level in QUANTILES:
            quantile = np.quantile(by_patient, level / 100, method="inverted_cdf")
            assert own.quantiles[level].value == pytest.approx(quantile, abs=(high - low) / 20)
        histogram, edges = np.histogram(by_patient, 20, (low, high))
        assert own.edges == pytest.approx(edges)
        shares = [0.0 if c.share is None else c.share.value for c in own.cells]
        assert shares == pytest.approx(histogram / len(by_patient))


def test_with_one_record_each_the_standard_deviation_is_the_one_between_patients() -> None:
    coded, who = random_cohort(3)
    chosen = np.unique(who, return_index=True)[1]
    found = summary(exact(taken(coded, chosen), who[chosen]), "age")
    ages = pd.Series(coded.columns["age"][chosen]).clip(*SPANS["age"])
    assert found.standard_deviation is not None
    assert found.standard_deviation.value == pytest.approx(ages.std(ddof=0), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_categories_and_labels_are_as_pandas_counts_them(seed: int) -> None:
    coded, who = random_cohort(seed)
    found = exact(coded, who)
    for name, codes in (
        ("pain", ["1", "2", "10"]),
        ("sex", ["0", "1"]),
        ("y", ["class 0", "class 1", "class 2"]),
    ):
        own = summary(found, name)
        values = coded.labels if name == "y" else coded.columns[name]
        frame = pd.DataFrame({"who": who, "code": values}).dropna()
        shares = pd.crosstab(frame["who"], frame["code"], normalize="index")
        assert [c.name for c in own.cells] == codes
        for place, cell in enumerate(own.cells):
            assert cell.share is not None
            assert cell.share.value == pytest.approx(shares[float(place)].mean(), abs=1e-8)
        assert own.patients is not None
        assert own.patients.value == pytest.approx(len(shares))
        if name == "y":
            assert own.missing is None
        else:
            assert own.missing is not None
            assert own.missing.value == pytest.approx(1 - len(shares) / 120, abs=1e-8)


def test_round_numbers_on_an_edge_are_counted_in_the_cell_above() -> None:
    ages = np.arange(0.0, 121.0)
    columns = {n: np.full((121, 6) if n == "wave" else 121, np.nan) for n in ("age", "wave", "pain", "sex")}
    sums = patient_sums(STUDY, Coded({**columns, "age": ages}, np.zeros(121)), np.arange(121))
    assert sums["histograms"][0].tolist() == [6.0] * 19 + [7.0]


def sums_of_one(coded: Coded) -> dict[str, np.ndarray]:
    return patient_sums(STUDY, coded, np.zeros(len(coded.labels), dtype=np.int64))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 40))
def test_sums_of_sites_are_the_sums_of_all_to_the_last_bit(seed: int, cut: int) -> None:
    coded, who = random_cohort(seed, 40)
    parts = [patient_sums(STUDY, taken(coded, c), who[c]) for c in (who < cut, who >= cut)]
    whole = patient_sums(STUDY, coded, who)
    order = np.random.default_rng(seed).permutation(40)  # patients under other numbers, with gaps
    renamed = patient_sums(STUDY, coded, 7 * order[who] + 3)
    assert {n: a.shape for n, a in whole.items()} == layout(STUDY)
    for name, array in merged(parts).items():
        assert array.dtype == np.float64
        assert np.array_equal(array, whole[name])
        assert np.array_equal(array, renamed[name])


def norm(sums: dict[str, np.ndarray]) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for a in sums.values() for x in a.reshape(-1)))


NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -3.0, 5.0, 60.0, 120.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324]),
    st.floats(-3, 120),
)
CODES = st.sampled_from([0.0, 1.0, 2.0, math.nan, -1.0, 3.0, math.inf, 0.5])


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    records=st.one_of(st.integers(1, 5), st.sampled_from([40, 1000])),
    numbers=st.lists(NUMBERS, min_size=1, max_size=12),
    codes=st.lists(CODES, min_size=1, max_size=6),
    labels=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
@example(records=1, numbers=[60.0, 1.0], codes=[0.0], labels=[0.0], seed=0)
@example(records=1000, numbers=[120.0], codes=[1.0], labels=[2.0], seed=0)
@example(records=3, numbers=[math.nan], codes=[math.nan], labels=[1.0], seed=0)
def test_a_patient_changes_the_vector_by_at_most_the_sensitivity(
    records: int, numbers: list[float], codes: list[float], labels: list[float], seed: int
) -> None:
    coded = Coded(
        {
            "age": np.resize(numbers, records),
            "wave": np.resize(numbers[::-1], (records, 6)),
            "pain": np.resize(codes, records),
            "sex": np.resize(codes[::-1], records),
        },
        np.resize(labels, records),
    )
    others, who = random_cohort(seed, 20)
    joined = Coded(
        {n: np.concatenate([coded.columns[n], v]) for n, v in others.columns.items()},
        np.concatenate([coded.labels, others.labels]),
    )
    with_patient = patient_sums(STUDY, joined, np.concatenate([np.full(records, 99), who]))
    without = patient_sums(STUDY, others, who)
    difference = {n: a - without[n] for n, a in with_patient.items()}
    assert all(np.isfinite(a).all() for a in with_patient.values())
    assert norm(difference) <= sensitivity(STUDY) * (1 + 1e-15)
    own = sums_of_one(coded)  # the others change nothing about what a patient adds, to the last bit
    for name, array in own.items():
        assert np.array_equal(array, difference[name])


@pytest.mark.parametrize("age", [0.0, 53.0, 120.0])
def test_the_sensitivity_is_reached(age: float) -> None:
    """It could be stated no smaller."""
    one = Coded(
        {"age": np.array([age]), "wave": np.full((1, 6), 5.0), "pain": np.zeros(1), "sex": np.ones(1)},
        np.zeros(1),
    )
    assert sensitivity(STUDY) == math.sqrt(7)
    assert norm(sums_of_one(one)) == sensitivity(STUDY)


def test_values_all_over_the_range_stay_within_the_sensitivity() -> None:
    """Every place in the range, and the worst spread of a patient's values around it."""
    for share in np.linspace(0, 1, 41):
        for value in np.linspace(20, 86, 133):
            ages = np.full(20, value)
            ages[: round(20 * share)] = 83.0
            one = Coded(
                {"age": ages, "wave": np.zeros((20, 6)), "pain": np.zeros(20), "sex": np.ones(20)},
                np.zeros(20),
            )
            sums = sums_of_one(one)
            assert norm({"s": sums["sums"][0]}) <= 1.0


@pytest.mark.parametrize("bounds", [(-8e307, 8e307), (0.0, 5e-324), (1.0, 1.0 + 2**-52), (-1e-300, 1e300)])
def test_absurd_ranges_cannot_break_the_bound(bounds: tuple[float, float]) -> None:
    columns = [{"kind": "numeric", "name": "x", "unit": "1", "range": list(bounds)}]
    odd = statistics_study(columns)
    random = np.random.default_rng(0)
    values = np.where(random.uniform(size=50) < 0.5, *bounds)
    for who in (np.zeros(50, dtype=np.int64), np.arange(50)):
        sums = patient_sums(odd, Coded({"x": values}, np.zeros(50)), who)
        assert all(np.isfinite(a).all() for a in sums.values())
        assert norm(sums) <= sensitivity(odd) * (who.max() + 1)


def test_an_empty_site_and_a_study_without_one_kind_of_column() -> None:
    nobody = Coded({n: v[:0] for n, v in random_cohort(0)[0].columns.items()}, np.empty(0))
    sums = patient_sums(STUDY, nobody, np.empty(0, dtype=np.int64))
    assert {n: a.shape for n, a in sums.items()} == layout(STUDY)
    assert norm(sums) == 0
    coded, who = random_cohort(0)
    for kind in ("numeric", "categorical"):
        part = statistics_study([c for c in COLUMNS if c["kind"] == kind])
        sums = patient_sums(part, coded, who)
        assert {n: a.shape for n, a in sums.items()} == layout(part)
        assert all(a.dtype == np.float64 for a in sums.values())
        assert exact(coded, who, part).patients is not None


def test_a_study_that_asks_for_no_statistics_gets_none() -> None:
    coded, who = random_cohort(0)
    none = statistics_study(statistics=None)
    with pytest.raises(StudyError, match=r"\[statistics\]"):
        patient_sums(none, coded, who)


def test_edges_are_where_they_are_said_to_be() -> None:
    column = STUDY.data.columns[0]
    assert isinstance(column, NumericColumn)
    assert cell_edges(column, 20).tolist() == list(range(0, 121, 6))


@pytest.mark.parametrize(
    ("more", "span"),
    [
        ({}, (0.0, 120.0)),
        ({"reference": [38, 68]}, (23.0, 83.0)),
        ({"reference": [10, 90]}, (0.0, 120.0)),
        ({"reference": [100, 200]}, (50.0, 120.0)),
        ({"reference": [300, 400]}, (0.0, 120.0)),  # nothing in common with the range
    ],
)
def test_moments_are_of_twice_the_public_interval_within_the_range(
    more: dict[str, Any], span: tuple[float, float]
) -> None:
    column = statistics_study([{**COLUMNS[0], "reference": None, **more}]).data.columns[0]
    assert isinstance(column, NumericColumn)
    assert moment_span(column) == span


def test_a_label_that_is_a_number_is_described_as_one() -> None:
    label = {"column": "y", "range": [0, 20], "unit": "d"}
    regression = statistics_study(
        data={"columns": COLUMNS, "label": label, "missing": "indicator"}, objective={"task": "regression"}
    )
    coded, who = random_cohort(1)
    days = np.random.default_rng(1).uniform(0, 20, len(who))
    coded = Coded(coded.columns, days)
    sums = patient_sums(regression, coded, who)
    assert {n: a.shape for n, a in sums.items()} == layout(regression)
    assert sums["label"].shape == (0,)
    assert sensitivity(regression) == math.sqrt(8)
    one = Coded({n: np.clip(v[:1], 0, 0) for n, v in coded.columns.items()}, np.full(1, 20.0))
    assert norm(patient_sums(regression, one, who[:1])) <= sensitivity(regression)

    found = exact(coded, who, regression)
    own = summary(found, "y")
    frame = pd.DataFrame({"who": who, "days": days})
    by_patient = frame.groupby("who")["days"].mean()
    assert (own.kind, own.unit, own.missing) == ("label", "d", None)
    assert found.patients == own.patients
    assert own.mean is not None
    assert own.mean.value == pytest.approx(by_patient.mean(), abs=1e-6)
    weight = 1 / frame.groupby("who")["days"].transform("size")
    deviation = math.sqrt(np.average((days - by_patient.mean()) ** 2, weights=weight))
    assert own.standard_deviation is not None
    assert own.standard_deviation.value == pytest.approx(deviation, rel=1e-6)
    assert own.quantiles is not None
    median = np.quantile(by_patient, 0.5, method="inverted_cdf")
    assert own.quantiles[50].value == pytest.approx(median, abs=1.0)
    assert len(moments(regression, sums, [0.0]).mean) == 7  # features only
    assert found.rows()[1][-1][0] == "y (d)"
