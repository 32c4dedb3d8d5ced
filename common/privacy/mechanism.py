"""What a release costs, as a frozen value that travels in messages and ledgers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.files import Strict


class SubsampledGaussian(Strict):
    """`steps` releases of a sum of per-patient contributions, each clipped to L2 norm C.

    At each step every patient takes part with probability `sample_rate`, independently (Poisson), and
    the sum is released with Gaussian noise of standard deviation `noise_multiplier` * C. With
    `sample_rate` 1 it is the plain Gaussian mechanism.

    Attributes:
        unit: what a neighbouring data set differs in: one patient, with all records.
        relation: neighbours differ by adding or removing one unit.
    """

    mechanism: Literal["subsampled-gaussian"] = "subsampled-gaussian"
    noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    unit: Literal["patient"] = "patient"
    relation: Literal["add-remove"] = "add-remove"


Event = SubsampledGaussian
