"""Columns that are numbers or codes, as a study's file says them; all others are common/modalities'."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.fields import Finite, MissingRule, Name, rising
from common.files import Strict
from common.modalities import ImageColumn, MoleculeColumn, SeriesColumn, TextColumn


class NumericColumn(Strict):
    """A measured quantity.

    Attributes:
        unit: the unit that the values have once a site has converted them (UCUM where there is one).
        range: plausible range.
        reference: public interval that is scaled linearly to [-1, 1]; `range` when absent. It comes
            from the literature, never from a site's data, so that scaling costs no privacy.
        beyond: what becomes of a finite value outside `range`: a violation, the nearest end of the range, or
            a missing value.
        default: public value that stands in for a missing one; the middle of `reference` when absent.
        repeat: the column stands for `name_0 … name_{repeat-1}` (waveforms, pixels).
    """

    kind: Literal["numeric"]
    name: Name
    description: str = ""
    unit: str
    range: tuple[Finite, Finite]
    reference: tuple[Finite, Finite] | None = None
    missing: MissingRule | None = None
    missing_codes: tuple[str, ...] = ()
    beyond: Literal["refuse", "winsorise", "missing"] = "refuse"
    default: Finite | None = None
    repeat: Annotated[int, Field(ge=1, le=1_000_000)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for field, interval in (("range", self.range), ("reference", self.reference)):
            rising(f"column {self.name}", field, interval)
        if self.default is not None and not self.range[0] <= self.default <= self.range[1]:
            raise ValueError(f"column {self.name}: default {self.default} lies outside range")
        return self

    @property
    def interval(self) -> tuple[float, float]:
        return self.reference or self.range

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the table's columns that this dictionary entry reads."""
        return (self.name,) if self.repeat == 1 else tuple(f"{self.name}_{i}" for i in range(self.repeat))


class CategoricalColumn(Strict):
    """A coded quantity, one-hot encoded: whole numbers rising, then text.

    Attributes:
        codes: code as it stands in the data → what it means. Whole numbers match `1` and `1.0` alike.
        default: the code that stands in for a missing one; all zeros when absent.
        baseline: a code that gets no feature of its own (as in regression): the others are seen against
            it, and less noise enters under privacy.
    """

    kind: Literal["categorical"]
    name: Name
    description: str = ""
    codes: Annotated[dict[str, str], Field(min_length=2, max_length=4096)]
    missing: MissingRule | None = None
    missing_codes: tuple[str, ...] = ()
    default: str | None = None
    baseline: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        for field, code in (("default", self.default), ("baseline", self.baseline)):
            if code is not None and code not in self.codes:
                raise ValueError(f"column {self.name}: {field} {code!r} is not one of its codes")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)


Tabular = NumericColumn | CategoricalColumn
Column = Annotated[
    NumericColumn | CategoricalColumn | ImageColumn | SeriesColumn | TextColumn | MoleculeColumn,
    Field(discriminator="kind"),
]
