"""What may be wrong with one image: a small, fixed set of words, none of which comes from the file."""

from __future__ import annotations

UNREADABLE = "not a readable image; export it again as PNG, JPEG, TIFF, DICOM or NIfTI"
TOO_MANY_NUMBERS = "holds more pixels than are read; export it at a lower resolution"
NOT_FINITE = "holds pixels that are no finite numbers; export it again"
SEVERAL_PICTURES = "holds several pictures; the study wants one"
NO_ROW = "not the number of a row of the array (the first is 0)"
BURNED_IN = (
    "may show identifiers burned into the pixels (BurnedInAnnotation = YES); clean it, or, once they are "
    'known to be clean, set burned_in = "accept" in site.toml'
)
COMPRESSED = "compressed in a way that isn't read here; export it uncompressed (Explicit VR Little Endian)"
PHOTOMETRY = "neither grey nor red, green and blue by its PhotometricInterpretation; export it as one of them"
NOT_A_SLICE = "its folder holds a file that is no DICOM slice; keep nothing but the slices there"
EMPTY_FOLDER = "its folder holds no slices"
UNEQUAL_SLICES = "its slices have different sizes or orientations; keep one series in a folder"
NOWHERE = "its slices don't say where they lie (ImagePositionPatient, ImageOrientationPatient)"
UNEVEN_SLICES = "its slices don't stand at even distances: one is absent, or there twice"
ORIENTATION = "its orientation is not known from its header; export it with a valid affine"

MOST_NUMBERS = 1 << 28  # pixels, or voxels times channels, of one image before it is resized


class Unfit(Exception):
    """One image can't be taken; its only argument is one of this module's texts or `dimensions`."""


def dimensions(found: int, wanted: int) -> str:
    """An image of another number of dimensions than the study's."""
    return f"is {found}-D, the study wants {wanted}-D"
