"""The reader: names, units and codes of the site's own table; lines; limits before memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from malformed import CASES, HEADER, ROWS, SITE, STUDY, csv_text, write_sound

from client.settings import SiteFolder
from client.sources import read_table
from common.errors import DataError, SiteError
from common.study import Study, parse_study
from common.table import Table


def read(folder: Path, site: str = SITE, study: str = STUDY, content: str | bytes | None = None) -> Table:
    write_sound(folder)
    (folder / "site" / "site.toml").write_text(site)
    if content is not None:
        raw = content.encode() if isinstance(content, str) else content
        (folder / "site" / "patients.csv").write_bytes(raw)
    return read_table(SiteFolder(folder / "site"), parse_study(study.encode(), "study"))


def column(table: Table, name: str) -> list[str | None]:
    return list(table.columns[name].to_pylist())


def test_a_table_keeps_its_text_and_its_lines(tmp_path: Path) -> None:
    table = read(tmp_path)
    assert table.records == 20
    assert column(table, "age")[:3] == ["31", "32", "33"]
    assert column(table, "pulse")[6] == ""
    assert table.place == "line"
    assert list(table.locate([0, 19])) == [2, 21]
    assert "31" not in repr(table).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("site", "content"),
    [
        (SITE, b"\xef\xbb\xbf" + csv_text(ROWS).encode()),
        (SITE, csv_text(ROWS).replace("\n", "\r\n")),
        (SITE, csv_text(ROWS).rstrip("\n")),
        (SITE + 'delimiter = ";"\n', csv_text(ROWS).replace(",", ";")),
        (SITE + 'delimiter = "\\t"\n', csv_text(ROWS).replace(",", "\t")),
        (SITE, csv_text([[f'"{c}"' for c in r] for r in ROWS])),
        (SITE, csv_text([[*r, "more"] for r in ROWS], [*HEADER, "unused"])),
        (SITE, csv_text([["0", *r] for r in ROWS], ["", *HEADER])),
        (SITE, csv_text([[f" {c} " for c in r] for r in ROWS], [f" {h} " for h in HEADER])),
    ],
    ids=["bom", "crlf", "no-last-newline", "semicolon", "tab", "quoted", "extra", "index", "padded"],
)
def test_usual_dialects_are_read_alike(tmp_path: Path, site: str, content: str | bytes) -> None:
    table = read(tmp_path, site, content=content)
    assert [(a or "").strip() for a in column(table, "age")] == [r[1] for r in ROWS]


def test_lines_survive_blank_lines_and_quoted_line_breaks(tmp_path: Path) -> None:
    header = "patient_id,age,sex,pulse,outcome,note\n\n"
    text = header + 'p1,40,1,60,0,"a\nb ""c"""\n\n\np2,41,1,61,0,x\np3,42,1,62,1,\n'
    table = read(tmp_path, content=text)
    assert column(table, "age") == ["40", "41", "42"]
    assert list(table.locate([0, 1, 2])) == [3, 7, 8]


def test_columns_units_and_codes_are_mapped(tmp_path: Path) -> None:
    site = SITE + (
        '[data.columns.age]\ncolumn = "months"\nunit = "mo"\nmultiply = 0.083333333333333333\n'
        '[data.columns.pulse]\nunit = "Hz"\nmultiply = 60\nadd = 0\n'
        '[data.columns.sex]\ncolumn = "gender"\n[data.columns.sex.codes]\nF = "0"\nM = "1"\n'
        '[data.columns.glucose]\ncolumn = "of another study"\nunit = "mmol/L"\nmultiply = 18.0\n'
    )
    content = "patient_id,months,gender,pulse,outcome\np1,480,F,1.5,0\np2,12,M,,1\np3,?,X,nan,1\n"
    table = read(tmp_path, site, content=content)
    assert [float(a) for a in column(table, "age")[:2] if a] == pytest.approx([40, 1])
    assert column(table, "age")[2] == "?"
    assert column(table, "sex") == ["0", "1", "X"]
    assert column(table, "pulse") == ["90", "", "nan"]


def test_missing_codes_are_not_converted(tmp_path: Path) -> None:
    study = STUDY.replace("default = 70", 'default = 70\nmissing_codes = ["-9"]')
    site = SITE + "[data.columns.pulse]\nmultiply = 2.0\nadd = 1.0\n"
    table = read(tmp_path, site, study, "patient_id,age,sex,pulse,outcome\np1,4,0,-9,0\np2,4,0,30,0\n")
    assert column(table, "pulse") == ["-9", "61"]


