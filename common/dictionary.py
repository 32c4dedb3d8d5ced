"""The data dictionary of a study: columns, label and split, as its file says them.

What they mean for a site's text is common/schema's, for a model common/encoding's.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.fields import Finite, Fraction, MissingRule, Name, rising
from common.files import Strict
from common.modalities import ImageColumn, MoleculeColumn, SeriesColumn, TextColumn, Wide


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


class LabelClass(Strict):
    name: str
    codes: Annotated[tuple[str, ...], Field(min_length=1)]


class Label(Strict):
    """What is learnt: one of several classes, or a number. Give `classes`, or `range` and `unit`.

    Attributes:
        classes: class i is predicted as index i; in binary studies class 1 is the positive one.
        range: of a number; public, because it bounds what one patient adds to the released errors. It is
            scaled linearly to [-1, 1]; a value outside is a violation; predictions are kept within it.
        unit: of a number, as for a numeric column.
    """

    column: Name
    description: str = ""
    classes: Annotated[tuple[LabelClass, ...], Field(max_length=4096)] = ()
    range: tuple[Finite, Finite] | None = None
    unit: str | None = None

    @property
    def number(self) -> NumericColumn | None:
        """The label as a numeric column that refuses missing values; None for classes."""
        if self.range is None or self.unit is None:
            return None
        return NumericColumn(
            kind="numeric", name=self.column, unit=self.unit, range=self.range, missing="refuse"
        )

    @property
    def width(self) -> float:
        """Of the range, in the label's unit.

        Raises:
            ValueError: if the label is a class.
        """
        if self.range is None:
            raise ValueError(f"label {self.column}: a class has no range")
        return self.range[1] - self.range[0]

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.classes) == (self.range is not None) or (self.range is None) != (self.unit is None):
            raise ValueError(f"label {self.column}: give `classes`, or `range` and `unit` of a number")
        if len(self.classes) == 1:
            raise ValueError(f"label {self.column}: classes: one class only; there must be two at least")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"label {self.column}: range must rise, got {list(self.range)}")
        return self

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        codes = [code for each in self.classes for code in each.codes]
        if len(set(codes)) != len(codes):
            raise ValueError(f"label {self.column}: a code stands for two classes")
        return self


class Split(Strict):
    """Who trains and who tests, decided per patient.

    `keyed-hash`: a patient tests if HMAC-SHA256(site secret, patient id) falls below `test_fraction`:
    stable under re-ordering and re-export, and no outsider can compute it.
    `column`: a column that holds `train` or `test` (to reproduce a published split).
    """

    by: Literal["keyed-hash", "column"] = "keyed-hash"
    test_fraction: Fraction = 0.2
    column: Name | None = None

    @model_validator(mode="after")
    def _column_named(self) -> Self:
        if (self.by == "column") != (self.column is not None):
            raise ValueError('split: give `column` with by = "column", and only then')
        return self


class Data(Strict):
    """The data dictionary.

    Attributes:
        scaling: `ranges` scales numbers linearly by the dictionary's public intervals, free of charge;
            `moments` by means and standard deviations of all sites, which are differentially private and
            charged (`[statistics]`).
    """

    patient_key: Name = "patient_id"
    missing: MissingRule = "refuse"
    scaling: Literal["ranges", "moments"] = "ranges"
    columns: Annotated[tuple[Column, ...], Field(min_length=1, max_length=4096)]
    label: Label
    split: Split = Split()

    @property
    def tabular(self) -> tuple[Tabular, ...]:
        """The columns that are numbers or codes."""
        return tuple(c for c in self.columns if isinstance(c, Tabular))

    @property
    def wide(self) -> tuple[Wide, ...]:
        """The columns that are images, series, texts or molecules."""
        return tuple(c for c in self.columns if isinstance(c, Wide))

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [s for c in self.columns for s in c.sources] + [self.patient_key, self.label.column]
        names += [self.split.column] if self.split.column else []
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) != len(names) else []
        if twice:
            raise ValueError(f"column names must be unique; twice: {', '.join(twice[:5])}")
        return self
