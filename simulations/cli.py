"""`fedward-sim`: what a researcher does on one machine."""

from __future__ import annotations

import re
import tempfile
from dataclasses import asdict
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from common.console import JsonOption, speaking
from common.errors import FedwardError, StudyError
from common.files import write_atomic
from simulations.benchmarks.cli import benchmark
from simulations.studies import ready_studies
from simulations.table.cli import table
from simulations.wanted import find_study

# What trains, reads tables or counts privacy is imported by the commands that do: it takes seconds.

app = typer.Typer(
    help="A researcher's side: data sets, studies, and many sites on one machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_sets = typer.Typer(help="Public data sets, prepared as hospitals.", no_args_is_help=True)
app.add_typer(data_sets, name="datasets")
app.command()(benchmark)
app.command()(table)

StudyName = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="A study's file, or the name of a ready study.", show_default=False),
]
Sites = Annotated[Path, typer.Option(help="Folder of site folders; it is only read.", show_default=False)]


Mirror = Annotated[Path | None, typer.Option(help="Take the files from this folder, not the internet.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the study, e.g. privacy.epsilon=0.1."),
]


Quorum = Annotated[int | None, typer.Option(help="So many sites make a round; all if absent.", min=1)]
State = Annotated[
    Path | None,
    typer.Option(help="Folder of the sites' policies and ledgers, which go on from run to run."),
]


class Engine(StrEnum):
    """Where the sites run."""

    in_process = "in-process"
    ray = "ray"


@app.command()
def studies(json: JsonOption = False) -> None:
    """List the ready studies."""
    with speaking(json) as speaker:
        found = [find_study(name) for name in ready_studies()]
        rows = [
            [s.name, s.title, s.model.name, f"{s.privacy.epsilon:g}" if s.private else "none"] for s in found
        ]
        speaker.table("Ready studies", ["study", "title", "model", "ε"], rows)
        speaker.answer({"studies": [{"name": s.name, "title": s.title, "digest": s.digest} for s in found]})


@app.command()
def check(
    study: StudyName,
    public_size: Annotated[int, typer.Option(help="Cost at a site of this many patients.", min=1)] = 200,
    sites: Annotated[Path | None, typer.Option(help="Cost at each of these sites instead.")] = None,
    changed: Changes = None,
    json: JsonOption = False,
) -> None:
    """Validate a study and explain it: what is learnt, from what, at what privacy and cost."""
    from common.explain import explain, explain_cost
    from common.models import parameter_count

    with speaking(json) as speaker:
        checked = find_study(study, changed or [])
        lines = explain(checked, parameter_count(checked)).lines
        sizes = {f"a site of {public_size} patients": public_size}
        if sites is not None:
            from simulations.engine.sites import find_sites

            places = [place.folder() for place in find_sites(sites, sites)]
            sizes = {folder.name: folder.file.site.public_size for folder in places}
        costs = {name: explain_cost(checked, size) for name, size in sizes.items()}
        for line in lines:
            speaker.say(line)
        for name, cost in costs.items():
            speaker.say(f"Cost at {name}: {cost}.")
        speaker.answer(
            {"study": checked.name, "digest": checked.digest, "explanation": list(lines), "costs": costs}
        )


@app.command()
def export(
    study: StudyName,
    file: Annotated[Path, typer.Argument(help="What to write; it must not exist.", show_default=False)],
    changed: Changes = None,
    json: JsonOption = False,
) -> None:
    """Write a study as the one file that coordinator and sites get (canonical JSON)."""
    with speaking(json) as speaker:
        wanted = find_study(study, changed or [])
        if file.exists():
            raise StudyError(f"{file} exists already", remedy="give another path")
        try:
            write_atomic(file, wanted.canonical, mode=0o644)
        except OSError as error:
            raise StudyError(f"{file}: {error.strerror}", remedy="give another path") from None
        speaker.say(f"{file}: {wanted.name}, digest {wanted.digest}")
        speaker.answer({"file": str(file), "study": wanted.name, "digest": wanted.digest})


