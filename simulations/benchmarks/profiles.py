"""Where time goes: `python -m simulations.benchmarks.profiles NAME` prints one table (see README.md here).

NAME is a step of `steps` (mlp, cnn …; torch's profiler, and the same by fedward's functions) or a federation
of `rounds` (w1a, w1b, w3a; Python's profiler over all rounds but the first). Times are of the processor, on
one thread; Python's profiler adds its own time to each call, so that only shares count.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from simulations.benchmarks.federations import FEDERATIONS
from simulations.benchmarks.measure import each_round
from simulations.benchmarks.networks import WORKS
from simulations.benchmarks.steps import step_of

STEPS, ROUNDS, LINES = 30, 20, 25


def profile_step(name: str, lines: int = LINES) -> str:
    """The operations of a private step, and of the plain one beside it."""
    torch.set_num_threads(1)
    told = []
    for way in ("plain", "fedward"):
        with step_of(WORKS[name], way) as step:
            for _ in range(3):
                step()
            milliseconds = 1000 * _processor_seconds(lambda: [step() for _ in range(STEPS)]) / STEPS
            with profile(activities=[ProfilerActivity.CPU]) as found:
                for _ in range(STEPS):
                    step()
            events = found.key_averages()
            table = events.table(sort_by="self_cpu_time_total", row_limit=lines, max_name_column_width=40)
            told.append(f"{name}, {way}: {milliseconds:.3f} ms of the processor a step\n{table}")
            if way == "fedward":
                by_function = cProfile.Profile(time.process_time)
                by_function.runcall(lambda: [step() for _ in range(STEPS)])
                told.append(_table(by_function, lines))
    return "\n".join(told)


def profile_rounds(name: str, lines: int = LINES, rounds: int = ROUNDS) -> str:
    """The functions in which a simulation's rounds spend their time, one worker."""
    from simulations.engine import SimulationSettings, simulate

    federation = replace(FEDERATIONS[name], rounds=rounds)
    found = cProfile.Profile(time.process_time)

    def told(number: int) -> None:
        if number == 1:
            found.enable()
        if number == rounds:
            found.disable()

    with tempfile.TemporaryDirectory(prefix="fedward-") as work, each_round(told):
        sites = federation.write(Path(work) / "sites")
        simulate(federation.study(), sites, Path(work) / "run", SimulationSettings(seed=1, workers=1))
    return f"{name}: rounds 2 to {rounds}\n{_table(found, lines)}"


def _processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _table(found: cProfile.Profile, lines: int) -> str:
    """By the time in each function itself, and by that with all it calls."""
    with tempfile.TemporaryFile("w+") as file:
        statistics = pstats.Stats(found, stream=file)
        for order in ("tottime", "cumtime"):
            statistics.sort_stats(order).print_stats(lines)
        file.seek(0)
        return file.read()


def main(names: list[str]) -> None:
    for name in names:
        told = profile_rounds(name) if name in FEDERATIONS else profile_step(name)
        sys.stdout.write(told + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
