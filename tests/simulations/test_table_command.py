"""`fedward-sim table`: its rows against loops by hand, its cells kept and found again, its intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import make_site, patients
from typer.testing import CliRunner, Result

from client.cohort import load_cohort
from client.training import plain_batch
from common.errors import StudyError, StudyFailed
from common.models import parameter_arrays, study_model
from common.privacy.noise import Seeded
from common.study import Study
from server.report import report
from simulations.cli import app
from simulations.datasets import fetch, prepare
from simulations.engine import SimulationSettings, simulate
from simulations.studies import ready_studies
from simulations.table import conduct as conducting
from simulations.table.cache import Cache, digest_of
from simulations.table.cell import ALL, Cell, compute
from simulations.table.federation import federation_of, pooled, together
from simulations.table.rows import SETTINGS, Row, Settings, left_out_rows, rows_of, settings_of
from simulations.table.scoring import columns_of, plain
from simulations.table.training import alone, federated
from simulations.wanted import find_study

PLAIN = 'privacy={mode="none"}'
BATCHES = 'training={local_epochs=1,patients_per_step=16,optimizer={name="adam",learning_rate=0.01}}'
MOMENTS = ['data.scaling="moments"', "statistics={epsilon=3.0,delta=1e-5}"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare("breast-cancer", fetch("breast-cancer", folder / "raw"), folder / "sites")
    return folder / "sites"


def wanted(*changes: str) -> Study:
    return find_study("breast-cancer", ["algorithm.rounds=3", *changes])


def table(*arguments: str | Path, json: bool = True) -> Result:
    return CliRunner().invoke(app, ["table", *map(str, arguments), *(["--json"] if json else [])])


def exactly(seed: int) -> SimulationSettings:
    return SimulationSettings(seed=seed, exact_metrics=True)


# --- rows


def test_pooled_training_is_gradient_descent_on_all_patients(sites: Path) -> None:
    """A loop by hand: torch's own loss, gradient and step on the sites' training patients together."""
    one = wanted(PLAIN)
    federation = federation_of(one, sites, seed=2)
    cohorts = federation.cohorts()
    plan = federation.pooled_plan(cohorts)
    assert plan.steps_per_round == 1
    found = alone(one, pooled(cohorts), plan, "pooled", seed=2)

    secret = Seeded(2)
    own = [load_cohort(p.folder(), one, secret.key("split", p.folder().name)) for p in federation.places]
    features = torch.cat([cohort.train.features for cohort in own])
    labels = torch.cat([cohort.train.labels for cohort in own]).float()
    network = study_model(one, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=one.training.optimizer.learning_rate)
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(features)[:, 0], labels)
        loss.backward()
        optimizer.step()
    for name, array in parameter_arrays(network).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


def test_pooled_training_sees_each_patient_as_often(sites: Path) -> None:
    federation = federation_of(wanted(PLAIN, BATCHES), sites, seed=1)
    cohorts = federation.cohorts()
    plans = {name: federation.plan(name) for name in cohorts}
    seen = sum(p.steps_per_round * plain_batch(len(cohorts[n].train), p) for n, p in plans.items())
    plan = federation.pooled_plan(cohorts)
    batch = plain_batch(len(pooled(cohorts).train), plan)
    assert batch == 16
    assert abs(plan.steps_per_round * batch - seen) <= batch / 2


def test_alone_is_a_federation_of_one(sites: Path, tmp_path: Path) -> None:
    one = wanted(PLAIN, BATCHES)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "ashford").symlink_to(sites / "ashford")
    together_ = federated(one, tmp_path / "one", tmp_path, exactly(3))
    federation = federation_of(one, sites, seed=3)
    by_itself = alone(one, federation.cohorts()["ashford"], federation.plan("ashford"), "ashford", 3)
    assert {n: a.tobytes() for n, a in together_.parameters.items()} == {
        n: a.tobytes() for n, a in by_itself.items()
    }


@pytest.mark.parametrize("changes", [[PLAIN], [], [PLAIN, *MOMENTS]])
def test_a_federated_cell_says_what_the_report_says(sites: Path, tmp_path: Path, changes: list[str]) -> None:
    one = wanted(*changes)
    (tmp_path / "work").mkdir()
    cell = Cell(Row("federated", one), 4, sites, "auroc")
    found = compute(cell, tmp_path / "work")
    done = simulate(one, sites, tmp_path / "run", exactly(4))
    told = report(done.store, done.store.session(done.session))
    assert told.measured is not None
    assert found.whole == plain(told.measured)
    assert found.sites == {s.site: plain(s.measured) for s in told.sites if s.measured}
    assert found.epsilon == max((s.epsilon for s in told.sites if s.epsilon is not None), default=None)
    assert found.interval is not None
    assert found.interval[0] < found.whole["auroc"] <= found.interval[1]


def test_each_site_alone_is_tested_at_home_and_everywhere(sites: Path, tmp_path: Path) -> None:
    found = compute(Cell(Row("local", wanted(PLAIN, *MOMENTS)), 1, sites, "auroc"), tmp_path)
    assert len(found.sites) == 4
    assert found.whole["patients"] == sum(each["patients"] for each in found.sites.values())
    assert found.interval is None


def test_a_site_that_is_left_out_takes_no_part(sites: Path, tmp_path: Path) -> None:
    one, others = wanted(PLAIN), tmp_path / "others"
    others.mkdir()
    for path in sites.iterdir():
        if path.name != "dunmore":
            (others / path.name).symlink_to(path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    without = federated(one, sites, tmp_path / "a", exactly(1), "dunmore")
    (tmp_path / "c").mkdir()
    by_hand = federated(one, others, tmp_path / "b", exactly(1))
    assert {n: a.tobytes() for n, a in without.parameters.items()} == {
        n: a.tobytes() for n, a in by_hand.parameters.items()
    }
    found = compute(Cell(Row("left-out", one, "dunmore"), 1, sites, "auroc"), tmp_path / "c")
    rows = (sites / "dunmore" / "patients.csv").read_text().count("\n") - 1
    assert found.sites[ALL]["patients"] == rows
    assert 0 < found.sites["dunmore"]["patients"] < rows


def test_many_patients_as_one_group() -> None:
    parts = [patients([1, 3, 2], seed=1), patients([], seed=2), patients([2, 1], seed=3)]
    whole = together(parts)
    assert whole.offsets.tolist() == [0, 1, 4, 6, 8, 9]
    assert torch.equal(whole.features, torch.cat([part.features for part in parts]))
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    marked = [replace(part, hashes=tuple(bytes([i]) for i in range(len(part)))) for part in parts]
    assert together(marked).hashes == (b"\0", b"\1", b"\2", b"\0", b"\1")


def test_a_model_that_grows_without_bound_is_told(sites: Path) -> None:
    steep = ["algorithm.rounds=9", 'training.optimizer={name="sgd",learning_rate=1e3,weight_decay=1e3}']
    federation = federation_of(wanted(PLAIN, *steep), sites, seed=1)
    with pytest.raises(StudyFailed, match="grows to infinity"):
        alone(federation.study, federation.cohorts()["ashford"], federation.plan("ashford"), "ashford", 1)


# --- settings


def test_rows_differ_as_the_settings_say() -> None:
    own = Settings.model_validate(
        {
            "plain": {"training.optimizer.learning_rate": 2.0},
            "pooled": {"algorithm.rounds": 7},
            "private": {"privacy.clipping_norm": 0.5},
            "at": {"1": {"algorithm.rounds": 5}},
        }
    )
    rows = {row.name: row.study for row in rows_of(wanted(), own, [1.0, 8.0])}
    assert list(rows) == ["pooled", "federated", "federated, ε = 1", "federated, ε = 8", "each site alone"]
    assert [s.algorithm.rounds for s in rows.values()] == [7, 3, 5, 3, 3]
    assert [s.training.optimizer.learning_rate for s in rows.values()] == [2.0, 2.0, 8.0, 8.0, 2.0]
    assert [s.privacy.epsilon for s in rows.values()] == [None, None, 1.0, 8.0, None]
    assert [s.privacy.clipping_norm for s in rows.values()] == [None, None, 0.5, 0.5, None]


def test_what_a_person_sets_holds_in_every_row() -> None:
    own = Settings(
        plain={"algorithm.rounds": 9, "training.optimizer.learning_rate": 2.0},
        at={"1": {"algorithm.rounds": 8}},
    )
    rows = rows_of(wanted(), own.without(["algorithm.rounds"]), [1.0])
    assert [row.study.algorithm.rounds for row in rows] == [3] * 4
    assert [row.study.training.optimizer.learning_rate for row in rows] == [2.0, 2.0, 8.0, 2.0]
    assert own.without(["training"]).plain == {"algorithm.rounds": 9}
    assert settings_of("some/heart-disease.toml", None) == Settings()
    assert settings_of("heart-disease", None).plain


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    for line in ("epsilons = []", "epsilons = [-1.0]", "seeds = 0", "plian = {}", "plain = 3", "plain = {"):
        (tmp_path / "s.toml").write_text(line)
        with pytest.raises(StudyError, match=r"s\.toml"):
            settings_of("breast-cancer", tmp_path / "s.toml")
    with pytest.raises(StudyError, match="cannot be read"):
        settings_of("breast-cancer", tmp_path / "absent.toml")
    with pytest.raises(StudyError, match=r"nowhere\.at\.all: no such table"):
        rows_of(wanted(), Settings(plain={"nowhere.at.all": 1}), [])
    with pytest.raises(StudyError, match=r"settings of breast-cancer at ε = 1: algorithm\.rounds"):
        rows_of(wanted(), Settings(private={"algorithm.rounds": 0}), [1.0])
    with pytest.raises(StudyError, match="lacks a δ and a clipping norm"):
        rows_of(wanted(PLAIN), Settings(), [1.0])
    with pytest.raises(StudyError, match="left out of one"):
        left_out_rows(wanted(), Settings(), [], ["only"])
    with pytest.raises(StudyError, match="no metric is called 'auc'"):
        columns_of(wanted(), ["auc"])


def test_settings_that_come_with_ready_studies_are_sound() -> None:
    assert {path.stem for path in SETTINGS.glob("*")} <= set(ready_studies())
    for name in ready_studies():
        one = find_study(name)
        own = settings_of(name, None)
        assert rows_of(one, own, own.epsilons if one.private else [])
        assert columns_of(one, own.columns)


# --- the command, and what it keeps


@pytest.fixture(scope="module")
def first(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small table, computed in processes of its own."""
    out = tmp_path_factory.mktemp("tables")
    result = table(*arguments(sites, out))
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def arguments(sites: Path, out: Path) -> list[str | Path]:
    few = ["--seeds", "1", "--epsilon", "3", "--set", "algorithm.rounds=2"]
    return ["breast-cancer", "--sites", sites, "--out", out, *few]


