"""Values beyond their range, and bands of numbers as subgroups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from common.encoding import encode
from common.errors import DataError, StudyError
from common.features import feature_names
from common.files import validated
from common.privacy.plan import histogram_sensitivity
from common.study import Study
from common.table import Table
from tests.common.test_schema import category, numeric, study_with, table


def _told(*columns: dict[str, Any], **evaluation: Any) -> Study:
    value = study_with(*columns).model_dump(mode="json")
    value["evaluation"] = evaluation
    return validated(Study, value, "study", StudyError)


def test_a_value_beyond_its_range_is_winsorised_where_the_study_says_so() -> None:
    study = study_with(numeric(beyond="winsorise"))
    encoded = encode(table(x=["-4", "0", "5", "1e30"]), study)
    assert encoded.features[:, 0].tolist() == [-1, -1, 0, 1]


def test_infinity_is_no_plausible_value_even_then() -> None:
    with pytest.raises(DataError, match="column x: infinite, once"):
        encode(table(x=["1", "inf"]), study_with(numeric(beyond="winsorise")))


def test_a_value_beyond_its_range_may_count_as_missing() -> None:
    study = study_with(numeric(beyond="missing", missing="indicator", default=2))
    encoded = encode(table(x=["5", "99"]), study)
    assert feature_names(study) == ("x", "x:missing")
    np.testing.assert_allclose(encoded.features, [[0, 0], [-0.6, 1]], rtol=1e-6)
    assert (
        len(encode(table(x=["5", "99"]), study_with(numeric(beyond="missing", missing="exclude"))).kept) == 1
    )
    with pytest.raises(DataError, match="missing though the study refuses"):
        encode(table(x=["5", "99"]), study_with(numeric(beyond="missing")))


def test_repeated_columns_are_winsorised_cell_by_cell() -> None:
    study = study_with(numeric("w", repeat=2, beyond="winsorise"))
    assert encode(table(w_0=["-1", "5"], w_1=["5", "11"]), study).features.tolist() == [[-1, 0], [0, 1]]


def test_bands_of_a_number_are_subgroups_and_the_missing_are_one_of_their_own() -> None:
    study = _told(numeric(missing="indicator"), category(), subgroups=["c"], bands={"x": [4, 6]})
    names = [column.name for column in study.subgroup_columns]
    assert names == ["c", "x"]
    assert study.subgroup_columns[1].codes == {"1": "below 4", "2": "4 to below 6", "3": "6 and above"}
    found = encode(table(x=["0", "4", "5.9", "6", "10", None], c=["a"] * 6), study)
    assert found.groups[:, 1].tolist() == [0, 1, 1, 2, 2, 3]
    assert histogram_sensitivity(study) == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize(
    ("bands", "problem"),
    [
        ({"c": [1]}, "bands of c, which is no single numeric column"),
        ({"nowhere": [1]}, "bands of nowhere, which is no single numeric column"),
        ({"x": [6, 4]}, "bands of x must rise"),
        ({"x": []}, "at least 1 item"),
    ],
)
def test_bands_that_make_no_sense_are_refused(bands: dict[str, Any], problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        _told(numeric(), category(), bands=bands)


def test_a_table_of_one_band_still_encodes() -> None:
    study = _told(numeric(), bands={"x": [5]})
    columns = {"patient_id": ["p1"], "outcome": ["0"], "x": ["7"]}
    assert encode(Table.of("t.csv", columns), study).groups.tolist() == [[1]]
