"""Columns that are more than a number or a code: images, time series, text, molecules.

Each becomes a block of `width` numbers in a record's features, always as many, on a scale that follows from
the study alone; a model puts it into `shape` again. What a site's cells hold is said with each kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.fields import Finite, Interval, Name, Positive, rising
from common.files import Strict

Unreadable = Literal["refuse", "exclude"]
LARGEST_BLOCK = 1 << 22  # numbers a record


Axis = Literal["depth", "height", "width"]


class Augmentation(Strict):
    """How images vary from one training step to the next; each record by itself, never in evaluation.

    Attributes:
        flip: axes along which an image is mirrored, for each by a coin; `true` is the width (left and right).
        shift: along each axis by up to so much of its size, in whole pixels; the edge is repeated.
        rotate: by up to so many degrees, either way; in 2-D.
        stretch: along each axis to up to 1 + so much of its size, or to that part of it; in 2-D.
        brightness: brighter or darker by up to so much of the window's width.
    """

    flip: tuple[Axis, ...] = ()
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    stretch: Annotated[float, Field(ge=0, le=1)] = 0.0
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("flip", mode="before")
    @classmethod
    def _usual_axis(cls, value: Any) -> Any:
        return {True: ("width",), False: ()}[value] if isinstance(value, bool) else value

    @property
    def varies(self) -> bool:
        return bool(self.flip or self.shift or self.rotate or self.stretch or self.brightness)


class ImageColumn(Strict):
    """A picture or a volume: PNG, JPEG, DICOM, NIfTI, or an array of an NPZ.

    The cell names a file within `[data.files.NAME]` of site.toml, or an array's row.

    Attributes:
        size: height and width, or depth, height and width, that every image is resized to.
        channels: 1 = grey, 3 = red, green, blue.
        unit: of the intensities, once a file's own rescaling is applied (DICOM: its modality LUT).
        range: intensities (a window) that are mapped to [-1, 1]; what lies outside is kept at its ends.
        missing: what becomes of a record whose file is absent or can't be read; `refuse` lists them all.
        augmentation: how images vary while a model is trained; not at all when absent.
    """

    kind: Literal["image"]
    name: Name
    description: str = ""
    size: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=2, max_length=3)]
    channels: Literal[1, 3] = 1
    unit: str = "1"
    range: Interval = (0.0, 255.0)
    missing: Unreadable = "refuse"
    augmentation: Augmentation = Augmentation()

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.channels, *self.size)

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    @model_validator(mode="after")
    def _bearable(self) -> Self:
        rising(f"column {self.name}", "range", self.range)
        if self.width > LARGEST_BLOCK:
            raise ValueError(f"column {self.name}: size: {self.width} numbers, more than {LARGEST_BLOCK}")
        if len(self.size) == 3 and (self.augmentation.rotate or self.augmentation.stretch):
            raise ValueError(
                f"column {self.name}: augmentation: volumes are flipped and shifted, not rotated or stretched"
            )
        if len(self.size) == 2 and "depth" in self.augmentation.flip:
            raise ValueError(f"column {self.name}: augmentation: a 2-D image has no depth to flip")
        return self


class Variable(Strict):
    """One quantity of a time series.

    Attributes:
        name: as it stands in the data, e.g. `HR`.
        unit: of the values (UCUM where there is one).
        range: plausible; a value outside counts as not measured.
        reference: public interval that is mapped to [-1, 1]; `range` when absent. Scaled values are kept
            within ±3.
        default: public value before the first measurement; the middle of `reference` when absent.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    unit: str
    range: Interval
    reference: Interval | None = None
    default: Finite | None = None

    @property
    def interval(self) -> tuple[float, float]:
        return self.reference or self.range

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        rising(f"variable {self.name}", "range", self.range)
        rising(f"variable {self.name}", "reference", self.reference)
        if self.default is not None and not self.range[0] <= self.default <= self.range[1]:
            raise ValueError(f"variable {self.name}: default {self.default} lies outside range")
        return self


