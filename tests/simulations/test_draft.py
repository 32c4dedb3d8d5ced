"""`fedward-sim init`: what it drafts is sound, says what it is, and runs at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from common.columns import CategoricalColumn, NumericColumn
from common.errors import DataError, DatasetError, StudyError
from simulations.cli import app, slug
from simulations.dealing import divided
from simulations.draft import draft


def sim(*arguments: str | Path | int) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--json"])


def table(folder: Path, records: int = 120, **columns: list[str]) -> Path:
    """A file of two records a patient, of whom the older ones are ill."""
    random = np.random.default_rng(1)
    age = random.normal(60, 10, records).round(1)
    frame = {
        "patient": [f"PATIENT-{i // 2}" for i in range(records)],
        "age": [str(a) for a in age],
        "outcome": ["yes" if a > 60 else "no" for a in age],
    }
    path = folder / "data.csv"
    pd.DataFrame(frame | columns).to_csv(path, index=False)
    return path


def test_a_newcomer_gets_from_a_csv_to_a_model(tmp_path: Path) -> None:
    odd = {
        "blood group (AB0)": ["A", "B", "0", "?"] * 30,
        "smokes": ["0", "1"] * 60,
        "lab": ["", "1.5", "2"] * 40,
    }
    file = table(tmp_path, **odd, born=[f"19{i % 99:02d}-01-01" for i in range(120)])
    study, sites = tmp_path / "Heart Study.toml", tmp_path / "sites"
    drafted = sim("init", "--from-csv", file, "--out", study, "--to", sites, "--sites", 2)
    assert drafted.exit_code == 0, drafted.output
    told = json.loads(drafted.stdout)
    assert told["study"] == "heart-study"
    assert set(told["left_out"]) == {"born"}
    assert told["names"] == {"blood_group_AB0": "blood group (AB0)"}
    assert json.loads(sim("check", study).stdout)["study"] == "heart-study"
    ran = sim("run", study, "--sites", sites, "--exact-metrics", "--seed", 1, "--out", tmp_path / "runs")
    assert ran.exit_code == 0, ran.output
    (one,) = json.loads(ran.stdout)["runs"]
    assert one["measured"]["auroc"] > 0.9
    assert one["delta"] == 1e-3


def test_a_draft_says_what_it_is(tmp_path: Path) -> None:
    one = draft(table(tmp_path), "x")
    assert "THEY TELL OF" in one.text.replace("\n# ", " ")
    assert one.text.count("TODO") >= 7
    assert "PATIENT-" not in one.text


def test_columns_are_taken_for_what_they_are(tmp_path: Path) -> None:
    odd = {
        "few": ["1", "2.0", "3"] * 40,
        "whole": [str(i % 50) for i in range(120)],
        "words": ["a", "b", "NA"] * 40,
        "same": ["7"] * 120,
        "nothing": [""] * 120,
        "text": [f"word {i}" for i in range(120)],
        "tiny": [f"{1e-9 * i}" for i in range(120)],
        "0.5-quantile": [f"-{i}.5" for i in range(120)],
    }
    one = draft(table(tmp_path, **odd), "x")
    columns = {c.name: c for c in one.study.data.columns}
    assert set(columns) == {"age", "few", "whole", "words", "tiny", "column_0_5_quantile"}
    assert set(one.left_out) == {"same", "nothing", "text"}
    few, words, tiny = columns["few"], columns["words"], columns["tiny"]
    assert isinstance(few, CategoricalColumn)
    assert list(few.codes) == ["1", "2", "3"]
    assert isinstance(words, CategoricalColumn)
    assert (list(words.codes), words.missing, words.missing_codes) == (["a", "b"], "indicator", ("NA",))
    assert isinstance(tiny, NumericColumn)
    assert tiny.range[0] == 0
    assert tiny.range[1] >= 1.19e-7
    negative = columns["column_0_5_quantile"]
    assert isinstance(negative, NumericColumn)
    assert negative.range == (-200.0, 0.0)


@pytest.mark.parametrize(
    ("label", "task"),
    [
        (["0", "1"] * 60, "binary"),
        (["mild", "severe", "none at all"] * 40, "multi-class"),
        ([str(i * 0.25) for i in range(120)], "regression"),
    ],
)
def test_the_label_decides_the_task(tmp_path: Path, label: list[str], task: str) -> None:
    file = table(tmp_path, level=label)
    one = draft(file, "x", label="level")
    assert one.study.objective.task == task
    study, sites = tmp_path / "s.toml", tmp_path / "sites"
    assert sim("init", "--from-csv", file, "--label", "level", "--out", study, "--to", sites).exit_code == 0
    few = ["--set", "algorithm.rounds=1"]
    ran = sim("run", study, "--sites", sites, "--exact-metrics", "--seed", 1, "--out", tmp_path / "r", *few)
    assert ran.exit_code == 0, ran.output


def test_an_export_in_german_or_french_says_what_is_wrong_with_its_numbers(tmp_path: Path) -> None:
    text = "id;Größe;Créatinine µmol/L;Hämoglobin;Rückkehr\n"
    for i in range(40):
        haemoglobin = "hämolytisch" if i % 9 == 1 else 10 + i / 7
        text += f"{i};{150 + i},5;{60 + i}.5;{haemoglobin};{'ja' if i % 2 else 'nein'}\n"
    file = tmp_path / "export.csv"
    file.write_text(text, encoding="utf-8-sig")
    made = draft(file, "export", label="Rückkehr", patient="id")
    assert made.left_out == {
        "Größe": "decimal commas in 40 cells: export numbers with a point",
        "Hämoglobin": "numbers, but for 5 cells: empty these in the file, or mend them",
    }
    assert made.names == {"Creatinine_umol_L": "Créatinine µmol/L", "Rueckkehr": "Rückkehr"}
    assert [c.name for c in made.study.data.label.classes] == ["nein", "ja"]  # the second one is positive


def test_another_delimiter_and_records_without_a_label(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    rows = [f"{i};{i % 7},5;{['ja', 'nein', ''][i % 3]}" for i in range(90)]
    file.write_text("\n".join(["id;x;label", *rows]).replace(",5", ".5") + "\n")
    one = draft(file, "x")
    assert one.delimiter == ";"
    assert len(one.frame) == 60
    assert [c.name for c in one.study.data.label.classes] == ["nein", "ja"]


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique_by=lambda n: n.strip()),
    cells=st.lists(st.text(max_size=6), min_size=3, max_size=6),
)
def test_whatever_the_names_and_cells_the_draft_is_sound_or_refused(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], cells: list[str]
) -> None:
    file = tmp_path_factory.mktemp("any") / "data.csv"
    frame = {n: (cells * 5)[i : i + 12] for i, n in enumerate(names)}
    frame |= {"pid": [str(i) for i in range(12)], "y": ["0", "1"] * 6, "number": [str(i) for i in range(12)]}
    try:
        pd.DataFrame({n: pd.Series(v) for n, v in frame.items()}).fillna("").to_csv(file, index=False)
    except UnicodeEncodeError:
        return
    refused = ""
    try:
        draft(file, "x", label="y", patient="pid")
    except (DataError, StudyError) as error:
        refused = error.message
    assert "the draft" not in refused  # what is drafted is a study


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no header"),
        ("id,y\n", "no records"),
        ("id,y\n1,0\n2,1\n", "no column is left"),
        ("id,x,y\n1,5,0\n2,6,0\n", "one value only"),
        ("id,x,y\n" + "".join(f"{i},{i},a{i}\n" for i in range(30)), "more than 10 classes"),
        ("id,x,y\n1,5,\n2,6,\n", "no record has a label"),
        ("x,y\n5,0\n6,1\n", "no column is called patient_id"),
        ("id,x\n5,0\n6,1\n", "no column is called label"),
        ("\xff\xfe", "UTF-16"),
    ],
)
def test_a_file_that_makes_no_study(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "data.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises((DataError, StudyError), match=words):
        draft(tmp_path / "data.csv", "x")


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    file = table(tmp_path)
    given_ = tmp_path / "there.toml"
    given_.write_text("")
    cases: list[tuple[list[str | Path], str]] = [
        (["--out", given_], "exists already"),
        (["--out", tmp_path / "study.json"], "ends in .toml"),
        (["--out", tmp_path / "no" / "study.toml"], "No such file"),
        (["--out", tmp_path / "a.toml", "--label", "absent"], "--label absent"),
        (["--out", tmp_path / "a.toml", "--label", "patient", "--patient", "patient"], "--label patient"),
        (["--out", tmp_path / "a.toml", "--to", tmp_path / "s", "--by", "absent"], "--by absent"),
        (
            ["--out", tmp_path / "a.toml", "--to", tmp_path / "s", "--sites", "99"],
            "leave one of 99 sites empty",
        ),
    ]
    for arguments, words in cases:
        result = sim("init", "--from-csv", file, *arguments)
        assert result.exit_code != 0
        assert words in json.loads(result.stdout)["message"]
    assert sim("init", "--from-csv", tmp_path / "absent.csv", "--out", tmp_path / "a.toml").exit_code == 4
    assert not (tmp_path / "a.toml").exists()


def test_a_patient_is_at_one_site(tmp_path: Path) -> None:
    wards = ["North Ward", "south", "", "South"] * 30
    frame = draft(table(tmp_path, ward=wards), "x").frame
    parts = divided(frame, "patient", 5)
    assert sorted(parts) == [f"site-{i}" for i in range(1, 6)]
    assert sum(len(part) for part in parts.values()) == len(frame)
    seen = [set(part["patient"]) for part in parts.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    by_ward = divided(frame, "patient", 1, by="ward")
    assert {name: set(part["ward"]) for name, part in by_ward.items()} == {
        "north-ward": {"North Ward", "south"},
        "unknown": {"", "South"},
    }
    with pytest.raises(DatasetError, match="empty"):
        divided(frame, "patient", 61)


def test_a_name_is_made_of_any_text() -> None:
    assert slug("Heart Study, 2nd!") == "heart-study-2nd"
    assert slug("ÄÖ") == "study"
