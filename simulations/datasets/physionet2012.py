"""PhysioNet's challenge of 2012: the first 48 hours of 8,000 stays in four kinds of intensive care unit.

A stay is a patient. Sites are the kinds of unit, which the record of every stay tells (ICUType); set A trains
and set B tests, as in the challenge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from common.errors import DatasetError
from simulations.datasets.packing import packed, unpacked
from simulations.datasets.raw import text_table
from simulations.datasets.sites import Hospital

UNITS = {"1": "coronary-care", "2": "cardiac-surgery", "3": "medical", "4": "surgical"}
_SPLITS = {"a": "train", "b": "test"}
_UNIT = re.compile(rb"^00:00,ICUType,([1-4])\s*$", re.MULTILINE)


def icu_mortality(raw: Path) -> list[Hospital]:
    """8,000 stays at four sites, one file of time, parameter and value each, as published.

    Raises:
        DatasetError: if the files are absent or others.
    """
    stays = [stay for part in _SPLITS for stay in _stays(raw, part)]
    hospitals = []
    for unit, name in UNITS.items():
        here = [(row, content) for row, content, of in stays if of == unit]
        table = pd.DataFrame([row for row, _ in here])
        files = {f"{row['stay']}.txt": content for row, content in here}
        hospitals.append(
            Hospital(
                name,
                table,
                len(table),
                files={"stays.tar.gz": packed(files, compress=True)},
                places={"stay": {"at": "stays.tar.gz", "time_unit": "HH:MM"}},
            )
        )
    return hospitals


def _stays(raw: Path, part: str) -> Iterator[tuple[dict[str, str], bytes, str]]:
    """Of one set: a stay's line of the table, its file and its unit."""
    outcomes = text_table(raw / f"Outcomes-{part}.txt")
    path = raw / f"set-{part}.tar.gz"
    files = {PurePosixPath(name).stem: content for name, content in unpacked(path)}
    units = {key: _UNIT.search(content) for key, content in files.items()}
    if set(outcomes.get("RecordID", ())) != set(files) or not np.all([u is not None for u in units.values()]):
        raise DatasetError(f"{path}: holds other stays than published", remedy="fetch the data set again")
    for key, died in zip(outcomes["RecordID"], outcomes["In-hospital_death"], strict=True):
        unit = units[key]
        if unit is not None:
            row = {"patient_id": key, "stay": key, "died": died, "split": _SPLITS[part]}
            yield row, files[key], unit.group(1).decode()