class SeriesColumn(Strict):
    """Measurements over time, put on a regular grid.

    The cell names a series within `[data.files.NAME]` of site.toml: a file of time, parameter and value
    (PhysioNet), or the key in one long table.

    Attributes:
        hours: from the record's beginning; later measurements are left out.
        step_hours: width of a cell of the grid.
        variables: in this order along the grid.
        cell: which of several measurements in a cell counts: their mean, or the last one (of several at one
            time the largest).
        masks: after the values, for each variable 1 where the cell has a measurement of its own.
    """

    kind: Literal["series"]
    name: Name
    description: str = ""
    hours: Positive
    step_hours: Positive
    variables: Annotated[tuple[Variable, ...], Field(min_length=1, max_length=512)]
    cell: Literal["mean", "last"] = "mean"
    masks: bool = True
    missing: Unreadable = "refuse"

    @property
    def steps(self) -> int:
        return math.ceil(self.hours / self.step_hours - 1e-9)

    @property
    def shape(self) -> tuple[int, ...]:
        """Steps, and at each the values, followed by the masks."""
        return (self.steps, len(self.variables) * (2 if self.masks else 1))

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    @model_validator(mode="after")
    def _bearable(self) -> Self:
        names = [v.name for v in self.variables]
        if len(set(names)) != len(names):
            raise ValueError(f"column {self.name}: variables name a quantity twice")
        if self.width > LARGEST_BLOCK:
            raise ValueError(f"column {self.name}: {self.width} numbers, more than {LARGEST_BLOCK}")
        return self


class TextColumn(Strict):
    """Free text as a row of token ids: 0 = nothing, 1 … vocabulary = a token's hash.

    The cell is the text itself. Hashing needs no vocabulary that was learnt from patients.

    Attributes:
        tokens: at most so many; the text's beginning counts.
        vocabulary: how many ids tokens are hashed to.
        unit: what a token is: a word (lower case, accents off), or its pieces of three letters too.
        missing: of a record without text: `empty` keeps it, with no token.
    """

    kind: Literal["text"]
    name: Name
    description: str = ""
    tokens: Annotated[int, Field(ge=1, le=65_536)] = 64
    vocabulary: Annotated[int, Field(ge=2, le=1 << 20)] = 2048
    unit: Literal["words", "pieces"] = "words"
    missing: Literal["refuse", "exclude", "empty"] = "empty"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tokens,)

    @property
    def width(self) -> int:
        return self.tokens

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Descriptor:
    """A physico-chemical property and the public interval that is scaled to [-1, 1]."""

    name: str
    unit: str
    interval: Interval


# Intervals hold nearly all drug-like molecules: Lipinski's and Veber's rules lie well inside.
DESCRIPTORS: tuple[Descriptor, ...] = (
    Descriptor("molecular weight", "g/mol", (0.0, 800.0)),
    Descriptor("logP", "1", (-5.0, 10.0)),
    Descriptor("molar refractivity", "cm3/mol", (0.0, 200.0)),
    Descriptor("polar surface", "Angstrom2", (0.0, 200.0)),
    Descriptor("hydrogen-bond acceptors", "1", (0.0, 15.0)),
    Descriptor("hydrogen-bond donors", "1", (0.0, 8.0)),
    Descriptor("rotatable bonds", "1", (0.0, 20.0)),
    Descriptor("rings", "1", (0.0, 6.0)),
    Descriptor("aromatic rings", "1", (0.0, 5.0)),
    Descriptor("heavy atoms", "1", (0.0, 60.0)),
    Descriptor("share of sp3 carbons", "1", (0.0, 1.0)),
    Descriptor("halogens", "1", (0.0, 6.0)),
    Descriptor("charge", "1", (-2.0, 2.0)),
)


class MoleculeColumn(Strict):
    """A molecule by its SMILES, which is the cell.

    Attributes:
        representation: `fingerprint`: Morgan's (Rogers & Hahn 2010), one number a bit; `tokens`: ids of
            the SMILES's atoms, bonds and brackets, as in a text column.
        bits, radius: of the fingerprint.
        descriptors: after the fingerprint, `DESCRIPTORS` (Crippen's logP, polar surface, …).
        tokens: at most so many.
        missing: what becomes of a record whose SMILES can't be read.
    """

    kind: Literal["molecule"]
    name: Name
    description: str = ""
    representation: Literal["fingerprint", "tokens"] = "fingerprint"
    bits: Annotated[int, Field(ge=64, le=16_384)] = 1024
    radius: Annotated[int, Field(ge=0, le=6)] = 2
    descriptors: bool = False
    tokens: Annotated[int, Field(ge=1, le=2048)] = 100
    missing: Unreadable = "refuse"

    @property
    def vocabulary(self) -> int:
        """Ids of tokens; 0 of a fingerprint."""
        return 128 if self.representation == "tokens" else 0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.representation == "tokens":
            return (self.tokens,)
        return (self.bits + (len(DESCRIPTORS) if self.descriptors else 0),)

    @property
    def width(self) -> int:
        return self.shape[0]

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.descriptors and self.representation == "tokens":
            raise ValueError(f"column {self.name}: descriptors go with a fingerprint, not with tokens")
        return self


Wide = ImageColumn | SeriesColumn | TextColumn | MoleculeColumn
