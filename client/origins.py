"""What site.toml says of data that lie in no table: how columns are made from FHIR resources."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.files import Strict

Resource = Literal["Patient", "Encounter", "Condition", "Observation", "MedicationRequest"]
FhirValue = Literal[
    "first", "last", "mean", "min", "max", "count", "present", "gender", "age", "deceased", "class"
]
Code = Annotated[str, Field(pattern=r"^[^|\s]+\|[^|\s]+$", max_length=512)]

SQLITE = "sqlite:///"
_AGGREGATES = ("mean", "min", "max")
_VALUES: dict[str, tuple[str, ...]] = {
    "Patient": ("gender", "age", "deceased"),
    "Encounter": ("class", "count", "present"),
    "Condition": ("count", "present"),
    "Observation": ("first", "last", *_AGGREGATES, "count", "present"),
    "MedicationRequest": ("count", "present"),
}
_CODED = ("Condition", "Observation", "MedicationRequest")


class FhirColumn(Strict):
    """One column of the table that is made from FHIR R4 resources, of each patient or of each encounter.

    Attributes:
        resource: the type of resource it comes from.
        code: `system|code`, one or several of which any counts; a code's end may be `*` (any ending).
        value: `first`, `last` by time, `mean`, `min`, `max` of what was observed; `count`, `present` (1 or
            0) of the resources; a Patient's `gender`, `age` in whole years, `deceased` (1 or 0, and 0 where
            nothing is said); an Encounter's `class` (its code), for one row an encounter.
        unit: UCUM code that every observed quantity must have; `1` where it has none.
    """

    resource: Resource
    code: Code | Annotated[tuple[Code, ...], Field(min_length=1, max_length=1000)] | None = None
    value: FhirValue
    unit: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @property
    def codes(self) -> tuple[str, ...]:
        if self.code is None:
            return ()
        return (self.code,) if isinstance(self.code, str) else self.code

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.value not in _VALUES[self.resource]:
            raise ValueError(f"{self.resource} has no {self.value}: {', '.join(_VALUES[self.resource])}")
        if (self.code is not None) != (self.resource in _CODED):
            raise ValueError(
                f"{self.resource} needs a code" if self.code is None else f"{self.resource} takes no code"
            )
        measured = self.value in ("first", "last", *_AGGREGATES)
        if self.unit is not None and not measured:
            raise ValueError(f"{self.value} has no unit")
        if self.unit is None and self.value in _AGGREGATES:
            raise ValueError(f"{self.value} needs the unit of what is observed")
        return self
