"""From an image's own pixels to the study's numbers: channels, orientation, size, window."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from client.sources.images.problems import NOT_FINITE, ORIENTATION, UNREADABLE, Unfit, dimensions
from common.modalities import ImageColumn

Floats = npt.NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def fitted(image: Floats, column: ImageColumn) -> Floats:
    """An image as a record's block.

    Args:
        image: float32 [1 or 3, height, width] or [1 or 3, depth, height, width], in the study's unit.

    Returns:
        float32 [column.width], in [-1, 1].

    Raises:
        Unfit: if it has another number of dimensions, or numbers that aren't finite.
    """
    if image.size == 0:
        raise Unfit(UNREADABLE)
    wanted = len(column.size)
    if image.ndim - 1 > wanted:  # a slice one voxel thick is a picture
        thin = [axis for axis in range(1, image.ndim) if image.shape[axis] == 1]
        image = np.squeeze(image, axis=tuple(thin[: image.ndim - 1 - wanted]))
    if image.ndim - 1 != wanted:
        raise Unfit(dimensions(image.ndim - 1, wanted))
    if not np.isfinite(image).all():
        raise Unfit(NOT_FINITE)
    block = scaled(resized(_in_channels(image, column.channels), column), column).reshape(-1)
    if not np.isfinite(block).all():  # sums of huge numbers
        raise Unfit(NOT_FINITE)
    return block


def channels_first(pixels: npt.NDArray[np.generic], spatial: int) -> Floats:
    """[*space] or [*space, 1 or 3 channels] as float32 [channels, *space].

    Args:
        spatial: how many dimensions are space.

    Raises:
        Unfit: at another number of channels.
    """
    with np.errstate(all="ignore"):
        image = np.asarray(pixels, dtype=np.float32)
    if image.ndim == spatial:
        return image[None]
    if image.ndim != spatial + 1 or image.shape[-1] not in (1, 3):
        raise Unfit(UNREADABLE)
    return np.moveaxis(image, -1, 0)


def _in_channels(image: Floats, channels: int) -> Floats:
    """Grey three times, or red, green and blue by their luminance."""
    if image.shape[0] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=0)
    red, green, blue = (weight * part for weight, part in zip(_LUMA, image, strict=True))
    return np.asarray((red + green + blue)[None], dtype=np.float32)


def oriented(volume: Floats, directions: npt.NDArray[np.float64]) -> Floats:
    """A volume turned by quarters and mirrored, so that every site's lie alike, whatever their format.

    Args:
        volume: [channels, three axes of space].
        directions: float64 [3, 3]; column i says where axis i leads in the patient, along left, posterior
            and superior (DICOM PS3.3 C.7.6.2.1.1).

    Returns:
        [channels, from feet to head, from front to back, from the patient's right to left], to the nearest
        axis: an axial CT as it is usually shown, slice by slice.

    Raises:
        Unfit: if the directions are not those of three different axes.
    """
    from nibabel.orientations import apply_orientation, io_orientation

    affine = np.eye(4)
    affine[:3, :3] = directions
    if not np.isfinite(affine).all():
        raise Unfit(ORIENTATION)
    found = io_orientation(affine)
    if not np.isfinite(found).all():
        raise Unfit(ORIENTATION)
    turned = [apply_orientation(each, found).T for each in volume]  # left, posterior, superior; then reversed
    return np.ascontiguousarray(np.stack(turned), dtype=np.float32)


def resized(image: Floats, column: ImageColumn) -> Floats:
    """[channels, *space] at the study's size: axes that get smaller by areas, the others linearly."""
    smaller = tuple(min(new, old) for new, old in zip(column.size, image.shape[1:], strict=True))
    found = torch.from_numpy(np.ascontiguousarray(image))[None]
    if smaller != image.shape[1:]:
        found = torch.nn.functional.interpolate(found, size=smaller, mode="area")
    if smaller != column.size:
        mode = "bilinear" if len(column.size) == 2 else "trilinear"
        found = torch.nn.functional.interpolate(found, size=column.size, mode=mode)
    return np.asarray(found[0].numpy(), dtype=np.float32)


def scaled(image: Floats, column: ImageColumn) -> Floats:
    """The study's window to [-1, 1]."""
    low, high = column.range
    return np.asarray(((image - low) * (2.0 / (high - low)) - 1.0).clip(-1.0, 1.0), dtype=np.float32)
