"""Broken sites and studies, as data: each case says how to break a sound folder and what must be said.

`case.build(tmp)` writes `tmp/site/` (site.toml, data) and `tmp/study.toml`, breaks one thing and returns
both paths. Whatever reads them must end in one FedwardError of `case.error` that names `case.file` and
`case.says`, and never `8675309` or `Zebedee`, the values planted in the patients' records.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import DataError, FedwardError, SiteError, StudyError

SECRETS = ("8675309", "Zebedee")
LARGEST_HASHED = 64 << 20

HEADER = ["patient_id", "age", "sex", "pulse", "outcome"]
ROWS = [
    [f"p{i:02d}", str(30 + i), str(i % 2), "" if i == 7 else str(60 + i), str(i // 2 % 2)]
    for i in range(1, 21)
]
SITE = """[site]
name = "malformed"
public_size = 20

[data]
file = "patients.csv"
"""
STUDY = """format = 1
name = "broken-study"
title = "A study to break"

[data]
patient_key = "patient_id"
missing = "refuse"

[[data.columns]]
kind = "numeric"
name = "age"
unit = "a"
range = [0, 120]
reference = [20, 90]

[[data.columns]]
kind = "categorical"
name = "sex"
codes = { "0" = "female", "1" = "male" }

[[data.columns]]
kind = "numeric"
name = "pulse"
unit = "/min"
range = [20, 250]
missing = "indicator"
default = 70

[data.label]
column = "outcome"
classes = [{ name = "no", codes = ["0"] }, { name = "yes", codes = ["1"] }]

[data.split]
by = "keyed-hash"
test_fraction = 0.2

[model]
name = "logistic-regression"

[objective]
task = "binary"

[algorithm]
rounds = 2

[training]
local_steps = 1
sample_rate = 1.0
optimizer = { name = "sgd", learning_rate = 1.0 }

[privacy]
mode = "patient-dp"
epsilon = 1.0
delta = 1e-3
clipping_norm = 1.0
"""

Break = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """Attributes:
    name: for the test's id.
    error: what is raised.
    file: part of the file's name that the message must hold.
    says: another part of the message.
    spoil: breaks a folder that holds a sound `site/` and `study.toml`.
    """

    name: str
    error: type[FedwardError]
    file: str
    says: str
    spoil: Break

    def build(self, folder: Path) -> tuple[Path, Path]:
        """Write the broken folder; returns the site's folder and the study's file."""
        write_sound(folder)
        self.spoil(folder)
        return folder / "site", folder / "study.toml"


def write_sound(folder: Path) -> None:
    """A site and a study with nothing wrong."""
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "site.toml").write_text(SITE)
    (folder / "site" / "patients.csv").write_text(csv_text(ROWS))
    (folder / "study.toml").write_text(STUDY)


def csv_text(rows: list[list[str]], header: list[str] = HEADER) -> str:
    return "".join(",".join(row) + "\n" for row in [header, *rows])


def fingerprint(folder: Path) -> dict[str, str]:
    """Every entry under a folder → digest of its content (size and time where it is very large)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        value = f"{status.st_mode:o} {status.st_size} {status.st_mtime_ns}"
        if path.is_file() and status.st_size <= LARGEST_HASHED:
            value += hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = value
    return found


def _cell(column: str, value: str, row: int = 4) -> Break:
    def spoil(folder: Path) -> None:
        rows = [list(r) for r in ROWS]
        rows[row][HEADER.index(column)] = value
        (folder / "site" / "patients.csv").write_text(csv_text(rows))

    return spoil


def _csv(content: bytes | str) -> Break:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: _replace(folder / "site" / "patients.csv", raw)


