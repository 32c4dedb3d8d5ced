"""The label of a study: classes, a number, several labels that are yes or no, or a time until an event."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from common.columns import CategoricalColumn, NumericColumn, Tabular
from common.fields import Finite, Name, rising
from common.files import Strict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

MOST_INTERVALS = 100  # of time


class LabelClass(Strict):
    name: str
    codes: Annotated[tuple[str, ...], Field(min_length=1)]


class YesNo(Strict):
    """One of several labels that each are yes or no.

    Attributes:
        name: the table's column.
        yes, no: codes; any other is a violation. A record that lacks the value has no such label.
    """

    name: Name
    description: str = ""
    yes: Annotated[tuple[str, ...], Field(min_length=1)] = ("1",)
    no: Annotated[tuple[str, ...], Field(min_length=1)] = ("0",)
    missing_codes: tuple[str, ...] = ()


class Label(Strict):
    """What is learnt: `column` and `classes`; or `column`, `range` and `unit` of a number; or `columns`,
    several labels that each are yes or no; or a time until an event: `column`, `event`, `range`, `unit`, and
    one of `intervals` and `cuts`.

    Attributes:
        classes: class i is predicted as index i; in binary studies class 1 is the positive one.
        range: of a number; public, because it bounds what one patient adds to the released errors. It is
            scaled linearly to [-1, 1]; a value outside is a violation; predictions are kept within it.
            Of a time, which counts from its lower end; a longer one is a violation, and is to be censored at
            the end of the range in the data.
        transform: of a number, before it is scaled and learnt; errors are told in the label's own unit all
            the same. `sqrt` suits doses and counts, whose spread grows with their size.
        unit: of a number or time, as for a numeric column.
        event: the column that tells whether the event was seen at that time, or the patient alive until then
            (censored): `event_codes` and `censored_codes`.
        intervals: of time, equal parts of `range`; `cuts`: their ends instead, rising. After the last one
            everybody still under observation is censored.
    """

    column: Name | Literal[""] = ""
    description: str = ""
    classes: Annotated[tuple[LabelClass, ...], Field(max_length=4096)] = ()
    range: tuple[Finite, Finite] | None = None
    unit: str | None = None
    transform: Literal["none", "sqrt"] = "none"
    columns: Annotated[tuple[YesNo, ...], Field(max_length=1024)] = ()
    event: Name | None = None
    event_codes: Annotated[tuple[str, ...], Field(min_length=1)] = ("1",)
    censored_codes: Annotated[tuple[str, ...], Field(min_length=1)] = ("0",)
    intervals: Annotated[int, Field(ge=1, le=MOST_INTERVALS)] | None = None
    cuts: Annotated[tuple[Finite, ...], Field(max_length=MOST_INTERVALS)] = ()

    @property
    def kind(self) -> Literal["class", "number", "several", "survival"]:
        if self.columns:
            return "several"
        if self.event is not None:
            return "survival"
        return "number" if self.range is not None else "class"

    @property
    def number(self) -> NumericColumn | None:
        """The label as a numeric column that refuses missing values; None unless it is a number."""
        return self._numeric if self.kind == "number" else None

    @property
    def time(self) -> NumericColumn | None:
        """Likewise the time until the event; None unless the label is one."""
        return self._numeric if self.kind == "survival" else None

    @property
    def _numeric(self) -> NumericColumn | None:
        if self.range is None or self.unit is None:
            return None
        return NumericColumn(
            kind="numeric", name=self.column, unit=self.unit, range=self.range, missing="refuse"
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the table's columns that the label reads."""
        if self.columns:
            return tuple(each.name for each in self.columns)
        return (self.column,) if self.event is None else (self.column, self.event)

    @property
    def codes(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """Of each source that is coded: codes with the index they stand for."""
        pairs: list[tuple[str, tuple[tuple[str, ...], ...]]]
        if self.columns:
            pairs = [(each.name, (each.no, each.yes)) for each in self.columns]
        elif self.event is not None:
            pairs = [(self.event, (self.censored_codes, self.event_codes))]
        else:
            pairs = [(self.column, tuple(each.codes for each in self.classes))] if self.classes else []
        return {
            name: tuple((code, i) for i, codes in enumerate(groups) for code in codes)
            for name, groups in pairs
        }

    @property
    def described(self) -> tuple[Tabular, ...]:
        """The label as columns of a table, in the order of `sources`; none if it is one of its classes."""
        numbers = [each for each in (self.number, self.time) if each is not None]
        coded: list[Tabular] = []
        if self.kind == "survival" and self.event is not None:
            codes = {"0": "censored", "1": "event"}
            coded.append(
                CategoricalColumn(kind="categorical", name=self.event, codes=codes, missing="refuse")
            )
        for each in self.columns:
            codes = {"0": "no", "1": "yes"}
            coded.append(
                CategoricalColumn(kind="categorical", name=each.name, codes=codes, missing="indicator")
            )
        return (*numbers, *coded)

    @property
    def width(self) -> float:
        """Of the range, in the label's unit.

        Raises:
            ValueError: if the label has no range.
        """
        if self.range is None:
            raise ValueError(f"label {self.column}: a class has no range")
        return self.range[1] - self.range[0]

    def scaled(self, values: Floats) -> Floats:
        """A number in its unit on the scale on which it is learnt, where its range is [-1, 1]; float64 [any].

        Raises:
            ValueError: if the label has no range.
        """
        low, high = self._learnt_range
        learnt = values**0.5 if self.transform == "sqrt" else values
        return (learnt - low) * (2.0 / (high - low)) - 1.0

    def untransformed(self, scaled: Floats) -> Floats:
        """From the scale of `scaled` to one where the range is [-1, 1] as well, but linear in the unit."""
        if self.transform == "none":
            return scaled
        low, high = self._learnt_range
        share = (low + (scaled + 1.0) / 2 * (high - low)) ** 2 - low**2
        return share * (2.0 / (high**2 - low**2)) - 1.0

    @property
    def _learnt_range(self) -> tuple[float, float]:
        if self.range is None:
            raise ValueError(f"label {self.column}: a class has no range")
        low, high = self.range
        return (low**0.5, high**0.5) if self.transform == "sqrt" else (low, high)

    @property
    def edges(self) -> tuple[float, ...]:
        """Of the intervals of time, in the label's unit; empty unless the label is a time until an event."""
        if self.event is None or self.range is None:
            return ()
        low, high = self.range
        count = self.intervals or 0
        return (low, *self.cuts, *(low + (high - low) * i / count for i in range(1, count)), *[high][:count])

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.columns:
            if self.column or self.classes or self.range or self.unit or self.event:
                raise ValueError("label: with `columns` there is no column, class, range, unit or event")
            return self
        if not self.column:
            raise ValueError("label: give `column`, or `columns` of several labels")
        if bool(self.classes) == (self.range is not None) or (self.range is None) != (self.unit is None):
            raise ValueError(f"label {self.column}: give `classes`, or `range` and `unit` of a number")
        if len(self.classes) == 1:
            raise ValueError(f"label {self.column}: classes: one class only; there must be two at least")
        rising(f"label {self.column}", "range", self.range)
        return self

    @model_validator(mode="after")
    def _transform_fits(self) -> Self:
        if self.transform == "none":
            return self
        if self.number is None or self.number.range[0] < 0:
            raise ValueError(
                f"label {self.column}: transform sqrt goes with the range of a number, from 0 up"
            )
        return self

    @model_validator(mode="after")
    def _can_be_scaled(self) -> Self:
        if self.number is not None:
            low, high = self._learnt_range
            widths = high - low, (high**2 - low**2 if self.transform == "sqrt" else high - low)
            if not all(width > 0 and math.isfinite(2.0 / width) for width in widths):
                raise ValueError(f"label {self.column}: range is too narrow, got {list(self.number.range)}")
        return self

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        if self.event is None:
            if self.intervals is not None or self.cuts:
                raise ValueError(f"label {self.column}: intervals and cuts go with `event` only")
            return self
        if self.range is None:
            raise ValueError(f"label {self.column}: a time until an event has `range` and `unit`, no classes")
        if (self.intervals is None) == (not self.cuts):
            raise ValueError(f"label {self.column}: give one of `intervals` and `cuts`")
        if any(a >= b for a, b in pairwise(self.edges)) or self.edges[-1] > self.range[1]:
            raise ValueError(f"label {self.column}: cuts must rise within range, above its lower end")
        return self

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        for name, pairs in self.codes.items():
            codes = [code for code, _ in pairs]
            if len(set(codes)) != len(codes):
                raise ValueError(f"label {name}: a code stands for two classes")
        return self
