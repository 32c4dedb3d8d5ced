"""Kinds of fields that several files share: names, finite numbers, fractions."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ClippingNorm = Annotated[float, Field(ge=1e-9, allow_inf_nan=False)]
"""Below, what a long gradient is multiplied by leaves the range in which float32 is exact."""
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
MissingRule = Literal["refuse", "indicator", "default", "exclude"]
Interval = tuple[Finite, Finite]


def rising(owner: str, field: str, interval: Interval | None) -> None:
    """Raises:
    ValueError: if the interval's ends don't rise, or are further apart than float64 can tell.
    """
    if interval is not None and math.isinf(interval[1] - interval[0]):
        raise ValueError(f"{owner}: {field} is too wide, got {list(interval)}")
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"{owner}: {field} must rise, got {list(interval)}")
