"""The data dictionary: what it accepts, what it says about the rest, and what it makes of it."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import numpy as np
import pandera.pandas as pandera
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import STUDY

from common.encoding import encode
from common.errors import DataError, StudyError
from common.features import feature_names, normal_code, ordered_codes
from common.schema import compile_schema, examine
from common.study import Study, parse_study
from common.table import PLACES_SHOWN, Table

BASE = tomllib.loads(STUDY)


def study_with(*columns: dict[str, Any], **data: Any) -> Study:
    content = copy.deepcopy(BASE)
    content["data"] |= {"columns": list(columns), **data}
    return Study.model_validate(content)


def numeric(name: str = "x", **more: Any) -> dict[str, Any]:
    return {"kind": "numeric", "name": name, "unit": "1", "range": [0, 10], **more}


def category(name: str = "c", **more: Any) -> dict[str, Any]:
    return {"kind": "categorical", "name": name, "codes": {"a": "A", "b": "B"}, **more}


def table(records: int | None = None, **columns: list[str | None]) -> Table:
    size = len(next(iter(columns.values()))) if records is None else records
    whole = {"patient_id": [f"p{i}" for i in range(size)], "outcome": ["0", "1"] * size}
    return Table.of("t.csv", {k: list(v)[:size] for k, v in (whole | columns).items()})


def test_numbers_are_scaled_from_the_interval_to_plus_minus_one() -> None:
    study = study_with(numeric(range=[0, 100], reference=[20, 60]))
    encoded = encode(table(x=["20", "40", "60", " 80 ", "1e1", ".5", "+40."]), study)
    np.testing.assert_allclose(encoded.features[:, 0], [-1, 0, 1, 2, -1.5, -1.975, 0], rtol=1e-6)
    assert encoded.features.dtype == np.float32
    assert encoded.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert encoded.labels.dtype == np.int64


def test_categories_are_one_hot() -> None:
    encoded = encode(table(c=["b", "a"]), study_with(category()))
    assert encoded.features.tolist() == [[0, 1], [1, 0]]


def test_equal_digests_encode_alike_whatever_the_order_of_codes_in_the_file() -> None:
    first = study_with(category(codes={"10": "x", "2": "y", "other": "z"}))
    second = study_with(category(codes={"other": "z", "10": "x", "2": "y"}))
    approved = parse_study(first.canonical, "approved")
    assert first.digest == second.digest == approved.digest
    names = ("c=2", "c=10", "c=other")
    assert feature_names(first) == feature_names(second) == feature_names(approved) == names
    rows = table(c=["10", "2", "other"])
    for study in (first, second, approved):
        assert encode(rows, study).features.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("1", "1"),
        ("1.0", "1"),
        (" 1.0 ", "1"),
        ("01", "01"),
        ("1.00", "1.00"),
        ("-9.0", "-9"),
        ("1.5", "1.5"),
    ],
)
def test_only_one_and_one_point_zero_are_alike(written: str, normal: str) -> None:
    assert normal_code(written) == normal


def test_codes_match_with_and_without_point_zero() -> None:
    study = study_with(category(codes={"0": "no", "1.0": "yes"}))
    assert encode(table(c=["1", "1.0", "0.0"]), study).features[:, 1].tolist() == [1, 1, 0]
    _, violations = examine(table(c=["1", "01"]), study)
    assert [str(v) for v in violations] == ["column c: unknown code, once (row 2)"]


def test_two_codes_that_read_alike_are_refused() -> None:
    with pytest.raises(StudyError, match="column c"):
        feature_names_and_encode(study_with(category(codes={"1": "x", "1.0": "y"})))


def feature_names_and_encode(study: Study) -> None:
    encode(table(c=["1"]), study)


def test_a_missing_value_may_become_an_indicator() -> None:
    study = study_with(
        numeric("x", reference=[0, 4]),
        numeric("y", default=10),
        category("c"),
        category("d", default="b"),
        missing="indicator",
    )
    encoded = encode(table(x=["", "4"], y=["NaN", "0"], c=["", "a"], d=[None, "a"]), study)
    assert feature_names(study) == (
        "x", "x:missing", "y", "y:missing", "c=a", "c=b", "c:missing", "d=a", "d=b", "d:missing",
    )  # fmt: skip
    assert encoded.features.tolist() == [
        [0, 1, 1, 1, 0, 0, 1, 0, 1, 1],
        [1, 0, -1, 0, 1, 0, 0, 1, 0, 0],
    ]


def test_a_missing_value_may_exclude_the_record() -> None:
    study = study_with(numeric("x"), numeric("y", missing="indicator"), missing="exclude")
    encoded = encode(table(x=["1", "", "3"], y=["", "2", "3"]), study)
    assert encoded.kept.tolist() == [0, 2]
    assert encoded.labels.tolist() == [0, 0]
    assert encoded.features.shape == (2, 3)


def test_missing_codes_are_per_column() -> None:
    study = study_with(numeric("x", missing_codes=["-9", "99"]), numeric("y"), missing="indicator")
    encoded = encode(table(x=["-9", "-9.0", "99", "9"], y=["1", "1", "1", "1"]), study)
    assert encoded.features[:, 1].tolist() == [1, 1, 1, 0]
    with pytest.raises(DataError, match=r"column y: outside the plausible range 0 to 10, once \(row 1\)"):
        encode(table(x=["1"], y=["-9"]), study)


def test_a_repeated_column_is_a_block() -> None:
    study = study_with(numeric("w", repeat=3, missing="indicator"), numeric("x"))
    assert feature_names(study) == ("w_0", "w_1", "w_2", "w_0:missing", "w_1:missing", "w_2:missing", "x")
    encoded = encode(table(w_0=["0", "10"], w_1=["5", ""], w_2=["10", "0"], x=["0", "0"]), study)
    assert encoded.features.tolist() == [[-1, 0, 1, 0, 0, 0, -1], [1, 0, -1, 0, 1, 0, -1]]


def test_violations_in_a_block_name_their_own_column() -> None:
    study = study_with(numeric("w", repeat=3))
    _, violations = examine(table(w_0=["0", "x"], w_1=["11", "12"], w_2=["", "inf"]), study)
    assert [str(v) for v in violations] == [
        "column w_0: not a number, once (row 2)",
        "column w_1: outside the plausible range 0 to 10, 2 times (rows 1, 2)",
        "column w_2: missing though the study refuses missing values, once (row 1)",
        "column w_2: infinite, once (row 2)",
    ]


def test_every_violation_is_told_at_once_and_no_value() -> None:
    study = study_with(numeric("x"), category("c"))
    rows = table(x=["8675309"] * 9 + ["Zebedee"], c=["a"] * 9 + ["Zebedee"], outcome=["0"] * 9 + ["8675309"])
    with pytest.raises(DataError) as caught:
        encode(rows, study)
    assert str(caught.value).splitlines()[:-1] == [
        "t.csv: the data don't fit the study",
        "  column x: not a number, once (row 10)",
        "  column x: outside the plausible range 0 to 10, 9 times (rows 1, 2, 3, 4, 5, …)",
        "  column c: unknown code, once (row 10)",
        "  column outcome: unknown label code, once (row 10)",
    ]
    assert PLACES_SHOWN == 5


def test_the_dictionary_is_compiled_once_to_pandera() -> None:
    study = study_with(numeric("x"), category("c"))
    schema = compile_schema(study)
    assert isinstance(schema, pandera.DataFrameSchema)
    assert set(schema.columns) == {"x", "c", "outcome"}
    assert compile_schema(parse_study(study.canonical, "again")) is schema


def test_a_decimal_comma_is_told_as_one() -> None:
    told = r"column x: not a number, for a comma .*\[data\] decimal.*, once \(row 3\)"
    with pytest.raises(DataError, match=told):
        encode(table(x=["1", "2.5", "3,5"], outcome=["0", "1", "0"]), study_with(numeric("x")))


def test_a_table_that_lacks_columns_is_refused() -> None:
    with pytest.raises(DataError, match=r"t\.csv: the table lacks column c"):
        encode(table(x=["1"]), study_with(numeric("x"), category("c")))


CELL = st.one_of(st.sampled_from(["", "nan", "0", "10", "-9", "5.25"]), st.floats(0, 10).map(repr))


@settings(deadline=None, max_examples=60)
@given(
    cells=st.lists(st.tuples(CELL, st.sampled_from(["a", "b", ""])), min_size=1, max_size=12),
    rule=st.sampled_from(["indicator", "exclude"]),
)
def test_width_depends_on_the_study_alone(cells: list[tuple[str, str]], rule: str) -> None:
    study = study_with(numeric("x", missing_codes=["-9"]), category("c"), missing=rule)
    encoded = encode(table(x=[x for x, _ in cells], c=[c for _, c in cells]), study)
    assert encoded.features.shape == (len(encoded.kept), len(feature_names(study)))
    assert np.isfinite(encoded.features).all()


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.one_of(st.none(), st.floats(0, 10)), min_size=1, max_size=12))
def test_encoding_agrees_with_plain_arithmetic(values: list[float | None]) -> None:
    study = study_with(numeric("x", reference=[2, 6]), missing="indicator")
    encoded = encode(table(x=[None if v is None else repr(v) for v in values]), study)
    expected = [[0.0, 1.0] if v is None else [(v - 4) / 2, 0.0] for v in values]
    np.testing.assert_allclose(encoded.features, expected, rtol=1e-5, atol=1e-6)


def test_codes_are_ordered_by_number_then_text() -> None:
    column = study_with(category(codes={"b": "", "10": "", "a": "", "9": "", "-1": ""})).data.columns[0]
    assert column.kind == "categorical"
    assert ordered_codes(column) == ("-1", "9", "10", "a", "b")
