"""Cohorts: grouped by patient, split by a secret, indifferent to how the file was written."""

from __future__ import annotations

import hashlib
import hmac
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import HEADER, SITE, STUDY, csv_text

from client.cohort import Cohort, Patients, load_cohort
from client.settings import SiteFolder
from common.errors import DataError, SiteError
from common.features import feature_names
from common.study import parse_study

KEY = b"a key of thirty-two random bytes"
COLUMN_SPLIT = STUDY.replace('by = "keyed-hash"', 'by = "column"\ncolumn = "part"')


def load(
    rows: list[list[str]], study: str = STUDY, key: bytes = KEY, header: list[str] = HEADER, kind: str = "csv"
) -> Cohort:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "site.toml").write_text(SITE.replace("patients.csv", f"patients.{kind}"))
        if kind == "csv":
            (root / "patients.csv").write_text(csv_text(rows, header))
        else:
            columns = {h: [row[i] for row in rows] for i, h in enumerate(header)}
            typed = {h: pa.array(v) for h, v in columns.items()}
            typed["age"] = pa.array([float(v) for v in columns["age"]])
            typed["sex"] = pa.array([int(v) for v in columns["sex"]], pa.int8())
            typed["pulse"] = pa.array([float(v) if v else None for v in columns["pulse"]])
            pq.write_table(pa.table(typed), root / "patients.parquet")
        return load_cohort(SiteFolder(root), parse_study(study.encode(), "study"), key)


def same(first: Cohort, second: Cohort) -> bool:
    pairs = [(first.train, second.train), (first.test, second.test)]
    return all(
        torch.equal(a.features, b.features)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.offsets, b.offsets)
        for a, b in pairs
    )


def ages(patients: Patients) -> list[list[int]]:
    """Ages of each patient, undoing the scaling from [20, 90]."""
    years = ((patients.features[:, 0] + 1) * 35 + 20).round().int().tolist()
    offsets = patients.offsets.tolist()
    return [years[a:b] for a, b in pairwise(offsets)]


def one_record_each(count: int) -> list[list[str]]:
    return [[f"p{i}", str(20 + i % 70), "1", "60", str(i % 2)] for i in range(count)]


RECORD = st.tuples(
    st.integers(0, 8),
    st.integers(0, 120),
    st.integers(0, 1),
    st.sampled_from(["", "60", "61.5"]),
    st.integers(0, 1),
)


@st.composite
def exports(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]]]:
    """Records of nine patients who may come several times, and the same in another order."""
    found = draw(st.lists(RECORD, min_size=1, max_size=20, unique=True))
    rows = [[f"patient-{p}", str(a), str(s), h, str(y)] for p, a, s, h, y in found]
    return rows, draw(st.permutations(rows))


@settings(deadline=None, max_examples=40)
@given(exports())
def test_order_and_format_of_the_export_leave_no_trace(both: tuple[list[list[str]], list[list[str]]]) -> None:
    rows, shuffled = both
    always = [[f"trainer-{i}", "50", "1", "60", "0"] for i in range(40)]
    first = load(rows + always)
    assert same(first, load(shuffled + always))
    assert same(first, load(always + shuffled))
    assert same(first, load(rows + always, kind="parquet"))


