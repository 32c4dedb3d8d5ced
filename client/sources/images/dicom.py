"""DICOM, by pydicom: pixels and what they mean; no element that says who the patient is is read.

Values are what the modality LUT makes of the stored ones (HU in CT; DICOM PS3.3 C.11.1); the window is the
study's. MONOCHROME1, where low means white, is mirrored within that window.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from client.sources.images.problems import (
    BURNED_IN,
    COMPRESSED,
    MOST_NUMBERS,
    NOWHERE,
    PHOTOMETRY,
    TOO_MANY_NUMBERS,
    UNEQUAL_SLICES,
    UNEVEN_SLICES,
    UNREADABLE,
    Unfit,
    dimensions,
)
from client.sources.images.shaping import Floats, channels_first, oriented
from common.modalities import ImageColumn

_READ = [
    "BitsAllocated",
    "BitsStored",
    "BurnedInAnnotation",
    "Columns",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "HighBit",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelData",
    "PixelRepresentation",
    "PlanarConfiguration",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SamplesPerPixel",
    "SharedFunctionalGroupsSequence",
]
_GREY, _INVERTED = ("MONOCHROME1", "MONOCHROME2"), "MONOCHROME1"
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PREAMBLE = 132  # bytes, the magic number included
_EVEN = 0.5  # of the median distance may a distance between slices be more or less
_SAME_DIRECTION = 1e-3  # two slices' direction cosines

# pydicom warns and logs about odd elements, and quotes them. Once for the process, as in client/dpsgd.
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


@dataclass(frozen=True, repr=False)
class Slice:
    """One frame.

    Attributes:
        image: float32 [1 or 3, rows, columns].
        position: of the first pixel, in mm along left, posterior and superior; None if it isn't said.
        orientation: direction cosines along a row, and along a column.
    """

    image: Floats
    position: npt.NDArray[np.float64] | None
    orientation: npt.NDArray[np.float64] | None


def is_dicom(content: bytes) -> bool:
    """By its magic number."""
    return content[128:132] == b"DICM"


def picture(content: bytes, column: ImageColumn, accept_burned_in: bool) -> Floats:
    """What one file holds: float32 [1 or 3, rows, columns], or of several frames a volume, see `volume`.

    Raises:
        Unfit: if it can't be taken.
        Exception: whatever pydicom raises at damaged bytes.
    """
    frames = slices(content, column, accept_burned_in)
    if len(frames) == 1:
        return frames[0].image
    if len(column.size) == 2:
        raise Unfit(dimensions(3, 2))
    return volume(frames, placed=False)


def slices(content: bytes, column: ImageColumn, accept_burned_in: bool) -> list[Slice]:
    """The frames of one file, in its order.

    Raises:
        Unfit: if they can't be taken.
        Exception: whatever pydicom raises at damaged bytes.
    """
    if not _decodable(_syntax(content)):
        raise Unfit(COMPRESSED)
    header = pydicom.dcmread(BytesIO(content), specific_tags=list(_READ))
    if str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES" and not accept_burned_in:
        raise Unfit(BURNED_IN)
    photometry = str(header.PhotometricInterpretation)
    if photometry not in (*_GREY, *_COLOUR):
        raise Unfit(PHOTOMETRY)
    count = int(header.get("NumberOfFrames") or 1)
    size = (count, int(header.Rows), int(header.Columns), int(header.SamplesPerPixel))
    if min(size) < 1:
        raise Unfit(UNREADABLE)
    if math.prod(size) > MOST_NUMBERS:
        raise Unfit(TOO_MANY_NUMBERS)
    if count > 1 and len(column.size) == 2:
        raise Unfit(dimensions(3, 2))
    stored = header.pixel_array
    frames = [stored] if count == 1 else list(stored)
    return [_slice(header, i, frame, column) for i, frame in enumerate(frames)]


def _syntax(content: bytes) -> UID:
    """How the data set is encoded, from the group of elements that stands before it (PS3.10 7.1)."""
    start = BytesIO(content[_PREAMBLE:])
    meta = read_dataset(start, False, True, stop_when=lambda tag, *_: tag.group != 2)
    return UID(meta.TransferSyntaxUID)


def _decodable(syntax: UID) -> bool:
    if syntax == DeflatedExplicitVRLittleEndian:  # pydicom unpacks it without asking how large it gets
        return False
    if not syntax.is_compressed:
        return True
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _slice(header: pydicom.Dataset, frame: int, stored: npt.NDArray[Any], column: ImageColumn) -> Slice:
    image = channels_first(stored, 2)
    if header.PhotometricInterpretation in _GREY:
        rescale = _group(header, frame, "PixelValueTransformationSequence", "RescaleSlope")
        with np.errstate(all="ignore"):
            if rescale is None and header.get("ModalityLUTSequence"):
                found = apply_modality_lut(stored, header)
            else:
                slope, intercept = _linear(header if rescale is None else rescale)
                found = stored.astype(np.float64) * slope + intercept
        image = channels_first(found, 2)
        if header.PhotometricInterpretation == _INVERTED:
            image = np.asarray(column.range[0] + column.range[1] - image, dtype=np.float32)
    position = _group(header, frame, "PlanePositionSequence", "ImagePositionPatient")
    orientation = _group(header, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
    alone = header if int(header.get("NumberOfFrames") or 1) == 1 else None
    return Slice(
        image,
        _numbers(position or alone, "ImagePositionPatient", 3),
        _numbers(orientation or alone, "ImageOrientationPatient", 6),
    )


def _linear(item: pydicom.Dataset) -> tuple[float, float]:
    """Slope and intercept; pydicom's own `apply_rescale` ignores one that stands without the other.

    Raises:
        Unfit: if the slope is 0.
    """
    slope, intercept = (
        default if value in (None, "") else float(value)
        for value, default in ((item.get("RescaleSlope"), 1.0), (item.get("RescaleIntercept"), 0.0))
    )
    if slope == 0:
        raise Unfit(UNREADABLE)
    return slope, intercept


def _group(header: pydicom.Dataset, frame: int, sequence: str, keyword: str) -> pydicom.Dataset | None:
    """A frame's own item of a functional group, or the one that all frames share (PS3.3 C.7.6.16)."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for groups in (*own[frame : frame + 1], *shared[:1]):
        items = groups.get(sequence) or []
        if len(items) and keyword in items[0]:
            item: pydicom.Dataset = items[0]
            return item
    return None


