"""A site's own files, opened once their size is known to be bearable."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from client.settings import DataSource
from common.errors import DataError


def opened(path: Path, source: DataSource, name: str | None = None) -> BinaryIO:
    """The file, once it is known to be a regular one of a bearable size.

    Args:
        name: how messages call it; its path where absent.

    Raises:
        DataError: if it isn't.
    """
    called = name or str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise DataError(f"{called}: is {kind}, not a file", remedy="name the file itself in site.toml")
        file = path.open("rb")
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or "not a possible path"
        raise DataError(
            f"{called}: cannot be read ({reason})", remedy="check [data] in site.toml and its permissions"
        ) from None
    size = os.fstat(file.fileno()).st_size
    if size == 0 or size > source.max_bytes:
        file.close()
        if size == 0:
            raise DataError(f"{called}: is empty", remedy="export the table again")
        raise DataError(
            f"{called}: holds {size} bytes, more than {source.max_bytes}",
            remedy="raise max_bytes in site.toml if the machine's memory allows it",
        )
    return file
