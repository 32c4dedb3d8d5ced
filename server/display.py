"""What a person sees of sessions: a live bar of rounds, and the table at the end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.console import Speaker
from common.metrics import Measured
from common.study import Study
from server.report import SessionReport

COLUMNS = ("auroc", "accuracy", "calibration_error")


def show(speaker: Speaker, study: Study, reports: Sequence[SessionReport]) -> None:
    """The table of one session, or of several that differ in their seed (mean ± standard deviation)."""
    names = [site.site for site in reports[0].sites]
    rows = []
    for name in names:
        sites = [site for each in reports for site in each.sites if site.site == name]
        rows.append(_row(name, [s.measured for s in sites], [s.epsilon for s in sites]))
    rows.append(["mean of sites", "", *_means(reports), ""])
    rows.append(_row("all sites", [r.measured for r in reports], [_largest(r) for r in reports]))
    kind = "exact metrics, on public data" if reports[0].exact else "noised metrics"
    times = f", mean ± sd over {len(reports)} seeds" if len(reports) > 1 else ""
    delta = f"; ε spent per patient at δ = {study.privacy.delta:g}" if study.private else ""
    speaker.say(study.title)
    speaker.table(
        f"On test patients; {kind}{times}{delta}",
        ["site", "patients", "AUROC", "accuracy", "cal. error", "ε"],
        rows,
    )


def _means(reports: Sequence[SessionReport]) -> list[str]:
    """The unweighted mean over sites, as many papers report it."""
    cells = []
    for column in COLUMNS:
        by_run = [[getattr(s.measured, column) for s in r.sites if s.measured] for r in reports]
        known = [[v for v in values if v is not None] for values in by_run]
        cells.append(_mean_sd([statistics.fmean(values) for values in known if values], 3))
    return cells


def _row(name: str, measured: Sequence[Measured | None], epsilons: Sequence[float | None]) -> list[str]:
    known = [m for m in measured if m is not None]
    cells = [_mean_sd([m.patients for m in known], 0)]
    cells += [_mean_sd([getattr(m, c) for m in known], 3) for c in COLUMNS]
    return [name, *cells, _mean_sd(epsilons, 3) if any(e is not None for e in epsilons) else "none"]


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
