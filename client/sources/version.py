"""What changes when the data behind a table change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.policy_file import signature
from client.settings import SiteFolder

LISTED = (".json", ".ndjson")  # what is read of a folder of FHIR resources


def data_version(folder: SiteFolder) -> object:
    """Signatures of the table and of the files or folders that its cells name.

    Of SQLite also that of its write-ahead log and of the query; of a folder of resources those of the files
    in it that are read. Whether a server's rows have changed nobody can tell without reading them: they
    count as the same, so that a vault keeps what it read.
    """
    return data_versions(folder)()


def data_versions(folder: SiteFolder) -> Callable[[], object]:
    """What tells `data_version` each time, having worked out once where to look."""
    table = _table_versions(folder)
    named = [str(folder.root / at) for at in sorted({each.at for each in folder.file.data.files.values()})]
    return lambda: (table(), tuple([signature(each) for each in named]))


def _table_versions(folder: SiteFolder) -> Callable[[], object]:
    source, path = folder.file.data, folder.data_path
    table = str(path)
    if source.sql is not None:
        query = str(folder.root / source.query_file) if source.query_file else None
        return lambda: (
            signature(table),
            signature(f"{table}-wal"),
            None if query is None else signature(query),
        )
    if source.fhir is not None:
        return lambda: _listing(path) if path.is_dir() else signature(table)
    return lambda: signature(table)


def _listing(path: Path) -> object:
    """Of a folder of resources; None if it can't be read."""
    try:
        files = sorted(each for each in path.iterdir() if each.suffix.lower() in LISTED)
    except OSError:
        return None
    return tuple((each.name, signature(each)) for each in files)
