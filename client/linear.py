"""Sums of clipped per-patient gradients of one linear layer, in float64 and by numpy.

A logistic regression's step takes some ten thousand multiplications: what a call costs decides. Arithmetic
is that of client/dense; arrays are kept between steps, and records lie along the second axis of all but the
features, so that each call does all records at once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from client.batches import Batch
from client.cohort import Patients
from client.dense import CANCELLING, DenseGradients, only_layer
from client.device import STEP_MEMORY
from client.rowwise import CLIPPING_MARGIN, TILE, VECTOR
from common.errors import StudyError
from common.study import Objective

Floats = npt.NDArray[np.float64]
MOST_NUMBERS = 1 << 20  # of a pass's features
LARGEST = 1 << 11  # weights; beyond, what a call costs no longer decides
_HELD = 1 << 19  # numbers of records' gradients at a time
_SMALL = 1 << 18  # multiplications


def not_linear(network: nn.Module, objective: Objective) -> str | None:
    """None if `LinearGradients` takes this network; else why not."""
    layer = only_layer(network)
    if layer is None:
        return "more than one linear layer"
    if layer.weight.numel() > LARGEST:
        return f"it has more than {LARGEST} weights"
    if layer.weight.device.type != "cpu":
        return "it isn't on the CPU"
    if not layer.weight.requires_grad or (layer.bias is not None and not layer.bias.requires_grad):
        return "something of it is frozen"
    if objective.task in ("multi-label", "survival") or objective.loss == "quantile":
        return f"labels or outputs of {objective.task}"
    if objective.task == "multi-class" and objective.loss == "hinge":
        return "the multi-class hinge loss"
    if objective.task != "multi-class" and layer.out_features != 1:
        return "more outputs than the loss takes"
    return None


class _Room:
    """Arrays for some tiles of rows, and the product's operands as views of them.

    The product is tried as client/chain tries its own. Where a row's place shows, each record goes through
    the first row of one tile, which gives the same bits as any number of tiles that passes.
    """

    def __init__(self, tiles: int, inputs: int, outputs: int, biased: bool) -> None:
        rows, padded = tiles * TILE, outputs + -outputs % VECTOR
        self.x = np.zeros((rows, inputs + biased))
        self.x[:, inputs:] = 1.0
        self.weight = np.zeros((inputs + biased, padded))
        self.z = np.zeros((rows, padded))
        self._operands = (
            torch.from_numpy(self.x).view(tiles, TILE, -1),
            torch.from_numpy(self.weight).expand(tiles, *self.weight.shape),
        )
        self._found = torch.from_numpy(self.z).view(tiles, TILE, -1)
        self._outputs, self._uniform = outputs, True
        self._uniform = self._tried()

    def multiply(self) -> None:
        """z = x weight; a row of it is the same bit for bit in any company."""
        if self._uniform:
            torch.bmm(*self._operands, out=self._found)
            return
        tile = torch.zeros_like(self._operands[0][:1])
        for row, record in enumerate(self._operands[0].flatten(end_dim=1)):
            tile[0, 0] = record
            self.z[row] = torch.bmm(tile, self._operands[1][:1])[0, 0].numpy()

    def _tried(self) -> bool:
        """With one record in every row, whether all come out alike, and as in one tile."""
        random, before = np.random.default_rng(len(self.x)), self.x.copy()
        self.x[:] = random.normal(size=self.x.shape[1])
        self.weight[:, : self._outputs] = random.normal(size=(self.x.shape[1], self._outputs))
        self.multiply()
        one = torch.bmm(self._operands[0][:1], self._operands[1][:1])[0, 0].numpy()
        alike = bool((self.z == one).all())
        self.x[:], self.weight[:] = before, 0.0
        return alike


class LinearGradients(DenseGradients):
    """As `DenseGradients`, for networks of which `not_linear` says nothing.

    Everything is float64 from the features on, so that rounding is far within the clipping margin for any
    number of patients that fits a machine.

    Raises:
        StudyError: if the network isn't such a one.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, expected: float = 1.0, *, memory: int = STEP_MEMORY
    ) -> None:
        super().__init__(network, objective, expected, memory=memory)
        reason, layer = not_linear(network, objective), only_layer(network)
        if reason is not None or layer is None:
            raise StudyError(f"no linear model: {reason}", remedy="take DenseGradients instead")
        self._weight, self._bias = layer.weight, layer.bias
        self._inputs, self._outputs = layer.in_features, layer.out_features
        self._width = self._inputs + (self._bias is not None)
        self._classes = np.arange(self._outputs)[:, None]
        self._rooms: dict[int, _Room] = {}
        self._most = TILE * max(1, MOST_NUMBERS // (TILE * (self._inputs + 1)))

    def sum(self, patients: Patients, batch: Batch, clipping_norm: float) -> torch.Tensor:
        """As `DenseGradients.sum`. Which of two ways a batch goes makes no difference to x and g."""
        C, records, most = clipping_norm * (1.0 - CLIPPING_MARGIN), batch.records.numpy(), self._most
        with np.errstate(all="ignore"):
            if batch.one_record_each:
                found = self._one_each(patients, records[:most], C)
                for start in range(most, len(records), most):
                    found += self._one_each(patients, records[start : start + most], C)
            else:
                found = self._many_each(patients, batch, C)
        if self._bias is None or self._outputs == 1:
            return torch.from_numpy(found.reshape(-1))
        inputs = self._inputs  # the last column is the bias
        return torch.from_numpy(np.concatenate((found[:, :inputs].reshape(-1), found[:, inputs])))

    def _room(self, rows: int) -> _Room:
        tiles = max(1, -(-rows // TILE))
        room = self._rooms.get(tiles)
        if room is None:
            room = _Room(tiles, self._inputs, self._outputs, self._bias is not None)
            self._rooms[tiles] = room
        return room

    def _rows(self, patients: Patients, records: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Inputs [records, inputs (+ 1)], until the next call, and output gradients [outputs, records]."""
        count, inputs, outputs = len(records), self._inputs, self._outputs
        room = self._room(count)
        x, table = room.x[:count], patients.features.numpy()
        x[:, :inputs] = table.reshape(-1, inputs).take(records, axis=0)
        room.weight[:inputs, :outputs] = self._weight.detach().numpy().T
        if self._bias is not None:
            room.weight[inputs, :outputs] = self._bias.detach().numpy()
        room.multiply()
        return x, self._slopes(room.z[:count, :outputs].T.copy(), patients.labels.numpy().take(records))

    def _one_each(self, patients: Patients, records: npt.NDArray[np.int64], C: float) -> Floats:
        """The sum over patients with one of those records each, [outputs, inputs (+ 1)]."""
        x, g = self._rows(patients, records)
        squares = np.add.reduce(g * g)
        squares *= np.vecdot(x, x)
        factors = np.sqrt(squares)
        np.maximum(factors, C, out=factors)  # NaN stays
        np.divide(C, factors, out=factors)
        g *= factors
        found: Floats = _product(g, x)
        if not math.isfinite(np.add.reduce(found, axis=None)):
            sound = np.isfinite(squares)  # a patient whose numbers overflow counts as zero
            found = _product(np.where(sound, g, 0.0), np.where(sound[:, None], x, 0.0))
        return found

    def _many_each(self, patients: Patients, batch: Batch, C: float) -> Floats:
        """The sum over patients with some records each, [outputs, inputs (+ 1)], some patients at a time."""
        ends = np.searchsorted(batch.patient.numpy(), np.arange(batch.patients), side="right")
        found, first, start = np.zeros((self._outputs, self._width)), 0, 0
        while first < batch.patients:
            last = max(first + 1, int(np.searchsorted(ends, start + _HELD // self.size, side="right")))
            end = int(ends[last - 1])
            starts = np.concatenate(([start], ends[first : last - 1])) - start
            found += self._held(patients, batch, slice(start, end), starts, C)
            first, start = last, end
        return found

    def _held(
        self, patients: Patients, batch: Batch, where: slice, starts: npt.NDArray[np.int64], C: float
    ) -> Floats:
        """The sum over consecutive patients, whose gradients are held; `starts` are their first records."""
        x, g = self._rows(patients, batch.records.numpy()[where])
        g *= batch.weights.numpy()[where]
        if len(starts) == 1:
            held = _product(g, x).reshape(1, -1)
        else:
            held = np.add.reduceat(g.T[:, :, None] * x[:, None, :], starts).reshape(len(starts), -1)
        rows = np.sqrt(np.add.reduce(g * g) * np.vecdot(x, x))
        together = np.add.reduceat(rows, starts)  # where rows cancel, see `DenseGradients.sum`
        norms = np.sqrt(np.vecdot(held, held))
        factors = C / np.maximum(np.maximum(norms, together / CANCELLING), C)
        sound = np.isfinite(norms) & np.isfinite(together)
        if not sound.all():
            factors, held = factors[sound], held[sound]
        total: Floats = (factors @ held).reshape(self._outputs, self._width)
        return total

    def _slopes(self, z: Floats, labels: npt.NDArray[Any]) -> Floats:
        """The loss's gradient by the outputs, [outputs, records] like z; see common/objectives."""
        objective = self._objective
        if objective.task == "multi-class":
            z -= np.maximum.reduce(z)
            np.exp(z, out=z)
            z /= np.add.reduce(z)
            z -= self._classes == labels
            return z
        if objective.task == "regression":
            z -= labels
            return np.sign(z) if objective.loss == "absolute" else np.multiply(z, 2.0, out=z)
        if objective.loss == "hinge":
            signs = 2.0 * labels - 1.0
            return np.where(1.0 - signs * z >= 0, -signs, 0.0 * z)
        z *= 0.5  # σ(z) = (1 + tanh(z / 2)) / 2, which overflows nowhere
        np.tanh(z, out=z)
        z *= 0.5
        z += 0.5 - labels
        return z


def _product(g: Floats, x: Floats) -> Floats:
    """g x; a large one by torch, which keeps to the threads that it is told."""
    if g.size * x.shape[1] < _SMALL:
        return g @ x
    return torch.mm(torch.from_numpy(g), torch.from_numpy(x)).numpy()
