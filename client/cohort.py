"""A site's patients as tensors: checked against the study, grouped by patient, split into train and test.

Who tests, and in which order patients stand, follows from HMAC-SHA256(site secret, patient id): it is
the same however the file is sorted or exported, and nobody without the secret can compute it.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch

from client.settings import SiteFolder
from client.sources import read_table
from common.encoding import Encoded, Scaling, encode_coded
from common.errors import DataError, SiteError
from common.schema import Coded, examine, missing_text, normal_text
from common.study import Study
from common.table import Positions, Table, Violation, refuse

log = logging.getLogger("fedward.data")

SHORTEST_SPLIT_KEY = 16  # bytes
_LANE_RECORDS = 1024  # at a time
_PARTS = {"train": 0, "test": 1}


def lanes_of(features: torch.Tensor) -> torch.Tensor:
    """A number that follows from each record's own features, int64 [records]; see client/blocks."""
    found = [torch.zeros(0, dtype=torch.int64)]
    for part in features.flatten(start_dim=1).split(_LANE_RECORDS):
        bits = part.contiguous().view(torch.int32).long()
        odd = torch.arange(1, 2 * bits.shape[1], 2, device=bits.device) * 0x9E3779B1
        found.append((bits * odd).sum(dim=1).bitwise_right_shift_(24).cpu())
    return torch.cat(found)


@dataclass(frozen=True, repr=False)
class Patients:
    """Records of some patients, each patient's together.

    Attributes:
        features: float32 [records, width].
        labels: [records] or [records, …], see common/encoding.
        offsets: int64 [patients + 1]; patient p has the records offsets[p] … offsets[p + 1] - 1.
        hashes: each patient's keyed hash, by which a withdrawn one is found; None where nobody can be.
        groups: int64 [records, columns of `Study.subgroup_columns`] (common/encoding), or None.
    """

    features: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor
    hashes: tuple[bytes, ...] | None = None
    groups: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    @cached_property
    def one_record_each(self) -> bool:
        return self.labels.shape[0] == len(self)

    def __repr__(self) -> str:  # sizes are private
        return "Patients(…)"

    @cached_property
    def lanes(self) -> torch.Tensor:
        """A number that follows from each record's own features, int64 [records]; see client/blocks."""
        return lanes_of(self.features)

    def on(self, device: torch.device) -> Patients:
        """The same on a device; offsets stay where batches are drawn, on the processor."""
        if self.features.device.type == device.type:
            return self
        groups = None if self.groups is None else self.groups.to(device)
        return Patients(self.features.to(device), self.labels.to(device), self.offsets, self.hashes, groups)

    def without(self, withdrawn: frozenset[bytes]) -> Patients:
        """The patients whose hash isn't listed; these very ones if none is."""
        if not withdrawn or self.hashes is None:
            return self
        kept = np.array([each not in withdrawn for each in self.hashes], dtype=np.bool_)
        if kept.all():
            return self
        counts = self.offsets.diff()
        mask = torch.from_numpy(kept)
        rows = torch.repeat_interleave(mask, counts)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts[mask].cumsum(0)])
        hashes = tuple(h for h, keep in zip(self.hashes, kept, strict=True) if keep)
        groups = None if self.groups is None else self.groups[rows]
        return Patients(self.features[rows], self.labels[rows], offsets, hashes, groups)


@dataclass(frozen=True)
class Cohort:
    """A site's training and test patients; no patient is in both."""

    train: Patients
    test: Patients

    def on(self, device: torch.device) -> Cohort:
        """The same on a device."""
        return Cohort(self.train.on(device), self.test.on(device))


