"""Archives of files: the published ones, and those that a site gets."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import DatasetError


def unpacked(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every plain file in a published .tar or .tar.gz.

    Raises:
        DatasetError: if it can't be read.
    """
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None:
                    yield member.name, file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        raise DatasetError(f"{path}: cannot be read", remedy="fetch the data set first") from None


def packed(files: Mapping[str, bytes], compress: bool = False) -> bytes:
    """A .tar, or a .tar.gz, of files in this order, without times or owners: the same bytes every time."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, file in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))
    return gzip.compress(content.getvalue(), mtime=0) if compress else content.getvalue()
