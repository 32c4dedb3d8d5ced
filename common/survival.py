"""Times until an event: how labels and released sums hold them, and metrics of such sums.

Time is cut into a study's intervals; sums are in cells of some intervals each, or of a part of one; one more
cell stands for all time after the last interval. A cell (a, b] holds its end. Within it events come before
those who left without (censored), as is the convention for equal times. Whoever leaves at a horizon, without
the event until then, belongs to the cell after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from common.cells import Cells
from common.curves import ratio
from common.study import Study

Array = np.ndarray[Any, np.dtype[Any]]
Floats = npt.NDArray[np.float64]

MOST_CELLS = 1_000  # of risk, and of time, in exact runs
SNAP = 1e-5  # intervals; labels are float32, and a round time on an edge must be counted where it is
HEAVIEST = 20.0  # weight of a patient who stands for those of whom censoring leaves nothing known


def time_positions(times: Floats, seen: Floats, edges: Sequence[float]) -> npt.NDArray[np.float32]:
    """Labels as a loss takes them.

    Args:
        times: float64 [records], in the label's unit.
        seen: float64 [records], 1 = the event, 0 = censored.
        edges: of the K intervals.

    Returns:
        float32 [records, 2]: the time in intervals (2.5 is the middle of the third one), at most K; and 1 if
        the event was seen. Whoever has it after the last interval is censored at K.
    """
    edge = np.asarray(edges, dtype=np.float64)
    interval = np.clip(np.searchsorted(edge, times, side="right") - 1, 0, len(edge) - 2)
    position = interval + (times - edge[interval]) / np.diff(edge)[interval]
    last = len(edge) - 1
    event = (seen > 0) & (times <= edge[-1])
    return np.stack([np.clip(position, 0.0, last), event], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Clock:
    """Cells of time.

    Attributes:
        edges: of the cells, in intervals from the start; one more cell stands for all that comes after.
        horizons: of the study, as cells that end by then; `ends`: in intervals.
    """

    edges: tuple[float, ...]
    horizons: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def cells(self) -> int:
        return len(self.edges)

    @staticmethod
    @lru_cache(maxsize=256)
    def _made(count: int, ends: tuple[int, ...], bins: int) -> Clock:
        wanted = min(bins, MOST_CELLS)
        parts = max(1, wanted // count)
        edges = {i / parts for i in range(count * parts + 1)}
        if wanted < count:
            edges = {float(round(i * count / wanted)) for i in range(wanted + 1)} | set(map(float, ends))
        ordered = tuple(sorted(edges))
        return Clock(ordered, tuple(ordered.index(end) for end in ends), ends)

    @staticmethod
    def of(study: Study, bins: int) -> Clock:
        """About as many cells as bins: whole intervals, or equal parts of one; each horizon is an edge."""
        edges = study.data.label.edges
        return Clock._made(len(edges) - 1, tuple(edges.index(h) for h in study.horizons), int(bins))


def sum_shapes(study: Study, bins: int) -> dict[str, tuple[int, ...]]:
    """Of `risk_sums`."""
    clock = Clock.of(study, bins)
    return {
        "risks": (clock.cells, 2, min(int(bins), MOST_CELLS)),
        "missed": (len(clock.horizons), clock.cells),
    }


def risk_sums(study: Study, survival: Array, labels: Array, weights: Array, bins: int) -> dict[str, Cells]:
    """What a site releases of its test patients.

    The risk is 1 less the mean, over the ends of the intervals, of the probability to live beyond: the share
    of the time that the patient is expected to lose. It ranks as the hazards do where they are proportional.

    Args:
        survival: float32 [records, K], probabilities to live beyond each interval.
        labels: float32 [records, 2], see `time_positions`.
        weights: float64 [records]; a patient's sum to 1.

    Returns:
        `risks` [time, 2 censored/event, risk]: patients. `missed` [horizons, time]: Σ over patients of the
        squared error of the predicted survival S at a horizon: S² in the cell of an event before it, (1 - S)²
        in the last cell for whoever lives beyond; whoever is censored before adds nothing.
    """
    clock = Clock.of(study, bins)
    risks = min(int(bins), MOST_CELLS)
    kept = np.nan_to_num(survival.astype(np.float64), nan=0.0).clip(0.0, 1.0)
    cell, seen = _cell_of(clock, labels)
    risk = ((1.0 - kept.mean(axis=1)).clip(0.0, 1.0) * risks).astype(np.int64).clip(0, risks - 1)
    found = {
        "risks": Cells((clock.cells, 2, risks), (cell * 2 + seen) * risks + risk, weights),
    }
    index, missed = list[Array](), list[Array]()
    for h, horizon in enumerate(clock.horizons):
        own = kept[:, clock.ends[h] - 1]
        before, beyond = (seen > 0) & (cell < horizon), cell >= horizon
        index.append(h * clock.cells + np.where(before, cell, clock.cells - 1))
        missed.append(weights * np.where(before, own**2, np.where(beyond, (1.0 - own) ** 2, 0.0)))
    shape = (len(clock.horizons), clock.cells)
    found["missed"] = Cells(shape, np.concatenate(index), np.concatenate(missed))
    return found


def _cell_of(clock: Clock, labels: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Each record's cell of time, and 1 if its event was seen."""
    place, edges = labels[:, 0].astype(np.float64), np.asarray(clock.edges)
    seen, last = (labels[:, 1] > 0).astype(np.int64), clock.cells - 1
    cell = (np.searchsorted(edges, place - SNAP) - 1).clip(0, last - 1)
    for end, horizon in zip((*clock.ends, edges[-1]), (*clock.horizons, last), strict=True):
        cell = np.where((seen == 0) & (np.abs(place - end) <= SNAP), horizon, cell)
    return cell.astype(np.int64), seen