@dataclass(frozen=True, repr=False)
class Records:
    """A site's records, read and checked, before they are scaled and split.

    Attributes:
        origin: how messages name the file.
        patients: int64 [records], each record's patient as an index into `hashes`.
        hashes: each patient's HMAC-SHA256 under the site's secret.
        part: int64 [records], 0 = train, 1 = test.
    """

    origin: str
    coded: Coded
    patients: npt.NDArray[np.int64]
    hashes: tuple[bytes, ...]
    part: npt.NDArray[np.int64]

    def without(self, withdrawn: frozenset[bytes]) -> Records:
        """The records of patients whose hash isn't listed; these very ones if none is."""
        listed = np.array([each in withdrawn for each in self.hashes], dtype=np.bool_)
        if not listed.any():
            return self
        kept = ~listed[self.patients]
        own = self.coded
        columns = {n: c[kept] for n, c in own.columns.items()}
        coded = Coded(columns, own.labels[kept], {n: c[kept] for n, c in own.wide.items()})
        return Records(self.origin, coded, self.patients[kept], self.hashes, self.part[kept])


def load_cohort(folder: SiteFolder, study: Study, split_key: bytes) -> Cohort:
    """Read, check, encode, group and split the site's records; see `load_records` and `cohort_of`."""
    return cohort_of(load_records(folder, study, split_key), study)


def load_records(folder: SiteFolder, study: Study, split_key: bytes) -> Records:
    """Read and check the site's records.

    Args:
        split_key: the site's secret, at least 16 bytes; it decides the order of patients, and under
            `keyed-hash` who tests.

    Raises:
        SiteError: if the key is too short, or site.toml doesn't fit the study.
        DataError: naming file, columns, counts and lines of everything that is wrong; it stays at the
            site.
    """
    if len(split_key) < SHORTEST_SPLIT_KEY:
        raise SiteError(
            f"{folder.split_key_path}: shorter than {SHORTEST_SPLIT_KEY} bytes", remedy="make a new split key"
        )
    table = read_table(folder, study)
    violations: list[Violation] = []
    part = _column_parts(table, study, violations)
    if part is not None:
        chosen = np.flatnonzero(part >= 0).astype(np.int64)
        table, part = table.take(chosen), part[chosen]
    patients, ids = _patients(table, study, violations)
    violations += _torn_patients(table, study, patients, part)
    violations += _repeated_rows(table, study, patients)
    coded, found = examine(table, study)
    refuse(table.origin, violations + found)
    for each in _left_out(table, study):
        log.warning("%s: left out: %s", table.origin, each)

    hashes = tuple(hmac.digest(split_key, patient.encode(), "sha256") for patient in ids)
    if part is None:
        border = int(study.data.split.test_fraction * 2**64)
        tests = np.array([int.from_bytes(h[:8], "big") < border for h in hashes], dtype=np.bool_)
        part = tests[patients].astype(np.int64)
    return Records(table.origin, coded, patients, hashes, part)


def cohort_of(records: Records, study: Study, scaling: Scaling | None = None) -> Cohort:
    """Encode, group and split.

    Args:
        scaling: of the numeric columns, instead of the dictionary's public intervals.

    Raises:
        Refused: if the scaling doesn't fit the study.
        DataError: if no patient is left to train on.
    """
    encoded = encode_coded(records.coded, study, scaling)
    rank = np.empty(len(records.hashes), dtype=np.int64)
    rank[sorted(range(len(rank)), key=records.hashes.__getitem__)] = np.arange(len(rank))
    ranks, part = rank[records.patients][encoded.kept], records.part[encoded.kept]
    ordered = sorted(records.hashes)
    cohort = Cohort(
        train=_grouped(encoded, ranks, np.flatnonzero(part == _PARTS["train"]), ordered),
        test=_grouped(encoded, ranks, np.flatnonzero(part == _PARTS["test"]), ordered),
    )
    if len(cohort.train) == 0:
        raise DataError(
            f"{records.origin}: no patient is left to train on",
            remedy="check the split, and which columns are missing where the study excludes the record",
        )
    return cohort


