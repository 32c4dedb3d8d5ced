"""Whatever is broken ends in one error that names the file and quotes no patient."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from malformed import CASES, SECRETS, Case, fingerprint, write_sound

from client.cohort import load_cohort
from client.settings import SiteFolder
from common.errors import FedwardError
from common.study import load_study

KEY = b"a key of thirty-two random bytes"


def test_the_folder_is_sound_before_it_is_broken(tmp_path: Path) -> None:
    write_sound(tmp_path)
    cohort = load_cohort(SiteFolder(tmp_path / "site"), load_study(tmp_path / "study.toml"), KEY)
    assert len(cohort.train) + len(cohort.test) == 20


def test_the_suite_is_large_and_its_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 75


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_input_is_one_clear_error(case: Case, tmp_path: Path) -> None:
    site, study = case.build(tmp_path)
    before = fingerprint(tmp_path)
    with pytest.raises(FedwardError) as caught:
        load_cohort(SiteFolder(site), load_study(study), KEY)
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert case.file in message
    assert case.says in message
    assert caught.value.remedy
    # Not only the message: a chained exception would quote the value in a trace.
    whole = message + "".join(traceback.format_exception_only(caught.value)) + repr(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for secret in SECRETS:
        assert secret not in whole
    assert fingerprint(tmp_path) == before
