"""Private steps of several sites at once, for simulations; client/stacking says which.

Whole tiles of rows, each of one site, go through the network together, each tile by its own site's weights.
That is what client/chain computes for a site alone, kernel by kernel, so a record's numbers are the same bit
for bit whoever shares its tile or the stack. From there on each site is by itself: its sum, its noise and its
optimiser make the very calls that they make alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import torch

from client.ahead import CORES
from client.batches import draw_batch
from client.chain import EachTile, Tapped
from client.cohort import Patients
from client.dense import DenseGradients
from client.dpsgd import noised_mean
from client.flat import flat_step
from client.rowwise import CLIPPING_MARGIN, TILE, VECTOR
from common.messages import Arrays

if TYPE_CHECKING:
    from client.tasks import Training
    from client.training import Trainer

LARGEST = 1 << 15  # parameters; beyond, arithmetic and not calls is what a step costs


def may_join(trainer: Trainer) -> bool:
    """Whether `train_privately` takes it: a record a patient, as it is, a small dense network, on the CPU."""
    engine, patients = trainer.engine, trainer.cohort.train
    return (
        trainer.plan.private
        and trainer.augmenter is None
        and type(engine) is DenseGradients
        and 0 < engine.size <= LARGEST
        and patients.features.device.type == "cpu"
        and patients.one_record_each
        and len(patients) > 0
    )


def memory(trainer: Trainer, widest: int) -> int:
    """Bytes that it takes in a step of twice the expected rows, with each tile's weights.

    Args:
        widest: numbers that a row's pass keeps.
    """
    patients = trainer.cohort.train
    tiles = 1 + min(len(patients), round(2 * trainer.plan.step.divisor)) // TILE
    width = patients.features[:1].numel()
    return 4 * tiles * (TILE * (width + widest) + trainer.flat.values.numel())


def train_privately(trainings: Sequence[Training]) -> list[Arrays]:
    """Train sites of one study and clipping norm that `may_join`; local minus global of each.

    Bit for bit what each one's `Trainer.train` returns.

    Raises:
        ArithmeticError: if on this machine company shows in a row's numbers; alone they are safe.
        ValueError: if a trainer is there twice: its weights can't be in two states.
    """
    if len({id(training.trainer) for training in trainings}) < len(trainings):
        raise ValueError("a trainer is there twice: train one by one")
    with CORES.working(), torch.no_grad():
        sites = [_Site(training) for training in trainings]
        stack = _Stack(trainings[0].trainer, len(sites))
        for number in range(max(site.steps for site in sites)):
            active = [site for site in sites if number < site.steps]
            for site in active:
                site.draw()
            for site, total in zip(active, stack.sums(active), strict=True):
                site.step(total)
        return [site.update() for site in sites]


class _Site:
    """What a site has of its own: who takes part, the streams, the weights and the optimiser.

    Attributes:
        values: float32 [parameters], of this moment.
        records: int64 [records], the batch.
    """

    def __init__(self, training: Training) -> None:
        self._trainer, self._parameters = training.trainer, training.parameters
        self._plan, self._flat = self._trainer.plan.step, self._trainer.flat
        self.steps = self._trainer.plan.steps_per_round
        self._sampling, self._noise = training.streams()
        self._flat.load(self._parameters)
        self.values: npt.NDArray[np.float32] = self._flat.values.numpy()
        self._step = flat_step(self._trainer.study.training.optimizer, self._flat.trainable)
        self._patients: Patients | None = None
        self.records: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def draw(self) -> None:
        """The next batch, of those who consent by now."""
        patients = self._trainer.consenting(self._trainer.cohort.train)
        if patients is not self._patients:
            self._patients = patients
            self._features = patients.features.flatten(start_dim=1).numpy()
            self._labels = patients.labels.numpy()
        self.records = draw_batch(patients, self._plan, self._sampling).records.numpy()

    def gather(self, x: npt.NDArray[np.float32], labels: npt.NDArray[np.generic]) -> None:
        """Write the batch's features [records, inputs] and labels [records, …]."""
        self._features.take(self.records, axis=0, out=x, mode="clip")  # "raise" copies
        self._labels.take(self.records, axis=0, out=labels, mode="clip")

    def step(self, total: torch.Tensor) -> None:
        """Noise, and the optimiser's step."""
        self._step(noised_mean(total, self._plan, self._noise))

    def update(self) -> Arrays:
        """What its parameters have become, less what they were."""
        return self._flat.since(self._parameters)


