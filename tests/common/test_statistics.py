"""Descriptions and scaling from noised sums: intervals that hold, what is left out, and odd sums."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from described import COLUMNS, RANGES, SPANS, random_cohort, statistics_study, taken
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from client.statistics import patient_sums
from common.encoding import Scaling, encode_coded
from common.errors import Refused, StudyError
from common.estimates import Figure, consistent, quantiles, ratio
from common.features import feature_names
from common.histograms import merged
from common.schema import Coded
from common.statistics import NOTE, QUANTILES, Description, describe, layout, moments, sensitivity

STUDY = statistics_study()
Sums = dict[str, np.ndarray]


def cohort_of_500() -> tuple[Coded, np.ndarray]:
    """Spread over the whole of each range, an eighth of the patients missing in each column."""
    random = np.random.default_rng(0)
    who = np.repeat(np.arange(500), random.integers(1, 41, 500))
    records = len(who)
    columns = {
        "age": random.uniform(0, 120, 500)[who],
        "wave": np.clip(random.uniform(-3, 5, (500, 1))[who] + random.normal(0, 0.2, (records, 6)), -3, 5),
        "pain": random.choice(3, 500, p=[0.5, 0.3, 0.2])[who].astype(float),
        "sex": random.integers(0, 2, 500)[who].astype(float),
    }
    for values in columns.values():
        values[np.isin(who, random.choice(500, 500 // 8, replace=False))] = np.nan
    return Coded(columns, random.integers(0, 3, 500)[who].astype(float)), who


COHORT = cohort_of_500()
EXACT = patient_sums(STUDY, *COHORT)


def noised(sums: Sums, noise: float, random: np.random.Generator) -> Sums:
    return {name: array + random.normal(0, noise, array.shape) for name, array in sums.items()}


def figures(found: Description) -> dict[tuple[str, ...], Figure]:
    """Everything that a description tells, by kind and name."""
    told: dict[tuple[str, ...], Figure | None] = {("count", "all"): found.patients}
    for c in found.columns:
        told["count", c.name] = c.patients
        told["missing", c.name] = c.missing
        told["mean", c.name] = c.mean
        told["deviation", c.name] = c.standard_deviation
        told |= {("quantile", c.name, str(q)): f for q, f in (c.quantiles or {}).items()}
        told |= {("share", c.name, cell.name): cell.share for cell in c.cells}
    return {name: figure for name, figure in told.items() if figure is not None}


@pytest.mark.parametrize(
    ("sites", "always"),
    [((2.0, 2.5), {"count", "missing", "mean", "deviation", "quantile", "share"}),
     ((15.0, 8.0), {"count", "missing", "mean", "deviation", "quantile"})],
)  # fmt: skip
def test_intervals_cover_the_exact_figure(sites: tuple[float, ...], always: set[str]) -> None:
    """Over 300 draws. At the larger noise a small cell is told only where the noise has raised it, so that
    nothing follows about shares."""
    random = np.random.default_rng(7)
    truth = figures(describe(STUDY, EXACT, [0.0], 0))
    covered = dict.fromkeys(truth, 0)
    for _ in range(300):
        found = figures(describe(STUDY, noised(EXACT, math.hypot(*sites), random), sites, 0))
        for name, figure in found.items():
            assert figure.low <= figure.value <= figure.high
            covered[name] += figure.low - 1e-9 <= truth[name].value <= figure.high + 1e-9
    rates: dict[str, list[float]] = {}
    for name, count in covered.items():
        rates.setdefault(name[0], []).append(count / 300)
    for kind in always:
        assert min(rates[kind]) >= 0.90, (kind, rates[kind])
        assert max(rates[kind]) <= 0.99, (kind, rates[kind])
        assert 0.93 <= np.mean(rates[kind]) <= 0.975, (kind, rates[kind])


def test_estimates_have_no_bias_to_speak_of() -> None:
    random = np.random.default_rng(8)
    truth = figures(describe(STUDY, EXACT, [0.0], 0))
    draws = [figures(describe(STUDY, noised(EXACT, 6.0, random), [6.0], 0)) for _ in range(400)]
    for name, exact in truth.items():
        if name[0] in {"count", "missing", "mean", "deviation"}:
            values = np.array([d[name].value for d in draws])
            assert abs(values.mean() - exact.value) <= 4 * values.std() / math.sqrt(400), name


def test_noise_free_figures_have_no_interval() -> None:
    for name, figure in figures(describe(STUDY, EXACT, [0.0, 0.0], 1)).items():
        assert figure.high - figure.low <= 1e-5 * max(1.0, abs(figure.value)), name


def test_the_description_of_two_sites_is_that_of_all_their_patients() -> None:
    coded, who = random_cohort(5)
    parts = [patient_sums(STUDY, taken(coded, c), who[c]) for c in (who < 50, who >= 50)]
    whole = patient_sums(STUDY, coded, who)
    assert describe(STUDY, merged(parts), [3.0, 4.0], 5) == describe(STUDY, whole, [5.0], 5)
    one, other = moments(STUDY, merged(parts), [3.0, 4.0]), moments(STUDY, whole, [5.0])
    assert np.array_equal(one.mean, other.mean)
    assert np.array_equal(one.deviation, other.deviation)


def test_what_is_about_too_few_patients_is_left_out() -> None:
    count = 100
    columns = {
        "age": np.where(np.arange(count) < 30, 50.0, np.nan),
        "pain": np.repeat([0.0, 1.0, 2.0], [68, 20, 12]),
        "wave": np.full((count, 6), 1.0),
        "sex": np.repeat([0.0, np.nan], [60, 40]),
    }
    sums = patient_sums(STUDY, Coded(columns, np.repeat([0.0, 1.0, 2.0], [50, 41, 9])), np.arange(count))

    def shown(noise: float, minimum: int) -> dict[str, list[str] | None]:
        found = describe(STUDY, sums, [noise], minimum)
        return {
            c.name: None if c.patients is None else [cell.name for cell in c.cells if cell.share is not None]
            for c in found.columns
        }

    everything = {"pain": ["1", "2", "10"], "sex": ["0"], "y": ["class 0", "class 1", "class 2"]}
    told = {"age": ["48 to 54"], "wave": ["1 to 1.4"], **everything}
    assert shown(0, 1) == shown(0, 9) == told
    assert shown(0, 12) == {**told, "y": ["class 0", "class 1"]}
    assert shown(0, 31) == {**told, "age": None, "pain": ["1"], "y": ["class 0", "class 1"]}
    assert shown(4.0, 5) == {**told, "pain": ["1", "2"], "y": ["class 0", "class 1"]}  # 5 + 2 * 4 > 12
    assert shown(0, 101) == dict.fromkeys(told)
    hidden = describe(STUDY, sums, [0.0], 101)
    assert hidden.patients is None
    assert [row[1:] for row in hidden.rows()[1]] == [["too few", *[""] * 5]] * 5
    assert not figures(hidden)


def test_a_column_that_nobody_may_lack_has_no_cell_for_it() -> None:
    """Its patients are then all patients, known better than from its own cells."""
    coded, who = random_cohort(2)
    full = Coded({n: np.nan_to_num(v, nan=0.0) for n, v in coded.columns.items()}, coded.labels)
    columns = [{**c, "missing": "refuse"} if c["name"] != "sex" else c for c in COLUMNS]
    strict = statistics_study(columns)
    sums = patient_sums(strict, full, who)
    assert layout(strict)["missing"] == sums["missing"].shape == (1,)
    assert sensitivity(strict) == sensitivity(STUDY)
    found = describe(strict, sums, [2.0], 1)
    assert [c.missing is None for c in found.columns] == [True, True, True, False, True]
    loose = describe(STUDY, patient_sums(STUDY, full, who), [2.0], 1)
    own, theirs = found.columns[0].patients, loose.columns[0].patients
    assert own is not None
    assert theirs is not None
    assert found.patients is not None
    assert [own.value, own.low, own.high] == pytest.approx([*vars(found.patients).values()])
    assert own.high - own.low < 0.8 * (theirs.high - theirs.low)


def test_json_and_table() -> None:
    found = describe(STUDY, noised(EXACT, 3.0, np.random.default_rng(0)), [3.0], 10)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told["intervals"] == NOTE
    assert told["study"] == STUDY.digest
    age = told["columns"][0]
    assert age["mean"]["low"] < age["mean"]["value"] < age["mean"]["high"]
    assert set(age["quantiles"]) == {str(q) for q in QUANTILES}
    assert len(age["edges"]) == len(age["cells"]) + 1
    header, rows = found.rows()
    assert all(len(row) == len(header) for row in rows)
    names = ["age (a)", "pain", "  1 (none)", "  2 (some)", "  10 (much)", "wave (mV)", "sex", "  0 (female)"]
    assert [row[0] for row in rows][:8] == names
    assert [row[0] for row in rows][-3:] == ["  class 0", "  class 1", "  class 2"]
    assert rows[-1][2] == rows[-1][4] == ""


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.0, 1e-9, 1.0, 30.0, 1e6]),
    sign=st.sampled_from([-1, 1]),
)
def test_whatever_the_sums_are_figures_keep_to_their_range(seed: int, scale: float, sign: int) -> None:
    random = np.random.default_rng(seed)
    sums = {
        n: scale * (random.normal(size=s) + sign * random.integers(0, 9)) for n, s in layout(STUDY).items()
    }
    noise = random.choice([0.0, 1.0, 30.0])
    found = describe(STUDY, sums, [noise], 0)
    json.dumps(found.as_json(), allow_nan=False)
    for name, figure in figures(found).items():
        assert figure.low <= figure.value <= figure.high
        low, high = 0.0, 1.0
        if name[0] == "count":
            high = math.inf
        elif name[0] == "mean":
            low, high = SPANS[name[1]]
        elif name[0] == "quantile":
            low, high = RANGES[name[1]]
        elif name[0] == "deviation":
            high = (SPANS[name[1]][1] - SPANS[name[1]][0]) / 2
        assert low - 1e-9 <= figure.low, name
        assert figure.high <= high + 1e-9, name
    scaling = moments(STUDY, sums, [noise])
    assert np.isfinite(scaling.mean).all()
    assert (scaling.deviation >= [0.3, *[0.08] * 6]).all()
    encode_coded(COHORT[0], STUDY, scaling)


# --- the estimators


def test_consistent_counts_are_least_squares() -> None:
    random = np.random.default_rng(1)
    sizes = [3, 5, 21]
    parts = [random.normal(50, 10, m) for m in sizes]
    found = consistent([(p, len(p) - 1) for p in parts], 4.0)
    # Constrained least squares by its normal equations, and the covariance of its projection.
    constraints = np.zeros((2, sum(sizes)))
    constraints[0, :3], constraints[0, 3:8] = 1, -1
    constraints[1, :3], constraints[1, 8:] = 1, -1
    projection = np.eye(29) - constraints.T @ np.linalg.solve(constraints @ constraints.T, constraints)
    assert np.concatenate([c.cells for c in found]) == pytest.approx(projection @ np.concatenate(parts))
    for c, start in zip(found, [0, 3, 8], strict=True):
        block = 4.0 * projection[start : start + len(c.cells), start : start + len(c.cells)]
        expected = 4.0 * (np.eye(len(c.cells)) + c.coupling)
        assert block == pytest.approx(expected)
        present = np.arange(len(c.cells)) < c.present
        assert c.patients_variance == pytest.approx(present @ block @ present)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.8])
@pytest.mark.parametrize("below", [2.5, 10.0])
def test_ratios_hold_their_level_however_noisy(correlation: float, below: float) -> None:
    """Fieller's interval is exact; where below is not clearly positive all of the range is told."""
    random = np.random.default_rng(3)
    a, b = random.multivariate_normal([0.4 * below, below], [[1, correlation], [correlation, 1]], 4000).T
    found = [ratio(x, y, (1.0, correlation, 1.0), lowest=0.0) for x, y in zip(a, b, strict=True)]
    covered = np.mean([f.low <= 0.4 <= f.high for f in found])
    assert 0.94 <= covered <= 0.98
    for x, y, f in zip(a[:50], b[:50], found[:50], strict=True):
        for end in (f.low, f.high):
            if 0 < end < 1:  # an end is where the test just rejects
                error = math.sqrt(1 - 2 * end * correlation + end * end)
                assert abs(x - end * y) / error == pytest.approx(norm.ppf(0.975), rel=1e-6)


