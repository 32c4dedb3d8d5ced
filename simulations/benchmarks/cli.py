"""`fedward-sim benchmark`: what the system costs on this machine, as ratios within one run."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common.console import JsonOption, speaking
from simulations.benchmarks.measure import HEADER, Comparison


class Benchmark(StrEnum):
    """What can be measured."""

    loop = "loop"
    sites = "sites"
    deployment = "deployment"
    noise = "noise"
    accounting = "accounting"
    ledger = "ledger"


def benchmark(
    names: Annotated[
        list[Benchmark] | None,
        typer.Argument(
            metavar="[NAME]…", help="loop, sites, deployment, noise, accounting, ledger; all if absent."
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Also Flower's Ray runtime; it listens on all interfaces meanwhile.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Training rounds of a run.", min=2)] = 50,
    repeats: Annotated[int, typer.Option(help="Runs that a median is taken of.", min=1)] = 5,
    most_sites: Annotated[int, typer.Option(help="Where `sites` ends.", min=4)] = 256,
    json: JsonOption = False,
) -> None:
    """Measure: against a plain training loop, as sites grow, in a real deployment, noise and accounting."""
    from simulations.benchmarks.accounting import compare_accounting
    from simulations.benchmarks.deployment import compare_deployment
    from simulations.benchmarks.ledger import compare_ledger
    from simulations.benchmarks.loop import compare_loop
    from simulations.benchmarks.noise import compare_noise
    from simulations.benchmarks.sites import SITES, compare_sites

    with speaking(json) as speaker, tempfile.TemporaryDirectory(prefix="fedward-") as temporary:
        work = Path(temporary)
        found: list[Comparison] = []
        for name in names or list(Benchmark):
            folder = work / name
            folder.mkdir(exist_ok=True)
            if name is Benchmark.loop:
                found += compare_loop(folder, rounds=rounds, repeats=repeats, ray=ray)
            elif name is Benchmark.sites:
                counts = [count for count in SITES if count <= most_sites]
                found.append(
                    compare_sites(folder, counts=counts, rounds=min(rounds, 10), repeats=min(repeats, 3))
                )
            elif name is Benchmark.noise:
                found += compare_noise(folder, repeats=repeats)
            elif name is Benchmark.accounting:
                found += compare_accounting(folder, repeats=repeats)
            elif name is Benchmark.ledger:
                found.append(compare_ledger(folder))
            else:
                found.append(compare_deployment(folder, rounds=min(rounds, 10)))
        for each in found:
            speaker.table(each.title, HEADER, each.rows())
        speaker.answer({"benchmarks": [each.as_json() for each in found]})
