"""PNG, JPEG and their like, by Pillow: nothing but pixels is taken (no EXIF, no text, no orientation)."""

from __future__ import annotations

import warnings
from io import BytesIO

import numpy as np
from PIL import Image

from client.sources.images.problems import (
    MOST_NUMBERS,
    SEVERAL_PICTURES,
    TOO_MANY_NUMBERS,
    UNREADABLE,
    Unfit,
)
from client.sources.images.shaping import Floats, channels_first

# Only formats that Pillow decodes itself: EPS, for one, would start a program.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "PPM", "WEBP")
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_GREY = ("L", *_DEEP)
_PHOTOMETRY = 262  # TIFF 6.0, section 3

# Once for the process, because `catch_warnings` is not safe among threads; what is damaged is told anyway.
warnings.filterwarnings("ignore", module=r"PIL\.")


def picture(content: bytes) -> Floats:
    """Intensities as they are stored, float32 [1 or 3, height, width]; 16 bits of grey keep their range.

    Raises:
        Unfit: if it holds several pictures, or too many pixels.
        Exception: whatever Pillow raises at damaged bytes.
    """
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Unfit(TOO_MANY_NUMBERS) from None
    with image:
        if getattr(image, "n_frames", 1) != 1:
            raise Unfit(SEVERAL_PICTURES)
        if image.width * image.height * 3 > MOST_NUMBERS:
            raise Unfit(TOO_MANY_NUMBERS)
        if image.format == "TIFF" and image.mode in _DEEP and _low_is_white(image):
            raise Unfit(UNREADABLE)  # Pillow mirrors it in eight bits only
        if image.mode in _GREY:
            pixels = np.asarray(image)
        else:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "LA", "La") else "RGB"))
    return channels_first(pixels, 2)


def _low_is_white(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", None)
    return tags is not None and tags.get(_PHOTOMETRY) == 0
