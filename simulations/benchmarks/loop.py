"""The whole system in simulation against a plain loop that takes the same steps, and against Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from common.privacy import accounting
from common.study import Study
from simulations.benchmarks.measure import Comparison, Timing, interleaved, rounds_timing
from simulations.benchmarks.plain import run_loop
from simulations.benchmarks.workload import benchmark_study, write_sites
from simulations.engine import SimulationSettings, simulate

PATIENTS = 100


def compare_loop(
    work: Path, *, sites: int = 4, rounds: int = 50, repeats: int = 5, ray: bool = False
) -> tuple[Comparison, ...]:
    """Without and with privacy: plain loop, in-process engine with one and two workers, Ray if asked.

    Start-up counts from the call to the first round; what Python imports is counted for Ray alone,
    because Ray's workers import it anew. A first run of each, uncounted, warms the machine up.
    """
    folder = write_sites(work / "sites", sites, PATIENTS)
    found = []
    for private in (False, True):
        study = benchmark_study(rounds, private=private)
        kind = "patient-level DP" if private else "without privacy"
        ways: list[tuple[str, Callable[[Path], Timing]]] = [
            ("plain loop with Opacus" if private else "plain loop", _loop(study, folder)),
            ("fedward, one worker", _engine(study, folder, 1)),
            ("fedward, two workers", _engine(study, folder, 2)),
        ]
        if not private:
            ways.insert(1, ("plain loop, DataLoader", _loop(study, folder, loader=True)))
        if ray:
            ways.append(("fedward on Flower's Ray, two workers", _ray(study, folder)))
        warm = [way for way in ways if "Ray" not in way[0]]
        interleaved(warm, 1, work / f"warm-up-{private}")
        results = interleaved(ways, repeats, work / f"private-{private}")
        title = f"{sites} sites x {rounds} rounds, {kind}"
        found.append(Comparison("loop-private" if private else "loop", title, results))
    return tuple(found)


def _loop(study: Study, sites: Path, *, loader: bool = False) -> Callable[[Path], Timing]:
    return lambda _: run_loop(study, sites, loader=loader)


def _engine(study: Study, sites: Path, workers: int) -> Callable[[Path], Timing]:
    def run(folder: Path) -> Timing:
        forget_accounting()
        began = time.perf_counter()
        done = simulate(study, sites, folder, SimulationSettings(workers=workers))
        return rounds_timing(time.perf_counter() - began, done.store, done.session)

    return run


def _ray(study: Study, sites: Path) -> Callable[[Path], Timing]:
    def run(folder: Path) -> Timing:
        from simulations.engine.ray import simulate_on_ray

        forget_accounting()
        began = time.perf_counter()
        done = simulate_on_ray(study, sites, folder, SimulationSettings(workers=2))
        return rounds_timing(time.perf_counter() - began, done.store, done.session)

    return run


def forget_accounting() -> None:
    """Let the next run calibrate its noise anew, as a process of its own would."""
    accounting.calibrate.cache_clear()
    accounting._epsilon.cache_clear()
