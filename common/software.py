"""Which fedward this is: a version, and a digest of the files that decide what may leave a site."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from common.errors import FedwardError
from common.files import canonical_json

PACKAGES = ("client", "common")
OTHER_FILES = frozenset({"wire.proto"})


@dataclass(frozen=True)
class Software:
    """Attributes:
    version: as the package's metadata have it; `0+unknown` if it runs without being installed.
    package: digest of the Python files of `common` and `client`, and of wire.proto, 64 hexadecimal
        digits. Libraries (torch, numpy …) are not in it.
    """

    version: str
    package: str


@cache
def software() -> Software:
    """The software of this process, as its files were when this was first asked.

    Raises:
        FedwardError: if a package can't be found or read.
    """
    try:
        version = metadata.version("fedward")
    except metadata.PackageNotFoundError:
        version = "0+unknown"
    return Software(version, digest_of({name: _folder(name) for name in PACKAGES}))


def digest_of(folders: dict[str, Path]) -> str:
    """SHA-256 over each file's name and content: of canonical JSON, `package/path` → SHA-256 of the
    content with LF line ends, so that a checkout with CRLF (which Python reads alike) has the same one.

    Args:
        folders: package → where it lies; the place itself doesn't count, nor do compiled files.

    Raises:
        FedwardError: if a file can't be read.
    """
    files: dict[str, str] = {}
    for package, folder in folders.items():
        for path in folder.rglob("*"):
            if path.suffix != ".py" and path.name not in OTHER_FILES:
                continue
            try:
                content = path.read_bytes()
            except OSError as error:
                raise FedwardError(
                    f"{path}: {error.strerror}", remedy="fedward must be able to read its own files"
                ) from None
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            files[name] = hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()
    return hashlib.sha256(canonical_json(files)).hexdigest()


def _folder(package: str) -> Path:
    """Found without importing it: `common` must not import `client`."""
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise FedwardError(f"package {package} is not installed", remedy="install fedward anew")
    return Path(found.origin).parent
