"""One step of DP-SGD against one of plain SGD, on the models that hospitals use.

A step of fedward's is the vault's own: coins for each patient, the engine that it would choose, noise from
the operating system's key, the optimiser. The others draw shuffled batches of as many records as it expects.
Ratios within one process, repetitions interleaved, medians: a machine that others use too changes the times,
but hardly the ratios. Memory is what a fresh process grows by at its peak during steps.

Before an engine takes a batch of a size that it hasn't seen, it tries that size once in a process
(client/chain and client/taps/company say why), which takes as long as a step or two: with the 19 sizes that
batches of a CNN may well have, 1.5 s. A site does so in its first rounds, and then no more. The steps that
are timed come after that; what it costs stands apart, as `StepResult.probes`.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from client.ahead import Cores, drawn_ahead
from client.batches import batch_of
from client.cohort import Patients
from client.dense import not_dense
from client.dpsgd import Engine, engine_of
from client.flat import FlatParameters, flat_step
from client.rowwise import TILE
from client.taps.company import multiple_of
from client.training import private_step
from common.privacy.noise import OperatingSystem
from common.privacy.plan import StepPlan
from common.study import Objective, Optimizer
from simulations.benchmarks.networks import WORKS, Work

Step = Callable[[], None]
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""An allocator that keeps what it was given; freed memory otherwise costs page faults at every step."""
SECONDS = 0.15  # of one repetition of one way
BATCHES = 10  # expected ones in the cohort
MEMORY_STEPS = 5
SPREAD = 2.5  # standard deviations of a batch's size within which sizes are tried before steps are timed
CLIPPING_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.1

WAYS = ("plain", "opacus", "ghost", "fedward")
"""Opacus twice: its stock hooks, and ghost clipping."""


@dataclass(frozen=True)
class StepResult:
    """One way of doing one row's step.

    Attributes:
        milliseconds: CPU time of a step on one thread, the median.
        ratio: the median over repetitions of its time to the plain step's.
        thread_ratio: the same of the training thread alone, with a second core for the noise where that is
            worth its while; None for ways that know of none.
        wall_ratio: the same by the clock, which needs a machine with two cores that nobody else uses.
        memory: MiB that a fresh process grows by in some steps; None if not measured.
        probes: CPU seconds, once in a process, of trying the sizes that batches have (99 % of them), above
            what steps of those sizes take; in no other figure. None for ways that try none.
    """

    work: str
    way: str
    milliseconds: float
    ratio: float
    thread_ratio: float | None = None
    wall_ratio: float | None = None
    memory: float | None = None
    probes: float | None = None


def measure_steps(
    names: Sequence[str] = tuple(WORKS),
    ways: Sequence[str] = WAYS,
    *,
    repeats: int = 7,
    tuned: bool = True,
    memory: bool = True,
) -> list[StepResult]:
    """Measure each row in processes of its own, on one thread. A way that can't do a row is left out of it.

    Args:
        names: of `WORKS`; `ways` of `WAYS`, "plain" first.
        tuned: with an allocator that keeps its memory, or the system's as it is.
        memory: whether to measure peak memory too.
    """
    found: list[StepResult] = []
    for name in names:
        timed = _in_process(["time", name, str(repeats), *ways], tuned)
        for line in timed.splitlines():
            way, milliseconds, ratio, thread, wall, probes = line.split()
            grown = float(_in_process(["memory", name, way], tuned)) if memory else None
            found.append(
                StepResult(
                    work=name,
                    way=way,
                    milliseconds=float(milliseconds),
                    ratio=float(ratio),
                    thread_ratio=float(thread) if way == "fedward" else None,
                    wall_ratio=float(wall) if way == "fedward" else None,
                    memory=grown,
                    probes=float(probes) if way == "fedward" else None,
                )
            )
    return found


def _in_process(arguments: Sequence[str], tuned: bool) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in TUNED} | (TUNED if tuned else {})
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "simulations.benchmarks.steps", *arguments]
    return subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


