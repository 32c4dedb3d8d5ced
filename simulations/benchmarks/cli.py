"""`fedward-sim benchmark`: what the system costs on this machine, as ratios within one run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import JsonOption, speaking
from simulations.benchmarks.measure import HEADER, Comparison

if TYPE_CHECKING:
    from simulations.benchmarks.steps import StepResult


class Benchmark(StrEnum):
    """What can be measured."""

    rounds = "rounds"
    sites = "sites"
    deployment = "deployment"
    noise = "noise"
    accounting = "accounting"
    ledger = "ledger"
    steps = "steps"


class Allocator(StrEnum):
    """Of memory, in `steps`."""

    tuned = "tuned"
    default = "default"


def _asked(names: list[str] | None) -> list[str] | None:
    """Check the names: of benchmarks, or of rows of `steps`, which takes long to import."""
    unknown = [name for name in names or [] if name not in list(Benchmark)]
    if unknown and "steps" in (names or []):
        from simulations.benchmarks.networks import WORKS

        unknown = [name for name in unknown if name not in WORKS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(Benchmark)}")
    return names


def _interpreters(given: list[str]) -> dict[str, Path]:
    """NAME=PYTHON, of frameworks that `rounds` can run beside fedward."""
    from simulations.benchmarks.peers import PEERS

    found = dict[str, Path]()
    for each in given:
        name, _, python = each.partition("=")
        if name not in PEERS or not Path(python).is_file():
            raise typer.BadParameter(
                f"--peer {each}: give one of {', '.join(PEERS)} and the python of an environment with it: "
                "fedjax=/opt/fedjax/bin/python"
            )
        found[name] = Path(python)
    return found


def benchmark(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]…",
            help="rounds, sites, deployment, noise, accounting, ledger, steps; all if absent. After steps, "
            "rows of it: logistic, mlp, cnn, cnn-3d, lstm, gru, resnet, mlp-patients, mlp-ungrouped.",
            callback=_asked,
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Also Flower's Ray runtime; it listens on all interfaces meanwhile.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PYTHON",
            help="Also another framework in `rounds`: fedjax, pfl or flower, and the python of an "
            "environment that has it. May be given again. Flower's Ray listens on all interfaces meanwhile.",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Training rounds of a run; else the benchmark's own.", min=2)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs that a median is taken of.", min=1)] = 5,
    most_sites: Annotated[int, typer.Option(help="Where `sites` ends.", min=4)] = 1024,
    allocator: Annotated[Allocator, typer.Option(help="Of memory, in `steps`.")] = Allocator.tuned,
    json: JsonOption = False,
) -> None:
    """Measure: rounds beside plain loops, as sites grow, a real deployment, noise, accounting, one step."""
    from simulations.benchmarks.accounting import compare_accounting
    from simulations.benchmarks.deployment import compare_deployment
    from simulations.benchmarks.ledger import compare_ledger
    from simulations.benchmarks.noise import compare_noise
    from simulations.benchmarks.rounds import compare_rounds
    from simulations.benchmarks.sites import SITES, compare_sites

    peers = _interpreters(peer or [])
    with speaking(json) as speaker, tempfile.TemporaryDirectory(prefix="fedward-") as temporary:
        work = Path(temporary)
        found: list[Comparison] = []
        few = min(rounds or 10, 10)
        wanted = [name for name in Benchmark if name in names] if names else list(Benchmark)
        steps = _steps(names or [], repeats, allocator) if Benchmark.steps in wanted else None
        for name in wanted:
            folder = work / name
            folder.mkdir(exist_ok=True)
            if name is Benchmark.rounds:
                found += compare_rounds(folder, rounds=rounds, repeats=min(repeats, 3), ray=ray, peers=peers)
            elif name is Benchmark.sites:
                counts = [count for count in SITES if count <= most_sites]
                found += [
                    compare_sites(
                        folder / f"private-{private}",
                        counts=counts,
                        rounds=few,
                        repeats=min(repeats, 3),
                        private=private,
                    )
                    for private in (False, True)
                ]
            elif name is Benchmark.noise:
                found += compare_noise(folder, repeats=repeats)
            elif name is Benchmark.accounting:
                found += compare_accounting(folder, repeats=repeats)
            elif name is Benchmark.ledger:
                found.append(compare_ledger(folder))
            elif name is Benchmark.deployment:
                found.append(compare_deployment(folder, rounds=few))
        for each in found:
            speaker.table(each.title, HEADER, each.rows())
        told: dict[str, Any] = {"benchmarks": [each.as_json() for each in found]}
        if steps is not None:
            from simulations.benchmarks.steps import HEADER as STEPS_HEADER
            from simulations.benchmarks.steps import as_json, rows

            title = f"One step, {allocator} allocator: on one core; then with a second one for the noise"
            speaker.table(title, STEPS_HEADER, rows(steps))
            told["steps"] = as_json(steps)
        speaker.answer(told)


def _steps(names: Sequence[str], repeats: int, allocator: Allocator) -> list[StepResult]:
    from simulations.benchmarks.networks import WORKS
    from simulations.benchmarks.steps import measure_steps

    works = [name for name in names if name in WORKS] or list(WORKS)
    return measure_steps(works, repeats=repeats, tuned=allocator is Allocator.tuned)
