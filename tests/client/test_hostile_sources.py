"""Sources under attack: one patient's data never sway another's, garbage ends in one clear error, and what is
read stays within bounds that are known before it is read."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import struct
import zipfile
from datetime import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import test_fhir as fhir
import test_images as pictures
import test_series as stays
import test_sql as lite
import test_wide as ward
from numpy.lib import format as npy
from pydantic import ValidationError

from client.cohort import load_cohort
from client.settings import SiteFolder
from client.sources import images, sql, text, wide
from client.sources.images import problems
from common.errors import DataError, FedwardError, SiteError
from common.modalities import TextColumn

# --- one patient's data and another's


@pytest.mark.parametrize("swap", [False, True])
def test_one_fullurl_of_two_patients_is_refused_whatever_the_order(tmp_path: Path, swap: bool) -> None:
    url = "urn:uuid:1"
    one = fhir.bundle((url, fhir.patient("a")), fhir.pulse(url, 60))
    two = fhir.bundle((url, fhir.patient("b")), fhir.pulse(url, 90))
    names = ["1.json", "2.json"]
    files = dict(zip(names[::-1] if swap else names, (one, two), strict=True))
    said = fhir.told(fhir.site(tmp_path, files, more='dangling = "skip"\n'))
    assert "resource Patient: the same fullUrl as another resource, once" in said


@pytest.mark.parametrize("swap", [False, True])
def test_a_second_server_is_refused_and_not_left_out(tmp_path: Path, swap: bool) -> None:
    here = [fhir.pulse("https://emr/Patient/a", 70)]
    there = [fhir.pulse("https://other/Patient/b", 90)]
    facts = there + here if swap else here + there
    content = fhir.ndjson(fhir.patient("a"), fhir.patient("b"), *facts)
    said = fhir.told(fhir.site(tmp_path, {"x.ndjson": content}, more='dangling = "skip"\n'))
    assert "resources refer to 2 servers" in said


def test_another_patients_bundle_changes_nobodys_references(tmp_path: Path) -> None:
    mine = fhir.ndjson(fhir.patient("a"), fhir.pulse("https://emr/fhir/Patient/a", 70))
    more = 'dangling = "skip"\n'
    before = fhir.read(fhir.site(tmp_path / "one", {"a.ndjson": mine}, more=more))
    other = fhir.bundle(("https://emr/fhir/Patient/b", fhir.patient("b")))
    after = fhir.read(fhir.site(tmp_path / "two", {"a.ndjson": mine, "b.json": other}, more=more))
    assert fhir.cells(before, "patient_id", "pulse") == [("a", "70.0")]
    assert fhir.cells(after, "patient_id", "pulse")[0] == ("a", "70.0")


def test_each_bundle_may_have_an_address_of_its_own_for_the_same_patient(tmp_path: Path) -> None:
    files = {
        f"{i}.json": fhir.bundle((f"urn:uuid:{i}", fhir.patient("a")), fhir.pulse(f"urn:uuid:{i}", 60 + i))
        for i in range(3)
    }
    table = fhir.read(fhir.site(tmp_path, files, value="max"))
    assert fhir.cells(table, "patient_id", "pulse") == [("a", "62.0")]


def test_a_short_name_in_an_archive_is_never_left_out_because_of_another_file(tmp_path: Path) -> None:
    path = pictures.packed(
        tmp_path / "s.tar", {f"{who}/1.png": pictures.png(pictures.grey()) for who in ("a", "b")}
    )
    with pytest.raises(DataError, match="1 name in the table fits several files") as caught:
        pictures.read(path, ["1.png", "b/1.png"])
    assert "1.png" not in str(caught.value)


@pytest.mark.parametrize("cell", ["mean", "last"])
def test_the_order_of_rows_leaves_no_trace_in_a_series(tmp_path: Path, cell: str) -> None:
    rows = [("00:10", "HR", "90.1"), ("00:10", "HR", "95.7"), ("00:20", "HR", "0.3"), ("00:20", "HR", "80")]
    draw, seen = random.Random(1), set()
    for i in range(8):
        draw.shuffle(rows)
        path = stays.folder(tmp_path / str(i), {"7": stays.text(rows)})
        seen.add(stays.read(path, ["7"], stays.column(cell=cell)).values.tobytes())
    assert len(seen) == 1


# --- garbage

STRANGE: list[Any] = [
    *(None, True, 0, -1, 10**400, 1e300, "", "\ud800", "x", [], {}, [[]], [None], {"code": []}),
    *([{"code": ["x"]}], {"reference": {}}, {"reference": "\ud800"}, [{"type": {}, "other": 1}]),
]


def _twisted(value: Any, draw: random.Random) -> Any:
    """One of the value's parts, however deep, replaced."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.2:
        return draw.choice(STRANGE)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = value.copy()
    copy[key] = _twisted(value[key], draw)
    return copy


