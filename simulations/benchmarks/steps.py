"""One step of DP-SGD against one of plain SGD, on the models that hospitals use.

Ratios of CPU time on one thread within one process, repetitions interleaved, medians: a machine that others
use too changes the times, but hardly the ratios. Memory is what a fresh process grows by during steps.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from client.cohort import Patients
from client.dpsgd import Batch
from client.taps import TappedGradients
from common.privacy.noise import Seeded, noised
from common.study import Objective

Step = Callable[[], None]

TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""An allocator that keeps what it was given; freed memory otherwise costs page faults at every step."""
SECONDS = 0.15  # of one repetition of one way
CLIPPING_NORM, NOISE_MULTIPLIER, LEARNING_RATE = 1.0, 1.0, 0.1


class _Sequences(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.layer(x)[0][:, -1])
        return outputs


class _Block(nn.Module):
    """A residual block (He et al. 2016) with GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.first_norm, self.second_norm = nn.GroupNorm(32, outputs), nn.GroupNorm(32, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(32, outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(inner)) + self.shortcut(x))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


def _cnn_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool3d(2),
        nn.Flatten(), nn.Linear(16 * 7**3, 11),
    )  # fmt: skip


def _resnet() -> nn.Module:
    """ResNet-18 for small images: a stem of 3 × 3 without pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(inputs, outputs, stride), _Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 9))


def _sequences(kind: str, private: bool) -> nn.Module:
    if not private:
        return _Sequences(getattr(nn, kind)(37, 64, batch_first=True))
    from opacus import layers

    return _Sequences(getattr(layers, f"DP{kind}")(37, 64, batch_first=True))


@dataclass(frozen=True)
class Work:
    """One row of the table.

    Attributes:
        network: called with True it gives the network that Opacus takes.
        shape: of a batch's features.
        outputs: classes.
        records: of each patient.
    """

    title: str
    network: Callable[[bool], nn.Module]
    shape: tuple[int, ...]
    outputs: int
    records: int = 1


WORKS: dict[str, Work] = {
    "logistic": Work("logistic regression, 30 features, batch 64", lambda _: nn.Linear(30, 2), (64, 30), 2),
    "mlp": Work("MLP 784-128-64-10, batch 256", lambda _: _mlp(), (256, 784), 10),
    "cnn": Work("CNN 28×28, two convolutions, batch 256", lambda _: _cnn(), (256, 1, 28, 28), 10),
    "cnn-3d": Work("3-D CNN 28³, batch 32", lambda _: _cnn_3d(), (32, 1, 28, 28, 28), 11),
    "lstm": Work("LSTM 48×37, hidden 64, batch 64", lambda p: _sequences("LSTM", p), (64, 48, 37), 2),
    "gru": Work("GRU 48×37, hidden 64, batch 64", lambda p: _sequences("GRU", p), (64, 48, 37), 2),
    "resnet": Work("ResNet-18 (GroupNorm), 28×28×3, batch 64", lambda _: _resnet(), (64, 3, 28, 28), 9),
    "mlp-patients": Work(
        "MLP, 8 patients with 40 records each", lambda _: _mlp(), (320, 784), 10, records=40
    ),
    "mlp-ungrouped": Work("MLP, the same 320 records, one a patient", lambda _: _mlp(), (320, 784), 10),
}
WAYS = ("plain", "opacus", "taps")


@dataclass(frozen=True)
class StepResult:
    """One way of doing one row's step.

    Attributes:
        milliseconds: CPU time of a step, the median.
        ratio: the median over repetitions of its time to the plain step's.
        memory: MiB that a fresh process grows by in three steps; None if not measured.
    """

    work: str
    way: str
    milliseconds: float
    ratio: float
    memory: float | None = None