@app.command()
def init(
    from_csv: Annotated[Path, typer.Option(help="One line a record, with a header.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The study's file; it must not exist.")] = Path("study.toml"),
    label: Annotated[str | None, typer.Option(help="The column that is learnt.", show_default=False)] = None,
    patient: Annotated[
        str | None, typer.Option(help="The column that says whose record it is.", show_default=False)
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Also deal the patients out to sites of a simulation, in here.")
    ] = None,
    sites: Annotated[int, typer.Option(help="How many, with as many patients each.", min=1)] = 4,
    by: Annotated[str | None, typer.Option(help="Column that says whose site it is instead.")] = None,
    json: JsonOption = False,
) -> None:
    """Draft a study and its data dictionary from a CSV file, to be mended by hand.

    The draft tells of the file's values, so it is as private as they are.
    """
    from simulations.dealing import write_sites
    from simulations.draft import draft

    with speaking(json) as speaker:
        if out.exists():
            raise StudyError(f"{out} exists already", remedy="give another path: --out")
        if out.suffix != ".toml":
            raise StudyError(f"{out}: a study's file ends in .toml", remedy="give another path: --out")
        drafted = draft(from_csv, slug(out.stem), label, patient)
        key = drafted.study.data.patient_key
        folders = write_sites(drafted.frame, key, to, sites, by) if to is not None else ()
        try:
            write_atomic(out, drafted.text.encode(), mode=0o600)
        except OSError as error:
            raise StudyError(f"{out}: {error.strerror}", remedy="give another path: --out") from None
        speaker.say(
            f"{out}: {len(drafted.study.data.columns)} columns. Read it, and give what is to do there."
        )
        for column, why in drafted.left_out.items():
            speaker.say(f"Left out: {column} ({why})")
        for name, column in drafted.names.items():
            speaker.say(f'A site maps {name}: [data.columns.{name}] column = "{column}"')
        if drafted.delimiter != ",":
            speaker.say(f"A site with this file says: [data] delimiter = {dumps(drafted.delimiter)}")
        if folders:
            speaker.say(f"{len(folders)} sites in {to}: fedward-sim run {out} --sites {to}")
        told = {"file": str(out), "study": drafted.study.name, "left_out": drafted.left_out}
        speaker.answer({**told, "names": drafted.names, "sites": [str(folder) for folder in folders]})


def slug(text: str) -> str:
    """A study's name made of any text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:64].strip("-") or "study"


@app.command()
def run(
    study: StudyName,
    sites: Sites,
    out: Annotated[Path, typer.Option(help="Folder that gets the run's folder.")] = Path("runs"),
    engine: Annotated[Engine, typer.Option(help="One process, or Flower's simulation runtime on Ray.")] = (
        Engine.in_process
    ),
    seed: Annotated[int | None, typer.Option(help="Repeatable run; else the system's noise.")] = None,
    repeat: Annotated[int, typer.Option(help="Runs with seeds SEED, SEED+1, …, and their mean.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Sites that work at the same time.", min=1)] = 2,
    memory: Annotated[float, typer.Option(help="GiB that warm sites may take together.", min=0.01)] = 4.0,
    exact_metrics: Annotated[
        bool, typer.Option("--exact-metrics", help="Metrics without noise; for data that is public anyway.")
    ] = False,
    quorum: Quorum = None,
    state: State = None,
    initial: Annotated[Path | None, typer.Option(help="The file of weights that the study names.")] = None,
    changed: Changes = None,
    json: JsonOption = False,
) -> None:
    """Run a study over a folder of sites and show what came of it."""
    from server.display import RoundsProgress, show
    from simulations.engine import SimulationSettings, simulate
    from simulations.runs import keep, new_run_folder, summary

    with speaking(json) as speaker:
        wanted = find_study(study, changed or [])
        if repeat > 1 and seed is None:
            raise StudyError("--repeat needs --seed", remedy="give the first seed: --seed 1")
        folder = new_run_folder(out, wanted)
        runs = []
        with RoundsProgress(speaker, wanted, repeat) as progress:
            for number in range(repeat):
                settings = SimulationSettings(
                    workers=workers,
                    seed=None if seed is None else seed + number,
                    exact_metrics=exact_metrics,
                    memory_bytes=int(memory * 2**30),
                    quorum=quorum,
                    state=state,
                    initial=initial,
                )
                place = folder if repeat == 1 else folder / f"seed-{settings.seed}"
                if engine is Engine.ray:
                    from simulations.engine.ray import simulate_on_ray

                    done = simulate_on_ray(wanted, sites, place, settings, progress.rounds)
                else:
                    done = simulate(wanted, sites, place, settings, progress.rounds)
                runs.append(keep(done))
                progress.next_run()
        show(speaker, wanted, [run.report for run in runs])
        speaker.say(f"Run folder: {folder}")
        speaker.answer({"folder": str(folder), **summary(runs)})


@app.command()
def describe(
    study: StudyName,
    sites: Sites,
    out: Annotated[Path, typer.Option(help="Folder that gets the run's folder.")] = Path("runs"),
    seed: Annotated[int | None, typer.Option(help="Repeatable run; else the system's noise.")] = None,
    minimum_patients: Annotated[int, typer.Option(help="What is about fewer is left out.", min=1)] = 10,
    quorum: Quorum = None,
    state: State = None,
    changed: Changes = None,
    json: JsonOption = False,
) -> None:
    """Show the sites' cohorts together, from noised statistics, before anything is trained."""
    from common.statistics import asked
    from server.description import show_description
    from simulations.engine import SimulationSettings, simulate
    from simulations.runs import new_run_folder

    with speaking(json) as speaker:
        wanted = find_study(study, changed or [])
        asked(wanted)
        settings = SimulationSettings(seed=seed, quorum=quorum, state=state, describe=True)
        done = simulate(wanted, sites, new_run_folder(out, wanted), settings)
        show_description(speaker, done.store, done.session, minimum_patients)


