"""NIfTI volumes, by nibabel: scaled by their header, and turned as DICOM's are."""

from __future__ import annotations

import logging
import math
import zlib

import numpy as np

from client.sources.images.problems import (
    MOST_NUMBERS,
    ORIENTATION,
    TOO_MANY_NUMBERS,
    UNREADABLE,
    Unfit,
    dimensions,
)
from client.sources.images.shaping import Floats, oriented

_HEADERS = {b"n+1\0": (344, 1), b"n+2\0": (4, 2)}  # magic → where it stands, version
_LARGEST = 8 * MOST_NUMBERS + (1 << 20)  # bytes: float64, and a header
_TO_LPS = np.diag([-1.0, -1.0, 1.0])  # NIfTI's world is right, anterior, superior

# Nobody reads complaints about one header among thousands, and they quote it.
logging.getLogger("nibabel").setLevel(logging.CRITICAL + 1)


def unpacked(content: bytes) -> bytes:
    """What a gzip file holds.

    Raises:
        Unfit: if it is more than the largest image, or damaged.
    """
    inflate = zlib.decompressobj(wbits=31)
    try:
        found = inflate.decompress(content, _LARGEST)
    except zlib.error:
        raise Unfit(UNREADABLE) from None
    if not inflate.eof:
        raise Unfit(TOO_MANY_NUMBERS if len(found) >= _LARGEST else UNREADABLE)
    return found


def version_of(content: bytes) -> int | None:
    """1 or 2 if it is a NIfTI file by its magic number."""
    for magic, (place, version) in _HEADERS.items():
        if content[place : place + 4] == magic:
            return version
    return None


def volume(content: bytes, wanted: int) -> Floats:
    """Intensities after the header's slope and intercept, float32 [1, depth, height, width]; see `oriented`.

    Args:
        wanted: dimensions of the study's images.

    Raises:
        Unfit: if it has more than three dimensions, too many voxels, or no orientation.
        Exception: whatever nibabel raises at damaged bytes.
    """
    import nibabel

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)  # nibabel sets it when first imported
    kind = nibabel.Nifti1Image if version_of(content) == 1 else nibabel.Nifti2Image
    image = kind.from_bytes(content)
    if image.get_data_dtype().kind not in "iuf":
        raise Unfit(UNREADABLE)
    if not (int(image.header["qform_code"]) or int(image.header["sform_code"])):
        raise Unfit(ORIENTATION)
    shape = [int(n) for n in image.shape]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 3:
        raise Unfit(dimensions(len(shape), wanted))
    shape += [1] * (3 - len(shape))
    if min(shape) < 1:
        raise Unfit(UNREADABLE)
    if math.prod(shape) > MOST_NUMBERS:
        raise Unfit(TOO_MANY_NUMBERS)
    with np.errstate(all="ignore"):
        values = image.get_fdata(dtype=np.float32, caching="unchanged").reshape(shape)
    return oriented(values[None], _TO_LPS @ np.asarray(image.affine, dtype=np.float64)[:3, :3])