def _numbers(item: pydicom.Dataset | None, keyword: str, count: int) -> npt.NDArray[np.float64] | None:
    values = None if item is None else item.get(keyword)
    if not values or len(values) != count:
        return None
    found = np.array([float(v) for v in values], dtype=np.float64)
    return found if np.isfinite(found).all() else None


def volume(found: Sequence[Slice], placed: bool = True) -> Floats:
    """Slices, in any order, as float32 [1 or 3, depth, height, width]; see `oriented`.

    Args:
        placed: whether they must say where they lie. Frames of one file that don't are taken as they come.

    Raises:
        Unfit: if they aren't of one size and orientation, at even distances; or are too many.
    """
    if len({each.image.shape for each in found}) != 1:
        raise Unfit(UNEQUAL_SLICES)
    if sum(each.image.size for each in found) > MOST_NUMBERS:
        raise Unfit(TOO_MANY_NUMBERS)
    known = [
        (each.position, each.orientation)
        for each in found
        if each.position is not None and each.orientation is not None
    ]
    if not known and not placed:
        return np.stack([each.image for each in found], axis=1)
    if len(known) != len(found):
        raise Unfit(NOWHERE)
    positions, orientations = (np.stack(each) for each in zip(*known, strict=True))
    if np.abs(orientations - orientations[0]).max() > _SAME_DIRECTION:
        raise Unfit(UNEQUAL_SLICES)
    row, down = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(row, down)
    places = positions @ normal
    order = np.argsort(places, kind="stable")
    gaps = np.diff(places[order])
    middle = float(np.median(gaps)) if len(gaps) else 1.0
    if middle <= 0 or (np.abs(gaps - middle) > _EVEN * middle).any():
        raise Unfit(UNEVEN_SLICES)
    stacked = np.stack([found[i].image for i in order], axis=1)
    return oriented(stacked, np.stack([normal, down, row], axis=1))
