"""Seconds a round of the whole of fedward in simulation, beside loops that take the same steps bare.

Every run is a process of its own, so that memory at its peak is its own and nothing is warm; the ways run in
turn, so that a busy spell of the machine hits them all.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.files import write_atomic
from common.processes import beside_python
from common.study import Study, load_study
from simulations.benchmarks.federations import FEDERATIONS, Federation
from simulations.benchmarks.measure import Comparison, Result, Timing, each_round, in_a_process

if TYPE_CHECKING:
    from simulations.benchmarks.floors import Ended

FEDWARD, RAY = "fedward", "fedward on Flower's Ray"
NAMES = tuple(FEDERATIONS)
_LONGEST_SECONDS = 1800
_SEED = 1


def compare_rounds(
    work: Path,
    *,
    names: Sequence[str] = NAMES,
    rounds: int | None = None,
    repeats: int = 3,
    ray: bool = False,
    peers: Mapping[str, Path] | None = None,
) -> tuple[Comparison, ...]:
    """Each federation: bare loops first, then fedward; seconds are medians of `repeats` runs.

    Of every result: milliseconds of the processor in a round, which a busy machine changes less than those by
    the clock; the first round apart; the whole process's peak memory; without privacy how far the final
    weights are from the plain loop's at most, relative to the largest of them. The command `fedward-sim run`
    is timed as a whole, interpreter and imports included.

    Args:
        rounds: instead of the federation's own number.
        peers: other frameworks (`peers.PEERS`) → the interpreter that has them; they take part in what they
            can train (`peers.takes`).

    Raises:
        DeploymentError: if a run fails.
    """
    found = []
    for name in names:
        federation = FEDERATIONS[name]
        found.append(
            _compare(replace(federation, rounds=rounds or federation.rounds), work, repeats, ray, peers or {})
        )
    return tuple(found)


def _compare(
    federation: Federation, work: Path, repeats: int, ray: bool, peers: Mapping[str, Path]
) -> Comparison:
    from simulations.benchmarks.floors import IMAGES, PRIVATE, PUBLIC, load
    from simulations.benchmarks.peers import SCRIPT, takes, write_work

    sites = federation.write(work / federation.name / "sites")
    study = work / federation.name / "study.json"
    write_atomic(study, federation.study().canonical, mode=0o644)
    bare = PRIVATE if federation.private else IMAGES if federation.images else PUBLIC
    theirs = {name: python for name, python in peers.items() if takes(name, federation)}
    ways = [*bare, *theirs, FEDWARD, *([RAY] if ray else [])]
    exchanged = work / federation.name / "work.npz"
    if theirs:
        write_work(load(load_study(study), sites, _SEED), exchanged)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    commands = []
    for repeat in range(repeats):
        for number, way in enumerate(ways):
            run = work / federation.name / f"{repeat}-{number}"
            command = [sys.executable, "-m", __name__, way, str(study), str(sites), str(run)]
            if way in theirs:
                command = [str(theirs[way]), "-I", str(SCRIPT), way, str(exchanged), str(run)]
            told = in_a_process(command, _LONGEST_SECONDS)
            runs[way].append(json.loads(told.splitlines()[-1]))
        commands.append(_command(study, sites, work / federation.name / f"{repeat}-command"))
    plain = statistics.median(r["processor"] for r in runs[ways[0]])
    reference = _weights(work / federation.name / "0-0")
    results = []
    for number, way in enumerate(ways):
        processor = statistics.median(r["processor"] for r in runs[way])
        more = {
            "ms of the processor": 1000 * processor,
            "ratio of that": processor / plain if plain else 0.0,
            "first round, ms": 1000 * statistics.median(r["first"] for r in runs[way]),
            "MiB at peak": max(r["peak"] for r in runs[way]) / 2**20,
        }
        if not federation.private:
            found = _weights(work / federation.name / f"0-{number}")
            more["weights differ by"] = float(np.abs(found - reference).max() / np.abs(reference).max())
        if way == FEDWARD:
            more["whole command, s"] = statistics.median(commands)
        timings = tuple(Timing(r["total"], r["per_round"], federation.rounds) for r in runs[way])
        results.append(Result(way, timings, more))
    title = f"{federation.name}: {federation.title}, {federation.rounds} rounds"
    return Comparison(federation.name, title, tuple(results))


def _command(study: Path, sites: Path, run: Path) -> float:
    """Wall seconds of the command as a person gives it."""
    command = [beside_python("fedward-sim"), "run", str(study), "--sites", str(sites), "--out", str(run)]
    began = time.perf_counter()
    in_a_process([*command, "--seed", str(_SEED), "--json"], _LONGEST_SECONDS)
    return time.perf_counter() - began


def _weights(run: Path) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    with np.load(run / "weights.npz") as found:
        return np.concatenate([found[name].ravel() for name in sorted(found)])


def main(way: str, study_file: str, sites: str, run: str) -> None:
    """One run in this process; one line of JSON tells of it, and weights.npz holds what it ended with."""
    from simulations.benchmarks.sites import peak_bytes

    study, folder = load_study(Path(study_file)), Path(run)
    began = time.perf_counter()
    took = _simulated if way in {FEDWARD, RAY} else _bare
    ended = took(way, study, Path(sites), folder)
    total = time.perf_counter() - began
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "weights.npz", **ended.parameters)  # type: ignore[arg-type]
    told = {
        "total": total,
        "first": ended.ends[0],
        "per_round": _per_round(ended.ends),
        "processor": _per_round(ended.processor),
        "peak": peak_bytes(),
    }
    sys.stdout.write(json.dumps(told) + "\n")


def _per_round(ends: Sequence[float]) -> float:
    return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0


def _bare(way: str, study: Study, sites: Path, _: Path) -> Ended:
    from simulations.benchmarks.floors import load, run_floor

    return run_floor(way, load(study, sites, _SEED))


def _simulated(way: str, study: Study, sites: Path, run: Path) -> Ended:
    from server.coordinator import PARAMETERS, part
    from simulations.benchmarks.floors import Ended
    from simulations.engine import SimulationSettings, simulate

    settings, processor = SimulationSettings(seed=_SEED), list[float]()
    if way == RAY:
        from simulations.engine.ray import simulate_on_ray

        done = simulate_on_ray(study, sites, run, settings)
    else:
        with each_round(lambda number: processor.append(time.process_time())):
            done = simulate(study, sites, run, settings)
    rounds, began = done.store.rounds(done.session), done.store.session(done.session).created
    parameters = part(done.store.checkpoint(done.session, rounds[-1].number), PARAMETERS)
    return Ended(tuple(r.finished - began for r in rounds[:-1]), tuple(processor[:-1]), parameters)


if __name__ == "__main__":
    main(*sys.argv[1:])
