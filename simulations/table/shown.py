"""A table as people and programs read it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.study import Study
from server.display import TITLES
from simulations.table.cell import ALL, Metrics, Result, mean
from simulations.table.rows import Row

DIGITS = 3


@dataclass(frozen=True)
class Line:
    """A row with its results, one a seed."""

    row: Row
    results: tuple[Result, ...]

    def as_json(self) -> dict[str, Any]:
        row = self.row
        return {
            "row": row.name,
            "kind": row.kind,
            "site": row.site,
            "epsilon": row.study.privacy.epsilon,
            "study": row.study.digest,
            "seeds": [result.model_dump(mode="json", exclude={"format"}) for result in self.results],
        }


@dataclass(frozen=True)
class Shown:
    """A table's text.

    Attributes:
        title: one line.
        notes: what a reader must know.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def markdown(self, command: str) -> str:
        """As a page of Markdown, with the command that makes it."""
        lines = [f"# {self.title}", "", f"`{command}`", "", _line(self.header)]
        lines += [_line(["---", *["---:"] * (len(self.header) - 1)])]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def training_table(
    study: Study, lines: Sequence[Line], columns: Sequence[str], seeds: Sequence[int]
) -> Shown:
    """One row a way of training: on all sites' test patients, and the mean of sites.

    Args:
        columns: attributes of `common.metrics.Measured`; the main one first.
    """
    titles = [TITLES.get(name, name) for name in columns]
    header = ["training", titles[0], "95 % interval", *titles[1:]]
    header += [*(f"{title}, mean of sites" for title in titles), "ε spent", "seconds", "peak MiB"]
    rows = []
    for line in lines:
        whole = [result.whole for result in line.results]
        sites = [mean(list(result.sites.values())) for result in line.results]
        cells = [_spread(whole, columns[0]), _bounds(line.results)]
        cells += [_spread(whole, name) for name in columns[1:]]
        cells += [_spread(sites, name) for name in columns]
        rows.append((line.row.name, *cells, _epsilon(line.results), *_cost(line.results)))
    return Shown(_title(study, seeds), tuple(header), tuple(rows), _notes(study, lines, seeds))


def left_out_table(
    study: Study, lines: Sequence[Line], columns: Sequence[str], seeds: Sequence[int]
) -> Shown:
    """One row a site: the model of all sites there, and that of the others.

    Args:
        lines: as `left_out_rows` orders them: one with all sites before those without one of them.
    """
    title = TITLES.get(columns[0], columns[0])
    header = (
        "tested at",
        f"{title}: with it",
        "left out",
        "left out, all its patients",
        "95 % interval",
        "ε spent",
    )
    rows: list[tuple[str, ...]] = []
    with_it = lines[0]
    for line in lines:
        if line.row.site is None:
            with_it = line
            continue
        name, main = line.row.site, columns[0]
        privacy = line.row.study.privacy.epsilon
        rows.append(
            (
                name + (f", ε = {privacy:g}" if privacy else ""),
                _spread([result.sites.get(name, {}) for result in with_it.results], main),
                _spread([result.sites[name] for result in line.results], main),
                _spread([result.sites[ALL] for result in line.results], main),
                _bounds(line.results),
                _epsilon(line.results),
            )
        )
    notes = (
        "With it: the site took part, tested on its test patients. Left out: the model of the other sites, "
        "on the same patients; then on all of the site's patients, none of whom took part.",
        _interval_note(seeds),
    )
    return Shown(f"{_title(study, seeds)}; leave one site out", header, tuple(rows), notes)


def _title(study: Study, seeds: Sequence[int]) -> str:
    unit = f" (in {study.data.label.unit})" if study.data.label.unit else ""
    times = f"mean ± sd over {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    return f"{study.name}: {study.title}{unit}, {times}"


def _notes(study: Study, lines: Sequence[Line], seeds: Sequence[int]) -> tuple[str, ...]:
    notes = [
        "Exact metrics, on public data. First on all sites' test patients together, then the mean of sites.",
        "Pooled: all training patients in one place, each seen as often as at its own site. Each site alone: "
        "every site's own model, on all sites' patients (mean of models) and on its own. Both train as a "
        "federation of one site: the study's rounds, without privacy.",
        _interval_note(seeds),
    ]
    if study.data.split.by == "keyed-hash":
        notes.append("A seed decides first weights, batches, and also who tests.")
    else:
        notes.append("A seed decides first weights and batches; who tests stands in the data.")
    if any(line.row.study.private for line in lines):
        delta = next(line.row.study.privacy.delta for line in lines if line.row.study.private)
        notes.append(f"ε per patient at δ = {delta:g}; nominal, because here the noise comes from seeds.")
    changed = [line.row.name for line in lines if _differs(study, line.row.study)]
    if changed:
        notes.append(f"Settings of their own, besides privacy: {', '.join(changed)}.")
    notes.append("Seconds and memory of one run: the mean of seeds, and the largest.")
    return tuple(notes)


def _interval_note(seeds: Sequence[int]) -> str:
    several = "; the mean of each seed's bounds" if len(seeds) > 1 else ""
    return f"95 % interval: percentiles of 1,000 bootstrap samples of the test patients, one model{several}."


def _differs(study: Study, other: Study) -> bool:
    return study.model_dump(exclude={"privacy"}) != other.model_dump(exclude={"privacy"})


def _spread(parts: Sequence[Mapping[str, Any] | Metrics], name: str) -> str:
    known = [part[name] for part in parts if part.get(name) is not None]
    if not known:
        return "–"
    text = f"{statistics.fmean(known):.{DIGITS}f}"
    return f"{text} ±{statistics.stdev(known):.{DIGITS}f}" if len(known) > 1 else text


def _bounds(results: Sequence[Result]) -> str:
    known = [result.interval for result in results if result.interval is not None]
    if not known:
        return "–"
    low, high = (statistics.fmean(each) for each in zip(*known, strict=True))
    return f"{low:.{DIGITS}f}–{high:.{DIGITS}f}"


def _epsilon(results: Sequence[Result]) -> str:
    known = [result.epsilon for result in results if result.epsilon is not None]
    return f"{max(known):.{DIGITS}f}" if known else "none"


def _cost(results: Sequence[Result]) -> tuple[str, str]:
    seconds = statistics.fmean(result.seconds for result in results)
    return f"{seconds:.1f}", f"{max(result.peak_bytes for result in results) / 2**20:.0f}"
