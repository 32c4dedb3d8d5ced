"""What more sites cost: seconds per round and memory of the process, each size in a process of its own."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from simulations.benchmarks.measure import Comparison, Result, Timing, each_round, in_a_process, rounds_timing
from simulations.benchmarks.workload import PATIENTS, benchmark_study, write_sites
from simulations.engine import SimulationSettings, simulate

SITES = (4, 64, 256, 1024)
_LONGEST_SECONDS = 3600


def compare_sites(
    work: Path,
    *,
    counts: Sequence[int] = SITES,
    rounds: int = 10,
    repeats: int = 3,
    workers: int = 2,
    private: bool = True,
) -> Comparison:
    """The in-process engine, all sites in memory, as their number grows.

    Raises:
        DeploymentError: if a size fails.
    """
    results = []
    for count in counts:
        sites = write_sites(work / f"sites-{count}", count, PATIENTS)
        runs = [_measured(sites, work / f"run-{count}-{i}", rounds, workers, private) for i in range(repeats)]
        more = {
            "ms per site and round": 1000 * statistics.median(t.per_round for t, _ in runs) / count,
            "of the processor": 1000 * statistics.median(m["processor"] for _, m in runs) / count,
            "MiB at peak": max(m["peak"] for _, m in runs) / 2**20,
        }
        results.append(Result(f"{count} sites", tuple(timing for timing, _ in runs), more))
    kind = "with patient-level DP" if private else "without privacy"
    title = f"{rounds} rounds {kind}, {PATIENTS} patients a site, {workers} workers"
    return Comparison("sites-private" if private else "sites", title, tuple(results))


def _measured(
    sites: Path, run: Path, rounds: int, workers: int, private: bool
) -> tuple[Timing, dict[str, float]]:
    kind = "private" if private else "public"
    command = [sys.executable, "-m", __name__, str(sites), str(run), str(rounds), str(workers), kind]
    told = json.loads(in_a_process(command, _LONGEST_SECONDS).splitlines()[-1])
    return Timing(told["total"], told["per_round"], told["rounds"]), told


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory from before `exec`
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main(sites: str, run: str, rounds: str, workers: str, kind: str) -> None:
    """One run in this process; one line of JSON tells of it."""
    study = benchmark_study(int(rounds), private=kind == "private")
    processor = list[float]()
    began = time.perf_counter()
    with each_round(lambda number: processor.append(time.process_time())):
        done = simulate(study, Path(sites), Path(run), SimulationSettings(workers=int(workers)))
    timing = rounds_timing(time.perf_counter() - began, done.store, done.session)
    more = {"processor": (processor[-2] - processor[0]) / (len(processor) - 2), "peak": peak_bytes()}
    sys.stdout.write(json.dumps({**vars(timing), **more}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
