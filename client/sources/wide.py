"""Images, series, texts and molecules that a table's cells hold or name, as blocks of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from client.settings import Files, SiteFolder
from client.sources import images, series, text
from common.errors import SiteError
from common.modalities import Wide
from common.study import Study
from common.table import Decoded


@dataclass(frozen=True)
class Where:
    """Where a column's files are.

    Attributes:
        path: a folder or a file; may be absent.
        files: the site's setting.
    """

    path: Path
    files: Files


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


def decode(folder: SiteFolder, study: Study, columns: Mapping[str, Any]) -> dict[str, Decoded]:
    """What the cells of the study's wide columns come to.

    Args:
        columns: dictionary name → text of every record (pyarrow string array).

    Raises:
        SiteError: if site.toml doesn't say where a column's files are.
        DataError: if what it names can't be opened at all; a single bad file is a problem of its record.
    """
    return {c.name: _decoded(folder, c, columns[c.name]) for c in study.data.wide}


def _decoded(folder: SiteFolder, column: Wide, content: Any) -> Decoded:
    files = folder.file.data.files.get(column.name)
    if files is None and column.kind in _NEED_FILES:
        raise SiteError(
            f"{folder.root / 'site.toml'}: says nowhere where the files of column {column.name} are",
            remedy=f'add [data.files.{column.name}] with at = "…", a folder or an archive',
        )
    where = None if files is None else Where(folder.root / files.at, files)
    plain = pc.utf8_trim_whitespace(content)
    cells = pc.if_else(pc.equal(plain, ""), None, plain).to_pylist()
    return _READERS[column.kind](column, cells, where)