def _patients(
    table: Table, study: Study, violations: list[Violation]
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Each record's patient as an index, and the patients' ids. Missing ids are violations."""
    key = study.data.patient_key
    text = normal_text(table.columns[key])
    missing = missing_text(text).to_numpy(zero_copy_only=False)
    if missing.any():
        violations.append(table.violation(key, "missing patient identifier", np.flatnonzero(missing)))
    index, ids = pd.factorize(np.asarray(text.fill_null("").to_numpy(zero_copy_only=False), dtype=object))
    return index.astype(np.int64), [str(i) for i in ids]


def _column_parts(table: Table, study: Study, violations: list[Violation]) -> npt.NDArray[np.int64] | None:
    """By the split column: 0 = train, 1 = test, -1 = neither; None if the split is by keyed hash."""
    name = study.data.split.column
    if name is None:
        return None
    text = normal_text(table.columns[name])
    part = pa.compute.index_in(text, value_set=pa.array(list(_PARTS))).fill_null(-1)
    parts = np.array(part.to_numpy(zero_copy_only=False), dtype=np.int64)
    strange = (parts < 0) & ~missing_text(text).to_numpy(zero_copy_only=False)
    if strange.any():
        violations.append(table.violation(name, "neither train nor test nor empty", np.flatnonzero(strange)))
    return parts


def _torn_patients(
    table: Table, study: Study, patients: npt.NDArray[np.int64], part: npt.NDArray[np.int64] | None
) -> list[Violation]:
    """Patients that the split column puts on both sides."""
    if part is None or len(patients) == 0:
        return []
    seen = np.zeros((patients.max() + 1, 2), dtype=np.bool_)
    seen[patients, part] = True
    torn = np.flatnonzero((seen[:, 0] & seen[:, 1])[patients])
    name = str(study.data.split.column)
    return [table.violation(name, "a patient has both train and test records", torn)] if len(torn) else []


def _repeated_rows(table: Table, study: Study, patients: npt.NDArray[np.int64]) -> list[Violation]:
    """Whole rows that a patient has twice: a broken export, not a second encounter."""
    several: Positions = np.flatnonzero(np.bincount(patients)[patients] > 1).astype(np.int64)
    if len(several) == 0:
        return []
    rows: Any = table.rows.take(pa.array(several)).to_pandas()
    twice = several[rows.duplicated(keep="first").to_numpy()]
    key = study.data.patient_key
    return [table.violation(key, "the same row again for the same patient", twice)] if len(twice) else []


def _left_out(table: Table, study: Study) -> list[Violation]:
    """What is wrong with files and texts whose records the study does without; it stays at the site."""
    return [
        table.violation(column.name, problem, positions)
        for column in study.data.wide
        if column.missing == "exclude"
        for problem, positions in table.decoded[column.name].problems.items()
    ]


def _grouped(
    encoded: Encoded,
    ranks: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.int64],
    hashes: Sequence[bytes],
) -> Patients:
    """The chosen records by patient; within a patient by content, so that file order leaves no trace."""
    order = chosen[np.argsort(ranks[chosen], kind="stable")]
    found, starts, counts = np.unique(ranks[order], return_index=True, return_counts=True)
    for start, count in zip(starts[counts > 1], counts[counts > 1], strict=True):
        block = order[start : start + count]
        alone = encoded.labels.ndim == 1
        content = [
            (
                encoded.features[i].tobytes(),
                encoded.labels[i].item() if alone else encoded.labels[i].tobytes(),
                encoded.groups[i].tobytes(),
            )
            for i in block
        ]
        order[start : start + count] = block[sorted(range(count), key=content.__getitem__)]
    return Patients(
        features=torch.from_numpy(encoded.features[order]),
        labels=torch.from_numpy(encoded.labels[order]),
        offsets=torch.from_numpy(np.append(starts, len(order)).astype(np.int64)),
        hashes=tuple(hashes[i] for i in found),
        groups=torch.from_numpy(encoded.groups[order]) if encoded.groups.shape[1] else None,
    )
