"""Who shares a pass through the network, so that what it computes for a record tells nothing of the others.

Products are taken row by row (`products`); what else a network does is probed: by random weights, and a
batch that holds one record in all rows but two, which hold another one and NaN. If the record's outputs and
all that is tapped are the same bit for bit in all its rows, and the same as in a batch of another size, then
a batch may have that size. Otherwise the records sit in lanes of blocks of one size (client/blocks) if that
passes, or else each passes alone. Which of these it is follows from the network and the machine only; a
batch whose size doesn't pass is cut into smaller ones, which changes nothing for anyone.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from client.blocks import LANES, SMALLEST, filled, layout
from client.cohort import lanes_of
from client.taps.parts import Where

Taps = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Features [records, …] → outputs and taps [records, …]."""
_UNTOLD = {"_modules", "_parameters", "training", "_flat_weights", "_flat_weight_refs"}
_ALIGNED = 64  # bytes, as torch allocates: what is computed may depend on it
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_KEPT = 256  # networks whose answers are kept


class Seating(Enum):
    """How records may be together."""

    FREE = "free"
    LANES = "in lanes"
    ALONE = "alone"


@dataclass
class _Answers:
    """What is known of one network on this machine."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    seating: Seating | None = None
    reference: list[bytes] = field(default_factory=list)
    fits: dict[int, bool] = field(default_factory=dict)


_answers: OrderedDict[str, _Answers] = OrderedDict()
_lock = threading.Lock()


def multiple_of(network: nn.Module) -> int:
    """Of which a pass has rows: images cost much each, and states go through in tiles of 16."""
    return 4 if any(isinstance(m, _ConvNd | nn.MultiheadAttention) for m in network.modules()) else 16


class Seats:
    """Passes of one batch.

    Attributes:
        most: records of a pass.
        limit: records of any batch's pass; a public number.
    """

    def __init__(self, company: Company, size: int) -> None:
        self._company, self._size, self._rows = company, size, dict[int, int]()
        self.limit = company.limit
        self.most = size // LANES if company.seating is Seating.LANES else size

    def probe(self, records: int) -> None:
        """See to it that passes of so many records, and of what is left of them, can be made."""
        for count in {min(records, self.most), records % self.most} - {0}:
            self._rows[count] = self._company.rows(count, self._size)

    def seated(self, records: torch.Tensor) -> tuple[torch.Tensor, Where]:
        """A pass's input [rows, …], zeros in rows that are spare, and which row each record [records, …] is
        in."""
        count = len(records)
        if self._company.seating is Seating.LANES:
            ((chosen, places),) = layout(lanes_of(records), self._size)
            rows = torch.empty_like(places)
            rows[chosen] = places
            return filled(records, rows.to(records.device), self._size), rows
        size = self._rows[count]
        if size == count:  # a part of something larger may begin where others' records end
            return (records.clone() if records.data_ptr() % _ALIGNED else records), slice(None)
        return functional.pad(records, (0, 0) * (records.dim() - 1) + (0, size - count)), slice(count)


class Company:
    """The sizes of batches that one network may see.

    Args:
        network: as it is while no sum is taken.
        like: a cohort's features [records, …], of which only shape and type count.
        taps: makes the function that is probed, of a network with other weights.
        limit: records of a pass, for memory; a public number.
        enough: from so many records on a larger pass is no faster; a public number.
        named: what `taps` depends on besides the network.
    """

    def __init__(
        self,
        network: nn.Module,
        like: torch.Tensor,
        taps: Callable[[nn.Module], Taps],
        limit: int,
        enough: int,
        named: str = "",
    ) -> None:
        self._network, self._taps, self._named = network, taps, named
        self.limit, self._enough = limit, min(limit, enough)
        # Small passes may be computed in other ways than large ones: most are held against one of 16
        self._multiple = multiple_of(network) if limit >= multiple_of(network) else 1
        self._base = 16 if limit >= 16 else self._multiple
        self._shape, self._dtype, self._device = like.shape[1:], like.dtype, like.device
        self._known = _answers_of(self._key())

    @property
    def seating(self) -> Seating:
        known = self._known
        with known.lock:
            if known.seating is None:
                known.seating = self._probed()
            return known.seating

    def seats(self, records: int, alone: bool = True) -> Seats:
        """For that many records.

        Args:
            alone: whether each of them is a patient; of several, those of one patient sit together.
        """
        if self.seating is not Seating.FREE:
            return Seats(self, SMALLEST if self.seating is Seating.LANES else 1)
        passes = -(-records // (self._enough if alone else self.limit))
        size = self._up(-(-records // max(1, passes)))
        if size > self.limit:
            size = self.limit // self._multiple * self._multiple
        while size > self._base and not self.fits(size):
            size = self._up(size // 2)
        return Seats(self, size if self.fits(size) else self._base)

    def rows(self, records: int, most: int) -> int:
        """The smallest pass that takes so many records, of which `most` is the largest."""
        size = self._up(records)
        if self.seating is Seating.FREE and size < most:
            if self.fits(size):
                return size
            if size < self._base:
                return self._base
        return most

    def _up(self, records: int) -> int:
        return max(1, -(-records // self._multiple)) * self._multiple

    def fits(self, size: int) -> bool:
        """Whether a record is computed in a batch of that size as in any other."""
        known = self._known
        with known.lock:
            if size not in known.fits:
                others = () if size < 4 else (1 + size // 3 % 2, size - 2)
                found = _rows(self._twin()(self._batch(size, others)), size)
                same = [row for index, row in enumerate(found) if index not in others]
                known.fits[size] = all(row == known.reference[0] for row in same)
            return known.fits[size]

    def _probed(self) -> Seating:
        try:
            return self._found()
        except (RuntimeError, ValueError, IndexError):  # the network doesn't take what was made up
            return Seating.ALONE

    def _found(self) -> Seating:
        size, taps = self._base, self._twin()
        found = _rows(taps(self._batch(size, ())), size)
        others: tuple[int, ...] = () if size < 4 else (1, size - 2)
        mixed = _rows(taps(self._batch(size, others)), size)
        if len(set(found)) == 1 and all(mixed[i] == found[0] for i in range(size) if i not in others):
            self._known.reference, self._known.fits[size] = found[:1], True
            return Seating.FREE
        if self.limit < SMALLEST:
            return Seating.ALONE
        size, others = SMALLEST, (6, 9, 11, 20)  # one in each lane
        found = _rows(taps(self._batch(size, ())), size)
        mixed = _rows(taps(self._batch(size, others)), size)
        same = all(row == found[index % LANES] for index, row in enumerate(found))
        if same and all(mixed[i] == found[i % LANES] for i in range(size) if i not in others):
            return Seating.LANES
        return Seating.ALONE

    def _twin(self) -> Taps:
        """The same network with other weights, the same ones every time."""
        network = copy.deepcopy(self._network).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                width = parameter[0].numel() if parameter.dim() > 1 else 4
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(drawn / width**0.5)
        return self._taps(network)

    def _batch(self, size: int, others: tuple[int, ...]) -> torch.Tensor:
        """One record in all rows but those."""
        generator = torch.Generator().manual_seed(2)
        tables = [m.num_embeddings for m in self._network.modules() if isinstance(m, _TABLES)]
        numbers = self._dtype.is_floating_point and not tables  # else what may be looked up
        if numbers:
            two = torch.randn((2, *self._shape), generator=generator, dtype=torch.float64)
        elif self._dtype.is_floating_point:  # numbers of which some, less their fractions, may be looked up
            two = torch.rand((2, *self._shape), generator=generator, dtype=torch.float64)
            two *= min(*tables, 4) - 0.5
        else:
            two = torch.randint(0, min(tables, default=1), (2, *self._shape), generator=generator)
        batch = two[:1].to(self._dtype).repeat(size, *[1] * len(self._shape))
        batch[list(others[:1])] = two[1].to(self._dtype)
        if numbers:
            batch[list(others[1:])] = torch.nan
        return batch.to(self._device)

    def _key(self) -> str:
        """Changes with whatever a pass through the network may depend on, values of weights apart."""
        digest, order = hashlib.sha256(), dict[int, int]()
        told: tuple[object, ...] = (
            tuple(self._shape),
            self._dtype,
            self._device.type,
            torch.get_num_threads(),
            self._named,
        )
        digest.update(repr(told).encode())
        for name, module in self._network.named_modules():
            digest.update(f"{name} {type(module)} {id(type(module))}".encode())
            for key, value in sorted(vars(module).items()):
                if key not in _UNTOLD:
                    digest.update(f"{key} {value!r}".encode())
            for key, parameter in module.named_parameters(recurse=False):
                first = order.setdefault(id(parameter), len(order))
                told = (key, first, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
                digest.update(repr(told).encode())
        return digest.hexdigest()


def _rows(tensors: Sequence[torch.Tensor], size: int) -> list[bytes]:
    """The bits of each row over all tensors, hashed."""
    digests = [hashlib.sha256() for _ in range(size)]
    for each in tensors:
        flat = each.detach().reshape(size, -1).cpu().numpy()
        for digest, row in zip(digests, flat, strict=True):
            digest.update(row.tobytes())
    return [digest.digest() for digest in digests]


def _answers_of(key: str) -> _Answers:
    with _lock:
        found = _answers.setdefault(key, _Answers())
        _answers.move_to_end(key)
        while len(_answers) > _KEPT:
            _answers.popitem(last=False)
        return found
