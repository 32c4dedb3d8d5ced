"""Patient-level DP-SGD (Abadi et al. 2016, with the patient as the unit).

One step: every patient takes part with probability q, by itself; the patient's gradient (mean or sum
over its records) is clipped to L2 norm C over all parameters together; the sum over patients gets
Gaussian noise of standard deviation σC and is divided by a *public* number. An empty batch is a step
like any other: its sum is zero, and it is noised all the same. Opacus gives the per-record gradients.

Norms and sums are computed in float64, so that rounding does not undo the bound (`ClippedGradients.sum`
says how far).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from opacus import GradSampleModule
from torch import nn

from client.blocks import block_size, filled, layout
from client.cohort import Patients
from common.objectives import record_losses
from common.privacy.noise import Floats, Normals, Stream, noised
from common.privacy.plan import StepPlan
from common.study import Objective

# torch warns that inputs need no gradient; Opacus's hooks work all the same. Once for the process,
# because `catch_warnings` is not safe among threads, and sites of a simulation are threads.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

MAX_RECORDS = 4096  # in one pass through the network
MAX_GRADIENT_ELEMENTS = 1 << 26  # 256 MiB of float32 per-record gradients at a time
CLIPPING_MARGIN = 2.0**-24  # of C, for the rounding of norms and sums in float64
DRAWN_AHEAD = 100_000  # from so many normals on, a thread of their own is worth its while
_ROWS, _ELEMENTS = 16, 1 << 16  # of gradients that are float64 at a time: 512 KiB stay in a core's cache


@dataclass(frozen=True)
class Batch:
    """One step's records.

    Attributes:
        records: int64 [records], indices into the cohort, a patient's together.
        patient: int64 [records], 0 … patients-1, rising.
        weights: float32 [records]: 1 / (the patient's records in this batch), or 1.
        patients: how many take part.
    """

    records: torch.Tensor
    patient: torch.Tensor
    weights: torch.Tensor
    patients: int

    @property
    def one_record_each(self) -> bool:
        return len(self.records) == self.patients


def draw_batch(patients: Patients, plan: StepPlan, stream: Stream) -> Batch:
    """Choose patients by independent coins, and at most `max_records` of each one's records."""
    chosen = np.flatnonzero(stream.bernoulli(len(patients), plan.sample_rate))
    return batch_of(patients, chosen, plan, stream)


def batch_of(patients: Patients, chosen: np.ndarray, plan: StepPlan, stream: Stream) -> Batch:
    """The batch of given patients (indices int64 [patients])."""
    if len(patients.labels) == len(patients):  # one record each
        records = torch.from_numpy(chosen.astype(np.int64))
        return Batch(records, torch.arange(len(chosen)), torch.ones(len(chosen)), len(chosen))
    offsets = patients.offsets.numpy()
    counts = offsets[chosen + 1] - offsets[chosen]
    patient = np.repeat(np.arange(len(chosen)), counts)
    firsts = np.cumsum(counts) - counts
    records = np.arange(counts.sum()) - np.repeat(firsts - offsets[chosen], counts)
    if len(counts) and counts.max() > plan.max_records:
        order = np.lexsort((stream.words(len(records)), patient))
        rank = np.arange(len(records)) - np.repeat(firsts, counts)
        kept = np.sort(order[rank < plan.max_records])
        records, patient = records[kept], patient[kept]
        counts = np.minimum(counts, plan.max_records)
    weights = np.repeat(1.0 / counts, counts) if plan.average_records else np.ones(len(records))
    return Batch(
        records=torch.from_numpy(records.astype(np.int64)),
        patient=torch.from_numpy(patient.astype(np.int64)),
        weights=torch.from_numpy(weights.astype(np.float32)),
        patients=len(chosen),
    )


def pieces(batch: Batch, max_records: int) -> list[Batch]:
    """The batch in pieces of whole patients, each of at most `max_records` records (or one patient)."""
    if len(batch.records) <= max_records:
        return [batch] if batch.patients else []
    counts = torch.bincount(batch.patient, minlength=batch.patients).tolist()
    cuts, size = [0], 0
    for index, count in enumerate(counts):
        if size and size + count > max_records:
            cuts.append(index)
            size = 0
        size += count
    cuts.append(batch.patients)
    result = []
    for first, last in pairwise(cuts):
        inside = (batch.patient >= first) & (batch.patient < last)
        result.append(
            Batch(batch.records[inside], batch.patient[inside] - first, batch.weights[inside], last - first)
        )
    return result


class ClippedGradients:
    """Sums of clipped per-patient gradients of one network.

    Args:
        network: taken over: use `network` of this object from here on.
        expected: public number of records in a step, by which the size of blocks is chosen.
    """

    def __init__(self, network: nn.Module, objective: Objective, expected: float = 1.0) -> None:
        self._module = GradSampleModule(network, loss_reduction="sum")
        self._objective = objective
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self._max_records = min(MAX_RECORDS, max(1, MAX_GRADIENT_ELEMENTS // max(1, self.size)))
        self._block = block_size(expected, self._max_records)

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """Σ over patients of min(1, C / ‖g‖) g, float64 [parameters], with ‖g‖ over all of them.

        A patient with a g that overflows counts as zero: NaN would drown the noise and tell everyone that
        such a patient is here.

        From g on, all is float64, and what is clipped to is C (1 - 2^-24). So one patient more or less
        changes the result by at most C in L2 norm, rounding included: that of a norm is below 2^-40 of
        it; a sum of n patients' vectors is off by at most n² 2^-53 C (Higham 2002, "Accuracy and
        stability of numerical algorithms", section 3.1), which the margin covers twice over up to
        n = 16,000, and up to many millions unless all roundings conspire.

        g itself is float32, and is computed in blocks whose size and order tell nothing of who else is
        there (client/blocks).

        Args:
            clipping_norm: C.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        for piece in pieces(batch, self._max_records):
            total += self._piece(patients, piece, clipping_norm)
        return total

    def _piece(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        gradients = self._per_patient(patients, batch)
        norms = _norms(gradients)
        sound = norms.isfinite()
        if not sound.all():
            norms = torch.where(sound, norms, 0.0)
            gradients = [torch.where(sound[:, None], g, 0.0) for g in gradients]
        scale = clipping_norm * (1.0 - CLIPPING_MARGIN) / norms.clamp(min=1e-300)
        return _weighted_sums(gradients, scale.clamp(max=1.0))

    def _per_patient(self, patients: Patients, batch: Batch) -> list[torch.Tensor]:
        """Each patient's gradient in some order, one float32 matrix [patients, numbers] a parameter."""
        blocks = list(layout(patients.lanes[batch.records], self._block))
        alone = batch.one_record_each and len(blocks) == 1
        grouped = [] if alone else [torch.zeros(batch.patients, p.numel()) for p in self.parameters]
        for chosen, rows in blocks:
            records = batch.records[chosen]
            outputs = self._module(filled(patients.features[records], rows, self._block))
            labels = filled(patients.labels[records], rows, self._block)
            weights = filled(batch.weights[chosen], rows, self._block)
            (record_losses(self._objective, outputs, labels) * weights).sum().backward()
            found = [self._taken(p)[rows] for p in self.parameters]
            if alone:
                return found
            for together, part in zip(grouped, found, strict=True):
                together.index_add_(0, batch.patient[chosen], part)
        return grouped

    def _taken(self, parameter: nn.Parameter) -> torch.Tensor:
        per_record: torch.Tensor = parameter.grad_sample.flatten(start_dim=1)  # type: ignore[attr-defined]
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
        return per_record


def _in_float64(gradient: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """A float32 matrix [patients, parameters] in float64, a cacheful at a time: rows, columns, part.

    A part is overwritten by the next one.
    """
    if gradient.numel() <= _ELEMENTS:
        yield slice(None), slice(None), gradient.double()
        return
    rows, columns = gradient.shape
    high = min(rows, max(_ROWS, _ELEMENTS // columns))
    wide = min(columns, _ELEMENTS // high)
    memory = torch.empty(high * wide, dtype=torch.float64)
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            part = gradient[top : top + high, left : left + wide]
            doubled = memory[: part.numel()].view(part.shape)
            yield slice(top, top + high), slice(left, left + wide), doubled.copy_(part)


def _norms(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Each patient's L2 norm over all its gradients, float64 [patients]."""
    squares = torch.zeros(len(gradients[0]), dtype=torch.float64)
    for gradient in gradients:
        for rows, _, part in _in_float64(gradient):
            squares[rows] += part.square_().sum(dim=1)
    return squares.sqrt_()


def _weighted_sums(gradients: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ over patients of weight · gradient, float64 [parameters].

    Args:
        weights: float64 [patients].
    """
    sums = []
    for gradient in gradients:
        total = torch.zeros(gradient.shape[1], dtype=torch.float64)
        for rows, columns, part in _in_float64(gradient):
            total[columns].addmv_(part.T, weights[rows])
        sums.append(total)
    return torch.cat(sums)


def noised_mean(total: torch.Tensor, plan: StepPlan, source: Normals) -> torch.Tensor:
    """(total + noise of standard deviation σC) / divisor, on a grid, float32 [parameters]: may be seen.

    Args:
        total: what `ClippedGradients.sum` gave.
        source: a stream, or what draws ahead of it; see common/privacy/noise, `noised`.

    Raises:
        ValueError: if the plan has no clipping, or no noise.
    """
    if plan.clipping_norm is None:
        raise ValueError("a plan without clipping has no private gradient")
    return noised(total, plan.noise_multiplier * plan.clipping_norm, source, divisor=plan.divisor)


# --- drawing while others compute


class Cores:
    """Who computes in this process: trainings, and threads that draw noise for them.

    Args:
        count: cores that this process may use. None: those that the system grants it, at most
            OMP_NUM_THREADS where that is set (Ray sets it for its workers); none is free for noise while
            the machine's load of the last minute, other programs included, is as high.
    """

    def __init__(self, count: int | None = None) -> None:
        self._count, self._busy, self._lock = count, 0, threading.Lock()

    @property
    def count(self) -> int:
        if self._count is not None:
            return self._count
        granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        told = os.environ.get("OMP_NUM_THREADS", "")
        return min(granted, int(told)) if told.isdigit() and int(told) > 0 else granted

    @contextmanager
    def working(self) -> Iterator[None]:
        """Take one core for a training, free or not."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            self.give_back()

    def borrow(self) -> bool:
        """Take one more if it is free; say whether it was."""
        with self._lock:
            free = self._busy < self.count and not self._crowded()
            self._busy += free
            return free

    def give_back(self) -> None:
        """Be done with one."""
        with self._lock:
            self._busy -= 1

    def _crowded(self) -> bool:
        if self._count is not None:
            return False
        try:
            return os.getloadavg()[0] >= self.count
        except (AttributeError, OSError):  # the system doesn't tell
            return False


CORES = Cores()


class DrawnAhead:
    """A stream's normals, the next of which a thread may be drawing. Made by `drawn_ahead`."""

    def __init__(self, stream: Stream, count: int, cores: Cores) -> None:
        self._stream, self._count, self._cores = stream, count, cores
        self._drawn: Floats = np.empty(0)
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def begin(self) -> None:
        """Start to draw the next `count` normals, if that pays and a core is free; returns at once."""
        if self._count < DRAWN_AHEAD or self._pending is not None or not self._cores.borrow():
            return
        try:
            if self._thread is None:
                self._drawn = np.empty(self._count)
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
            self._pending = self._thread.submit(self._stream.fill, self._drawn)
        except BaseException:
            self._cores.give_back()
            raise
        self._pending.add_done_callback(lambda _: self._cores.give_back())

    def normals(self, count: int) -> Iterator[Floats]:
        """The stream's own normals, whoever drew them.

        Raises:
            ValueError: if other than the number begun is taken.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            yield from self._stream.normals(count)
            return
        pending.result()
        if count != self._count:
            raise ValueError(f"{self._count} normals were begun, and {count} are taken")
        for start in range(0, count, _ELEMENTS // 2):
            yield self._drawn[start : start + _ELEMENTS // 2]

    def close(self) -> None:
        """Wait for the thread, and end it."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)


@contextmanager
def drawn_ahead(stream: Stream, count: int, cores: Cores = CORES) -> Iterator[DrawnAhead]:
    """For one training: between `begin` and use, another core draws the next `count` normals.

    Only if they are `DRAWN_AHEAD` or more and a core is free (see `Cores`): each training in this process
    counts as one that is busy, and so does each thread that draws, so that a simulation's workers keep
    theirs. The numbers are the same either way. The thread ends with the context; an error on it is
    raised where the normals are used.
    """
    with cores.working():
        ahead = DrawnAhead(stream, count, cores)
        try:
            yield ahead
        finally:
            ahead.close()
