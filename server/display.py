"""What a person sees of sessions: a live bar of rounds, and the table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.console import Speaker
from common.metrics import Measured
from common.study import Study
from common.uncertainty import Intervals
from server.report import SessionReport, SiteReport

COLUMNS = {"auroc": "AUROC", "accuracy": "accuracy", "calibration_error": "cal. error"}
ERROR_COLUMNS = {"mae": "MAE", "rmse": "RMSE", "bias": "mean error"}
SURVIVAL_COLUMNS = {"c_index": "C-index", "brier": "Brier score"}
INTERVAL_COLUMNS = {"mae": "MAE", "coverage": "coverage", "interval_width": "interval"}
TITLES = {**COLUMNS, **ERROR_COLUMNS, **SURVIVAL_COLUMNS, "near": "within tolerance"}


def show(speaker: Speaker, study: Study, reports: Sequence[SessionReport]) -> None:
    """The table of one session, or of several that differ in their seed (mean ± standard deviation).

    One session's noised metrics come with the 95 % interval that noise leaves them in. Gaps between
    subgroups follow, if the study asks for them; and which sites some rounds went without, and why.
    """
    columns = show_columns(study)
    names = [site.site for site in reports[0].sites]
    rows = []
    for name in names:
        sites = [site for each in reports for site in each.sites if site.site == name]
        rows.append(_row(name, sites, [s.epsilon for s in sites], columns))
    rows.append(["mean of sites", "", *_means(reports, columns), ""])
    rows.append(_row("all sites", reports, [_largest(r) for r in reports], columns))
    kind = "exact metrics, on public data" if reports[0].exact else "noised metrics"
    if not reports[0].exact and len(reports) == 1:
        kind += " (95 % interval of the noise)"
    if study.data.label.number is not None:
        kind += f", in {study.data.label.number.unit}"
    times = f", mean ± sd over {len(reports)} seeds" if len(reports) > 1 else ""
    delta = f"; ε spent per patient at δ = {reports[0].delta:g}" if reports[0].delta else ""
    speaker.say(study.title)
    speaker.table(
        f"On test patients; {kind}{times}{delta}",
        ["site", "patients", *columns.values(), "ε"],
        rows,
    )
    _show_gaps(speaker, study, reports)
    for told in reports:
        for each in told.unanswered:
            answer = "malformed answer" if each.outcome == "malformed" else each.outcome
            reason = ": ".join(part for part in (answer, each.detail) if part)
            speaker.say(f"{each.site} is missing from {each.rounds} rounds, the last time for its {reason}")


def show_columns(study: Study) -> dict[str, str]:
    """Metric → title."""
    if len(study.objective.quantiles) > 1:
        return INTERVAL_COLUMNS
    if study.evaluation.tolerance is not None:
        return ERROR_COLUMNS | {"near": f"within {study.evaluation.tolerance:.0%}"}
    return {"regression": ERROR_COLUMNS, "survival": SURVIVAL_COLUMNS}.get(study.objective.task, COLUMNS)


def _show_gaps(speaker: Speaker, study: Study, reports: Sequence[SessionReport]) -> None:
    """The gaps of all sites' patients, beside what chance makes of equal groups."""
    keys = dict.fromkeys((gap.column, gap.metric) for each in reports for gap in each.gaps)
    rows = []
    for column, metric in keys:
        found = [g for each in reports for g in each.gaps if (g.column, g.metric) == (column, metric)]
        rows.append(
            [
                column,
                TITLES[metric],
                _mean_sd([gap.gap for gap in found], 3),
                _group(study, column, [gap.highest for gap in found]),
                _group(study, column, [gap.lowest for gap in found]),
                _mean_sd([gap.noise for gap in found], 3),
                _mean_sd([gap.sampling for gap in found], 3),
            ]
        )
    if rows:
        speaker.table(
            "Gaps between groups of all sites' test patients, and what chance alone makes in 95 % of cases",
            ["by", "metric", "gap", "highest", "lowest", "by noise", "by sampling"],
            rows,
        )


def _group(study: Study, column: str, codes: Sequence[str]) -> str:
    """What a code means; several seeds may differ in it."""
    if len(set(codes)) > 1:
        return "varies"
    meanings = next(c.codes for c in study.subgroup_columns if c.name == column)
    return meanings.get(codes[0], codes[0])


def _means(reports: Sequence[SessionReport], columns: Mapping[str, str]) -> list[str]:
    """The unweighted mean over sites, as many papers report it."""
    cells = []
    for column in columns:
        by_run = [[getattr(s.measured, column) for s in r.sites if s.measured] for r in reports]
        known = [[v for v in values if v is not None] for values in by_run]
        cells.append(_mean_sd([statistics.fmean(values) for values in known if values], 3))
    return cells


def _row(
    name: str,
    reports: Sequence[SessionReport] | Sequence[SiteReport],
    epsilons: Sequence[float | None],
    columns: Mapping[str, str],
) -> list[str]:
    known = [each.measured for each in reports if each.measured is not None]
    cells = [_mean_sd([m.patients for m in known], 0)]
    if len(reports) == 1 and known:
        cells += [_with_interval(known[0], reports[0].intervals, column) for column in columns]
    else:
        cells += [_mean_sd([getattr(m, column) for m in known], 3) for column in columns]
    return [name, *cells, _mean_sd(epsilons, 3) if any(e is not None for e in epsilons) else "none"]


def _with_interval(measured: Measured, intervals: Intervals | None, column: str) -> str:
    """0.991 (0.982–0.998), or the metric alone if it is exact."""
    value = getattr(measured, column)
    bounds = intervals.noise.get(column) if intervals is not None else None
    if value is None or bounds is None:
        return _mean_sd([value], 3)
    dash = "–" if bounds[0] >= 0 else " to "
    return f"{value:.3f} ({bounds[0]:.3f}{dash}{bounds[1]:.3f})"


def _mean_sd(values: Sequence[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    if len(known) > 1 and digits and statistics.stdev(known) > 0:
        return f"{mean} ±{statistics.stdev(known):.{digits}f}"
    return mean


def _largest(told: SessionReport) -> float | None:
    known = [s.epsilon for s in told.sites if s.epsilon is not None]
    return max(known) if known else None


class RoundsProgress:
    """A live bar of rounds on a terminal; silence elsewhere."""

    def __init__(self, speaker: Speaker, study: Study, runs: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            console=speaker.err,
            disable=not speaker.live,
        )
        self._per_run = study.algorithm.rounds + 1
        self._task = self._progress.add_task(study.name, total=self._per_run * runs)
        self._before = 0

    def __enter__(self) -> RoundsProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def rounds(self, done: int) -> None:
        self._progress.update(self._task, completed=self._before + done)

    def next_run(self) -> None:
        self._before += self._per_run
        self.rounds(0)