def test_decimal_commas_are_read_where_site_toml_says_so(tmp_path: Path) -> None:
    study = STUDY.replace("default = 70", 'default = 70\nmissing_codes = [".", "-9.5"]')
    site = SITE + (
        'delimiter = ";"\ndecimal = ","\n[data.columns.age]\nunit = "mo"\nmultiply = 0.5\n'
        '[data.columns.pulse.codes]\n"zu hoch" = "250.5"\n"3,5" = "."\n'
    )
    lines = (
        "p1;40,5;1;60,25;0",
        "p2;1.500;1;.;0",
        "p3; -1,5e1 ;0;zu hoch;1",
        "p4;;0;-9.5;1",
        "p5;1.500,5;0;3,5;1",
    )
    table = read(tmp_path, site, study, "\n".join(["patient_id;age;sex;pulse;outcome", *lines, ""]))
    assert column(table, "age") == ["20.25", "1:500", "-7.5", "", "1:500.5"]  # thousands are no numbers
    assert column(table, "pulse") == ["60.25", ".", "250.5", "-9.5", "."]
    assert column(table, "sex") == ["1", "1", "0", "0", "0"]


@pytest.mark.parametrize("site", [SITE.replace(".csv", ".parquet"), SITE.replace("file", "fhir")])
def test_only_texts_have_decimal_commas(tmp_path: Path, site: str) -> None:
    with pytest.raises(SiteError, match="decimal belongs to a CSV file"):
        read(tmp_path, site + 'decimal = ","\n')


REPEATED = STUDY.replace('name = "age"\n', 'name = "age"\nrepeat = 2\n')


def test_a_repeated_column_is_mapped_by_its_stem_or_one_by_one(tmp_path: Path) -> None:
    site = (
        SITE + '[data.columns.age]\ncolumn = "a"\nmultiply = 2.0\n[data.columns.age_1]\ncolumn = "second"\n'
    )
    table = read(tmp_path, site, REPEATED, "patient_id,a_0,second,sex,pulse,outcome\np1,4,5,0,60,0\n")
    assert (column(table, "age_0"), column(table, "age_1")) == (["8"], ["5"])


def test_a_mapped_unit_without_conversion_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="is in mo but the study wants a: give multiply or add"):
        read(tmp_path, SITE + '[data.columns.age]\nunit = "mo"\n')


def test_the_same_unit_needs_no_conversion(tmp_path: Path) -> None:
    assert read(tmp_path, SITE + '[data.columns.age]\nunit = "a"\n').records == 20


def as_parquet(folder: Path, table: pa.Table) -> Table:
    write_sound(folder)
    (folder / "site" / "site.toml").write_text(SITE.replace("patients.csv", "patients.parquet"))
    pq.write_table(table, folder / "site" / "patients.parquet", row_group_size=7)
    study: Study = parse_study(STUDY.encode(), "study")
    return read_table(SiteFolder(folder / "site"), study)


def test_parquet_types_read_as_a_csv_export_would(tmp_path: Path) -> None:
    table = as_parquet(
        tmp_path,
        pa.table(
            {
                "patient_id": pa.array(range(10)),
                "age": pa.array([float(i) for i in range(9)] + [0.1]),
                "sex": pa.array([True, False] * 5),
                "pulse": pa.array([60, None] * 5, pa.int16()),
                "outcome": pa.array(["0", "1"] * 5).dictionary_encode(),
                "image": pa.array([b"\x00\xff"] * 10),
                "series": pa.array([[1, 2]] * 10),
            }
        ),
    )
    assert column(table, "age")[-2:] == ["8", "0.1"]
    assert column(table, "sex")[:2] == ["1", "0"]
    assert column(table, "pulse")[:2] == ["60", None]
    assert column(table, "outcome")[:2] == ["0", "1"]
    assert list(table.locate([0, 9])) == [1, 10]
    assert set(table.rows.column_names) == set(HEADER)


@pytest.mark.parametrize(
    "name", ["parquet-claims-five-billion-rows", "parquet-claims-ten-gigabytes", "ten-gigabytes"]
)
def test_what_a_header_claims_is_never_allocated(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    site, study = case.build(tmp_path)
    loaded, folder = parse_study(study.read_bytes(), "study"), SiteFolder(site)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with pytest.raises(DataError, match="more than"):
        read_table(folder, loaded)
    assert pool.bytes_allocated() - before < 1 << 20
    assert pool.max_memory() < 1 << 30


def test_the_limit_on_records_counts_no_header(tmp_path: Path) -> None:
    assert read(tmp_path, SITE + "max_records = 20\n").records == 20


def test_ragged_records_are_counted_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.sources.delimited._LARGEST_BLOCK", 4096)
    rows = [[f"p{i}", "40", "1", "60", "0"] for i in range(5000)]
    rows[4000].append("8675309")
    rows[4999].pop()
    with pytest.raises(
        DataError, match=r"2 records don't have the header's 5 fields: line 4002, 5001"
    ) as caught:
        read(tmp_path, content=csv_text(rows))
    assert "8675309" not in str(caught.value)


def test_a_repeated_column_with_one_conversion_is_converted_alike(tmp_path: Path) -> None:
    site = SITE + "[data.columns.age]\nmultiply = 2.0\n"
    content = "patient_id,age_0,age_1,sex,pulse,outcome\np1,4,5,0,60,0\np2,6,?,0,60,0\n"
    table = read(tmp_path, site, REPEATED, content)
    assert (column(table, "age_0"), column(table, "age_1")) == (["8", "12"], ["10", "?"])
