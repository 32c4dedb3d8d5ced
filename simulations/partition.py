"""How patients spread over sites. Every function takes a seeded Generator and places each patient once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.errors import DatasetError

Indices = npt.NDArray[np.int64]

_DRAWS = 100


def by_column(values: Sequence[str] | npt.NDArray[np.str_]) -> dict[str, Indices]:
    """The natural split: a patient's site is what its column says. Sites in alphabetical order."""
    column = np.asarray(values)
    return {str(name): np.flatnonzero(column == name).astype(np.int64) for name in np.unique(column)}


def by_sizes(patients: int, shares: Sequence[float], generator: np.random.Generator) -> tuple[Indices, ...]:
    """Random patients in given proportions, rounded by largest remainder so that all are placed.

    Args:
        patients: how many there are.
        shares: a positive weight per site, such as (40, 30, 20, 10).

    Raises:
        DatasetError: if a share is not positive, or a site would stay empty.
    """
    weights = np.asarray(shares, dtype=np.float64)
    if len(weights) == 0 or not (np.isfinite(weights) & (weights > 0)).all():
        raise DatasetError("shares must be positive numbers", remedy="give one share per site")
    exact = patients * weights / weights.sum()
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: patients - int(sizes.sum())]] += 1
    if (sizes == 0).any():
        raise DatasetError(
            f"{patients} patients leave one of {len(weights)} sites empty", remedy="ask for fewer sites"
        )
    return _cut(generator.permutation(patients), sizes)


def iid(patients: int, sites: int, generator: np.random.Generator) -> tuple[Indices, ...]:
    """Random patients, sites of equal size (to one).

    Raises:
        DatasetError: if there are more sites than patients.
    """
    return by_sizes(patients, [1.0] * sites, generator)


def dirichlet(
    labels: npt.NDArray[np.int64],
    sites: int,
    concentration: float,
    generator: np.random.Generator,
    smallest: int = 1,
) -> tuple[Indices, ...]:
    """Label-skewed sites: each class is dealt out in proportions drawn from a Dirichlet distribution
    (Hsu, Qi, Brown 2019, arXiv:1909.06335, in the per-class form of Yurochkin et al. 2019).

    Args:
        labels: int64 [patients].
        concentration: small means very different sites; towards infinity, alike.
        smallest: draw again until every site has that many patients.

    Raises:
        DatasetError: if the concentration is not positive, or no draw fills every site.
    """
    if not (np.isfinite(concentration) and concentration > 0):
        raise DatasetError(f"concentration must be positive, got {concentration}", remedy="try 0.1 to 10")
    if sites < 1:
        raise DatasetError(f"sites must be at least 1, got {sites}", remedy="ask for one site or more")
    for _ in range(_DRAWS):
        places: list[list[Indices]] = [[] for _ in range(sites)]
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            shares = generator.dirichlet([concentration] * sites)
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for place, part in zip(places, np.split(members, cuts), strict=True):
                place.append(part)
        parts = tuple(np.sort(np.concatenate(place)).astype(np.int64) for place in places if place)
        if len(parts) == sites and min(len(part) for part in parts) >= smallest:
            return parts
    raise DatasetError(
        f"no draw gave each of {sites} sites {smallest} patients",
        remedy="raise the concentration, or ask for fewer sites",
    )


def _cut(order: Indices, sizes: npt.NDArray[np.int64]) -> tuple[Indices, ...]:
    return tuple(np.sort(part).astype(np.int64) for part in np.split(order, np.cumsum(sizes)[:-1]))
