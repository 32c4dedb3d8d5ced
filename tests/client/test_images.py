"""Images at a site: every format against its own oracle, and bad files told by line and by nothing else."""

from __future__ import annotations

import gzip
import io
import json
import logging
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import small
import tomli_w
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)
from typer.testing import CliRunner

from client.cli import app
from client.cohort import load_cohort
from client.settings import Files, SiteFolder, Where
from client.site import make_site_keys
from client.sources import images
from client.sources.images import problems
from common.errors import DataError, SiteError
from common.modalities import ImageColumn
from common.table import Decoded

Array = np.ndarray[Any, Any]
ZEBRA = "PATIENT-ZEBRA"
RANDOM = np.random.default_rng(5)


def column(size: tuple[int, ...] = (6, 8), **changes: Any) -> ImageColumn:
    return ImageColumn.model_validate({"kind": "image", "name": "scan", "size": size, **changes})


def read(path: Path, cells: list[str | None], wanted: ImageColumn | None = None, **files: Any) -> Decoded:
    return images.read(wanted or column(), cells, Where(path, Files(at="here", **files)))


def problem(path: Path, cell: str, wanted: ImageColumn | None = None, **files: Any) -> str:
    """The one thing that is wrong with one record."""
    found = read(path, [cell], wanted, **files)
    assert np.isnan(found.values).all()
    ((text, positions),) = found.problems.items()
    assert positions.tolist() == [0]
    assert ZEBRA not in text
    return text


def image(path: Path, cell: str, wanted: ImageColumn | None = None, **files: Any) -> Array:
    """One record's image, in the study's window."""
    wanted = wanted or column()
    found = read(path, [cell], wanted, **files)
    assert not found.problems
    low, high = wanted.range
    return (found.values[0].reshape(wanted.shape).astype(np.float64) + 1) / 2 * (high - low) + low


def png(pixels: Array, form: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, form, **options)
    return target.getvalue()


def grey(size: tuple[int, ...] = (6, 8), top: int = 256) -> Array:
    return RANDOM.integers(0, top, size).astype(np.uint8 if top == 256 else np.uint16)