def test_quantiles_are_the_inverse_of_the_histogram() -> None:
    cells = np.array([10.0, 0.0, 30.0, 40.0, 20.0])
    (count,) = consistent([(cells, 5)], 0.0)
    found = quantiles(count, [0.05, 0.25, 0.6, 0.9])
    assert [f.value for f in found] == pytest.approx([0.5, 2.5, 3.5, 4.5])
    assert [f.low for f in found] == pytest.approx([0.5, 2.5, 3.5, 4.5], abs=1e-6)
    assert [f.high for f in found] == pytest.approx([0.5, 2.5, 3.5, 4.5], abs=1e-6)


# --- scaling


def test_moments_scale_to_mean_0_and_deviation_1() -> None:
    coded, _ = cohort_of_500()
    chosen = np.unique(COHORT[1], return_index=True)[1]  # one record each
    coded = Coded({**coded.columns, "age": coded.columns["age"].clip(*SPANS["age"])}, coded.labels)
    one = taken(coded, chosen)
    scaling = moments(STUDY, patient_sums(STUDY, one, np.arange(500)), [0.0])
    features = encode_coded(one, STUDY, scaling).features
    place = {name: i for i, name in enumerate(feature_names(STUDY))}
    age = features[:, place["age"]][~np.isnan(one.columns["age"])]
    wave = features[:, [place[f"wave_{i}"] for i in range(6)]][~np.isnan(one.columns["wave"][:, 0])]
    for values in (age, wave):
        assert values.mean() == pytest.approx(0, abs=1e-5)
        assert values.std() == pytest.approx(1, abs=1e-3)
    plain = encode_coded(one, STUDY)
    others = [i for name, i in place.items() if name != "age" and not name.startswith("wave_")]
    flags = [i for name, i in place.items() if name.endswith(":missing")]
    assert np.array_equal(features[:, others], plain.features[:, others])
    assert np.array_equal(features[:, flags], plain.features[:, flags])