class _Stack:
    """Clipped sums of several sites' batches, by the first one's network with each one's weights.

    Args:
        count: sites at most.
    """

    def __init__(self, trainer: Trainer, count: int) -> None:
        self._engine = cast(DenseGradients, trainer.engine)  # says `may_join`
        self._objective = trainer.study.objective
        self._clipping_norm = (trainer.plan.step.clipping_norm or 0.0) * (1.0 - CLIPPING_MARGIN)
        train = trainer.cohort.train
        self._width, self._labels = train.features[:1].numel(), train.labels[:0]
        self._size = trainer.flat.values.numel()
        # Each row begins where a vector does: how weights lie must not tell a tile's place.
        self._values = np.zeros((count, self._size + -self._size % VECTOR), dtype=np.float32)
        self._places = {
            layer: (_place(layer.weight), None if layer.bias is None else _place(layer.bias))
            for layer in self._engine.chain.layers
        }

    def sums(self, sites: Sequence[_Site]) -> list[torch.Tensor]:
        """Of each site what `DenseGradients.sum` gives, float64 [trainable parameters]."""
        counts = [site.records.size for site in sites]
        tiles = [-(-count // TILE) for count in counts]
        firsts = [TILE * before for before in accumulate(tiles[:-1], initial=0)]
        taps = self._taps(sites, tiles, firsts) if any(tiles) else []
        return [
            self._engine.summed([(layer, x[a : a + n], g[a : a + n]) for layer, x, g in taps] if n else [])
            for a, n in zip(firsts, counts, strict=True)
        ]

    def _taps(self, sites: Sequence[_Site], tiles: Sequence[int], firsts: Sequence[int]) -> list[Tapped]:
        """All layers' inputs and clipped output gradients, of each site's rows from its first one on."""
        many = some_more(sum(tiles))
        if not self._engine.chain.uniform(self._objective, many * TILE, each_tile=True):
            raise ArithmeticError("a row's numbers depend on its company on this machine: train one by one")
        x = torch.zeros((many * TILE, self._width))  # by torch, which begins where a vector does
        labels = self._labels.new_zeros((many * TILE, *self._labels.shape[1:]))
        weights, owner = np.zeros(many * TILE, dtype=np.float32), np.zeros(many, dtype=np.int64)
        rows_of_x, rows_of_labels = x.numpy(), labels.numpy()
        for i, (site, first, own) in enumerate(zip(sites, firsts, tiles, strict=True)):
            self._values[i, : self._size] = site.values
            owner[first // TILE : first // TILE + own] = i
            rows = slice(first, first + site.records.size)
            site.gather(rows_of_x[rows], rows_of_labels[rows])
            weights[rows] = 1.0
        numbers = torch.from_numpy(self._values).index_select(0, torch.from_numpy(owner))
        found = self._engine.chain.tapped(
            self._objective, x, labels, torch.from_numpy(weights), EachTile(numbers, self._places)
        )
        return self._engine.clipped(found, self._clipping_norm)


def _place(parameter: torch.Tensor) -> slice:
    """Where it stands in its trainer's flat values, of which it is a view."""
    start = parameter.storage_offset()
    return slice(start, start + parameter.numel())


def some_more(tiles: int) -> int:
    """So many or up to an eighth more: fewer sizes, each of which is tried when it is first used."""
    step = 1 << max(0, tiles.bit_length() - 4)
    return -(-tiles // step) * step