@settings(deadline=None, max_examples=25)
@given(exports())
def test_shapes_and_offsets_fit_together(both: tuple[list[list[str]], list[list[str]]]) -> None:
    rows = both[0] + [[f"trainer-{i}", "50", "1", "60", "0"] for i in range(40)]
    cohort = load(rows)
    width = len(feature_names(parse_study(STUDY.encode(), "study")))
    for part in (cohort.train, cohort.test):
        assert part.features.shape == (len(part.labels), width)
        assert (part.features.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert part.offsets.dtype == torch.int64
        assert part.offsets[0] == 0
        assert part.offsets[-1] == len(part.labels)
        assert (part.offsets.diff() > 0).all()
    assert len(cohort.train) + len(cohort.test) == len({row[0] for row in rows})
    assert len(cohort.train.labels) + len(cohort.test.labels) == len(rows)


def test_the_split_is_the_keyed_hash_of_the_patient() -> None:
    rows = [[f"p{i}", str(20 + i), "1", "60", "0"] for i in range(70)]
    cohort = load(rows)

    def digest(patient: str) -> bytes:
        return hmac.new(KEY, patient.encode(), hashlib.sha256).digest()

    def tests(patient: str) -> bool:
        return int.from_bytes(digest(patient)[:8], "big") / 2**64 < 0.2

    order = sorted(rows, key=lambda r: digest(r[0]))
    assert ages(cohort.test) == [[int(r[1])] for r in order if tests(r[0])]
    assert ages(cohort.train) == [[int(r[1])] for r in order if not tests(r[0])]
    assert 5 <= len(cohort.test) <= 25


def test_another_key_gives_another_split() -> None:
    rows = one_record_each(70)
    assert not same(load(rows), load(rows, key=b"another key, also long enough."))


def test_records_of_a_patient_stay_together_and_may_differ_in_label() -> None:
    rows = [[f"p{i % 5}", str(30 + i), "0", "60", str(i % 2)] for i in range(20)]
    cohort = load(rows, STUDY.replace("0.2", "0.0001"))
    assert sorted(sorted(a) for a in ages(cohort.train)) == [
        [30 + p + 5 * k for k in range(4)] for p in range(5)
    ]


def test_whole_number_identifiers_are_alike_however_they_were_exported() -> None:
    rows = one_record_each(50)
    first = [[str(100 + i), *r[1:]] for i, r in enumerate(rows)]
    second = [[f"{100 + i}.0", *r[1:]] for i, r in enumerate(rows)]
    assert same(load(first), load(second))


def test_a_column_may_split_and_empty_means_neither() -> None:
    rows = one_record_each(10)
    parts = ["train", "test", "", " train ", "nan"] * 2
    cohort = load([[*r, p] for r, p in zip(rows, parts, strict=True)], COLUMN_SPLIT, header=[*HEADER, "part"])
    assert sorted(a for each in ages(cohort.train) for a in each) == [20, 23, 25, 28]
    assert sorted(a for each in ages(cohort.test) for a in each) == [21, 26]


def test_records_outside_of_the_study_need_not_fit_it() -> None:
    rows = [["p1", "50", "1", "60", "0", "train"], ["p2", "8675309", "?", "", "", ""]]
    assert len(load(rows, COLUMN_SPLIT, header=[*HEADER, "part"]).train) == 1


def test_excluded_records_may_leave_a_patient_out() -> None:
    study = STUDY.replace('missing = "refuse"', 'missing = "exclude"').replace("0.2", "0.0001")
    rows = [["p1", "", "1", "60", "0"], ["p2", "40", "1", "60", "0"], ["p2", "", "0", "60", "0"]]
    cohort = load(rows, study)
    assert ages(cohort.train) == [[40]]
    assert len(cohort.test) == 0
    assert cohort.test.offsets.tolist() == [0]


def test_the_same_row_twice_is_no_violation_for_two_patients() -> None:
    rows = [["p1", "40", "1", "60", "0"], ["p2", "40", "1", "60", "0"], ["p2", "41", "1", "60", "0"]]
    assert len(load(rows, STUDY.replace("0.2", "0.0001")).train) == 2


def test_rows_that_differ_outside_of_the_study_are_two_encounters() -> None:
    rows = [["p1", "40", "1", "60", "0", "Monday"], ["p1", "40", "1", "60", "0", "Friday"]]
    cohort = load(rows, STUDY.replace("0.2", "0.0001"), header=[*HEADER, "day"])
    assert cohort.train.offsets.tolist() == [0, 2]
    with pytest.raises(DataError, match=r"the same row again for the same patient, once \(line 4\)"):
        load([*rows, rows[0]], header=[*HEADER, "day"])


def test_a_short_key_is_refused() -> None:
    with pytest.raises(SiteError, match="shorter than 16 bytes"):
        load(one_record_each(5), key=b"short")


def test_sizes_are_not_shown() -> None:
    cohort = load(one_record_each(37))
    assert not any(c.isdigit() for c in repr(cohort))


def test_three_hundred_patients_load_well_below_a_tenth_of_a_second() -> None:
    rows = one_record_each(300)
    load(rows)  # pandera loads its back end at the first validation
    times = []
    for _ in range(7):
        start = time.perf_counter()
        load(rows)
        times.append(time.perf_counter() - start)
    assert np.min(times) < 0.1