def test_a_variance_lost_in_noise_falls_back_to_the_public_interval() -> None:
    far = moments(STUDY, EXACT, [1e4])
    assert far.mean == pytest.approx([53.0, *[1.0] * 6])
    assert far.deviation == pytest.approx([15.0, *[4.0] * 6])
    interval = encode_coded(COHORT[0], STUDY).features
    assert encode_coded(COHORT[0], STUDY, far).features == pytest.approx(interval.clip(-5, 5), abs=1e-5)


def test_a_deviation_has_a_floor() -> None:
    random = np.random.default_rng(0)
    columns = {**COHORT[0].columns, "age": random.normal(60, 0.01, len(COHORT[1]))}
    sums = patient_sums(STUDY, Coded(columns, COHORT[0].labels), COHORT[1])
    assert moments(STUDY, sums, [0.0]).deviation[0] == pytest.approx(0.3)  # 1 % of 38 to 68


def small_scaling(**changes: Any) -> Scaling:
    return Scaling(**{"mean": np.full(7, 50.0), "deviation": np.full(7, 10.0), **changes})


def test_numbers_are_standardised_and_kept_within_five_deviations() -> None:
    ages = np.array([50.0, 60.0, 0.0, 120.0, np.nan])
    coded = Coded({**{n: v[:5] for n, v in COHORT[0].columns.items()}, "age": ages}, np.zeros(5))
    found = encode_coded(coded, STUDY, small_scaling())
    assert found.features[:, 0].tolist() == [0, 1, -5, 5, 0]
    assert found.features.dtype == np.float32
    tiny = small_scaling(deviation=np.full(7, 5e-324))
    assert encode_coded(coded, STUDY, tiny).features[:, 0].tolist() == [0, 5, -5, 5, 0]


