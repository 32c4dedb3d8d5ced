"""The data dictionary of a study: columns, label and split, as its file says them.

What they mean for a site's text is common/schema's, for a model common/encoding's.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from common.columns import Column, Tabular
from common.fields import Fraction, MissingRule, Name
from common.files import Strict
from common.label import Label
from common.modalities import Wide


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
        names = [s for c in self.columns for s in c.sources] + [self.patient_key, *self.label.sources]
        names += [self.split.column] if self.split.column else []
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) != len(names) else []
        if twice:
            raise ValueError(f"column names must be unique; twice: {', '.join(twice[:5])}")
        return self
