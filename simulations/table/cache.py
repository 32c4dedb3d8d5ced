"""Cells that are done, one file each: what was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import re
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from common.errors import FedwardError, SiteError
from common.files import Strict, canonical_json, read_bounded, write_atomic
from simulations.engine.sites import find_sites
from simulations.table.cell import Cell, Result

_LARGEST = 1 << 24  # bytes of a cell's file
_PIECE = 1 << 20


class _Kept(Strict):
    """A cell's file.

    Attributes:
        row, seed, metric, study, sites, version: what it is of: the study's and the data's digest, fedward's
        version.
        check: SHA-256 of `result` in canonical form.
    """

    row: str
    seed: int
    metric: str
    study: str
    sites: str
    version: str
    check: str
    result: Result


class Cache:
    """Results of one folder of sites.

    Args:
        folder: of the files; made if absent.
        sites: folder of site folders; all that is in them is hashed once.

    Raises:
        SiteError: if the sites can't be read, or the folder can't be written.
    """

    def __init__(self, folder: Path, sites: Path) -> None:
        self._folder, self._sites = folder, digest_of(sites)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SiteError(f"{folder}: {error.strerror}", remedy="give another folder: --out") from None

    def path(self, cell: Cell) -> Path:
        """The file of a cell's result."""
        key = self._key(cell)
        digest = hashlib.sha256(canonical_json(key)).hexdigest()[:16]
        words = re.sub(r"[^a-z0-9.]+", "-", str(key["row"]).lower().replace("ε = ", "epsilon-"))[:60]
        return self._folder / f"{words}-seed-{cell.seed}-{digest}.json"

    def read(self, cell: Cell) -> Result | None:
        """What a cell came to; None if that isn't known, or its file is damaged."""
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            kept = _Kept.model_validate_json(read_bounded(path, SiteError, _LARGEST))
        except (FedwardError, ValidationError):
            return None
        told = {name: getattr(kept, name) for name in ("row", "seed", "metric", "study", "sites", "version")}
        return kept.result if told == self._key(cell) and kept.check == _check(kept.result) else None

    def write(self, cell: Cell, result: Result) -> None:
        """Keep what a cell came to.

        Raises:
            SiteError: if the folder can't be written.
        """
        kept = _Kept.model_validate({**self._key(cell), "check": _check(result), "result": result})
        try:
            write_atomic(self.path(cell), kept.model_dump_json(indent=1).encode(), mode=0o644)
        except OSError as error:
            raise SiteError(
                f"{self._folder}: {error.strerror}", remedy="give another folder: --out"
            ) from None

    def _key(self, cell: Cell) -> dict[str, str | int]:
        return {
            "row": cell.row.name,
            "seed": cell.seed,
            "metric": cell.metric,
            "study": cell.row.study.digest,
            "sites": self._sites,
            "version": version("fedward"),
        }


def _check(result: Result) -> str:
    return hashlib.sha256(canonical_json(result.model_dump(mode="json"))).hexdigest()


def digest_of(sites: Path) -> str:
    """SHA-256 of all files in the folders of a folder's sites, by name and content.

    Raises:
        SiteError: as `find_sites`, or if a file can't be read.
    """
    whole = hashlib.sha256()
    for place in find_sites(sites, sites):
        for path in sorted(p for p in place.root.rglob("*") if p.is_file()):
            own = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while piece := file.read(_PIECE):
                        own.update(piece)
            except OSError as error:
                raise SiteError(f"{path}: {error.strerror}", remedy="check its permissions") from None
            whole.update(f"{path.relative_to(place.root.parent)}\0{own.hexdigest()}\n".encode())
    return whole.hexdigest()