def test_each_source_has_its_own_scale() -> None:
    coded = Coded(
        {**COHORT[0].columns, "wave": np.tile(np.arange(6.0), (len(COHORT[1]), 1))}, COHORT[0].labels
    )
    scaling = small_scaling(
        mean=np.array([0.0, 0, 1, 2, 3, 4, 6]), deviation=np.array([1.0, 1, 1, 1, 1, 1, 2])
    )
    place = feature_names(STUDY).index("wave_0")
    assert encode_coded(coded, STUDY, scaling).features[0, place : place + 6].tolist() == [
        0,
        0,
        0,
        0,
        0,
        -0.5,
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": np.zeros(6)}, r"mean is float64 \[6\]"),
        ({"deviation": np.ones((7, 1))}, r"deviation is float64 \[7, 1\]"),
        ({"mean": np.zeros(7, dtype=np.float32)}, "float32"),
        ({"mean": np.full(7, np.nan)}, "NaN"),
        ({"deviation": np.full(7, np.inf)}, "infinity"),
        ({"deviation": np.array([1.0, 1, 1, 0, 1, 1, 1])}, "positive"),
        ({"deviation": -np.ones(7)}, "positive"),
    ],
)
def test_a_scaling_that_does_not_fit_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        encode_coded(COHORT[0], STUDY, small_scaling(**changes))
    assert caught.value.remedy


def test_a_study_that_asks_for_no_statistics_has_none() -> None:
    none = statistics_study(statistics=None)
    for ask in (
        lambda: layout(none),
        lambda: describe(none, EXACT, [1.0], 1),
        lambda: moments(none, EXACT, [1.0]),
    ):
        with pytest.raises(StudyError, match=r"\[statistics\]"):
            ask()