class Invented:
    """Random patients for a row, and shuffled batches of them."""

    def __init__(self, work: Work) -> None:
        torch.manual_seed(0)
        self.size = work.shape[0]
        count = BATCHES * self.size
        self.features = torch.randn(count, *work.shape[1:])
        self.labels = torch.randint(0, work.outputs, (count,))
        self.patients = Patients(
            self.features, self.labels, torch.arange(count // work.records + 1) * work.records
        )
        self._waiting = torch.empty(0, dtype=torch.int64)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and labels of the next batch."""
        if not self._waiting.shape[0]:
            self._waiting = torch.randperm(self.labels.shape[0])
        chosen, self._waiting = self._waiting[: self.size], self._waiting[self.size :]
        return self.features[chosen], self.labels[chosen]


@contextmanager
def step_of(work: Work, way: str, cores: int = 1) -> Iterator[Step]:
    """One step, ready to be repeated.

    Args:
        cores: that fedward's may use; the others compute on the calling thread alone.
    """
    invented = Invented(work)
    if way == "fedward":
        with _fedward(work, invented, cores) as step:
            yield step
    else:
        yield {"plain": _plain, "opacus": _opacus, "ghost": _ghost}[way](work, invented)


def _plain(work: Work, invented: Invented) -> Step:
    network = work.network(False)
    return _usual(network, torch.optim.SGD(network.parameters(), lr=LEARNING_RATE), invented)


def _usual(network: nn.Module, optimizer: torch.optim.Optimizer, invented: Invented) -> Step:
    """Forward, backward, step."""

    def step() -> None:
        features, labels = invented.batch()
        optimizer.zero_grad()
        functional.cross_entropy(network(features), labels).backward()
        optimizer.step()

    return step


def _opacus(work: Work, invented: Invented) -> Step:
    """Opacus's stock engine, with hooks; its noise is torch's."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    module = GradSampleModule(work.network(True))
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=invented.size,
    )
    return _usual(module, optimizer, invented)