# --- metrics; all take any leading axes


def c_index(risks: Array) -> Array:
    """Harrell's concordance: of two patients of whom one has the event while the other is still observed, how
    often it is the one with the higher risk; equal risks count half (Harrell et al. 1982).

    Args:
        risks: patients [..., time, 2, risk]. Whoever is censored in the cell of an event is observed then;
            two events in one cell aren't compared. Noised counts enter as they are: every product is of two
            different cells, so its noise has mean zero.
    """
    censored, events = risks[..., 0, :], risks[..., 1, :]
    everybody = censored + events
    after = _from_last(everybody, axis=-2) - events
    below = np.cumsum(after, axis=-1) - after
    won = (events * (below + after / 2)).sum(axis=(-2, -1))
    pairs = (events.sum(axis=-1) * after.sum(axis=-1)).sum(axis=-1)
    fewest = np.minimum(events.sum(axis=(-2, -1)), everybody.sum(axis=(-2, -1)))
    return np.where(fewest > 0, ratio(won, pairs), np.nan)


def kept_shares(counts: Array, lost: int) -> Array:
    """Kaplan and Meier (1958): the share that isn't lost up to the end of each cell, [..., time].

    Args:
        counts: patients by time and event [..., time, 2].
        lost: 1: by the event; 0: by censoring, of those without an event in the cell.
    """
    at_risk = _from_last(counts.sum(axis=-1), axis=-1)
    if lost == 0:
        at_risk = at_risk - counts[..., 1]
    hazard = np.divide(counts[..., lost], at_risk, out=np.zeros(at_risk.shape), where=at_risk > 0)
    return np.asarray(np.cumprod(1.0 - hazard.clip(0.0, 1.0), axis=-1))


def brier_scores(study: Study, risks: Array, missed: Array) -> Array:
    """Expected squared error of the predicted survival at each horizon, [..., horizons].

    Censored patients are made up for by weights 1 / G, G the share that isn't censored before the event or
    the horizon (Graf et al. 1999), of at most `HEAVIEST`.

    Args:
        risks: patients [..., time, 2, risk].
        missed: see `risk_sums`, [..., horizons, time].
    """
    clock = Clock.of(study, risks.shape[-1])
    counts = risks.sum(axis=-1)
    uncensored = np.maximum(kept_shares(counts, 0), 1.0 / HEAVIEST)
    before = np.concatenate([np.ones((*counts.shape[:-2], 1)), uncensored[..., :-1]], axis=-1)
    patients, found = counts.sum(axis=(-2, -1)), []
    for h, horizon in enumerate(clock.horizons):
        early = (missed[..., h, :horizon] / before[..., :horizon]).sum(axis=-1)
        found.append(ratio(early + missed[..., h, -1] / before[..., horizon], patients))
    return np.stack(found, axis=-1)


def survival_shares(study: Study, risks: Array) -> Array:
    """The share of patients that lives beyond each horizon (Kaplan & Meier), [..., horizons]."""
    clock = Clock.of(study, risks.shape[-1])
    alive = kept_shares(risks.sum(axis=-1), 1)
    return np.stack([alive[..., horizon - 1] for horizon in clock.horizons], axis=-1)


def coarser(study: Study, sums: dict[str, Array], most: int) -> dict[str, Array]:
    """The same patients, about, in at most `most` bins of risk or a few more, and as many cells of time.

    Args:
        sums: of `risk_sums`, without leading axes.
    """
    bins = sums["risks"].shape[-1]
    width = next((w for w in range(-(-bins // most), bins) if bins % w == 0), 1)
    fine, coarse = Clock.of(study, bins), Clock.of(study, bins // width)
    ends = np.asarray(fine.edges)[1:]
    places = np.append(np.searchsorted(np.asarray(coarse.edges), ends - SNAP) - 1, coarse.cells - 1)
    by_risk = sums["risks"].reshape(fine.cells, 2, bins // width, width).sum(axis=-1)
    risks, missed = (
        np.zeros((coarse.cells, 2, bins // width)),
        np.zeros((len(coarse.horizons), coarse.cells)),
    )
    np.add.at(risks, places, by_risk)
    np.add.at(missed.T, places, sums["missed"].T)
    return {"risks": risks, "missed": missed}


def _from_last(values: Array, axis: int) -> Array:
    """Running sum from the end: of each cell and all after it."""
    return np.flip(np.cumsum(np.flip(values, axis), axis=axis), axis)
