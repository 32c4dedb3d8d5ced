"""What preparers share: published tables as text, and patients held back for testing."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pandas as pd

from common.errors import DatasetError
from simulations.partition import by_column, by_sizes

SEED = 2024
TRAIN, TEST = "train", "test"
_SHARES = (80, 20)
_SHEETS = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_REMEDY = "fetch the data set first"


def text_table(path: Path, member: str | None = None) -> pd.DataFrame:
    """A CSV file, or one in a zip archive, as text; nothing counts as missing.

    Raises:
        DatasetError: if it can't be read.
    """
    try:
        content = path.read_bytes()
        if member is not None:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                content = archive.read(member)
        return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise DatasetError(f"{path}: cannot be read", remedy=_REMEDY) from None


def sheet(path: Path, member: str) -> pd.DataFrame:
    """A sheet of an .xlsx workbook as text; its first row names the columns, an empty cell is "".

    Only for files whose SHA-256 is known: XML of unknown origin could be made to fill the memory.

    Args:
        member: the sheet's file in the workbook, such as xl/worksheets/sheet1.xml.

    Raises:
        DatasetError: if it can't be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shared = [
                "".join(part.text or "" for part in item.iter(f"{_SHEETS}t"))
                for item in ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))  # noqa: S314
            ]
            rows = ElementTree.fromstring(archive.read(member)).iter(f"{_SHEETS}row")  # noqa: S314
            header, *lines = ([*_cells(row, shared)] for row in rows)
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, ElementTree.ParseError):
        raise DatasetError(f"{path}: cannot be read", remedy=_REMEDY) from None
    names = {place: name for place, name in header if name}
    cells = [dict(line) for line in lines]
    table = pd.DataFrame({name: [each.get(place, "") for each in cells] for place, name in names.items()})
    return table[(table != "").any(axis=1)].reset_index(drop=True)


def held_out(
    patients: pd.Series, group: pd.Series | None = None, shares: tuple[int, int] = _SHARES
) -> npt.NDArray[np.object_]:
    """`train` or `test` for each record: a fixed random part of the patients, in each group the same share.

    Args:
        patients: each record's patient.
        group: each record's site, if sites must have the same share; the same for a patient's records.
        shares: of those who train and those who test.
    """
    people = pd.DataFrame({"patient": patients, "group": "" if group is None else group}).drop_duplicates(
        "patient"
    )
    people = people.sort_values("patient")
    tests: set[str] = set()
    random = np.random.default_rng(SEED)
    for members in by_column(people["group"].to_numpy(dtype=str)).values():
        _, chosen = by_sizes(len(members), shares, random)
        tests.update(people["patient"].iloc[members[chosen]])
    return np.where(patients.isin(tests), TEST, TRAIN).astype(object)


def _cells(row: ElementTree.Element, shared: list[str]) -> list[tuple[str, str]]:
    """Each cell's column, as the sheet letters it, and text."""
    found = []
    for cell in row.iter(f"{_SHEETS}c"):
        value = cell.find(f"{_SHEETS}v")
        if value is not None and value.text is not None:
            text = shared[int(value.text)] if cell.get("t") == "s" else value.text
            found.append((cell.get("r", "").rstrip("0123456789"), text))
    return found