def _ghost(work: Work, invented: Invented) -> Step:
    """Opacus's ghost clipping: two backward passes, and no gradient of a record."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    module = GradSampleModuleFastGradientClipping(
        work.network(True), max_grad_norm=CLIPPING_NORM, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=invented.size,
    )
    loss = DPLossFastGradientClipping(module, optimizer, torch.nn.CrossEntropyLoss())

    def step() -> None:
        features, labels = invented.batch()
        optimizer.zero_grad()
        loss(module(features), labels).backward()
        optimizer.step()

    return step


@contextmanager
def _fedward(work: Work, invented: Invented, cores: int) -> Iterator[Step]:
    """As client/training takes it."""
    plan, flat, engine = _private(work, invented)
    step = flat_step(Optimizer(name="sgd", learning_rate=LEARNING_RATE), flat.trainable)
    source = OperatingSystem()
    sampling, noise = source.stream("sampling"), source.stream("noise")
    deviation = plan.noise_multiplier * CLIPPING_NORM
    with drawn_ahead(noise, engine.size, Cores(cores), scale=deviation) as normals:
        yield lambda: private_step(engine, invented.patients, plan, step, sampling, normals)


def _private(work: Work, invented: Invented) -> tuple[StepPlan, FlatParameters, Engine]:
    """What a site trains by: its plan, its parameters and the engine that it would choose."""
    expected = invented.size / work.records
    plan = StepPlan(
        sample_rate=1 / BATCHES,
        clipping_norm=CLIPPING_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        divisor=expected,
        max_records=work.records,
        average_records=True,
    )
    network = work.network(False)
    flat = FlatParameters(network, torch.device("cpu"))
    return plan, flat, engine_of(network, Objective(task="multi-class"), expected)


def _sizes(work: Work, patients: float, multiple: int) -> list[int]:
    """Numbers of patients whose records fill passes of each size that is likely, one number a size.

    Args:
        patients: expected in a batch.
        multiple: of which a pass has rows.
    """
    reach = SPREAD * math.sqrt(patients * (1 - 1 / BATCHES))
    likely = range(max(1, math.floor(patients - reach)), math.ceil(patients + reach) + 1)
    return list({-(-count * work.records // multiple): count for count in likely}.values())


def _tried(work: Work) -> tuple[float, int]:
    """Take a sum of each size that batches are likely to have; CPU seconds and how many."""
    invented = Invented(work)
    plan, _, engine = _private(work, invented)
    multiple = TILE if not_dense(engine.network) is None else multiple_of(engine.network)
    sizes = _sizes(work, plan.divisor, multiple)
    stream = OperatingSystem().stream("sampling")
    began = time.process_time()
    for size in sizes:
        engine.sum(
            invented.patients, batch_of(invented.patients, np.arange(size), plan, stream), CLIPPING_NORM
        )
    return time.process_time() - began, len(sizes)


def _time(name: str, repeats: int, ways: Sequence[str]) -> None:
    """Print for each way that can: name, milliseconds, ratio; on two cores, the thread's and the clock's;
    seconds of probes."""
    seconds, sizes = _tried(WORKS[name]) if "fedward" in ways else (0.0, 0)
    cpu = _compared(WORKS[name], ways, repeats, time.process_time, cores=1)
    able = [way for way in cpu if way in {"plain", "fedward"}]
    thread = _compared(WORKS[name], able, repeats, time.thread_time, cores=2)
    wall = _compared(WORKS[name], able, repeats, time.perf_counter, cores=2)
    for way in cpu:
        two = [_ratio(times, way) if way in times else 0.0 for times in (thread, wall)]
        usual = statistics.median(cpu[way])
        probes = max(0.0, seconds - sizes * usual) if way == "fedward" else 0.0
        print(way, 1000 * usual, _ratio(cpu, way), *two, probes)  # noqa: T201


def _ratio(times: dict[str, list[float]], way: str) -> float:
    first = next(iter(times.values()))
    return statistics.median(a / b for a, b in zip(times[way], first, strict=True))


def _compared(
    work: Work, ways: Sequence[str], repeats: int, clock: Callable[[], float], cores: int
) -> dict[str, list[float]]:
    """Seconds of a step, of each repetition of each way that can do the work."""
    with ExitStack() as stack:
        steps, counts = dict[str, Step](), dict[str, int]()
        for way in ways:
            with suppress(NotImplementedError):  # ghost clipping has no rule for some layers
                step = stack.enter_context(step_of(work, way, cores))
                step()
                counts[way] = max(1, min(500, int(SECONDS / max(1e-5, _seconds(step, 2, clock)))))
                steps[way] = step
        times: dict[str, list[float]] = {way: [] for way in steps}
        for _ in range(repeats):
            for way, step in steps.items():
                times[way].append(_seconds(step, counts[way], clock))
    return times


def _seconds(step: Step, count: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(count):
        step()
    return (clock() - began) / count


def _memory(name: str, way: str) -> None:
    with step_of(WORKS[name], way) as step:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _mebibytes("VmRSS")
        for _ in range(MEMORY_STEPS):
            step()
        print(_mebibytes("VmHWM") - before)  # noqa: T201


def _mebibytes(field: str) -> float:
    """Memory of this process now (VmRSS) or at its peak (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: the peak stands for both
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


HEADER = (
    "work",
    "way",
    "ms",
    "÷ plain",
    "÷ plain, training thread",
    "÷ plain, clock",
    "MiB",
    "probes once, s",
)


def rows(results: Sequence[StepResult]) -> list[list[str]]:
    """The table's cells; see `HEADER`."""
    return [
        [
            WORKS[r.work].title,
            r.way,
            f"{r.milliseconds:.3f}",
            f"{r.ratio:.2f}",
            "" if r.thread_ratio is None else f"{r.thread_ratio:.2f}",
            "" if r.wall_ratio is None else f"{r.wall_ratio:.2f}",
            "" if r.memory is None else f"{r.memory:.0f}",
            "" if r.probes is None else f"{r.probes:.2f}",
        ]
        for r in results
    ]


def as_json(results: Sequence[StepResult]) -> list[dict[str, Any]]:
    return [asdict(r) for r in results]


def main(arguments: Sequence[str]) -> None:
    """What `measure_steps` starts: `time NAME REPEATS WAY …` or `memory NAME WAY`."""
    torch.set_num_threads(1)
    if arguments[0] == "time":
        _time(arguments[1], int(arguments[2]), arguments[3:])
    else:
        _memory(arguments[1], arguments[2])


if __name__ == "__main__":
    main(sys.argv[1:])
