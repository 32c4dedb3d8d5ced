"""Times until an event: what a label means, the hazard loss by hand, and metrics of released sums against
plain loops over pairs of patients and over patients."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import make_site, study

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.encoding import encode
from common.errors import DataError, SiteError, StudyError
from common.histograms import EXACT_BINS, Packed, histogram_shapes, histograms, histograms_apart, merged
from common.metrics import at_horizons, measure
from common.objectives import record_losses, scores
from common.privacy.plan import histogram_sensitivity
from common.study import Objective, Study
from common.subgroups import gaps
from common.survival import Clock, coarser, time_positions
from common.table import Table
from common.uncertainty import estimate
from server.display import show_columns

LABEL = {"column": "T", "event": "E", "range": [0, 100], "unit": "d", "intervals": 10}
SURVIVAL = Objective(task="survival")
Floats = np.ndarray[Any, np.dtype[np.float64]]


def survival(label: dict[str, Any] | None = None, **changes: Any) -> Study:
    return study(
        data={"label": {**LABEL, **(label or {})}},
        model={"name": "logistic-hazard"},
        objective={"task": "survival"},
        **changes,
    )


def drawn(seed: int, count: int, digits: int = 6) -> tuple[Floats, Floats, Floats]:
    """Times, events and log hazards; some are censored early, some after the last interval."""
    random = np.random.default_rng(seed)
    risk = random.normal(size=count)
    event, censored = random.exponential(60 * np.exp(-risk)), random.uniform(0, 130, count)
    times = np.minimum(np.minimum(event, censored), 100.0).round(digits)
    return times, (event <= np.minimum(censored, 100.0)).astype(float), risk


def told(
    wanted: Study, curves: Floats, times: Floats, seen: Floats, bins: int = EXACT_BINS
) -> dict[str, Floats]:
    labels = torch.from_numpy(time_positions(times, seen, wanted.data.label.edges))
    weights = torch.ones(len(times), dtype=torch.float64)
    return histograms(wanted, torch.from_numpy(curves.astype(np.float32)), labels, weights, bins)


def curves_of(risk: Floats, intervals: int = 10) -> Floats:
    """Survival curves that fall faster the higher the risk."""
    hazard = 1 / (1 + np.exp(2.5 - risk))
    steps = np.arange(1, intervals + 1)
    return np.asarray((1 - hazard[:, None]) ** steps)


# --- labels


def test_positions_count_intervals() -> None:
    found = time_positions(
        np.array([0.0, 5.0, 10.0, 30.0, 31.0, 99.0]), np.array([1.0, 0, 1, 1, 1, 0]), (0.0, 10.0, 30.0, 40.0)
    )
    assert found[:, 0].tolist() == pytest.approx([0, 0.5, 1, 2, 2.1, 3])
    assert found[:, 1].tolist() == [1, 0, 1, 1, 1, 0]


def test_an_event_after_the_last_interval_is_censored_there() -> None:
    assert time_positions(np.array([41.0]), np.array([1.0]), (0.0, 10.0, 40.0)).tolist() == [[2, 0]]
    assert time_positions(np.array([40.0]), np.array([1.0]), (0.0, 10.0, 40.0)).tolist() == [[2, 1]]


def table(**columns: list[str | None]) -> Table:
    count = len(next(iter(columns.values())))
    values: dict[str, list[str | None]] = {f"x_{i}": ["0.5"] * count for i in range(4)}
    return Table.of("t.csv", {"patient_id": [f"p{i}" for i in range(count)], **values, **columns})


def test_a_label_from_text() -> None:
    found = encode(table(T=["5", "20", "100"], E=["1", "0", "1.0"]), survival())
    assert found.labels.dtype == np.float32
    assert found.labels.tolist() == [[0.5, 1], [2, 0], [10, 1]]
    cut = survival(
        {"intervals": None, "cuts": [20, 50], "event_codes": ["dead"], "censored_codes": ["alive"]}
    )
    found = encode(table(T=["10", "60", "35"], E=["dead", "dead", "alive"]), cut)
    assert found.labels.tolist() == [[0.5, 1], [2, 0], [1.5, 0]]


@pytest.mark.parametrize(
    ("column", "cell", "problem"),
    [
        ("T", "-1", "outside the plausible range 0 to 100 d"),
        ("T", "abc", "not a number"),
        ("T", "", "missing; every record needs a label"),
        ("E", "2", "unknown label code"),
        ("E", None, "missing; every record needs a label"),
    ],
)
def test_labels_that_do_not_fit(column: str, cell: str | None, problem: str) -> None:
    columns: dict[str, list[str | None]] = {"T": ["5", "6"], "E": ["1", "0"]}
    columns[column][1] = cell
    with pytest.raises(DataError, match=rf"column {column}: {problem}, once \(row 2\)") as raised:
        encode(table(**columns), survival())
    assert not cell or cell not in raised.value.message.replace("row 2", "")


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ({"intervals": None}, "give one of `intervals` and `cuts`"),
        ({"cuts": [5.0]}, "give one of `intervals` and `cuts`"),
        ({"intervals": None, "cuts": [5.0, 5.0]}, "cuts must rise"),
        ({"intervals": None, "cuts": [0.0, 5.0]}, "cuts must rise"),
        ({"intervals": None, "cuts": [500.0]}, "cuts must rise within range"),
        ({"event": None}, "intervals and cuts go with `event` only"),
        ({"range": None, "unit": None}, "give `classes`, or `range` and `unit`"),
        ({"event_codes": ["0"]}, "a code stands for two classes"),
        ({"event": "T"}, "column names must be unique"),
    ],
)
def test_survival_labels_of_a_study_that_are_wrong(label: dict[str, Any], problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        survival(label)


def test_studies_that_do_not_fit_together() -> None:
    with pytest.raises(StudyError, match="survival one with event"):
        study(objective={"task": "survival"})
    with pytest.raises(StudyError, match="survival takes the loss hazard"):
        study(data={"label": LABEL}, objective={"task": "survival", "loss": "hinge"})
    with pytest.raises(StudyError, match="horizons are for survival studies"):
        study(evaluation={"horizons": [5.0]})
    with pytest.raises(StudyError, match="ends of the label's intervals, which are 10, 20"):
        survival(evaluation={"horizons": [15.0]})
    with pytest.raises(StudyError, match="horizons must rise"):
        survival(evaluation={"horizons": [50.0, 20.0]})
    assert survival().horizons == (100.0,)
    assert survival().outputs == 10


# --- loss


def loss_by_hand(logits: Floats, position: float, seen: float) -> float:
    """-log of the likelihood of one patient's own time, interval by interval."""
    hazard, total = 1 / (1 + np.exp(-logits)), 0.0
    for k, h in enumerate(hazard):
        if seen and (k < position <= k + 1 or (k == 0 and position == 0)):
            return total - float(np.log(h))
        if (seen and position > k) or (not seen and position >= k + 0.5):
            total -= float(np.log(1 - h))
    return total


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    position=st.one_of(st.floats(0, 6, width=32), st.sampled_from([0.0, 0.5, 1.0, 5.0, 5.5, 6.0])),
    seen=st.booleans(),
)
def test_the_hazard_loss_is_the_likelihood(seed: int, position: float, seen: bool) -> None:
    logits = np.random.default_rng(seed).normal(size=6) * 2
    labels = torch.tensor([[position, float(seen)]])
    found = record_losses(SURVIVAL, torch.from_numpy(logits)[None].float(), labels)
    assert found.shape == (1,)
    assert float(found) == pytest.approx(loss_by_hand(logits, position, float(seen)), abs=1e-5)