def dicom(
    pixels: Array,
    syntax: UID = ExplicitVRLittleEndian,
    encode: bool = False,
    **elements: Any,
) -> bytes:
    """A DICOM file of grey or colour pixels, whose header names the patient."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if encode else syntax
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    header = Dataset()
    header.file_meta = meta
    header.PatientName, header.PatientID, header.PatientBirthDate = ZEBRA, ZEBRA, "19700101"
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.shape[-1] == 3
    header.Rows, header.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    header.SamplesPerPixel = 3 if colour else 1
    header.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        header.PlanarConfiguration = 0
    header.BitsAllocated = header.BitsStored = 8 * pixels.dtype.itemsize
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == (4 if colour else 3):
        header.NumberOfFrames = len(pixels)
    header.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(header, name, value)
    if encode:
        header.compress(syntax)
    target = io.BytesIO()
    pydicom.dcmwrite(target, header, enforce_file_format=True)
    return target.getvalue()


def group(name: str, **elements: Any) -> Dataset:
    """A functional group with one item."""
    item, found = Dataset(), Dataset()
    for key, value in elements.items():
        setattr(item, key, value)
    setattr(found, name, [item])
    return found


def nifti(values: Array, affine: Array | None = None, slope: float = 1.0, inter: float = 0.0) -> bytes:
    found = nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine)
    found.header["descrip"] = ZEBRA.encode()
    content = bytearray(found.to_bytes())
    content[112:120] = struct.pack("<ff", slope, inter)  # nibabel itself would divide by them
    return bytes(content)


def packed(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# --- pictures


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("TIFF", {}), ("BMP", {}), ("PPM", {})])
def test_grey_pixels_come_as_they_are(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    pixels = grey()
    (tmp_path / "a").write_bytes(png(pixels, form, **options))  # whatever the file is called
    np.testing.assert_allclose(image(tmp_path, "a")[0], pixels, atol=1e-4)


def test_jpeg_is_what_pillow_makes_of_it(tmp_path: Path) -> None:
    content = png(grey((40, 30)), "JPEG", quality=70)
    (tmp_path / "a.jpeg").write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)), dtype=np.float64)
    np.testing.assert_allclose(image(tmp_path, "a.jpeg", column((40, 30)))[0], expected, atol=1e-4)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_range(tmp_path: Path, form: str) -> None:
    pixels = grey(top=1 << 16)
    pixels[0, :2] = 0, 65_535
    (tmp_path / "a").write_bytes(png(pixels, form))
    np.testing.assert_allclose(image(tmp_path, "a", column(range=(0, 65_535)))[0], pixels, atol=0.02)


def test_colours_and_grey_stand_in_for_each_other(tmp_path: Path) -> None:
    colours, pixels = grey((6, 8, 3)), grey()
    (tmp_path / "colours.png").write_bytes(png(colours))
    (tmp_path / "grey.png").write_bytes(png(pixels))
    both = column(channels=3)
    np.testing.assert_allclose(image(tmp_path, "colours.png", both), colours.transpose(2, 0, 1), atol=1e-4)
    np.testing.assert_allclose(image(tmp_path, "grey.png", both), np.stack([pixels] * 3), atol=1e-4)
    luminance = colours @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(image(tmp_path, "colours.png")[0], luminance, atol=1e-3)


def test_only_pixels_are_taken(tmp_path: Path) -> None:
    """An EXIF orientation and an alpha channel change nothing."""
    pixels = grey((8, 8, 3))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, ZEBRA  # turned by a quarter; a description
    (tmp_path / "a").write_bytes(png(pixels, "PNG", exif=exif))
    alpha = np.concatenate([pixels, grey((8, 8, 1))], axis=2)
    (tmp_path / "b").write_bytes(png(alpha))
    wanted = column((8, 8), channels=3)
    np.testing.assert_array_equal(image(tmp_path, "a", wanted), image(tmp_path, "b", wanted))
    np.testing.assert_allclose(image(tmp_path, "a", wanted), pixels.transpose(2, 0, 1), atol=1e-4)


def test_resizing_is_by_areas_or_linear(tmp_path: Path) -> None:
    pixels = grey((12, 8))
    (tmp_path / "a").write_bytes(png(pixels))
    halved = pixels.astype(np.float64).reshape(6, 2, 4, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(image(tmp_path, "a", column((6, 4)))[0], halved, atol=1e-3)
    wider = image(tmp_path, "a", column((12, 16)))[0]
    np.testing.assert_allclose(wider[:, 1], 0.75 * pixels[:, 0] + 0.25 * pixels[:, 1], atol=1e-3)
    mixed = image(tmp_path, "a", column((6, 16)))[0]  # lower by areas, and wider linearly
    rows = pixels.astype(np.float64).reshape(6, 2, 8).mean(axis=1)
    np.testing.assert_allclose(mixed[:, 1], 0.75 * rows[:, 0] + 0.25 * rows[:, 1], atol=1e-3)


def test_the_window_keeps_what_lies_outside_at_its_ends(tmp_path: Path) -> None:
    pixels = np.full((6, 8), 10, dtype=np.uint8)
    pixels[0, :3] = 50, 100, 200
    (tmp_path / "a").write_bytes(png(pixels))
    found = read(tmp_path, ["a"], column(range=(50, 150))).values.reshape(6, 8)
    np.testing.assert_allclose(found[0, :4], [-1.0, 0.0, 1.0, -1.0], atol=1e-6)


def test_unbearable_and_strange_pictures(tmp_path: Path) -> None:
    pages = [Image.fromarray(grey()) for _ in range(2)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    assert problem(tmp_path, "pages.tiff") == problems.SEVERAL_PICTURES
    (tmp_path / "bomb.png").write_bytes(_claiming(20_000, 20_000))
    (tmp_path / "worse.png").write_bytes(_claiming(1_000_000, 1_000_000))
    for name in ("bomb.png", "worse.png"):
        assert problem(tmp_path, name) == problems.TOO_MANY_NUMBERS
    (tmp_path / "a.png").write_bytes(png(grey()))
    assert problem(tmp_path, "a.png", column((4, 6, 8))) == "is 2-D, the study wants 3-D"
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    for content in (b"", b"x", b"<svg/>", b"GIF89a", b"\x1f\x8b", b"\x1f\x8b" + bytes(40)):
        (tmp_path / "b").write_bytes(content)
        assert problem(tmp_path, "b") == problems.UNREADABLE
    assert problem(tmp_path, "program.eps") == problems.UNREADABLE
    floats = np.zeros((6, 8), dtype=np.float32)
    floats[1, 1] = np.nan
    (tmp_path / "nan.tiff").write_bytes(png(floats, "TIFF"))
    assert problem(tmp_path, "nan.tiff") == problems.NOT_FINITE


def _claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says that it is so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


# --- where files lie


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz"), ("s.tgz", "w:gz")])
def test_a_tar_gives_what_its_folder_gives(tmp_path: Path, name: str, mode: str) -> None:
    files = {f"deep/er/{i}.png": png(grey()) for i in range(5)}
    archive = packed(tmp_path / name, files, mode)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    cells: list[str | None] = [*reversed(files), None, next(iter(files)), "./" + next(iter(files))]
    expected = read(tmp_path, cells)
    found = read(archive, cells)
    assert not found.problems
    np.testing.assert_array_equal(found.values, expected.values)
    assert np.isnan(found.values[5]).all()
    assert not np.isnan(np.delete(found.values, 5, axis=0)).any()
    short: list[str | None] = [
        None if c is None else c.removeprefix("./").removeprefix("deep/") for c in cells
    ]
    np.testing.assert_array_equal(read(archive, short).values, expected.values)


def test_nothing_outside_and_nothing_behind_a_link(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(png(grey()))
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "folder").symlink_to(tmp_path)
    for cell in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "folder/secret.png",
        "a\0b",
        "..",
    ):
        assert problem(inside, cell) != problems.UNREADABLE
        assert problem(inside, cell, column((4, 6, 8)))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("link.png")
        member.type, member.linkname = tarfile.SYMTYPE, "../secret.png"
        archive.addfile(member)
    for cell in ("link.png", "../secret.png"):
        assert problem(tmp_path / "a.tar", cell)


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(grey((60, 60))))
    (tmp_path / "empty").mkdir()
    assert "absent" in problem(tmp_path, f"{ZEBRA}.png")
    assert "larger than 50 bytes" in problem(tmp_path, "large.png", max_bytes=50)
    assert "folder, not a file" in problem(tmp_path, "empty")
    assert problem(tmp_path, "empty", column((2, 6, 8))) == problems.EMPTY_FOLDER


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("gone", None, "no folder and no archive"),
        ("some.zip", b"PK", "no folder and no archive"),
        ("a.tar", b"no tar at all", "damaged, or no tar archive"),
        ("a.tar.gz", gzip.compress(bytes(range(256)) * 20)[:90], "damaged, or no tar archive"),
        ("gone.tar", None, "No such file"),
        ("a.npz", b"no zip at all", "damaged, or no NPZ file"),
        ("gone.npz", None, "No such file"),
    ],
)
def test_what_cannot_be_opened_at_all_is_one_error(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for wanted in (column(), column((2, 6, 8))):
        with pytest.raises(DataError, match=says) as caught:
            read(tmp_path / name, ["a"], wanted)
        assert name in str(caught.value)
        assert caught.value.remedy


# --- arrays


def test_rows_of_an_array(tmp_path: Path) -> None:
    stored, colours, volumes = grey((4, 6, 8)), grey((4, 6, 8, 3)), grey((3, 4, 6, 8))
    np.savez_compressed(tmp_path / "a.npz", images=stored, colours=colours, volumes=volumes)
    path = tmp_path / "a.npz"
    np.testing.assert_allclose(image(path, "2")[0], stored[2], atol=1e-4)
    np.testing.assert_allclose(image(path, "2.0")[0], stored[2], atol=1e-4)
    found = image(path, "3", column(channels=3), array="colours")
    np.testing.assert_allclose(found, colours[3].transpose(2, 0, 1), atol=1e-4)
    np.testing.assert_allclose(image(path, "1", column((4, 6, 8)), array="volumes")[0], volumes[1], atol=1e-4)
    for cell in ("4", "-1", "1.5", "x", ZEBRA, "9" * 30, "²"):
        assert problem(path, cell) == problems.NO_ROW


@pytest.mark.parametrize(
    ("arrays", "options", "says"),
    [
        ({"others": grey()}, {}, "no array called images"),
        ({"images": grey((2, 6))}, {}, "is 2-D; column scan takes rows of 2-D images"),
        ({"images": grey((2, 6, 8, 2))}, {}, "is 4-D; column scan takes rows"),
        ({"images": np.array([["a"]])}, {}, "holds no numbers"),
        ({"images": np.array([[None]], dtype=object)}, {}, "holds no numbers"),
        ({"images": grey((2, 6, 8))}, {"max_bytes": 95}, "unpacks to more than 95 bytes"),
    ],
)
def test_an_array_of_another_form(
    tmp_path: Path, arrays: dict[str, Array], options: dict[str, Any], says: str
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=says):
        read(tmp_path / "a.npz", ["0"], **options)


# --- DICOM


def test_dicom_comes_in_its_unit(tmp_path: Path) -> None:
    stored = RANDOM.integers(-500, 1500, (6, 8)).astype(np.int16)
    (tmp_path / "ct").write_bytes(dicom(stored, RescaleSlope="2", RescaleIntercept="-1024"))
    wanted = column(range=(-5000, 5000), unit="[hnsf'U]")
    np.testing.assert_allclose(image(tmp_path, "ct", wanted)[0], stored * 2.0 - 1024, atol=0.01)
    lung = read(tmp_path, ["ct"], column(range=(-1000, 400))).values.reshape(6, 8)
    np.testing.assert_allclose(lung, np.clip((stored * 2.0 - 24) / 700 - 1, -1, 1), atol=1e-5)


def test_a_modality_table_is_applied(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 0, 16], "US"
    table.LUTData = [10, 200, 30, 40]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    stored = RANDOM.integers(0, 4, (6, 8)).astype(np.uint16)
    (tmp_path / "a").write_bytes(dicom(stored, ModalityLUTSequence=[table]))
    np.testing.assert_allclose(image(tmp_path, "a")[0], np.array([10, 200, 30, 40])[stored], atol=1e-3)


def test_where_low_means_white_the_window_is_mirrored(tmp_path: Path) -> None:
    pixels = grey()
    (tmp_path / "a").write_bytes(dicom(pixels, PhotometricInterpretation="MONOCHROME1"))
    (tmp_path / "b").write_bytes(dicom(255 - pixels))
    np.testing.assert_allclose(image(tmp_path, "a"), image(tmp_path, "b"), atol=1e-4)


def test_dicom_in_colour(tmp_path: Path) -> None:
    colours = grey((6, 8, 3))
    (tmp_path / "a").write_bytes(dicom(colours))
    np.testing.assert_allclose(
        image(tmp_path, "a", column(channels=3)), colours.transpose(2, 0, 1), atol=1e-4
    )
    (tmp_path / "b").write_bytes(dicom(grey(), PhotometricInterpretation="PALETTE COLOR"))
    assert problem(tmp_path, "b") == problems.PHOTOMETRY


def test_compressed_dicom(tmp_path: Path) -> None:
    pixels = grey((16, 16))
    (tmp_path / "rle").write_bytes(dicom(pixels, RLELossless, encode=True))
    np.testing.assert_allclose(image(tmp_path, "rle", column((16, 16)))[0], pixels, atol=1e-4)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "JPEG2000")
    frame = pydicom.encaps.encapsulate([target.getvalue()])
    (tmp_path / "j2k").write_bytes(dicom(pixels, JPEG2000Lossless, PixelData=frame))
    np.testing.assert_allclose(image(tmp_path, "j2k", column((16, 16)))[0], pixels, atol=1e-4)
    (tmp_path / "ls").write_bytes(dicom(pixels, JPEGLSLossless, PixelData=frame))
    (tmp_path / "video").write_bytes(dicom(pixels, UID("1.2.840.10008.1.2.4.103"), PixelData=frame))
    (tmp_path / "deflated").write_bytes(dicom(pixels, DeflatedExplicitVRLittleEndian))
    for name in ("ls", "video", "deflated"):
        assert problem(tmp_path, name, column((16, 16))) == problems.COMPRESSED


def test_burned_in_identifiers_are_refused_until_the_site_says_otherwise(tmp_path: Path) -> None:
    pixels = grey()
    (tmp_path / "a").write_bytes(dicom(pixels, BurnedInAnnotation="YES"))
    (tmp_path / "b").write_bytes(dicom(pixels, BurnedInAnnotation="NO"))
    assert problem(tmp_path, "a") == problems.BURNED_IN
    np.testing.assert_array_equal(image(tmp_path, "a", burned_in="accept"), image(tmp_path, "b"))


AXIAL = ["1", "0", "0", "0", "1", "0"]


def _slices(volume: Array, spacing: float = 2.5) -> dict[str, bytes]:
    """An axial series; the files' names say nothing about their order."""
    order = RANDOM.permutation(len(volume))
    return {
        f"series/{name}.dcm": dicom(
            volume[i],
            ImagePositionPatient=["-10", "5", str(100 + spacing * int(i))],
            ImageOrientationPatient=AXIAL,
            RescaleSlope="1",
            RescaleIntercept="-100",
        )
        for name, i in enumerate(order)
    }


