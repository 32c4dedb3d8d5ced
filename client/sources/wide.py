"""Images, series, texts and molecules that a table's cells hold or name, as blocks of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from client.settings import SiteFolder, Where
from client.sources import images, measurements, series, text
from common.errors import DataError, SiteError
from common.modalities import SeriesColumn, Wide
from common.study import Study
from common.table import PLACES_SHOWN, Decoded

Reader = Callable[[Any, Sequence[str | None], Where | None], Decoded]
"""Takes the column, each record's cell (None = missing) and where its files are, if site.toml says so."""


def _molecules(column: Any, cells: Sequence[str | None], where: Where | None) -> Decoded:
    from client.sources import molecules  # RDKit: few sites need it

    return molecules.read(column, cells, where)


_READERS: dict[str, Reader] = {
    "image": images.read,
    "series": series.read,
    "text": text.read,
    "molecule": _molecules,
}
_NEED_FILES = frozenset({"image", "series"})
_BYTES = 4  # a number


def check(folder: SiteFolder, study: Study) -> None:
    """That site.toml fits the study's wide columns, which must show before any row is read.

    Raises:
        SiteError: if it doesn't say where a column's files are, or what their parameters are.
    """
    for column in study.data.wide:
        files = folder.file.data.files.get(column.name)
        if files is None and column.kind in _NEED_FILES:
            raise SiteError(
                f"{folder.root / 'site.toml'}: says nowhere where the files of column {column.name} are",
                remedy=f'add [data.files.{column.name}] with at = "…", a folder or an archive',
            )
        if files is not None and isinstance(column, SeriesColumn):
            measurements.plan_of(column, files)


def decode(folder: SiteFolder, study: Study, columns: Mapping[str, Any]) -> dict[str, Decoded]:
    """What the cells of the study's wide columns come to.

    Args:
        columns: dictionary name → text of every record (pyarrow string array).

    Raises:
        DataError: if what site.toml names can't be opened at all, or the study makes more of it than the
            site allows; a single bad file is a problem of its record.
    """
    most = folder.file.data.max_bytes
    size = sum(_BYTES * c.width * len(columns[c.name]) for c in study.data.wide)
    if size > most:
        names = ", ".join(c.name for c in study.data.wide[:PLACES_SHOWN])
        raise DataError(
            f"{folder.root / 'site.toml'}: column {names} would come to {size} bytes, more than {most}",
            remedy="raise max_bytes of [data] if the machine's memory allows several times as much",
        )
    return {c.name: _decoded(folder, c, columns[c.name]) for c in study.data.wide}


def _decoded(folder: SiteFolder, column: Wide, content: Any) -> Decoded:
    files = folder.file.data.files.get(column.name)
    where = None if files is None else Where(folder.root / files.at, files)
    plain = pc.utf8_trim_whitespace(content)
    cells = pc.if_else(pc.equal(plain, ""), None, plain).to_pylist()
    return _READERS[column.kind](column, cells, where)