def test_scores_are_survival_curves() -> None:
    outputs = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    expected = np.cumprod(1 - 1 / (1 + np.exp(-outputs.double().numpy())), axis=1)
    assert np.allclose(scores(SURVIVAL, outputs).numpy(), expected, atol=1e-6)


def test_the_best_constant_hazards_are_the_life_tables() -> None:
    """Without features the loss is least where each hazard is events / at risk."""
    times, seen, _ = drawn(3, 400)
    labels = torch.from_numpy(time_positions(times, seen, survival().data.label.edges))
    hazards = []
    for low, high in pairwise(survival().data.label.edges):
        events = ((times > low) & (times <= high) & (seen > 0)).sum()
        survived = ((times > high) | ((seen == 0) & (times >= (low + high) / 2))).sum()
        hazards.append(events / (events + survived))
    logits = torch.logit(torch.tensor(hazards, dtype=torch.float64)).requires_grad_()
    record_losses(SURVIVAL, logits.expand(400, 10), labels).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-4


# --- metrics


def harrell(times: Floats, seen: Floats, risk: Floats) -> float:
    """All pairs of which one is known to have the event first. As for lifelines' `concordance_index(T, -risk,
    E)` somebody censored at the very time of an event is still there."""
    won = pairs = 0.0
    for i in np.flatnonzero(seen):
        later = (times > times[i]) | ((times == times[i]) & (seen == 0))
        pairs += later.sum()
        won += (risk[i] > risk[later]).sum() + (risk[i] == risk[later]).sum() / 2
    return won / pairs