def test_twisted_fhir_resources_never_crash(tmp_path: Path) -> None:
    link = [{"type": "replaced-by", "other": {"reference": "Patient/b"}}]
    sound = [
        *(fhir.patient("a", link=link, deceasedBoolean=False), fhir.patient("b")),
        *(fhir.encounter("e", "a", period={"start": "2025-01-01"}), fhir.pulse("b", 70, id="o")),
        fhir.condition("b", verificationStatus={"coding": [{"code": "confirmed"}]}),
        fhir.pulse("a", 60, encounter={"reference": "Encounter/e"}, component=[fhir.pulse("a", 7)]),
    ]
    draw = random.Random(4)
    columns = 'stays = { resource = "Encounter", value = "count" }\n'
    folder = fhir.site(tmp_path, {}, columns=columns)
    for _ in range(600):
        resources = list(sound)
        place = draw.randrange(len(resources))
        resources[place] = _twisted(sound[place], draw)
        if isinstance(resources[place], dict):
            resources[place]["resourceType"] = sound[place]["resourceType"]
        (tmp_path / "export" / "x.ndjson").write_text("\n".join(map(json.dumps, resources)) + "\n")
        with contextlib.suppress(FedwardError):
            fhir.read(folder)


def test_resources_at_the_edge_of_recursion(tmp_path: Path) -> None:
    ends = set()
    for depth in range(840, 1000):
        deep = '{"resourceType": "Patient", "id": "a", "x": ' + "[" * depth + "]" * depth + "}\n"
        try:
            fhir.read(fhir.site(tmp_path, {"x.ndjson": deep}))
        except DataError as error:
            ends.add(str(error).split(": ", 1)[1].split(",")[0].split("\n")[0])
    assert "nested too deeply in line 1" in ends


def test_a_header_with_negative_sizes_is_refused(tmp_path: Path) -> None:
    for shape in ((-(2**31), 2**16, 3 * 2**15), (-1, -6, 8), (-4, 6, 8)):
        header = io.BytesIO()
        npy.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": "|u1"})
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", header.getvalue() + bytes(192))
        with pytest.raises(DataError, match="damaged, or no NPZ file"):
            pictures.read(tmp_path / "a.npz", ["0"])