def _replace(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def _site(old: str, new: str) -> Break:
    return lambda folder: _edit(folder / "site" / "site.toml", old, new)


def _study(old: str, new: str) -> Break:
    return lambda folder: _edit(folder / "study.toml", old, new)


def _both(*steps: Break) -> Break:
    def spoil(folder: Path) -> None:
        for step in steps:
            step(folder)

    return spoil


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    if text.count(old) == 0:
        raise ValueError(f"{path.name} has no {old!r} to replace")
    path.write_text(text.replace(old, new, 1))


def _mapping(text: str) -> Break:
    return _site('file = "patients.csv"\n', f'file = "patients.csv"\n\n{text}\n')


def _raw(name: str, content: bytes) -> Break:
    return lambda folder: _replace(folder / name, content)


def _folder_instead(name: str) -> Break:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def _absent(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def _as_parquet(make: Callable[[Path], None]) -> Break:
    """The same patients as Parquet, made by `make`, under the name that site.toml then gives."""

    def spoil(folder: Path) -> None:
        (folder / "site" / "patients.csv").unlink()
        _edit(folder / "site" / "site.toml", "patients.csv", "patients.parquet")
        make(folder / "site" / "patients.parquet")

    return spoil


def parquet_table(copies: int = 1) -> pa.Table:
    rows = [[f"{r[0]}-{c}", *r[1:]] for c in range(copies) for r in ROWS]
    return pa.table({name: [r[i] for r in rows] for i, name in enumerate(HEADER)})


def _parquet_bytes(change: Callable[[bytes], bytes]) -> Break:
    def make(path: Path) -> None:
        pq.write_table(parquet_table(), path)
        path.write_bytes(change(path.read_bytes()))

    return _as_parquet(make)


def _parquet_with(change: Callable[[pa.Table], pa.Table]) -> Break:
    return _as_parquet(lambda path: pq.write_table(change(parquet_table()), path))


def _forged(records: int | None = None, size: int | None = None) -> Break:
    """A small file whose footer claims more. Thrift's compact numbers carry no outer lengths, so that
    longer ones can take their place."""

    def make(path: Path) -> None:
        table = parquet_table(copies=499)  # 9,980 rows: three bytes as a number, unlike anything else there
        pq.write_table(table, path, compression="none", write_statistics=False)
        raw = path.read_bytes()
        length = int.from_bytes(raw[-8:-4], "little")
        body, footer = raw[: -8 - length], raw[-8 - length : -8]
        if records is not None:
            footer = footer.replace(_varint(table.num_rows), _varint(records))
        if size is not None:
            claimed = pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
            footer = footer.replace(_varint(claimed), _varint(size))
        path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")

    return _as_parquet(make)


def _varint(number: int) -> bytes:
    zigzag = (number << 1) ^ (number >> 63)
    zigzag &= (1 << 64) - 1
    out = bytearray()
    while True:
        out.append(zigzag & 0x7F | (0x80 if zigzag > 0x7F else 0))
        zigzag >>= 7
        if not zigzag:
            return bytes(out)


def _sparse(size: int) -> Break:
    return lambda folder: os.truncate(folder / "site" / "patients.csv", size)


def _link(target: str) -> Break:
    def spoil(folder: Path) -> None:
        (folder / "site" / "patients.csv").unlink()
        (folder / "site" / "patients.csv").symlink_to(target)

    return spoil


def _pipe(folder: Path) -> None:
    (folder / "site" / "patients.csv").unlink()
    os.mkfifo(folder / "site" / "patients.csv")


def _with_split(values: list[str]) -> Break:
    rows = [[*r, values[i % len(values)]] for i, r in enumerate(ROWS)]
    return _both(_SPLIT_BY_COLUMN, _csv(csv_text(rows, [*HEADER, "part"])))


_SPLIT_BY_COLUMN = _study('by = "keyed-hash"', 'by = "column"\ncolumn = "part"')
_TWICE = [*ROWS, ROWS[3]]
_TORN = [[*r, "train"] for r in ROWS] + [[*ROWS[0][:1], "45", *ROWS[0][2:], "test"]]
_WIDE = [[*r, "Zebedee"] if i == 5 else r for i, r in enumerate(ROWS)]
_NARROW = [r[:-1] if i == 5 else r for i, r in enumerate(ROWS)]
_SOUND = csv_text(ROWS)
_LAST_LINE_HAS_QUOTE = _SOUND.replace("p20", '"p20')


def _data(name: str, says: str, spoil: Break, file: str = "patients.") -> Case:
    return Case(name, DataError, file, says, spoil)


CELLS = (
    _data("age-far-above-range", "age: outside the plausible range 0 to 120 a", _cell("age", "8675309")),
    _data("age-far-below-range", "age: outside the plausible range", _cell("age", "-8675309")),
    _data("age-just-above-range", "age: outside the plausible range", _cell("age", "120.0001")),
    _data("age-is-a-name", "age: not a number", _cell("age", "Zebedee")),
    _data("age-with-unit", "age: not a number", _cell("age", "8675309 years")),
    _data("age-decimal-comma", "age: not a number", _cell("age", '"8675309,5"')),
    _data("age-hexadecimal", "age: not a number", _cell("age", "0x8675309")),
    _data("age-underscores", "age: not a number", _cell("age", "8675309_0")),
    _data("age-two-signs", "age: not a number", _cell("age", "--8675309")),
    _data("age-half-exponent", "age: not a number", _cell("age", "8675309e")),
    _data("age-other-digits", "age: not a number", _cell("age", "١٢")),
    _data("age-signed-nan", "age: not a number", _cell("age", "-nan")),
    _data("age-infinite", "age: infinite", _cell("age", "inf")),
    _data("age-minus-infinity", "age: infinite", _cell("age", "-Infinity")),
    _data("age-overflows", "age: infinite", _cell("age", "1e999")),
    _data("age-missing", "age: missing though the study refuses", _cell("age", "")),
    _data("age-blank", "age: missing though the study refuses", _cell("age", "   ")),
    _data("age-nan", "age: missing though the study refuses", _cell("age", "NaN")),
    _data("age-formula", "age: not a number", _cell("age", "=8675309+1")),
    _data("age-date", "age: not a number", _cell("age", "1986-09-30")),
    _data("age-missing-in-last-record", "(line 21)", _cell("age", "", row=19)),
    _data("sex-unknown-number", "sex: unknown code", _cell("sex", "8675309")),
    _data("sex-unknown-name", "sex: unknown code", _cell("sex", "Zebedee")),
    _data("sex-leading-zero", "sex: unknown code", _cell("sex", "01")),
    _data("sex-negative", "sex: unknown code", _cell("sex", "-1")),
    _data("sex-missing", "sex: missing though the study refuses", _cell("sex", "")),
    _data("pulse-not-a-number", "pulse: not a number", _cell("pulse", "Zebedee")),
    _data("pulse-out-of-range", "20 to 250 /min", _cell("pulse", "8675309")),
    _data("label-empty", "outcome: missing; every record needs a label", _cell("outcome", "")),
    _data("label-nan", "outcome: missing; every record needs a label", _cell("outcome", "nan")),
    _data("label-unknown", "outcome: unknown label code", _cell("outcome", "8675309")),
    _data("label-a-name", "outcome: unknown label code", _cell("outcome", "Zebedee")),
    _data("patient-without-id", "patient_id: missing patient identifier", _cell("patient_id", "")),
    _data("patient-id-blank", "(line 6)", _cell("patient_id", "  ")),
    _data("patient-id-nan", "missing patient identifier", _cell("patient_id", "NaN")),
    _data(
        "same-row-twice", "the same row again for the same patient, once (line 22)", _csv(csv_text(_TWICE))
    ),
    _data(
        "every-kind-at-once",
        "sex: unknown code",
        _both(
            _cell("age", "8675309"),
            lambda folder: _edit(folder / "site" / "patients.csv", "p03,33,1", "Zebedee,33,8675309"),
        ),
    ),
    _data(
        "patient-on-both-sides",
        "part: a patient has both train and test records, 2 times (lines 2, 22)",
        _both(_SPLIT_BY_COLUMN, _csv(csv_text(_TORN, [*HEADER, "part"]))),
    ),
    _data("split-unknown", "part: neither train nor test nor empty", _with_split(["train", "Zebedee"])),
    _data("nobody-trains", "no patient is left to train on", _with_split(["test"])),
    _data("nobody-takes-part", "no patient is left to train on", _with_split([""])),
    _data("split-column-absent", "lacks column part", _SPLIT_BY_COLUMN),
)

FILES = (
    _data("file-absent", "cannot be read", _absent("site/patients.csv")),
    _data("file-is-a-folder", "is a folder", _folder_instead("site/patients.csv")),
    _data("file-is-a-pipe", "a device or pipe", _pipe),
    _data("file-links-to-itself", "cannot be read", _link("patients.csv")),
    _data("file-links-nowhere", "cannot be read", _link("Zebedee.csv")),
    _data("file-is-a-device", "a device or pipe", _link("/dev/zero")),
    _data("file-empty", "is empty", _csv("")),
    _data("file-of-blank-lines", "has no header", _csv("\n\n\n")),
    _data("file-is-a-bom", "has no header", _csv(b"\xef\xbb\xbf")),
    _data("header-only", "no records", _csv(csv_text([]))),
    _data("no-header", "lacks column patient_id", _csv(_SOUND.split("\n", 1)[1])),
    _data("header-is-a-patient", "lacks column", _csv("Zebedee,8675309,1,2,3\n" * 3)),
    _data("header-twice", "columns 2 and 4 of the header", _csv(_SOUND.replace("pulse", "age", 1))),
    _data("header-is-a-repeated-value", "columns 1 and 2", _csv("8675309,8675309,1\n1,2,3\n")),
    _data("column-absent", "lacks column pulse", _csv(_SOUND.replace("pulse", "puls", 1))),
    _data("key-absent", "lacks column patient_id", _csv(_SOUND.replace("patient_id", "id", 1))),
    _data("label-absent", "lacks column outcome", _csv(_SOUND.replace("outcome", "result", 1))),
    _data("record-too-long", "line 7", _csv(csv_text(_WIDE))),
    _data("record-too-short", "line 7", _csv(csv_text(_NARROW))),
    _data("cut-in-a-record", "line 21", _csv(_SOUND[:-6])),
    _data("quote-never-closed", "never closed", _csv(_LAST_LINE_HAS_QUOTE)),
    _data("semicolons", "lacks column", _csv(_SOUND.replace(",", ";"))),
    _data("utf-16", "UTF-16", _csv(_SOUND.encode("utf-16"))),
    _data("utf-16-without-mark", "NUL byte in line 1", _csv(_SOUND.encode("utf-16-le"))),
    _data("latin-1", "not UTF-8 in line 6", _csv(_SOUND.replace("p05", "Zebedeé").encode("latin-1"))),
    _data("utf-8-cut", "not UTF-8", _csv(_SOUND.encode() + b"\xe2\x82")),
    _data("nul-byte", "NUL byte in line 6", _csv(_SOUND.replace("p05", "p\x005"))),
    _data("gzip-as-csv", "gzip", _csv(gzip.compress(_SOUND.encode()))),
    _data("workbook-as-csv", "Excel workbook", _csv(b"PK\x03\x04" + bytes(200))),
    _data("old-workbook-as-csv", "Excel workbook", _csv(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(200))),
    _data("database-as-csv", "SQLite", _csv(b"SQLite format 3\x00" + bytes(200))),
    _data("parquet-as-csv", "Parquet", _csv(b"PAR1" + bytes(200))),
    _data("noise-as-csv", "patients.csv", _csv(bytes(range(128, 256)) * 20)),
    _data("ten-gigabytes", "holds 10737418240 bytes", _sparse(10 << 30)),
    _data("larger-than-allowed", "more than 100", _mapping("max_bytes = 100")),
    _data("more-records-than-allowed", "more than 19 records", _mapping("max_records = 19")),
)

PARQUET = (
    _data("parquet-empty", "is empty", _parquet_bytes(lambda raw: b"")),
    _data("parquet-is-csv", "damaged", _parquet_bytes(lambda raw: _SOUND.encode())),
    _data("parquet-magic-alone", "damaged", _parquet_bytes(lambda raw: b"PAR1PAR1")),
    _data("parquet-cut-in-half", "damaged", _parquet_bytes(lambda raw: raw[: len(raw) // 2])),
    _data("parquet-cut-by-a-byte", "damaged", _parquet_bytes(lambda raw: raw[:-1])),
    _data("parquet-without-start", "damaged", _parquet_bytes(lambda raw: raw[100:])),
    _data("parquet-body-cut-out", "damaged", _parquet_bytes(lambda raw: raw[:4] + raw[-900:])),
    _data(
        "parquet-footer-length-lies",
        "damaged",
        _parquet_bytes(lambda raw: raw[:-8] + (10 << 28).to_bytes(4, "little") + raw[-4:]),
    ),
    _data(
        "parquet-footer-is-noise", "damaged", _parquet_bytes(lambda raw: raw[:-200] + bytes(192) + raw[-8:])
    ),
    _data(
        "parquet-pages-are-noise", "damaged", _parquet_bytes(lambda raw: raw[:4] + b"\xa5" * 300 + raw[304:])
    ),
    _data("parquet-claims-five-billion-rows", "claims 5000000000 records", _forged(records=5_000_000_000)),
    _data("parquet-claims-negative-rows", "patients.parquet", _forged(records=-5)),
    _data("parquet-claims-a-million-rows", "damaged", _forged(records=1_000_000)),
    _data("parquet-claims-ten-gigabytes", "would unpack to about", _forged(size=10 << 30)),
    _data("parquet-claims-negative-size", "damaged", _forged(size=-1)),
    _data("parquet-without-rows", "no records", _parquet_with(lambda t: t.slice(0, 0))),
    _data("parquet-column-absent", "lacks column pulse", _parquet_with(lambda t: t.drop_columns(["pulse"]))),
    _data(
        "parquet-column-of-lists",
        "age holds no single values",
        _parquet_with(lambda t: t.set_column(1, "age", pa.array([[8675309]] * 20))),
    ),
    _data(
        "parquet-column-of-bytes",
        "age holds no single values",
        _parquet_with(lambda t: t.set_column(1, "age", pa.array([b"Zebedee"] * 20))),
    ),
    _data(
        "parquet-age-out-of-range",
        "age: outside the plausible range 0 to 120 a, 20 times (rows 1, 2, 3, 4, 5, …)",
        _parquet_with(lambda t: t.set_column(1, "age", pa.array([8675309] * 20))),
    ),
    _data(
        "parquet-age-nan",
        "age: missing",
        _parquet_with(lambda t: t.set_column(1, "age", pa.array([float("nan")] * 20))),
    ),
    _data(
        "parquet-age-infinite",
        "age: infinite",
        _parquet_with(lambda t: t.set_column(1, "age", pa.array([float("inf")] * 20))),
    ),
    _data(
        "parquet-key-null",
        "missing patient identifier, 20 times",
        _parquet_with(lambda t: t.set_column(0, "patient_id", pa.nulls(20, pa.string()))),
    ),
    _data(
        "parquet-label-fraction",
        "outcome: unknown label code",
        _parquet_with(lambda t: t.set_column(4, "outcome", pa.array([0.8675309] * 20))),
    ),
    _data(
        "parquet-names-twice",
        "have the same name",
        _parquet_with(lambda t: t.rename_columns(["patient_id", "age", "age", "pulse", "outcome"])),
    ),
)


def _bad_site(name: str, says: str, spoil: Break) -> Case:
    return Case(name, SiteError, "site.toml", says, spoil)


SITES = (
    _bad_site("site-file-absent", "cannot be read", _absent("site/site.toml")),
    _bad_site("site-file-is-a-folder", "cannot be read", _folder_instead("site/site.toml")),
    _bad_site("site-file-empty", "site", _raw("site/site.toml", b"")),
    _bad_site("site-file-not-toml", "site.toml", _raw("site/site.toml", b"[site\nname = ")),
    _bad_site("site-file-not-utf-8", "not UTF-8", _raw("site/site.toml", SITE.encode() + b"# \xff")),
    _bad_site("site-file-huge", "more than", _raw("site/site.toml", b"#" * (2 << 20))),
    _bad_site("site-file-deep", "site.toml", _raw("site/site.toml", b"a=" + b"[" * 100_000)),
    _bad_site("site-unknown-key", "site.colour", _site("public_size = 20", "public_size = 20\ncolour = 1")),
    _bad_site("site-unknown-table", "model", _mapping('[model]\nname = "mlp"')),
    _bad_site("site-without-name", "site.name", _site('name = "malformed"', "")),
    _bad_site("site-name-with-path", "site.name", _site("malformed", "../malformed")),
    _bad_site("site-of-nobody", "site.public_size", _site("public_size = 20", "public_size = 0")),
    _bad_site("site-size-negative", "site.public_size", _site("public_size = 20", "public_size = -20")),
    _bad_site("site-size-in-words", "site.public_size", _site("public_size = 20", 'public_size = "few"')),
    _bad_site("site-without-data", "data", _site('[data]\nfile = "patients.csv"', "")),
    _bad_site("site-data-is-a-list", "data", _site("[data]", "[[data]]")),
    _bad_site("site-key-twice", "site.toml", _site("public_size = 20", "public_size = 20\npublic_size = 30")),
    _bad_site("delimiter-of-two", "data.delimiter", _mapping('delimiter = ";;"')),
    _bad_site("delimiter-is-a-quote", "delimiter", _mapping("delimiter = '\"'")),
    _bad_site("delimiter-not-ascii", "delimiter", _mapping('delimiter = "→"')),
    _bad_site("limit-of-zero", "data.max_bytes", _mapping("max_bytes = 0")),
    _bad_site("mapping-unknown-key", "data.columns.age", _mapping('[data.columns.age]\nformula = "x"')),
    _bad_site("mapping-is-a-number", "data.columns.age", _mapping("[data.columns]\nage = 3")),
    _bad_site("mapping-multiplies-by-nan", "multiply", _mapping("[data.columns.age]\nmultiply = nan")),
    _bad_site("mapping-multiplies-by-zero", "multiply = 0", _mapping("[data.columns.age]\nmultiply = 0.0")),
    _bad_site("unit-without-conversion", "is in mo", _mapping('[data.columns.age]\nunit = "mo"')),
    _bad_site("unit-of-a-category", "data.columns.sex", _mapping('[data.columns.sex]\nunit = "a"')),
    _bad_site("factor-of-the-label", "data.columns.outcome", _mapping("[data.columns.outcome]\nadd = 1.0")),
    _bad_site("code-to-nowhere", "data.columns.sex", _mapping('[data.columns.sex.codes]\n"0" = "2"')),
    _bad_site(
        "label-code-to-nowhere", "data.columns.outcome", _mapping('[data.columns.outcome.codes]\n"0" = "no"')
    ),
    _bad_site("codes-of-the-key", "patient_id", _mapping('[data.columns.patient_id.codes]\n"p01" = "p02"')),
    _bad_site("codes-of-a-number", "data.columns.age", _mapping('[data.columns.age.codes]\n"a" = "Zebedee"')),
    _bad_site("two-read-one-column", "the same column", _mapping('[data.columns.age]\ncolumn = "pulse"')),
    _bad_site("label-is-a-feature", "the same column", _mapping('[data.columns.outcome]\ncolumn = "sex"')),
    _data("mapped-column-absent", "lacks column age", _mapping('[data.columns.age]\ncolumn = "Alter"')),
    Case("data-file-unnamed", SiteError, "site", "neither CSV", _site('"patients.csv"', '"."')),
    _data("data-file-impossible", "cannot be read", _site("patients.csv", "patients\\u0000.csv"), "patients"),
    _data("data-file-name-too-long", "cannot be read", _site("patients.csv", "patients" * 100 + ".csv")),
    Case("ending-unknown", SiteError, "patients.xlsx", "neither CSV", _site("patients.csv", "patients.xlsx")),
)


def _bad_study(name: str, says: str, spoil: Break) -> Case:
    return Case(name, StudyError, "study.toml", says, spoil)


_COLUMNS = STUDY[STUDY.index("[[data") : STUDY.index("[data.label]")]

STUDIES = (
    _bad_study("study-absent", "cannot be read", _absent("study.toml")),
    _bad_study("study-is-a-folder", "cannot be read", _folder_instead("study.toml")),
    _bad_study("study-empty", "data", _raw("study.toml", b"")),
    _bad_study("study-not-toml", "line 1", _raw("study.toml", b"= 3")),
    _bad_study("study-not-json", "study.toml", _raw("study.toml", b'{"name": ')),
    _bad_study("study-deep-json", "study.toml", _raw("study.toml", b'{"a":' + b"[" * 200_000)),
    _bad_study("study-not-utf-8", "not UTF-8", _raw("study.toml", STUDY.encode("utf-16"))),
    _bad_study("study-huge", "more than", _raw("study.toml", b"#" * (2 << 20))),
    _bad_study("study-unknown-key", "colour", _study("format = 1", "format = 1\ncolour = 1")),
    _bad_study("study-unknown-format", "format", _study("format = 1", "format = 99")),
    _bad_study("study-name-with-blank", "name", _study('"broken-study"', '"broken study"')),
    _bad_study("study-without-label", "data.label", _study('column = "outcome"', "")),
    _bad_study("study-without-columns", "data.columns", _study(_COLUMNS, "")),
    _bad_study("column-of-unknown-kind", "kind", _study('kind = "numeric"', 'kind = "colour"')),
    _bad_study("column-name-with-blank", "name", _study('name = "age"', 'name = "my age"')),
    _bad_study("column-twice", "twice", _study('name = "pulse"', 'name = "age"')),
    _bad_study("label-among-columns", "twice", _study('column = "outcome"', 'column = "age"')),
    _bad_study("key-among-columns", "twice", _study('patient_key = "patient_id"', 'patient_key = "age"')),
    _bad_study(
        "repeat-meets-column",
        "twice",
        _both(
            _study('name = "age"\n', 'name = "age"\nrepeat = 2\n'), _study('name = "sex"', 'name = "age_1"')
        ),
    ),
    _bad_study("repeat-of-zero", "repeat", _study('name = "age"\n', 'name = "age"\nrepeat = 0\n')),
    _bad_study("unit-absent", "unit", _study('unit = "a"\n', "")),
    _bad_study("range-falls", "range must rise", _study("[0, 120]", "[120, 0]")),
    _bad_study("range-is-a-point", "range must rise", _study("[0, 120]", "[5, 5]")),
    _bad_study("range-of-three", "range", _study("[0, 120]", "[0, 60, 120]")),
    _bad_study("range-infinite", "range", _study("[0, 120]", "[0, inf]")),
    _bad_study("range-nan", "range", _study("[0, 120]", "[nan, 120]")),
    _bad_study("range-in-words", "range", _study("[0, 120]", '["young", "old"]')),
    _bad_study("reference-falls", "reference must rise", _study("[20, 90]", "[90, 20]")),
    _bad_study("default-outside-range", "outside range", _study("default = 70", "default = 700")),
    _bad_study("one-code", "codes", _study(', "1" = "male"', "")),
    _bad_study("default-code-unknown", "default", _study('name = "sex"', 'name = "sex"\ndefault = "2"')),
    _bad_study("missing-rule-unknown", "missing", _study('missing = "indicator"', 'missing = "impute"')),
    _bad_study("label-of-one-class", "classes", _study(', { name = "yes", codes = ["1"] }', "")),
    _bad_study("label-classes-overlap", "two classes", _study('codes = ["1"] }]', 'codes = ["0"] }]')),
    _bad_study("label-class-without-code", "codes", _study('codes = ["1"] }]', "codes = [] }]")),
    _bad_study("binary-of-three", "binary", _study('["1"] }]', '["1"] }, { name = "so", codes = ["2"] }]')),
    _bad_study("split-without-column", "split", _study('"keyed-hash"', '"column"')),
    _bad_study("split-at-zero", "test_fraction", _study("0.2", "0.0")),
    _bad_study("split-at-one", "test_fraction", _study("0.2", "1.0")),
    _bad_study("learning-rate-zero", "learning_rate", _study("learning_rate = 1.0", "learning_rate = 0")),
    _bad_study("epsilon-zero", "epsilon", _study("epsilon = 1.0", "epsilon = 0")),
    _bad_study("privacy-half-given", "privacy", _study("clipping_norm = 1.0", "")),
    Case(
        "codes-alike",
        StudyError,
        "broken-study",
        "column sex",
        _study('"1" = "male"', '"1" = "male", "1.0" = "male too"'),
    ),
)

CASES: tuple[Case, ...] = (*CELLS, *FILES, *PARQUET, *SITES, *STUDIES)