class Published(StrEnum):
    """Results that can be run again."""

    flamby_heart = "flamby-heart"


@app.command()
def reproduce(
    name: Annotated[Published, typer.Argument(help="Which published result.")] = Published.flamby_heart,
    mirror: Mirror = None,
    json: JsonOption = False,
) -> None:
    """Run a published experiment again and compare. Exits with 1 if it comes out otherwise."""
    from simulations.reproduce import flamby_heart

    with speaking(json) as speaker, tempfile.TemporaryDirectory(prefix="fedward-") as work:
        found = flamby_heart(Path(work), mirror)
        rows = [
            [f.quantity, f"{f.mean:.4f} ±{f.deviation:.4f}", f"{f.published[0]:.4f} ±{f.published[1]:.4f}"]
            for f in found
        ]
        title = f"{name}: accuracy of FedAvg without privacy, mean ± sd over {len(found[0].accuracies)} seeds"
        speaker.table(title, ["quantity", "here", "published"], rows)
        speaker.answer({"result": name, "quantities": [{**asdict(f), "mean": f.mean} for f in found]})
        if not all(f.within for f in found):
            raise FedwardError(f"{name} does not come out as published", remedy="see the table")


@data_sets.command(name="list")
def list_datasets(json: JsonOption = False) -> None:
    """List the public data sets."""
    from simulations.datasets import datasets as known_datasets

    with speaking(json) as speaker:
        rows = [[d.name, d.title, d.licence] for d in known_datasets()]
        speaker.table("Data sets", ["name", "title", "licence"], rows)
        speaker.answer({"datasets": [{"name": n, "title": t, "licence": li} for n, t, li in rows]})


@data_sets.command()
def fetch(
    name: Annotated[str, typer.Argument(help="See `datasets list`.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Gets NAME/ with one folder a hospital.")] = Path("sites"),
    raw: Annotated[Path, typer.Option(help="Folder that keeps the published files.")] = Path("sites/raw"),
    mirror: Mirror = None,
    json: JsonOption = False,
) -> None:
    """Fetch a data set (URL and SHA-256 of every file; resumes), and prepare its hospitals."""
    from simulations.datasets import fetch as fetch_files
    from simulations.datasets import prepare as prepare_sites

    with speaking(json) as speaker:
        files = fetch_files(name, raw, mirror)
        folders = prepare_sites(name, files, to / name)
        speaker.say(f"{name}: {len(folders)} hospitals in {to / name}")
        speaker.answer({"dataset": name, "sites": [str(folder) for folder in folders]})


def main() -> None:
    """Entry point of `fedward-sim`."""
    app()
