"""What changes when the data behind a table change."""

from __future__ import annotations

from client.policy_file import signature
from client.settings import SiteFolder

LISTED = (".json", ".ndjson")  # what is read of a folder of FHIR resources


def data_version(folder: SiteFolder) -> object:
    """Signatures of the table and of the files or folders that its cells name.

    Of SQLite also that of its write-ahead log and of the query; of a folder of resources those of the files
    in it that are read. Whether a server's rows have changed nobody can tell without reading them: they
    count as the same, so that a vault keeps what it read.
    """
    named = sorted({each.at for each in folder.file.data.files.values()})
    return _table_version(folder), tuple(signature(folder.root / each) for each in named)


def _table_version(folder: SiteFolder) -> object:
    source, path = folder.file.data, folder.data_path
    if source.sql is not None:
        query = signature(folder.root / source.query_file) if source.query_file else None
        return signature(path), signature(f"{path}-wal"), query
    if source.fhir is not None and path.is_dir():
        try:
            files = sorted(each for each in path.iterdir() if each.suffix.lower() in LISTED)
        except OSError:
            return None
        return tuple((each.name, signature(each)) for each in files)
    return signature(path)
