"""The patients of one table dealt out to sites of a simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import StudyError
from simulations.datasets.sites import Hospital, write_site
from simulations.partition import by_column, iid


def divided(frame: pd.DataFrame, key: str, sites: int, by: str | None = None) -> dict[str, pd.DataFrame]:
    """The records of each site, all of a patient's at one.

    Args:
        key: column of patients.
        sites: how many of equal size, at random but the same each time; unless
        by: a column whose values are sites; a patient belongs where its first record is.

    Raises:
        DatasetError: if there are more sites than patients.
        StudyError: if there is no such column.
    """
    first = frame.groupby(key, sort=True).head(1).sort_values(key)
    if by is None:
        parts = iid(len(first), sites, np.random.default_rng(0))
        places: dict[str, Any] = {f"site-{i}": part for i, part in enumerate(parts, start=1)}
    elif by in frame.columns:
        slugs = first[by].str.lower().str.replace(r"[^a-z0-9]+", "-", regex=True).str.strip("-")
        places = by_column(slugs.str.slice(0, 60).str.strip("-").replace("", "unknown").to_numpy(dtype=str))
    else:
        raise StudyError(f"--by {by}: the file has no such column", remedy="name another")
    ids = first[key].to_numpy()
    return {name: frame[frame[key].isin(set(ids[part]))] for name, part in places.items()}


def write_sites(
    frame: pd.DataFrame, key: str, to: Path, sites: int, by: str | None = None
) -> tuple[Path, ...]:
    """One folder a site, with site.toml and patients.csv; see `divided`.

    Raises:
        DatasetError: if a folder cannot be written, too.
    """
    return tuple(
        write_site(Hospital(name, records, records[key].nunique()), to / name)
        for name, records in divided(frame, key, sites, by).items()
    )