def test_headers_of_arrays_that_are_no_headers(tmp_path: Path) -> None:
    sound = "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 6, 8)}"
    for header in (
        sound.replace("'descr'", "('a',)"),
        sound.replace("'|u1'", "{}"),
        sound.replace("'|u1'", "[]"),
        sound.replace("'|u1'", "'<i4,<i4'"),
        sound.replace("'|u1'", "'|O'"),
        sound.replace("(4, 6, 8)", "(4.0, 6, 8)"),
        sound.replace("(4, 6, 8)", "(10**30,)"),
        sound.replace("}", ""),
        "",
        "[" * 400,
    ):
        text = (header + "\n").encode()
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(192)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", content)
        with pytest.raises(DataError, match=r"damaged, or no NPZ file|holds no numbers"):
            pictures.read(tmp_path / "a.npz", ["0"])


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("size", [(6, 8), (2, 6, 8)])
def test_damage_within_an_archive(tmp_path: Path, mode: str, size: tuple[int, ...]) -> None:
    files = {f"{i}.png": pictures.png(pictures.grey((90, 90))) for i in range(4)}
    sound = pictures.packed(tmp_path / "a.tar", files, mode).read_bytes()
    for place in range(len(sound) // 3, len(sound), len(sound) // 20):
        content = bytearray(sound)
        content[place] ^= 0xFF
        (tmp_path / "a.tar").write_bytes(content)
        with contextlib.suppress(DataError):
            pictures.read(tmp_path / "a.tar", list(files), pictures.column(size))


def test_durations_are_no_numbers(tmp_path: Path) -> None:
    """Parquet has them as whole numbers of a unit that nobody would guess."""
    table = pd.DataFrame(
        {"key": ["7"], "time": pd.to_timedelta(["00:10:00"]), "parameter": "HR", "value": 90}
    )
    table.to_parquet(tmp_path / "long.parquet")
    with pytest.raises(DataError, match="column time holds no single values"):
        stays.read(tmp_path / "long.parquet", ["7"], time_unit="minutes")
    table["time"] = [time(0, 10)]
    table.to_parquet(tmp_path / "long.parquet")
    found = stays.read(tmp_path / "long.parquet", ["7"], stays.column(variables=[stays.HR]))
    assert not found.problems
    assert found.values[0, 0] == 0


# --- bounds


def test_a_study_whose_blocks_exceed_the_sites_memory_is_refused_before_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(wide._READERS, "series", lambda *_: pytest.fail("was read"))
    folder = ward.site(tmp_path, settings=ward.SITE.replace('csv"', 'csv"\nmax_bytes = 1000'))
    with pytest.raises(DataError, match=r"would come to 1044 bytes, more than 1000") as caught:
        load_cohort(folder, ward.study(), ward.KEY)
    assert "max_bytes" in str(caught.value.remedy)


def test_a_folder_of_too_many_slices_is_given_up_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MOST_NUMBERS", 100)
    held: list[int] = []
    add = images._add

    def watched(stack: Any, *arguments: Any) -> None:
        add(stack, *arguments)
        held.append(sum(each.image.size for each in stack.slices))

    monkeypatch.setattr(images, "_add", watched)
    path = pictures._written(tmp_path, pictures._slices(np.zeros((6, 6, 8), dtype=np.int16)))
    said = pictures.problem(path, "series", pictures.column((6, 6, 8), range=(-1000, 1000)))
    assert said == problems.TOO_MANY_NUMBERS
    assert max(held) <= 100


def test_an_archive_that_mixes_the_slices_of_many_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_MOST_HELD", 10 * 48)
    stack = list(pictures._slices(np.zeros((6, 6, 8), dtype=np.int16)).values())
    folders = [f"{who}" for who in range(8)]
    wanted = pictures.column((6, 6, 8), range=(-1000, 1000))
    files = {f"{who}/{i}": content for who in folders for i, content in enumerate(stack)}
    sorted_one = pictures.packed(tmp_path / "sorted.tar", files)
    assert not pictures.read(sorted_one, folders, wanted).problems
    mixed = dict(sorted(files.items(), key=lambda item: item[0].split("/")[1]))
    with pytest.raises(DataError, match="mixes the slices of many folders"):
        pictures.read(pictures.packed(tmp_path / "mixed.tar", mixed), folders, wanted)


def test_all_of_a_query_counts_towards_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's own limit begins anew with every part of the result."""
    lite.emr(tmp_path)
    hours = itertools.count()
    monkeypatch.setattr(sql, "time", SimpleNamespace(monotonic=lambda: 3600.0 * next(hours)))
    monkeypatch.setattr(sql, "_CHUNK", 10)
    lite.read(lite.site_with(tmp_path, lite.lite(more="max_seconds = 86400\n")))
    said = lite.told(lite.site_with(tmp_path, lite.lite(more="max_seconds = 3600\n")), DataError)
    assert "the query took longer than 3600 s" in said


def test_endless_accents_cost_no_time() -> None:
    content = "a" + "\u0301\u0323" * 1_000_000 + " b"
    column = TextColumn.model_validate({"kind": "text", "name": "note"})
    assert text.token_ids(content, column) == text.token_ids("a b", column)
    assert text.normalised("\u1fb3") == text.normalised("\u03b1\u0345") == "\u03b1\u03b9"


# --- what a budget rests on


@pytest.mark.parametrize(
    "broken",
    [
        ward.SITE.split("[data.files")[0],
        ward.SITE + "delimiter = '\"'\n",
        ward.SITE + "[data.files.stay.parameters.HR]\nmultiply = 0\n",
    ],
)
def test_a_wrong_site_toml_is_told_before_a_row_is_read(tmp_path: Path, broken: str) -> None:
    """Else the budget would be given back although rows were read."""
    folder: SiteFolder = ward.site(tmp_path, settings=broken)
    (tmp_path / "stays.csv").unlink()
    with pytest.raises(SiteError):
        load_cohort(folder, ward.study(), ward.KEY)


def test_a_database_that_fails_at_a_row_is_not_mistaken_for_a_wrong_query(tmp_path: Path) -> None:
    """SQLite says `no such column` of a patient's word, too, where full text is searched for it."""
    query = "SELECT v.patient_id, age, sex, pulse, outcome FROM visit v JOIN words ON words MATCH v.outcome"
    lite.emr(
        tmp_path,
        "CREATE VIRTUAL TABLE words USING fts5(word)",
        "INSERT INTO visit VALUES ('Zebedee', 1, 0, 60, 'Zebedee:x')",
    )
    said = lite.told(lite.site_with(tmp_path, lite.lite(query)), DataError)
    assert "the query fails (no such column)" in said


def test_what_is_left_out_is_listed_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ward.site(tmp_path, ward.STAYS.replace(",2,", ",8675309x,").replace("c1ccccc1", "Zebedee"))
    with pytest.raises(DataError):
        load_cohort(folder, ward.study(), ward.KEY)
    assert not caplog.records
    load_cohort(folder, ward.study("exclude"), ward.KEY)
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "left out: column stay: the file that it names is absent, once (line 3)",
        "left out: column drug: not a SMILES that RDKit can read, once (line 4)",
    ]


