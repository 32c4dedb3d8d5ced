"""Coded columns as a model takes them: scaled numbers, one-hot codes, labels, subgroups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.columns import NumericColumn, Tabular
from common.errors import Refused
from common.features import missing_rule, ordered_codes
from common.schema import Coded, Floats, examine
from common.study import Study
from common.survival import time_positions
from common.table import Positions, Table, refuse

LARGEST_SCALED = 5.0  # deviations


@dataclass(frozen=True)
class Encoded:
    """Records as a model takes them.

    Attributes:
        features: float32 [records, width], width = feature_count(study).
        labels: int64 [records], index of the label's class; of a number float32 [records], its range
            scaled to [-1, 1]; of several labels float32 [records, labels], NaN where not known; of a time
            until an event float32 [records, 2], see `common.survival.time_positions`.
        kept: int64 [records], positions in the table; those with an `exclude`d missing value are absent.
        groups: int64 [records, columns of `Study.subgroup_columns`], see `subgroup_indices`.
    """

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float32]
    kept: Positions
    groups: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Scaling:
    """What numeric features are scaled by, instead of the dictionary's intervals.

    Attributes:
        mean, deviation: float64 [numeric sources in the dictionary's order], in the dictionary's units.
    """

    mean: Floats
    deviation: Floats


def encode(table: Table, study: Study) -> Encoded:
    """Check a table against the dictionary and encode it.

    Raises:
        DataError: naming every violation's column, count and first lines.
    """
    coded, violations = examine(table, study)
    refuse(table.origin, violations)
    return encode_coded(coded, study)


def encode_coded(coded: Coded, study: Study, scaling: Scaling | None = None) -> Encoded:
    """Features and labels of columns that have no violation.

    Args:
        scaling: a number becomes (value - mean) / deviation, kept within ±5, and a missing one 0, the mean.
            The limit is public: a deviation may be far smaller than the dictionary's range, and one
            patient's rare value must not dwarf all other features. None: by the dictionary's intervals.

    Raises:
        Refused: if the scaling doesn't fit the study's columns, or holds anything but finite means and
            positive deviations.
    """
    if scaling is not None:
        refuse_other_scaling(scaling, study)
    scaled_before = 0
    records = len(coded.labels)
    kept = np.ones(records, dtype=np.bool_)
    parts: list[npt.NDArray[np.float32]] = []
    for column in study.data.columns:
        if not isinstance(column, Tabular):
            block = coded.wide[column.name]
            kept &= ~np.isnan(block[:, 0])
            parts.append(block)
            continue
        values = coded.columns[column.name]
        missing = np.isnan(values)
        rule = missing_rule(column, study)
        if rule == "exclude":
            kept &= ~missing.reshape(records, len(column.sources)).any(axis=1)
        if isinstance(column, NumericColumn):
            if scaling is None:
                low, high = column.interval
                default = (low + high) / 2 if column.default is None else column.default
                scaled = (np.where(missing, default, values) - low) * (2.0 / (high - low)) - 1.0
            else:
                own = slice(scaled_before, scaled_before + column.repeat)
                scaled_before += column.repeat
                scaled = _standardised(values, scaling.mean[own], scaling.deviation[own])
            parts.append(scaled.astype(np.float32).reshape(records, column.repeat))
        else:
            codes = ordered_codes(column)
            default = -1 if column.default is None else codes.index(column.default)
            index = np.where(missing, default, values).astype(np.int64)
            seen = [i for i, code in enumerate(codes) if code != column.baseline]
            parts.append((index[:, None] == np.array(seen)).astype(np.float32))
        if rule == "indicator":
            parts.append(missing.reshape(records, len(column.sources)).astype(np.float32))
    positions = np.flatnonzero(kept).astype(np.int64)
    features = np.concatenate(parts, axis=1)
    if len(positions) < records:
        features = features[positions]
    labels = _encoded_labels(coded.labels[positions], study)
    return Encoded(features, labels, positions, subgroup_indices(coded, study)[positions])


def _encoded_labels(labels: Floats, study: Study) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    label = study.data.label
    if label.kind == "survival":
        return time_positions(labels[:, 0], labels[:, 1], label.edges)
    if label.kind == "several":
        return labels.astype(np.float32)
    if label.range is None:
        return labels.astype(np.int64)
    scaled = label.scaled(labels)
    return scaled.clip(-1.0, 1.0).astype(np.float32)  # rounding only: a value outside is a violation


def subgroup_indices(coded: Coded, study: Study) -> npt.NDArray[np.int64]:
    """Each record's group in each of `Study.subgroup_columns`, int64 [records, columns].

    A code's group is its index among `ordered_codes`; a missing value, whatever stands in for it among the
    features, is a group of its own, the last one.
    """
    groups = []
    for column in study.subgroup_columns:
        values = coded.columns[column.name]
        starts = study.evaluation.bands.get(column.name)
        index = values if starts is None else np.digitize(values, starts)
        groups.append(np.where(np.isnan(values), len(column.codes), index))
    return np.array(groups, dtype=np.int64).reshape(len(groups), len(coded.labels)).T


def _standardised(values: Floats, mean: Floats, deviation: Floats) -> Floats:
    with np.errstate(over="ignore"):  # beyond the limit either way
        scaled = np.clip((values - mean) / deviation, -LARGEST_SCALED, LARGEST_SCALED)
    return np.where(np.isnan(values), 0.0, scaled)


def refuse_other_scaling(scaling: Scaling, study: Study) -> None:
    numbers = sum(len(c.sources) for c in study.data.tabular if isinstance(c, NumericColumn))
    for name, values in (("mean", scaling.mean), ("deviation", scaling.deviation)):
        if values.shape != (numbers,) or values.dtype != np.float64:
            raise Refused(
                f"the scaling's {name} is {values.dtype} {list(values.shape)}; "
                f"study {study.name} has {numbers} numeric columns (float64)",
                remedy="both sides must run the same version of fedward",
            )
    if not (np.isfinite(scaling.mean).all() and np.isfinite(scaling.deviation).all()):
        raise Refused("the scaling holds NaN or infinity", remedy="describe the cohort again")
    if not (scaling.deviation > 0).all():
        raise Refused("the scaling holds a deviation that isn't positive", remedy="describe the cohort again")
