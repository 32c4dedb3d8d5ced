"""`fedward-sim table`: what federated training, privacy and being alone cost, side by side."""

from __future__ import annotations

import os
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.console import JsonOption, Speaker, speaking
from common.errors import SiteError, StudyError
from common.files import write_atomic
from simulations.wanted import find_study

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.study import Study
    from simulations.table.cell import Cell, Result
    from simulations.table.shown import Line, Shown


def table(
    study: Annotated[
        str,
        typer.Argument(metavar="STUDY", help="Its file, or the name of a ready study.", show_default=False),
    ],
    sites: Annotated[Path, typer.Option(help="Folder of site folders; it is only read.", show_default=False)],
    seeds: Annotated[int | None, typer.Option(help="How many; 5, unless settings differ.", min=1)] = None,
    first_seed: Annotated[int, typer.Option(help="The others follow it.", min=0)] = 1,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="A row with privacy at this ε; 1, 3 and 8, unless settings differ."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No rows with privacy.")] = False,
    leave_one_out: Annotated[
        bool,
        typer.Option("--leave-one-out", help="Instead: each site tested with the model of the others."),
    ] = False,
    settings: Annotated[
        Path | None, typer.Option(help="File that says how rows differ from the study.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Gets STUDY/: the table, and its cells.")] = Path("tables"),
    initial: Annotated[
        Path | None, typer.Option(help="The file of weights that the study names.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells computed at a time, each in its own process.", min=1)] = 1,
    changed: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the study, e.g. algorithm.rounds=5."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare pooled, federated, federated and private, and local training; for data that is public anyway.

    What is computed is kept: a command that was stopped goes on where it was.
    """
    with speaking(json) as speaker:
        if plain and epsilon:
            raise StudyError("--plain and --epsilon contradict each other", remedy="give one of them")
        wanted = find_study(study, changed or [])

        from simulations.engine.sites import find_sites
        from simulations.table.cell import Cell
        from simulations.table.rows import can_be_private, left_out_rows, rows_of, settings_of
        from simulations.table.scoring import columns_of
        from simulations.table.shown import Line, left_out_table, training_table

        chosen = settings_of(study, settings).without([change.partition("=")[0] for change in changed or []])
        given = tuple(epsilon or ()) or (chosen.epsilons if can_be_private(wanted, chosen) else ())
        epsilons = () if plain or (leave_one_out and not epsilon) else given
        if not sites.is_dir():
            raise SiteError(
                f"{sites}: no such folder",
                remedy=f"make it, if {wanted.name} is a data set: fedward-sim datasets fetch {wanted.name}",
            )
        names = [place.folder().name for place in find_sites(sites, sites)]
        columns = columns_of(wanted, chosen.columns)
        if leave_one_out:
            rows = left_out_rows(wanted, chosen, epsilons, names)
        else:
            rows = rows_of(wanted, chosen, epsilons)
        numbers = range(first_seed, first_seed + (seeds or chosen.seeds))
        workers = max(1, (os.cpu_count() or 1) // jobs)
        cells = [Cell(row, number, sites, columns[0], workers, initial) for row in rows for number in numbers]
        found = _computed(speaker, wanted, cells, out / wanted.name, jobs)
        lines = [
            Line(row, tuple(found[i * len(numbers) : (i + 1) * len(numbers)])) for i, row in enumerate(rows)
        ]
        told = (left_out_table if leave_one_out else training_table)(wanted, lines, columns, numbers)
        stem = "leave-one-out" if leave_one_out else "table"
        _show(speaker, told, lines, out / wanted.name / stem, wanted)


def _computed(speaker: Speaker, study: Study, cells: Sequence[Cell], folder: Path, jobs: int) -> list[Result]:
    """Every cell's result, with a bar of cells on a terminal."""
    from simulations.table.cache import Cache
    from simulations.table.conduct import conduct

    cache = Cache(folder / "cells", cells[0].sites)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=speaker.err,
        disable=not speaker.live,
    ) as progress:
        bar = progress.add_task(study.name, total=len(cells))
        return conduct(
            cells, cache, jobs, lambda cell, _: progress.update(bar, advance=1, description=cell.name)
        )


def _show(speaker: Speaker, told: Shown, lines: Sequence[Line], stem: Path, study: Study) -> None:
    """Print a table, and write it beside its cells as Markdown and JSON."""
    value = {
        "study": study.name,
        "digest": study.digest,
        "title": told.title,
        "header": told.header,
        "table": told.rows,
        "notes": told.notes,
        "rows": [line.as_json() for line in lines],
    }
    command = " ".join(["fedward-sim", *sys.argv[1:]])
    try:
        write_atomic(stem.with_suffix(".md"), told.markdown(command).encode(), mode=0o644)
        write_atomic(stem.with_suffix(".json"), dumps(value, indent=1).encode(), mode=0o644)
    except OSError as error:
        raise SiteError(f"{stem.parent}: {error.strerror}", remedy="give another folder: --out") from None
    speaker.table(told.title, told.header, told.rows)
    for note in told.notes:
        speaker.say(note)
    speaker.say(f"Written: {stem.with_suffix('.md')}, {stem.with_suffix('.json')}")
    speaker.answer({**value, "folder": str(stem.parent)})