# --- numbers that would be silently wrong


def test_volumes_without_an_orientation_and_complex_ones_are_refused(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    wanted = pictures.column((3, 4, 5), range=(-1000, 1000))
    placed = nibabel.Nifti1Image(values, np.eye(4))
    (tmp_path / "placed.nii").write_bytes(placed.to_bytes())
    pictures.image(tmp_path, "placed.nii", wanted)
    (tmp_path / "nowhere.nii").write_bytes(nibabel.Nifti1Image(values, None).to_bytes())
    assert pictures.problem(tmp_path, "nowhere.nii", wanted) == problems.ORIENTATION
    whole = nibabel.Nifti1Image(values.astype(np.complex64), np.eye(4))
    (tmp_path / "complex.nii").write_bytes(whole.to_bytes())
    assert pictures.problem(tmp_path, "complex.nii", wanted) == problems.UNREADABLE


def test_a_tiff_where_low_means_white_is_mirrored_or_refused(tmp_path: Path) -> None:
    def low_is_white(pixels: pictures.Array) -> bytes:
        content = bytearray(pictures.png(pixels, "TIFF"))
        start = struct.unpack("<I", content[4:8])[0]
        for entry in range(start + 2, start + 2 + 12 * content[start], 12):
            if content[entry : entry + 2] == struct.pack("<H", 262):
                content[entry + 8 : entry + 10] = bytes(2)
        return bytes(content)

    pixels = pictures.grey()
    (tmp_path / "8.tif").write_bytes(low_is_white(pixels))
    np.testing.assert_allclose(pictures.image(tmp_path, "8.tif")[0], 255 - pixels, atol=1e-4)
    (tmp_path / "16.tif").write_bytes(low_is_white(pictures.grey(top=65536)))
    assert pictures.problem(tmp_path, "16.tif", pictures.column(range=(0, 65535))) == problems.UNREADABLE


@pytest.mark.parametrize(
    ("elements", "slope", "intercept"),
    [
        ({"RescaleSlope": "2"}, 2, 0),
        ({"RescaleIntercept": "-5"}, 1, -5),
        ({"RescaleSlope": "2", "RescaleIntercept": ""}, 2, 0),
        ({"RescaleSlope": "0", "RescaleIntercept": "5"}, None, None),
    ],
)
def test_half_a_rescaling(tmp_path: Path, elements: dict[str, str], slope: Any, intercept: Any) -> None:
    pixels = (pictures.grey(top=65536) % 500).astype(np.int16)
    (tmp_path / "a").write_bytes(pictures.dicom(pixels, **elements))
    wanted = pictures.column(range=(-1000, 1000))
    if slope is None:
        assert pictures.problem(tmp_path, "a", wanted) == problems.UNREADABLE
    else:
        found = pictures.image(tmp_path, "a", wanted)[0]
        np.testing.assert_allclose(found, pixels * slope + intercept, atol=1e-3)


def test_an_interval_that_no_number_can_span_is_no_interval() -> None:
    variable = stays.HR | {"range": (-1e308, 1e308), "reference": None, "default": None}
    with pytest.raises(ValidationError, match="too wide"):
        stays.column(variables=[variable])