def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of cells that get computed from here on."""
    begun, names = conducting._begun, []

    def counted(cell: Cell, folder: Path) -> Any:
        names.append(cell.name)
        return begun(cell, folder)

    monkeypatch.setattr(conducting, "_begun", counted)
    return names


def test_the_table_is_written(first: tuple[Path, dict[str, Any]]) -> None:
    out, told = first
    assert [row[0] for row in told["table"]] == ["pooled", "federated", "federated, ε = 3", "each site alone"]
    assert told["header"][1:4] == ["AUROC", "95 % interval", "accuracy"]
    page = (out / "breast-cancer" / "table.md").read_text()
    assert page.count("\n| ") == 2 + 4
    kept = json.loads((out / "breast-cancer" / "table.json").read_text())
    assert kept["rows"] == told["rows"]
    for row in told["rows"]:
        (one,) = row["seeds"]
        assert one["seconds"] > 0
        assert one["peak_bytes"] > 2**20
        assert one["whole"]["auroc"] > 0.9


def test_what_is_known_is_not_computed(
    sites: Path, first: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = first
    names = computed(monkeypatch)
    again = table(*arguments(sites, out), json=False)
    assert again.exit_code == 0, again.output
    assert "each site alone" in again.stdout
    assert json.loads(table(*arguments(sites, out)).stdout) == told
    assert names == []


def test_a_damaged_file_is_computed_again(
    sites: Path, first: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, told = first
    (path,) = (out / "breast-cancer" / "cells").glob("pooled-*.json")
    whole = path.read_bytes()
    few = find_study("breast-cancer", ["algorithm.rounds=2"])
    cell = Cell(rows_of(few, Settings(), [])[0], 1, sites, "auroc")
    cache = Cache(path.parent, sites)
    assert cache.path(cell) == path
    assert cache.read(cell) is not None
    for damaged in (b"", b"\xff\0", whole[:-20], whole.replace(b'"auroc": 0.9', b'"auroc": 0.8', 1)):
        assert damaged != whole
        path.write_bytes(damaged)
        assert cache.read(cell) is None
    names = computed(monkeypatch)
    result = json.loads(table(*arguments(sites, out)).stdout)
    assert [row[:7] for row in result["table"]] == [row[:7] for row in told["table"]]
    assert names == ["pooled, seed 1"]


def test_a_killed_table_goes_on_where_it_was(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*arguments(sites, tmp_path), "--plain"]
    small.remove("--epsilon")
    small.remove("3")
    begun = conducting._begun
    names: list[str] = []

    def interrupted(cell: Cell, folder: Path) -> Any:
        if len(names) == 1:
            raise KeyboardInterrupt
        names.append(cell.name)
        return begun(cell, folder)

    monkeypatch.setattr(conducting, "_begun", interrupted)
    assert table(*small).exit_code == 130
    monkeypatch.setattr(conducting, "_begun", begun)
    assert len(list((tmp_path / "breast-cancer" / "cells").iterdir())) == 1
    assert not (tmp_path / "breast-cancer" / "table.md").exists()
    later = computed(monkeypatch)
    assert table(*small, "--jobs", "2").exit_code == 0
    assert names + later == ["pooled, seed 1", "federated, seed 1", "each site alone, seed 1"]


def test_other_data_is_another_cell(tmp_path: Path) -> None:
    make_site(tmp_path / "sites" / "north", "north")
    before = digest_of(tmp_path / "sites")
    cell = Cell(Row("pooled", wanted()), 1, tmp_path / "sites", "auroc")
    path = Cache(tmp_path / "cells", tmp_path / "sites").path(cell)
    data = next((tmp_path / "sites" / "north").glob("*.csv"))
    data.write_text(data.read_text() + "\n")
    assert digest_of(tmp_path / "sites") != before
    cache = Cache(tmp_path / "cells", tmp_path / "sites")
    assert cache.path(cell) != path
    assert cache.path(replace(cell, seed=2)) != cache.path(cell)
    assert cache.path(replace(cell, row=Row("pooled", wanted(PLAIN)))) != cache.path(cell)
    assert cache.path(replace(cell, workers=2)) == cache.path(cell)


def test_leave_one_out_at_the_prompt(sites: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    for name in ("ashford", "birchwood"):
        (two / name).symlink_to(sites / name)
    few = ["--seeds", 1, "--set", "algorithm.rounds=2", "--out", tmp_path / "out"]
    result = table("breast-cancer", "--sites", two, "--leave-one-out", *map(str, few))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [row[0] for row in told["table"]] == ["ashford", "birchwood"]
    assert all(float(cell) > 0.8 for row in told["table"] for cell in row[1:4])
    assert (tmp_path / "out" / "breast-cancer" / "leave-one-out.md").exists()


def test_what_goes_wrong_in_a_cell_is_told(sites: Path, tmp_path: Path) -> None:
    broken = tmp_path / "sites" / "ashford"
    broken.mkdir(parents=True)
    for name in ("site.toml", "patients.csv"):
        (broken / name).write_bytes((sites / "ashford" / name).read_bytes())
    rows = (broken / "patients.csv").read_text().splitlines()
    (broken / "patients.csv").write_text(
        "\n".join([rows[0], *rows[2:], rows[1].replace(",", ",98765.4321,", 1)])
    )
    result = table("breast-cancer", "--sites", tmp_path / "sites", "--out", tmp_path, "--seeds", "1")
    assert result.exit_code != 0
    told = json.loads(result.stdout)
    assert told["message"].startswith("pooled, seed 1: ")
    assert "patients.csv" in told["message"]
    assert "98765.4321" not in result.output
    assert told["remedy"]


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (["--plain", "--epsilon", "1"], "study-invalid", "contradict"),
        (["--epsilon", "-1"], "study-invalid", "epsilon"),
        (["--settings", "absent.toml"], "study-invalid", "cannot be read"),
        (["--set", "nowhere.at.all=1"], "study-invalid", "no such table"),
        (["--sites", "absent"], "site-invalid", "datasets fetch breast-cancer"),
    ],
)
def test_options_that_make_no_sense(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], error: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = table("breast-cancer", "--sites", sites, *more)
    assert result.exit_code in (2, 3)
    told = json.loads(result.stdout)
    assert told["error"] == error
    assert words in told["message"] + told["remedy"]
    assert list(tmp_path.iterdir()) == []


def test_a_study_without_privacy_has_no_private_rows(sites: Path) -> None:
    bare = ["--set", PLAIN, "--epsilon", "1"]
    told = json.loads(table("breast-cancer", "--sites", sites, *bare).stdout)
    assert "lacks a δ" in told["message"]
