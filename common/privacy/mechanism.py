"""What a release costs, as a frozen value that travels in messages, ledgers and certificates.

Every number that depends on patients and leaves a vault comes from one of these mechanisms. The unit is
the patient with all records; neighbouring data sets differ by adding or removing one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from common.files import Strict

Noise = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**12)]


class _OfPatients(Strict):
    """Attributes:
    unit: what a neighbouring data set differs in: one patient, with all records.
    relation: neighbours differ by adding or removing one unit.
    """

    unit: Literal["patient"] = "patient"
    relation: Literal["add-remove"] = "add-remove"


class SubsampledGaussian(_OfPatients):
    """`steps` releases of a sum of per-patient contributions, each clipped to L2 norm C.

    At each step every patient takes part with probability `sample_rate`, independently (Poisson), and
    the sum is released with Gaussian noise of standard deviation `noise_multiplier` * C. With
    `sample_rate` 1 it is the plain Gaussian mechanism.
    """

    mechanism: Literal["subsampled-gaussian"] = "subsampled-gaussian"
    noise_multiplier: Noise
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Count


class GaussianRelease(_OfPatients):
    """`releases` vectors, to each of which a patient adds an L2 norm of at most S, each with Gaussian
    noise of standard deviation `noise_multiplier` * S in every cell: histograms and statistics."""

    mechanism: Literal["gaussian"] = "gaussian"
    noise_multiplier: Noise
    releases: Count = 1


Event = Annotated[SubsampledGaussian | GaussianRelease, Field(discriminator="mechanism")]
EVENT: TypeAdapter[SubsampledGaussian | GaussianRelease] = TypeAdapter(Event)


def rate_and_steps(event: SubsampledGaussian | GaussianRelease) -> tuple[float, int]:
    """Sampling rate and number of releases, as accountants take them."""
    if isinstance(event, GaussianRelease):
        return 1.0, event.releases
    return event.sample_rate, event.steps