def measure_steps(
    names: Sequence[str] = tuple(WORKS),
    ways: Sequence[str] = WAYS,
    *,
    repeats: int = 7,
    tuned: bool = True,
    memory: bool = True,
) -> list[StepResult]:
    """Measure each row in processes of its own, on one thread.

    Args:
        names: of `WORKS`; `ways` of `WAYS`, "plain" first.
        tuned: with an allocator that keeps its memory, or the system's as it is.
        memory: whether to measure peak memory too.
    """
    found: list[StepResult] = []
    for name in names:
        timed = _in_process(["time", name, str(repeats), *ways], tuned)
        for line in timed.splitlines():
            way, milliseconds, ratio = line.split()
            grown = float(_in_process(["memory", name, way], tuned)) if memory else None
            found.append(StepResult(name, way, float(milliseconds), float(ratio), grown))
    return found


def _in_process(arguments: Sequence[str], tuned: bool) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in TUNED} | (TUNED if tuned else {})
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "simulations.benchmarks.steps", *arguments]
    return subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def step_of(work: Work, way: str) -> Step:
    """One step, ready to be repeated on the same batch."""
    torch.manual_seed(0)
    features = torch.randn(work.shape)
    labels = torch.randint(0, work.outputs, work.shape[:1])
    network = work.network(way == "opacus")
    if way == "plain":
        return _plain(network, features, labels)
    if way == "opacus":
        return _opacus(network, features, labels)
    return _taps(network, features, labels, work.records)


def _plain(network: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE)
    records = torch.arange(len(labels))  # every way takes its batch by index

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(network(features[records]), labels[records]).backward()
        optimizer.step()

    return step


def _opacus(network: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> Step:
    """Opacus's stock engine, with hooks; its noise is torch's."""
    import warnings

    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    module = GradSampleModule(network)
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=len(labels),
    )

    records = torch.arange(len(labels))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(module(features[records]), labels[records]).backward()
        optimizer.step()

    return step


def _taps(network: nn.Module, features: torch.Tensor, labels: torch.Tensor, records: int) -> Step:
    """The taps, with fedward's own noise."""
    engine = TappedGradients(network, Objective(task="multi-class"))
    patients = len(labels) // records
    patient = torch.arange(patients).repeat_interleave(records)
    batch = Batch(torch.arange(len(labels)), patient, torch.full((len(labels),), 1 / records), patients)
    cohort = Patients(features, labels, torch.arange(patients + 1) * records)
    stream = Seeded(0).stream("steps")
    parameters = list(network.parameters())
    sizes = [p.numel() for p in parameters]

    def step() -> None:
        total = engine.sum(cohort, batch, CLIPPING_NORM)
        gradient = noised(total, NOISE_MULTIPLIER * CLIPPING_NORM, stream, divisor=patients)
        with torch.no_grad():
            for parameter, piece in zip(parameters, gradient.split(sizes), strict=True):
                parameter.sub_(piece.view_as(parameter), alpha=LEARNING_RATE)

    return step


def _time(name: str, repeats: int, ways: Sequence[str]) -> None:
    steps = {way: step_of(WORKS[name], way) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    counts = {}
    for way, step in steps.items():
        step()
        step()
        counts[way] = max(1, min(500, int(SECONDS / max(1e-5, _seconds(step, 1)))))
    for _ in range(repeats):
        for way, step in steps.items():
            times[way].append(_seconds(step, counts[way]))
    for way in ways:
        ratios = [a / b for a, b in zip(times[way], times[ways[0]], strict=True)]
        print(way, 1000 * statistics.median(times[way]), statistics.median(ratios))  # noqa: T201


def _seconds(step: Step, count: int) -> float:
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / count


def _memory(name: str, way: str) -> None:
    step = step_of(WORKS[name], way)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)  # noqa: T201


def rows(results: Sequence[StepResult]) -> list[list[str]]:
    """The table's cells: work, way, ms, ratio, MiB."""
    return [
        [WORKS[r.work].title, r.way, f"{r.milliseconds:.3f}", f"{r.ratio:.2f}",
         "" if r.memory is None else f"{r.memory:.0f}"]
        for r in results
    ]  # fmt: skip


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