def graf(times: Floats, seen: Floats, survived: Floats, horizon: float) -> float:
    """Brier score with weights by Kaplan-Meier of the censoring, patient by patient."""

    def uncensored(until: float, inclusive: bool) -> float:
        share = 1.0
        for t in np.unique(times[seen == 0]):
            if t < until or (inclusive and t == until):
                there = (times >= t).sum() - ((times == t) & (seen > 0)).sum()
                share *= 1 - ((times == t) & (seen == 0)).sum() / there
        return share

    total = 0.0
    for t, e, s in zip(times, seen, survived, strict=True):
        if t <= horizon and e:
            total += s**2 / uncensored(t, False)
        elif t >= horizon:
            total += (1 - s) ** 2 / uncensored(horizon, False)
    return total / len(times)


def kaplan_meier(times: Floats, seen: Floats, horizon: float) -> float:
    share = 1.0
    for t in np.unique(times[(seen > 0) & (times <= horizon)]):
        share *= 1 - ((times == t) & (seen > 0)).sum() / (times >= t).sum()
    return share


@pytest.mark.parametrize("horizon", [40.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_on_the_cells_exact_metrics_are_those_of_plain_loops(seed: int, horizon: float) -> None:
    """Whole tenths of days are edges of the 1,000 cells; risks are brought to the middles of bins."""
    wanted = survival(evaluation={"horizons": [horizon]})
    times, seen, risk = drawn(seed, 250, digits=0 if seed % 2 else 1)
    curves = curves_of(risk).astype(np.float32).astype(np.float64)
    sums = told(wanted, curves, times, seen)
    found = measure(wanted, sums)
    binned = np.floor((1 - curves.mean(axis=1)) * 1000)
    assert found.patients == 250
    # who leaves at a horizon is there for another tenth of a day
    near = 1e-9 if horizon == 100 or not (times[seen == 0] == horizon).any() else 1e-3
    assert found.c_index == pytest.approx(harrell(times, seen, binned), abs=near)
    (point,) = at_horizons(wanted, sums)
    survived = curves[:, round(horizon / 10) - 1]
    assert point.brier == found.brier == pytest.approx(graf(times, seen, survived, horizon), abs=1e-6)
    assert point.survival == pytest.approx(kaplan_meier(times, seen, horizon), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_at_any_times_they_agree_to_a_thousandth(seed: int) -> None:
    wanted = survival({"intervals": 7})
    times, seen, risk = drawn(seed, 600)
    curves = curves_of(risk, 7)
    found = measure(wanted, told(wanted, curves, times, seen))
    assert found.c_index == pytest.approx(harrell(times, seen, 1 - curves.mean(axis=1)), abs=1e-3)
    assert found.brier == pytest.approx(graf(times, seen, curves[:, -1], 100.0), abs=2e-3)


@pytest.mark.parametrize("bins", [2, 4, 10, 30, EXACT_BINS])
def test_sites_add_up_and_travel_packed(bins: int) -> None:
    wanted = survival(evaluation={"horizons": [30.0, 100.0]})
    times, seen, risk = drawn(1, 300)
    curves = curves_of(risk)
    whole = told(wanted, curves, times, seen, bins)
    assert {n: a.shape for n, a in whole.items()} == histogram_shapes(wanted, bins)
    halves = [told(wanted, curves[h], times[h], seen[h], bins) for h in (slice(100), slice(100, None))]
    for name, array in merged(halves).items():  # type: ignore[arg-type]
        assert np.allclose(array, whole[name])
    labels = time_positions(times, seen, wanted.data.label.edges)
    kind: int = Packed(bins)
    apart = histograms_apart(wanted, curves.astype(np.float32), labels, np.ones(300), kind, [100, 200])
    alone = histograms(
        wanted,
        torch.from_numpy(curves[100:].astype(np.float32)),
        torch.from_numpy(labels[100:]),
        torch.ones(200, dtype=torch.float64),
        kind,
    )
    assert {n: a.tobytes() for n, a in apart[1].items()} == {n: a.tobytes() for n, a in alone.items()}


def test_few_bins_are_few_cells_of_time_with_every_horizon_an_edge() -> None:
    wanted = survival({"intervals": 12}, evaluation={"horizons": [25.0, 100.0]})
    assert Clock.of(wanted, 4).edges == (0, 3, 6, 9, 12)
    assert Clock.of(wanted, 3).edges == (0, 3, 4, 8, 12)
    assert Clock.of(wanted, 12).cells == 13
    assert Clock.of(wanted, 30).cells == 25
    assert Clock.of(wanted, EXACT_BINS).cells == 12 * 83 + 1


def test_coarser_sums_hold_the_same_patients() -> None:
    wanted = survival({"intervals": 7}, evaluation={"horizons": [100.0]})
    times, seen, risk = drawn(2, 500)
    sums = told(wanted, curves_of(risk, 7), times, seen)
    small = coarser(wanted, sums, 100)
    assert small["risks"].shape[-1] == 100
    assert {n: a.shape for n, a in small.items()} == histogram_shapes(wanted, 100)
    for name, array in small.items():
        assert array.sum() == pytest.approx(sums[name].sum())
    a, b = measure(wanted, sums), measure(wanted, small)
    assert a.c_index == pytest.approx(b.c_index, abs=0.02)
    assert a.brier == pytest.approx(b.brier, abs=0.02)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    seed=st.integers(0, 100_000),
    records=st.integers(1, 5),
    bins=st.sampled_from([2, 10, 50]),
    horizons=st.sampled_from([[], [50.0], [10.0, 50.0, 100.0]]),
    odd=st.sampled_from(["", "sure", "nan"]),
)
def test_a_patient_adds_at_most_the_stated_sensitivity(
    seed: int, records: int, bins: int, horizons: list[float], odd: str
) -> None:
    wanted = survival(evaluation={"horizons": horizons})
    random = np.random.default_rng(seed)
    curves = np.sort(random.random((records, 10)), axis=1)[:, ::-1].copy()
    if odd:
        curves[:] = {"sure": float(random.integers(2)), "nan": np.nan}[odd]
    times, seen = random.uniform(0, 120, records), random.integers(0, 2, records).astype(float)
    labels = torch.from_numpy(time_positions(times, seen, wanted.data.label.edges))
    weights = torch.full((records,), 1 / records, dtype=torch.float64)
    sums = histograms(wanted, torch.from_numpy(curves.astype(np.float32)), labels, weights, bins)
    norm = np.sqrt(sum(float((a**2).sum()) for a in sums.values()))
    assert norm <= histogram_sensitivity(wanted) + 1e-9


def test_the_sensitivity_is_reached() -> None:
    wanted = survival(evaluation={"horizons": [10.0, 50.0, 100.0]})
    sums = told(wanted, np.ones((1, 10)), np.array([5.0]), np.array([1.0]), 10)
    norm = np.sqrt(sum(float((a**2).sum()) for a in sums.values()))
    assert norm == pytest.approx(histogram_sensitivity(wanted)) == 2.0


def test_noise_of_the_c_index_has_mean_zero_and_its_interval_covers() -> None:
    wanted = survival(evaluation={"bins": 4})
    times, seen, risk = drawn(5, 2000)
    exact = told(wanted, curves_of(risk), times, seen, 4)
    truth = measure(wanted, exact)
    random = np.random.default_rng(0)
    found, inside = [], {"c_index": 0, "brier": 0}
    for _ in range(60):
        noisy = {n: a + 8.0 * random.standard_normal(a.shape) for n, a in exact.items()}
        each = estimate(wanted, noisy, 8.0)
        found.append(each.measured.c_index)
        for name in inside:
            low, high = each.intervals.noise[name]
            inside[name] += low <= (getattr(truth, name) or 0.0) <= high
            assert name in each.intervals.sampling
    assert np.mean([f for f in found if f is not None]) == pytest.approx(truth.c_index, abs=0.02)
    assert min(inside.values()) >= 51  # of 60, of which 57 are expected


def test_sampling_intervals_are_about_the_bootstraps() -> None:
    wanted = survival()
    times, seen, risk = drawn(6, 300)
    curves = curves_of(risk)
    low, high = estimate(wanted, told(wanted, curves, times, seen), 0.0).intervals.sampling["c_index"]
    random = np.random.default_rng(1)
    again = []
    for _ in range(200):
        chosen = random.integers(0, 300, 300)
        again.append(harrell(times[chosen], seen[chosen], 1 - curves[chosen].mean(axis=1)))
    spread = np.quantile(again, [0.025, 0.975])
    assert low == pytest.approx(spread[0], abs=0.02)
    assert high == pytest.approx(spread[1], abs=0.02)


@pytest.mark.parametrize("value", [0.0, -3.0])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_nobody_is_there(value: float, noise: float) -> None:
    wanted = survival(evaluation={"horizons": [50.0, 100.0]})
    sums = {n: np.full(shape, value) for n, shape in histogram_shapes(wanted, 10).items()}
    found = estimate(wanted, sums, noise).measured
    assert (found.patients, found.c_index, found.brier) == (0.0, None, None)


def test_the_table_shows_the_c_index() -> None:
    assert show_columns(survival()) == {"c_index": "C-index", "brier": "Brier score"}


def test_subgroups_have_gaps_in_the_c_index() -> None:
    column = {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4}
    sex = {"kind": "categorical", "name": "sex", "codes": {"0": "female", "1": "male"}}
    wanted = study(
        data={"columns": [column, sex], "label": LABEL},
        objective={"task": "survival"},
        evaluation={"subgroups": ["sex"], "bins": 4},
    )
    times, seen, risk = drawn(4, 400)
    groups = np.arange(400) % 2
    risk = np.where(groups == 1, -risk, risk)
    labels = torch.from_numpy(time_positions(times, seen, wanted.data.label.edges))
    sums = histograms(
        wanted,
        torch.from_numpy(curves_of(risk).astype(np.float32)),
        labels,
        torch.ones(400, dtype=torch.float64),
        EXACT_BINS,
        torch.from_numpy(groups)[:, None],
    )
    assert {n: a.shape for n, a in sums.items()} == histogram_shapes(wanted, EXACT_BINS)
    (gap,) = gaps(wanted, sums, 0.0)
    assert (gap.metric, gap.highest, gap.lowest) == ("c_index", "0", "1")
    assert gap.gap > 0.3 > (gap.sampling or 0.0)


def test_a_site_has_its_own_codes_and_unit(tmp_path: Path) -> None:
    folder = make_site(tmp_path)
    lines = [f"p{i},0,0,0,0,{i + 1},{'dead' if i % 2 else 'alive'}" for i in range(20)]
    folder.data_path.write_text("\n".join(["patient_id,x_0,x_1,x_2,x_3,weeks,status", *lines]) + "\n")
    site = {
        "site": {"name": "north", "public_size": 50},
        "data": {
            "file": "patients.csv",
            "columns": {
                "T": {"column": "weeks", "unit": "wk", "multiply": 7.0},
                "E": {"column": "status", "codes": {"dead": "1", "alive": "0"}},
            },
        },
    }
    (tmp_path / "site.toml").write_text(tomli_w.dumps(site))
    wanted = survival({"range": [0, 200]})
    cohort = load_cohort(SiteFolder(tmp_path), wanted, b"0123456789abcdef")
    found = torch.cat([cohort.train.labels, cohort.test.labels])
    found = found[found[:, 0].argsort()]
    assert torch.allclose(found[:, 0], torch.arange(1, 21) * 7 / 20)
    assert found[:, 1].tolist() == [0, 1] * 10
    site["data"]["columns"]["E"]["codes"] = {"dead": "2"}  # type: ignore[index]
    (tmp_path / "site.toml").write_text(tomli_w.dumps(site))
    with pytest.raises(SiteError, match=r"data.columns.E: 1 of its codes are mapped to codes"):
        load_cohort(SiteFolder(tmp_path), wanted, b"0123456789abcdef")
