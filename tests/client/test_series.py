"""Time series at a site: the grid against a slow loop, files and long tables, and every kind of garbage."""

from __future__ import annotations

import io
import math
import os
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.settings import Files, Where
from client.sources import measurements, series
from client.sources.named import NOT_PLAIN, OUTSIDE, named_files
from common.errors import DataError, SiteError
from common.modalities import SeriesColumn
from common.table import Decoded

HR = {"name": "HR", "unit": "/min", "range": (0, 300), "reference": (40, 140), "default": 80}
GLUCOSE = {"name": "Glucose", "unit": "mg/dL", "range": (1, 2000)}
PH = {"name": "pH", "unit": "1", "range": (6.5, 8), "reference": (7.2, 7.6)}

Lines = Sequence[tuple[str, str, str]]


def column(**changes: object) -> SeriesColumn:
    given = {"kind": "series", "name": "stay", "hours": 4, "step_hours": 1, "variables": [HR, GLUCOSE, PH]}
    return SeriesColumn.model_validate(given | changes)


def text(lines: Lines) -> str:
    return "Time,Parameter,Value\n" + "".join(",".join(line) + "\n" for line in lines)


def folder(path: Path, files: Mapping[str, str | bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def archive(path: Path, files: Mapping[str, str | bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(path: Path, cells: Sequence[str | None], of: SeriesColumn | None = None, **files: object) -> Decoded:
    where = Where(path, Files.model_validate({"at": path.name, **files}))
    return series.read(of or column(), cells, where)


def slowly(of: SeriesColumn, rows: Sequence[tuple[float, str, float]]) -> np.ndarray:
    """One series' grid, cell by cell. `rows`: hours, name and value, in the file's order."""
    values, masks = [], []
    for v in of.variables:
        low, high = v.interval
        last = v.default if v.default is not None else (low + high) / 2
        for s in range(of.steps):
            here = [
                (hours, i, value)
                for i, (hours, name, value) in enumerate(rows)
                if name == v.name
                and v.range[0] <= value <= v.range[1]
                and 0 <= hours < of.hours
                and math.floor(hours / of.step_hours + 1e-9) == s
            ]
            if here and of.cell == "last":
                last = max(here, key=lambda row: (row[0], row[2]))[2]
            elif here:
                last = math.fsum(value for _, _, value in here) / len(here)
            values.append(min(3.0, max(-3.0, 2 * (last - low) / (high - low) - 1)))
            masks.append(float(bool(here)))
    shape = (len(of.variables), of.steps)
    parts = [np.reshape(values, shape).T] + ([np.reshape(masks, shape).T] if of.masks else [])
    return np.concatenate(parts, axis=1).reshape(-1)


# --- the grid


def test_a_cell_by_hand(tmp_path: Path) -> None:
    lines = [
        ("00:10", "HR", "90"),
        ("00:50", "HR", "100"),
        ("01:59", "HR", "-1"),  # outside the range: not measured
        ("02:00", "HR", "400"),
        ("03:59", "HR", "290"),  # scaled to 4, kept at 3
        ("04:00", "HR", "50"),  # after the end
        ("01:00", "Albumin", "who knows"),  # no variable of the study
    ]
    path = folder(tmp_path / "sets", {"7.txt": text(lines)})
    found = read(path, ["7"]).values.reshape(4, 6)
    assert found[:, 0].tolist() == pytest.approx([0.1, 0.1, 0.1, 3.0])
    assert found[:, 3].tolist() == [1, 0, 0, 1]
    assert found[:, 1].tolist() == [0.0] * 4  # the middle of the range, as nothing was measured
    assert found[:, 4:].sum() == 0
    assert read(path, ["7"], column(variables=[HR], cell="last")).values[0, 0] == pytest.approx(0.2)
    assert read(path, ["7"], column(variables=[HR | {"default": 0}], hours=8)).values[0, 0] == pytest.approx(
        0.1
    )


def test_before_the_first_measurement_stands_the_default(tmp_path: Path) -> None:
    path = folder(tmp_path / "sets", {"7": text([("02:30", "HR", "140")])})
    assert read(path, ["7"], column(masks=False)).values.reshape(4, 3)[:, 0].tolist() == pytest.approx(
        [-0.2, -0.2, 1.0, 1.0]
    )
    low = HR | {"reference": (100, 110), "default": 0}
    assert read(path, ["7"], column(variables=[low])).values[0, 0] == -3.0


MINUTE = st.integers(0, 6 * 60)
ROW = st.tuples(MINUTE, st.sampled_from(["HR", "Glucose", "pH", "Urine"]), st.integers(-10, 3000))


@settings(max_examples=60, deadline=None)
@given(
    all_rows=st.lists(st.lists(ROW, max_size=30), min_size=1, max_size=4),
    step=st.sampled_from([1.0, 0.5, 0.1, 3.0, 5 / 60]),
    hours=st.sampled_from([4.0, 4.05, 5.0]),
    cell=st.sampled_from(["mean", "last"]),
    masks=st.booleans(),
)
def test_the_grid_is_the_slow_loops(
    tmp_path_factory: pytest.TempPathFactory,
    all_rows: list,
    step: float,
    hours: float,
    cell: str,
    masks: bool,
) -> None:
    of = column(step_hours=step, hours=hours, cell=cell, masks=masks)
    scales = {"pH": 400, "HR": 10, "Glucose": 1, "Urine": 1}
    plain = [[(m / 60, name, value / scales[name]) for m, name, value in rows] for rows in all_rows]
    lines = [
        [(f"{m // 60:02}:{m % 60:02}", name, repr(value / scales[name])) for m, name, value in rows]
        for rows in all_rows
    ]
    path = tmp_path_factory.mktemp("grid")
    tar = archive(path / "set.tar", {f"set/{i}.txt": text(each) for i, each in enumerate(lines)})
    found = read(tar, [str(i) for i in range(len(lines))], of)
    assert not found.problems
    np.testing.assert_allclose(found.values, [slowly(of, rows) for rows in plain], rtol=2e-6, atol=2e-6)
    # a long table in minutes says the same
    long = pd.DataFrame(
        [(f"k{i}", m, n, v / scales[n]) for i, rows in enumerate(all_rows) for m, n, v in rows],
        columns=["stay", "offset", "what", "number"],
    ).sample(frac=1, random_state=0)
    long = long.sort_values(["offset"], kind="stable") if cell == "mean" else long
    if cell == "mean" and len(long):
        long.to_parquet(path / "long.parquet")
        again = read(
            path / "long.parquet",
            [f"k{i}" for i in range(len(lines))],
            of,
            key="stay", time="offset", parameter="what", value="number", time_unit="minutes",
        )  # fmt: skip
        there = ~np.isnan(again.values[:, 0])
        assert there.tolist() == [bool(rows) for rows in all_rows]
        np.testing.assert_allclose(again.values[there], found.values[there], rtol=2e-6, atol=2e-6)


def test_no_records_numbers_depend_on_another_record(tmp_path: Path) -> None:
    draw = random.Random(5)
    files: dict[str, str | bytes] = {
        f"{i}.txt": text(
            [
                (
                    f"0{draw.randrange(4)}:{draw.randrange(10, 60)}",
                    draw.choice(["HR", "pH"]),
                    repr(draw.random() * 99),
                )
                for _ in range(draw.randrange(40))
            ]
        )
        for i in range(12)
    }
    files |= {"bad.txt": b"\xff\xfe\x00", "text.txt": text([("00:01", "HR", "fast")])}
    path = folder(tmp_path / "sets", files)
    cells = [*(str(i) for i in range(12)), "bad", "text", None, "3", "none"]
    together = read(path, cells)
    for i, cell in enumerate(cells):
        np.testing.assert_array_equal(read(path, [cell]).values[0], together.values[i])
    order = list(range(len(cells)))
    draw.shuffle(order)
    np.testing.assert_array_equal(read(path, [cells[i] for i in order]).values, together.values[order])


def test_batches_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{i}.txt": text([(f"0{i % 4}:00", "HR", f"{60 + i}"), ("00:01", "pH", "7")]) for i in range(9)}
    rows = [(n[:-4], *line.split(",")) for n, t in files.items() for line in t.splitlines()[1:]]
    table = tmp_path / "long.csv"
    pd.DataFrame(rows, columns=["key", "time", "parameter", "value"]).to_csv(table, index=False)
    path = folder(tmp_path / "sets", files)
    cells = [*(str(i) for i in range(9)), "0", None, "gone"]
    whole = read(path, cells), read(table, cells)
    monkeypatch.setattr(measurements, "_SERIES_A_BATCH", 2)
    for one, other in zip(whole, (read(path, cells), read(table, cells)), strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        assert {k: v.tolist() for k, v in one.problems.items()} == {
            k: v.tolist() for k, v in other.problems.items()
        }
    np.testing.assert_array_equal(whole[0].values, whole[1].values)
    assert np.isnan(whole[0].values[10:]).all()
    assert [v.tolist() for v in whole[1].problems.values()] == [[11]]


# --- files


GOOD = text([("00:10", "HR", "90")])
GARBAGE = {
    "wrong fields": (GOOD + "00:20,HR\n", measurements.NO_LINES),
    "too many fields": (GOOD + "00:20,HR,7,8\n", measurements.NO_LINES),
    "no header": ("00:10,HR,90\n", measurements.NO_HEADER),
    "empty": ("", measurements.NO_HEADER),
    "twice": ("Time,Parameter,Value,time\n", measurements.NO_HEADER),
    "no UTF-8": (GOOD.encode() + b"00:20,HR,\xff\n", measurements.NO_LINES),
    "UTF-16": (GOOD.encode("utf-16"), measurements.NO_HEADER),
    "zeros": (GOOD.encode() + bytes(64), measurements.NO_LINES),
    "open quote": (GOOD + '00:20,"HR,90\n00:30,HR,95\n', measurements.NO_LINES),
    "text": (GOOD + "00:20,HR,secret-77\n", "a value of HR is not a number"),
    "time": (GOOD + "secret-77,HR,90\n", "a time of its measurements is not HH:MM"),
    "minutes": (GOOD + "00:60,HR,90\n", "a time of its measurements is not HH:MM"),
    "no time": (GOOD + ",HR,90\n", "a time of its measurements is not HH:MM"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_bad_file_is_a_problem_of_its_record_alone(tmp_path: Path, kind: str) -> None:
    content, problem = GARBAGE[kind]
    for path in (
        folder(tmp_path / "sets", {"1.txt": GOOD, "2.txt": content}),
        archive(tmp_path / "set.tar.gz", {"set/1.txt": GOOD, "set/2.txt": content}),
    ):
        found = read(path, ["1", "2", "1", None])
        assert {k: v.tolist() for k, v in found.problems.items()} == {problem: [1]}
        assert np.isnan(found.values[:, 0]).tolist() == [False, True, False, True]
        np.testing.assert_array_equal(found.values[0], found.values[2])


def test_what_is_sound_stays_sound(tmp_path: Path) -> None:
    files = {
        "bom": b"\xef\xbb\xbf" + GOOD.encode(),
        "crlf": GOOD.replace("\n", "\r\n"),
        "open end": GOOD.rstrip("\n"),
        "quoted": GOOD.replace("HR", '"HR"'),
        "more columns": "By,Value,Parameter,Time\nme,90,HR,00:10:59\n",
        "blanks": "Time , Parameter,Value\n 00:10 , HR ,90 \n\n",
        "and others": GOOD
        + "00:20:30,Urine,1\n00:11,Nurse,Smith\n99:99,Nurse,Smith\n00:12,HR,\n00:12,HR,NaN\n",
    }
    found = read(folder(tmp_path / "sets", files), list(files))
    assert not found.problems
    assert (found.values == found.values[0]).all()
    header = folder(tmp_path / "sets", {"only.txt": "Time,Parameter,Value\n"})
    assert read(header, ["only"]).values.reshape(4, 6)[:, :3].tolist() == [pytest.approx([-0.2, 0, 0])] * 4
    assert not read(header, ["only"]).problems


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    path = folder(tmp_path / "sets", {"1.txt": GOOD, "large.txt": GOOD * 9})
    folder(tmp_path, {"secret.txt": GOOD})
    (path / "sub").mkdir()
    (path / "link.txt").symlink_to(tmp_path / "secret.txt")
    (path / "inner.txt").symlink_to(path / "1.txt")
    os.mkfifo(path / "pipe")
    cells = [
        "1",
        "1.txt",
        "gone",
        "../secret",
        "/etc/passwd",
        "sub",
        "link",
        "inner",
        "pipe",
        "large",
        "x" * 5000,
    ]
    found = read(path, [*cells, "1.txt/1", "a\0b", "..", ""], max_bytes=100)
    problems = {int(p): problem for problem, each in found.problems.items() for p in each}
    assert set(range(2, 15)) == set(problems)
    assert problems[2] == problems[11] == "the file that it names is absent"
    assert problems[3] == problems[4] == problems[6] == problems[12] == problems[13] == OUTSIDE
    assert problems[5] == problems[7] == problems[8] == problems[14] == NOT_PLAIN
    assert problems[9] == "the file that it names is larger than 100 bytes (max_bytes in site.toml)"
    assert not np.isnan(found.values[:2]).any()


def test_members_that_cannot_be_had(tmp_path: Path) -> None:
    path = archive(tmp_path / "set.tar.gz", {"a/1.txt": GOOD, "b/1.txt": GOOD, "b/2.txt": GOOD * 9})
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("folder", tarfile.DIRTYPE),
            ("dev", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    found = read(path, ["b/1", "a/1", "./b/1.txt", "2", "../a/1", "gone", "a"], max_bytes=100)
    problems = {int(p): problem for problem, each in found.problems.items() for p in each}
    assert problems[3].startswith("the file that it names is larger")
    assert problems[4] == OUTSIDE
    assert problems[5] == problems[6] == "the file that it names is absent"
    assert set(problems) == {3, 4, 5, 6}
    with pytest.raises(DataError, match="1 name in the table fits several files of it"):
        read(path, ["1", "a/1"])
    assert list(read(tmp_path / "links.tar", ["link", "folder", "dev"]).problems) == [NOT_PLAIN]


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    sound = archive(tmp_path / "set.tar.gz", {f"{i}": os.urandom(3000) for i in range(20)}).read_bytes()
    for name, content in (
        ("a.tar", b"no archive"),
        ("b.tar.gz", sound[:-9000]),
        ("c.tgz", b""),
        ("d.tar", sound[:99]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"damaged, or no tar archive\)"):
            read(tmp_path / name, ["1"])
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "none.tar", ["1"])
    with pytest.raises(DataError, match="is no folder and no archive of files"):
        read(tmp_path / "none", ["1"])
    with pytest.raises(DataError, match="its series are nowhere"):
        series.read(column(), ["1"], None)


def test_garbage_never_crashes(tmp_path: Path) -> None:
    draw = random.Random(11)
    sound = text([(f"0{i % 4}:{10 + i}", "HR", f"{80 + i}.5") for i in range(20)]).encode()
    files: dict[str, str | bytes] = {"sound.txt": sound}
    for i in range(150):
        bytes_ = bytearray(sound)
        for _ in range(draw.randrange(1, 6)):
            bytes_[draw.randrange(len(bytes_))] = draw.choice([0, 10, 13, 34, 44, 255, draw.randrange(256)])
        files[f"{i}.txt"] = bytes(bytes_[: draw.randrange(len(bytes_))] if i % 3 == 0 else bytes_)
    path = folder(tmp_path / "sets", files)
    found = read(path, ["sound", *(str(i) for i in range(150))])
    alone = read(path, ["sound"])
    np.testing.assert_array_equal(found.values[0], alone.values[0])
    told = {int(p) for each in found.problems.values() for p in each}
    assert told == set(np.flatnonzero(np.isnan(found.values).any(axis=1)).tolist())
    assert 50 < len(told) < 150


# --- long tables


def test_long_tables_under_their_own_names(tmp_path: Path) -> None:
    table = tmp_path / "labs.csv"
    table.write_text(
        "Stay;Offset;Item;Num\n1;1.5;HR;90\n2.0;-3;HR;100\n;0;HR;1\n9;late;HR;x\n", encoding="utf-8"
    )
    names = {"key": "stay", "time": "offset", "parameter": "item", "value": "num", "delimiter": ";"}
    found = read(table, ["1", "2", "3"], time_unit="hours", **names)
    assert found.values.reshape(3, 4, 6)[0, :, 3].tolist() == [0, 1, 0, 0]
    assert found.values.reshape(3, 4, 6)[1, :, 3].sum() == 0  # before the record's beginning
    assert {k: v.tolist() for k, v in found.problems.items()} == {measurements.ABSENT_KEY: [2]}
    assert set(read(table, ["9"], time_unit="minutes", **names).problems) == {
        "a time of its measurements is not in minutes",
        "a value of HR is not a number",
    }
    with pytest.raises(DataError, match=r"lacks its column of key, time, parameter, value") as caught:
        read(table, ["1"], delimiter=";")
    assert "Stay" not in str(caught.value)
    with pytest.raises(DataError, match=r"more than 20"):
        read(table, ["1"], max_bytes=20)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.csv", ["1"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 secret PAR1")
    with pytest.raises(DataError, match="damaged or no Parquet file"):
        read(tmp_path / "bad.parquet", ["1"])


def test_parameters_have_names_and_units_of_their_own(tmp_path: Path) -> None:
    path = folder(
        tmp_path / "sets",
        {
            "1": text(
                [
                    ("00:10", "220045", "90"),
                    ("01:10", "211", "100"),
                    ("00:20", "Gluc", "10"),
                    ("00:30", "HR", "9"),
                ]
            )
        },
    )
    parameters = {
        "HR": {"names": ["220045", "211"]},
        "Glucose": {"names": ["Gluc"], "unit": "mmol/L", "multiply": 18.0},
        "Other study's": {"names": ["HR"]},
    }
    found = read(path, ["1"], parameters=parameters).values.reshape(4, 6)
    assert found[:2, 0].tolist() == pytest.approx([0.0 + 2 * 50 / 100 - 1, 2 * 60 / 100 - 1])
    assert found[0, 1] == pytest.approx(2 * (180 - 1) / 1999 - 1)
    wrong = {"Glucose": {"unit": "mmol/L"}}
    with pytest.raises(SiteError, match="is in mmol/L but the study wants mg/dL"):
        read(path, ["1"], parameters=wrong)
    with pytest.raises(SiteError, match="multiply = 0"):
        read(path, ["1"], parameters={"HR": {"multiply": 0}})
    with pytest.raises(SiteError, match="has a name that stands for HR, too"):
        read(path, ["1"], parameters={"pH": {"names": ["HR"]}})


def test_nothing_wanted_nothing_read(tmp_path: Path) -> None:
    path = folder(tmp_path / "sets", {})
    assert np.isnan(read(path, [None, None]).values).all()
    assert list(named_files(path, [None], 100)) == []
    assert read(path, []).values.shape == (0, column().width)


# --- the real data


@pytest.mark.shared
def test_physionet_2012(mirror: Path) -> None:
    path = mirror / "physionet2012" / "set-a.tar.gz"
    if not path.exists():
        pytest.skip(f"no real data: {path} is absent")
    ids = [line.split(",")[0] for line in (path.parent / "Outcomes-a.txt").read_text().splitlines()[1:]]
    age = {"name": "Age", "unit": "a", "range": (15, 120), "reference": (20, 100)}
    of = column(hours=48, variables=[HR, GLUCOSE, PH, age])
    found = read(path, ids, of)
    assert found.values.shape == (4000, 48 * 8)
    assert not found.problems
    assert not np.isnan(found.values).any()
    with tarfile.open(path) as tar:
        wanted = {f"set-a/{i}.txt": n for n, i in enumerate(ids) if n % 400 == 7}
        for member in tar:
            if member.name not in wanted:
                continue
            content = tar.extractfile(member)
            lines = [line.split(",") for line in (content.read().decode().splitlines() if content else [])][
                1:
            ]
            rows = [(int(t[:2]) + int(t[3:]) / 60, name, float(value)) for t, name, value in lines]
            np.testing.assert_allclose(
                found.values[wanted[member.name]], slowly(of, rows), rtol=2e-6, atol=2e-6
            )