WIDE = (-1000.0, 1000.0)


def _written(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_a_folder_of_slices_is_a_volume(tmp_path: Path, kind: str) -> None:
    volume = RANDOM.integers(0, 500, (5, 6, 8)).astype(np.int16)
    files = {**_slices(volume), "other.nii": nifti(volume[0].astype(np.int16))}
    if kind == "folder":
        path = _written(tmp_path / "here", {**files, "series/DICOMDIR": b"x", "series/.hidden": b"x"})
    else:
        path = packed(tmp_path / f"a.{kind}", files, "w:gz" if kind.endswith("gz") else "w")
    wanted = column((5, 6, 8), range=WIDE)
    for cell in ("series", "series/", "./series"):
        np.testing.assert_allclose(image(path, cell, wanted)[0], volume - 100.0, atol=0.01)
    both = read(path, ["series", None, "series", "./series"], wanted)
    assert not both.problems
    assert np.isnan(both.values[1]).all()
    np.testing.assert_array_equal(both.values[0], both.values[2])
    np.testing.assert_array_equal(both.values[0], both.values[3])
    assert "folder, not a file" in problem(path, "series") or kind != "folder"


def test_series_that_are_no_volume(tmp_path: Path) -> None:
    volume = RANDOM.integers(0, 500, (6, 6, 8)).astype(np.int16)
    wanted = column((6, 6, 8), range=WIDE)
    sound = {
        f"series/{i}": dicom(each, ImagePositionPatient=["0", "0", str(i)], ImageOrientationPatient=AXIAL)
        for i, each in enumerate(volume)
    }
    image(_written(tmp_path / "sound", sound), "series", wanted)
    small_one = dicom(volume[2][:4], ImagePositionPatient=["0", "0", "2"], ImageOrientationPatient=AXIAL)
    sagittal = dicom(
        volume[2],
        ImagePositionPatient=["0", "0", "2"],
        ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"],
    )
    broken: dict[str, tuple[dict[str, bytes], str]] = {
        "gap": ({n: c for n, c in sound.items() if n != "series/2"}, problems.UNEVEN_SLICES),
        "twice": ({**sound, "series/9": sound["series/1"]}, problems.UNEVEN_SLICES),
        "size": ({**sound, "series/2": small_one}, problems.UNEQUAL_SLICES),
        "plane": ({**sound, "series/2": sagittal}, problems.UNEQUAL_SLICES),
        "nowhere": ({**sound, "series/2": dicom(volume[2])}, problems.NOWHERE),
        "text": ({**sound, "series/readme": b"hello"}, problems.NOT_A_SLICE),
        "cut": ({**sound, "series/2": sound["series/2"][:-20]}, problems.UNREADABLE),
        "burned": (
            {**sound, "series/2": dicom(volume[2], BurnedInAnnotation="YES")},
            problems.BURNED_IN,
        ),
    }
    for name, (files, text) in broken.items():
        assert problem(_written(tmp_path / name, files), "series", wanted) == text, name


def test_several_frames_in_one_file(tmp_path: Path) -> None:
    volume = RANDOM.integers(0, 500, (4, 6, 8)).astype(np.int16)
    wanted = column((4, 6, 8), range=WIDE)
    (tmp_path / "plain").write_bytes(dicom(volume))
    np.testing.assert_allclose(image(tmp_path, "plain", wanted)[0], volume, atol=0.01)
    assert problem(tmp_path, "plain") == "is 3-D, the study wants 2-D"
    frames = []
    for place in (30, 10, 20, 0):
        frame = group("PlanePositionSequence", ImagePositionPatient=["0", "0", str(place)])
        value = group("PixelValueTransformationSequence", RescaleSlope="1", RescaleIntercept=str(place))
        frame.PixelValueTransformationSequence = value.PixelValueTransformationSequence
        frames.append(frame)
    shared = [group("PlaneOrientationSequence", ImageOrientationPatient=AXIAL)]
    enhanced = dicom(volume, PerFrameFunctionalGroupsSequence=frames, SharedFunctionalGroupsSequence=shared)
    (tmp_path / "enhanced").write_bytes(enhanced)
    expected = volume[[3, 1, 2, 0]] + np.array([0, 10, 20, 30])[:, None, None]
    np.testing.assert_allclose(image(tmp_path, "enhanced", wanted)[0], expected, atol=0.01)
    (tmp_path / "huge").write_bytes(dicom(volume, NumberOfFrames=2_000_000_000))
    assert problem(tmp_path, "huge", wanted) == problems.TOO_MANY_NUMBERS


# --- NIfTI


def test_nifti_is_scaled_by_its_header(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 500, (8, 6, 5)).astype(np.int16)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # axes lead left, posterior and superior
    (tmp_path / "a.nii").write_bytes(nifti(values, affine, slope=0.5, inter=-20))
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    wanted = column((5, 6, 8), range=WIDE)
    np.testing.assert_allclose(image(tmp_path, "a.nii", wanted)[0], values.T * 0.5 - 20, atol=0.01)
    np.testing.assert_array_equal(image(tmp_path, "a.nii", wanted), image(tmp_path, "a.nii.gz", wanted))
    version2 = nibabel.Nifti2Image(values, affine).to_bytes()
    (tmp_path / "b").write_bytes(version2)
    np.testing.assert_allclose(image(tmp_path, "b", wanted)[0], values.T, atol=0.01)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SAR", "PIR", "IPL", "ASL"])
def test_every_orientation_and_dicom_end_alike(tmp_path: Path, axes: str) -> None:
    """One patient, stored in any way, is one volume: from feet to head, front to back, right to left."""
    body = RANDOM.integers(0, 500, (8, 6, 5)).astype(np.int16)  # RAS
    native = nibabel.Nifti1Image(body, np.eye(4))
    start, end = (nibabel.orientations.axcodes2ornt(tuple(each)) for each in ("RAS", axes))
    stored = native.as_reoriented(nibabel.orientations.ornt_transform(start, end))
    assert "".join(nibabel.aff2axcodes(stored.affine)) == axes
    (tmp_path / "a").write_bytes(stored.to_bytes())
    wanted = column((5, 6, 8), range=WIDE)
    expected = body[::-1, ::-1].T
    np.testing.assert_allclose(image(tmp_path, "a", wanted)[0], expected, atol=0.01)
    axial = _written(tmp_path, _slices(np.ascontiguousarray(expected)))
    np.testing.assert_allclose(image(axial, "series", wanted)[0], expected - 100.0, atol=0.01)
    sagittal = {  # rows go down to the feet, columns to the back; slices from right to left
        f"side/{i}": dicom(
            np.ascontiguousarray(expected[::-1, :, i]),
            ImagePositionPatient=[str(i), "0", "0"],
            ImageOrientationPatient=["0", "1", "0", "0", "0", "-1"],
        )
        for i in range(8)
    }
    np.testing.assert_allclose(image(_written(tmp_path, sagittal), "side", wanted)[0], expected, atol=0.01)


def test_strange_nifti(tmp_path: Path) -> None:
    values = RANDOM.integers(0, 500, (8, 6, 5)).astype(np.int16)
    wanted = column((5, 6, 8), range=WIDE)

    def told(content: bytes, of: ImageColumn = wanted) -> str:
        (tmp_path / "a").write_bytes(content)
        return problem(tmp_path, "a", of)

    assert told(nifti(np.stack([values] * 2, axis=3))) == "is 4-D, the study wants 3-D"
    assert told(nifti(values), column()) == "is 3-D, the study wants 2-D"
    assert told(nifti(values)[:-10]) == problems.UNREADABLE
    assert told(gzip.compress(nifti(values))[:-10]) == problems.UNREADABLE
    assert told(gzip.compress(b"something else")) == problems.UNREADABLE
    large = bytearray(nifti(values))
    large[42:48] = struct.pack("<hhh", 30_000, 30_000, 30_000)
    assert told(bytes(large)) == problems.TOO_MANY_NUMBERS
    floats = values.astype(np.float32)
    floats[0, 0, 0] = np.nan
    assert told(nifti(floats)) == problems.NOT_FINITE
    (tmp_path / "thin").write_bytes(nifti(values[:, :, :1], np.diag([-1.0, -1.0, 1.0, 1.0])))
    np.testing.assert_allclose(image(tmp_path, "thin", column(range=WIDE))[0], values[:, :, 0].T, atol=0.01)


# --- garbage


def _jpeg() -> bytes:
    return png(grey((16, 16)), "JPEG")


SEEDS: dict[str, tuple[Callable[[], bytes], ImageColumn]] = {
    "png": (lambda: png(grey()), column()),
    "jpeg": (_jpeg, column()),
    "tiff": (lambda: png(grey(), "TIFF"), column()),
    "jpeg2000": (lambda: png(grey((16, 16)), "JPEG2000"), column()),
    "webp": (lambda: png(grey((6, 8, 3)), "WEBP"), column()),
    "dicom": (lambda: dicom(grey(), ImagePositionPatient=["0", "0", "1"], RescaleSlope="1"), column()),
    "rle": (lambda: dicom(grey((16, 16)), RLELossless, encode=True), column()),
    "frames": (lambda: dicom(grey((3, 6, 8))), column((3, 6, 8))),
    "nifti": (lambda: nifti(grey((8, 6, 3)).astype(np.int16)), column((3, 6, 8))),
    "nifti.gz": (lambda: gzip.compress(nifti(grey((8, 6, 3)).astype(np.int16))), column((3, 6, 8))),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_garbage_is_a_problem_of_its_record(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Cut or changed bytes give numbers or a problem from the list, silently; never a crash."""
    caplog.set_level(logging.DEBUG)
    random = np.random.default_rng(len(kind))
    make, wanted = SEEDS[kind]
    sound = make()
    for i in range(60):
        content = bytearray(sound)
        if i % 3 == 0:
            del content[int(random.integers(len(content))) :]
        for _ in range(int(random.integers(0, 8)) if i % 3 else 0):
            reach = min(len(content), 700) if i % 2 else len(content)
            content[int(random.integers(reach))] = int(random.integers(256))
        (tmp_path / f"{i}").write_bytes(content)
    (tmp_path / "sound").write_bytes(sound)
    cells: list[str | None] = ["sound", *(str(i) for i in range(60)), "sound"]
    found = read(tmp_path, cells, wanted)
    known = {value for value in vars(problems).values() if isinstance(value, str)}
    assert all(text in known or text.startswith("is ") for text in found.problems)
    bad = np.concatenate([np.empty(0, dtype=np.int64), *found.problems.values()])
    assert len(np.unique(bad)) == len(bad) > 0
    lacking = np.isnan(found.values).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(lacking), np.sort(bad))
    assert np.isfinite(found.values[~lacking]).all()
    assert np.abs(found.values[~lacking]).max() <= 1.0
    again = read(tmp_path, cells, wanted)  # same numbers every time, and beside whomever
    np.testing.assert_array_equal(again.values, found.values)
    np.testing.assert_array_equal(found.values[0], read(tmp_path, ["sound"], wanted).values[0])
    np.testing.assert_array_equal(found.values[0], found.values[-1])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]
    assert not any(ZEBRA in r.getMessage() for r in caplog.records)


def test_odd_headers_are_not_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Elements that pydicom would warn about, with the patient's name in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = dicom(grey(), ImageComments=ZEBRA)
    spoilt = content.replace(b"19700101", b"ZEBRA-70").replace(b"\x10\x00\x20\x00LO", b"\x10\x00\x20\x00UI")
    (tmp_path / "a").write_bytes(spoilt)
    caplog.set_level(logging.DEBUG)
    image(tmp_path, "a")
    out, err = capfd.readouterr()
    assert ZEBRA not in out + err + caplog.text


# --- a site


def _site(root: Path, cells: list[str], **options: Any) -> SiteFolder:
    root.mkdir()
    pd.DataFrame(
        {
            "patient_id": [f"{ZEBRA}-{i}" for i in range(len(cells))],
            "scan": cells,
            "y": [0, 1] * (len(cells) // 2),
        }
    ).to_csv(root / "patients.csv", index=False)
    site = {
        "site": {"name": "north", "public_size": 10},
        "data": {"file": "patients.csv", "files": {"scan": {"at": "scans", **options}}},
    }
    (root / "site.toml").write_text(tomli_w.dumps(site))
    (root / "scans").mkdir()
    folder = SiteFolder(root)
    make_site_keys(folder)
    return folder


def _study(missing: str = "refuse") -> Any:
    return small.study(
        data={"columns": [{"kind": "image", "name": "scan", "size": [6, 8], "missing": missing}]},
    )


def test_check_lists_bad_files_by_line(tmp_path: Path) -> None:
    cells = [f"{ZEBRA}-{i}.png" for i in range(20)]
    folder = _site(tmp_path / "site", cells)
    for i, cell in enumerate(cells):
        content = dicom(grey(), BurnedInAnnotation="YES") if i in (2, 3) else png(grey())
        if i != 7:
            (folder.root / "scans" / cell).write_bytes(content[:40] if i == 11 else content)
    file = small.toml(_study(), tmp_path / "study.toml")
    done = CliRunner().invoke(app, ["check", str(folder.root), str(file), "--json"])
    assert done.exit_code == 4
    message = json.loads(done.output)["message"]
    assert "column scan: may show identifiers burned into the pixels" in message
    assert "2 times (lines 4, 5)" in message
    assert "column scan: the file that it names is absent, once (line 9)" in message
    assert f"column scan: {problems.UNREADABLE}, once (line 13)" in message
    assert ZEBRA not in done.output
    file = small.toml(_study("exclude"), tmp_path / "study.toml")
    done = CliRunner().invoke(app, ["check", str(folder.root), str(file), "--json"])
    assert done.exit_code == 0, done.output
    key = b"a key of thirty-two random bytes"
    cohort = load_cohort(folder, _study("exclude"), key)
    assert len(cohort.train) + len(cohort.test) == 16


def test_a_site_says_where_images_are(tmp_path: Path) -> None:
    folder = _site(tmp_path / "site", ["a", "b"])
    text = (folder.root / "site.toml").read_text()
    (folder.root / "site.toml").write_text(text[: text.index("[data.files")])
    with pytest.raises(SiteError, match="says nowhere where the files of column scan are"):
        load_cohort(SiteFolder(folder.root), _study(), b"a key of thirty-two random bytes")


# --- real data


def test_real_chest_x_rays_are_read_from_their_tar(mirror: Path) -> None:
    """Against the array of 64 x 64 pixels that was made of the same files by Pillow's box filter."""
    folder = mirror / "chest_xray_kermany"
    if not (folder / "chest_xray_224.tar").is_file():
        pytest.skip("no chest X-rays")
    manifest = pd.read_csv(folder / "manifest.csv")
    chosen = np.arange(0, len(manifest), 40)
    wanted = column((64, 64))
    found = read(folder / "chest_xray_224.tar", list(manifest["file"].iloc[chosen]), wanted)
    assert not found.problems
    rows = read(folder / "chest_xray_64.npz", [str(i) for i in chosen], wanted)
    apart = np.abs(found.values - rows.values).mean(axis=1)
    assert apart.max() < 0.03  # colours were rounded, and cells of 3.5 pixels weighted otherwise
    cross = np.abs(found.values - np.roll(rows.values, 1, axis=0)).mean(axis=1)
    assert cross.mean() > 5 * apart.mean()
