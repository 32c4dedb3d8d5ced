"""`fedward-sim` and `fedward-audit` at the prompt."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
from safetensors.numpy import load
from typer.testing import CliRunner, Result

from common.study import load_study
from simulations.audit.cli import app as audit
from simulations.cli import app
from simulations.datasets import fetch, prepare


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare("breast-cancer", fetch("breast-cancer", folder / "raw"), folder / "sites")
    return folder / "sites"


def sim(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--json"])


def told(result: Result) -> dict[str, object]:
    value: dict[str, object] = json.loads(result.stdout)
    return value


def test_a_changed_study_is_another_study(tmp_path: Path) -> None:
    result = sim("export", "breast-cancer", tmp_path / "study.json", "--set", "privacy.epsilon=3.0")
    assert result.exit_code == 0, result.output
    study = load_study(tmp_path / "study.json")
    assert study.privacy.epsilon == 3.0
    assert told(result)["digest"] == study.digest
    assert sim("export", "breast-cancer", tmp_path / "study.json").exit_code == 2


def test_a_text_without_quotes_is_told_how_to_be_written(tmp_path: Path) -> None:
    result = sim("export", "breast-cancer", tmp_path / "study.json", "--set", "model.name=mlp")
    assert result.exit_code == 2
    assert """--set 'model.name="mlp"'""" in told(result)["remedy"]


@pytest.mark.parametrize(
    "change",
    [
        "privacy.epsilon=-1",
        "privacy.epsilom=1",
        "nowhere.at.all=1",
        "privacy.epsilon",
        "privacy.epsilon=[",
        "=",
        "",
    ],
)
def test_a_change_that_makes_no_sense(tmp_path: Path, change: str) -> None:
    result = sim("export", "breast-cancer", tmp_path / "study.json", "--set", change)
    assert result.exit_code == 2
    assert told(result)["error"] == "study-invalid"
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_what_it_says_and_the_auditor_agrees(sites: Path, tmp_path: Path) -> None:
    result = sim("run", "breast-cancer", "--sites", sites, "--out", tmp_path, "--set", "algorithm.rounds=3")
    assert result.exit_code == 0, result.output
    folder = Path(str(told(result)["folder"]))
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "result.json", "study.json", "store", "sites"} <= names
    audited = CliRunner().invoke(audit, ["recompute", str(folder / "store"), "--json"])
    assert audited.exit_code == 0, audited.output
    opinions = json.loads(audited.stdout)["opinions"]
    assert len(opinions) == 8
    assert all(o["sound"] for o in opinions)


def test_training_goes_on_from_a_files_weights(sites: Path, tmp_path: Path) -> None:
    mlp = ["--set", 'model.name="mlp"', "--set", "algorithm.rounds=1", "--seed", "1"]
    first = sim("run", "breast-cancer", "--sites", sites, "--out", tmp_path, *mlp)
    file = Path(str(told(first)["folder"])) / "model.safetensors"
    before = file.read_bytes()
    digest = hashlib.sha256(before).hexdigest()
    go_on = [*mlp, "--set", f'model.initial_weights={{sha256="{digest}"}}',
             "--set", 'model.frozen=["0"]']  # fmt: skip
    result = sim("run", "breast-cancer", "--sites", sites, "--out", tmp_path, *go_on, "--initial", file)
    assert result.exit_code == 0, result.output
    after = load(Path(str(told(result)["folder"])).joinpath("model.safetensors").read_bytes())
    for name, array in load(before).items():
        assert (after[name].tobytes() == array.tobytes()) == name.startswith("0."), name
    refused = sim("run", "breast-cancer", "--sites", sites, "--out", tmp_path / "none", *go_on)
    assert refused.exit_code == 2
    assert "begins with the weights of a file" in str(told(refused)["message"])
    refused = sim("run", "breast-cancer", "--sites", sites, "--out", tmp_path / "none", "--initial", file)
    assert "names no initial weights" in str(told(refused)["message"])
    assert not (tmp_path / "none").exists()


def test_the_auditor_finds_less_noise_than_promised(sites: Path, tmp_path: Path) -> None:
    result = sim("run", "breast-cancer", "--sites", sites, "--out", tmp_path, "--set", "algorithm.rounds=2")
    store = Path(str(told(result)["folder"])) / "store"
    with sqlite3.connect(store / "store.db") as database:
        (answers,) = database.execute("SELECT answers FROM rounds WHERE round = 1").fetchone()
        lowered = json.loads(answers)
        lowered[0]["training"]["noise_multiplier"] /= 2
        database.execute("UPDATE rounds SET answers = ? WHERE round = 1", (json.dumps(lowered),))
    database.close()
    audited = CliRunner().invoke(audit, ["recompute", str(store)])
    assert audited.exit_code == 1
    assert "NO" in audited.output


def test_a_folder_without_a_store_or_sites_is_said_clearly(tmp_path: Path) -> None:
    assert CliRunner().invoke(audit, ["recompute", str(tmp_path), "--json"]).exit_code == 1
    result = sim("run", "breast-cancer", "--sites", tmp_path / "none", "--out", tmp_path / "runs")
    assert result.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    assert "none" in str(told(result)["message"])
    assert sim("run", "no-such-study", "--sites", tmp_path).exit_code == 2
    assert sim("run", "breast-cancer", "--sites", tmp_path, "--repeat", "2").exit_code == 2
