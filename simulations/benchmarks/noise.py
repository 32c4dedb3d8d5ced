"""What secure noise costs: against torch's generator, and when another core draws it ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from client.ahead import DRAWN_AHEAD, Cores, drawn_ahead
from client.batches import draw_batch
from client.cohort import Patients
from client.dpsgd import engine_of, noised_mean
from client.flat import FlatParameters, flat_step
from common.models.registry import Shape
from common.models.tabular import mlp
from common.privacy.noise import OperatingSystem, noised
from common.privacy.plan import StepPlan
from common.study import Objective, Optimizer
from simulations.benchmarks.measure import Comparison, Timing, interleaved

VALUES = 1_000_000
DRAWS = 11  # of a run, of which the median counts
_DEVIATION, _DIVISOR = 1.7, 40.0


@dataclass(frozen=True)
class Network:
    """An MLP on `inputs` features of 10 classes, and the patients that a step of it expects."""

    inputs: int
    hidden: tuple[int, ...]
    patients: int


NETWORKS = (Network(784, (128, 64), 256), Network(784, (1000, 214), 64), Network(784, (1000, 214), 16))


def compare_noise(
    work: Path,
    *,
    repeats: int = 5,
    values: int = VALUES,
    networks: Sequence[Network] = NETWORKS,
    steps: int = 10,
) -> tuple[Comparison, ...]:
    """Seconds of one draw of `values` numbers, then of one private step with and without drawing ahead.

    A draw is measured as this thread's processor time, with torch on one thread: other work on the
    machine doesn't count. A step is measured by the clock, because two cores are at it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every vault does
    try:
        return (_draws(work, values, repeats), *(_steps(work, n, steps, repeats) for n in networks))
    finally:
        torch.set_num_threads(threads)


def _draws(work: Path, values: int, repeats: int) -> Comparison:
    """The first is the yardstick; the third is all that a step does with noise; the last is the same with
    torch's own generator and no mitigation."""
    stream = OperatingSystem().stream("benchmark")
    total = torch.randn(values, dtype=torch.float64)
    narrow = total.float()

    def drawn() -> None:
        for _ in stream.normals(values):
            pass

    def released() -> None:
        noised(total, _DEVIATION, stream, divisor=_DIVISOR)

    def unprotected() -> None:
        (narrow + _DEVIATION * torch.randn(values)) / _DIVISOR

    ways: list[tuple[str, Callable[[], object]]] = [
        ("torch.randn, float32", lambda: torch.randn(values)),
        ("fedward's normals, float64", drawn),
        ("fedward's normals, added, put on the grid, divided", released),
        ("torch.randn, added, divided, float32", unprotected),
    ]
    timed = [(name, _repeated(way)) for name, way in ways]
    interleaved(timed, 1, work / "warm-up")
    title = f"{values:,} normals on one thread; a round is one draw, in processor time"
    return Comparison("noise", title, interleaved(timed, repeats, work))


def _repeated(draw: Callable[[], object]) -> Callable[[Path], Timing]:
    def run(_: Path) -> Timing:
        found = []
        for _draw in range(DRAWS):
            began = time.thread_time()
            draw()
            found.append(time.thread_time() - began)
        middle = sorted(found)[DRAWS // 2]
        return Timing(total=middle * DRAWS, per_round=middle, rounds=DRAWS)

    return run


def _steps(work: Path, network: Network, steps: int, repeats: int) -> Comparison:
    step = _Step(network)
    ways = [
        ("drawn in turn", lambda _: step.timed(steps, Cores(1))),
        ("drawn ahead where it pays", lambda _: step.timed(steps, Cores(2))),
    ]
    interleaved(ways, 1, work / "warm-up")
    size = step.clipped.size
    pays = "it pays" if size >= DRAWN_AHEAD else "too few: drawn in turn"
    layers = "-".join(str(width) for width in (network.inputs, *network.hidden, 10))
    title = f"MLP {layers}, {size:,} parameters ({pays}), {network.patients} patients; a round is one step"
    return Comparison(f"noise-ahead-{size}-{network.patients}", title, interleaved(ways, repeats, work))


class _Step:
    """Private steps of one network on invented patients."""

    def __init__(self, network: Network) -> None:
        count = network.patients
        self.patients = Patients(
            torch.randn(count, network.inputs), torch.randint(0, 10, (count,)), torch.arange(count + 1)
        )
        self.plan = StepPlan(
            sample_rate=1.0,
            clipping_norm=1.0,
            noise_multiplier=_DEVIATION,
            divisor=float(count),
            max_records=1,
            average_records=True,
        )
        model = mlp(Shape(network.inputs, 10), network.hidden)
        flat = FlatParameters(model, torch.device("cpu"))
        self.clipped = engine_of(model, Objective(task="multi-class"), count)
        self.optimize = flat_step(Optimizer(name="sgd", learning_rate=0.01), flat.trainable)

    def timed(self, steps: int, cores: Cores) -> Timing:
        """As client/training takes them."""
        source = OperatingSystem()
        sampling, noise = source.stream("sampling"), source.stream("noise")
        found = []
        began = time.perf_counter()
        with drawn_ahead(noise, self.clipped.size, cores) as normals:
            for _ in range(steps):
                start = time.perf_counter()
                batch = draw_batch(self.patients, self.plan, sampling)
                normals.begin()
                total = self.clipped.sum(self.patients, batch, 1.0)
                self.optimize(noised_mean(total, self.plan, normals))
                found.append(time.perf_counter() - start)
        return Timing(time.perf_counter() - began, sorted(found)[steps // 2], steps)
