"""Commands as programs see them: exit codes, one JSON object, help for everything; and who imports whom."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from small import allow, make_site, study, toml
from typer.testing import CliRunner

from client.account import read_account
from client.policy_file import load_policy, set_policy
from client.settings import SiteFolder
from client.site import open_vault
from common.messages import Job, JobHeader, encode
from common.models import parameter_arrays, study_model
from common.privacy.plan import plan_study

COMMANDS = {
    "fedward-site": "client.cli",
    "fedward-sim": "simulations.cli",
    "fedward-server": "server.cli",
    "fedward-audit": "simulations.audit.cli",
}
PROJECT = Path(__file__).resolve().parents[1]
WANTED = study()


def typer_of(name: str) -> typer.Typer:
    module = importlib.import_module(COMMANDS[name])
    found = getattr(module, "app", None) or module.main
    assert isinstance(found, typer.Typer)
    return found


def command(name: str) -> click.Command:
    return typer.main.get_command(typer_of(name))


def run(name: str, *arguments: object, expect: int = 0) -> Any:
    """One command with --json; its one JSON object."""
    done = CliRunner().invoke(typer_of(name), [*map(str, arguments), "--json"])
    assert done.exit_code == expect, done.output
    told = json.loads(done.stdout)
    if expect:
        assert set(told) >= {"error", "message", "remedy"}
        assert told["remedy"]
        assert "Traceback" not in done.output
    return told


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """With a lifetime budget, and no study approved."""
    folder = make_site(tmp_path / "site")
    set_policy(folder, {"cohort": {"epsilon": 100.0, "delta": 1e-2}})
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return toml(WANTED, tmp_path / "small.json")


def test_lint_imports_keeps_its_contracts() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([tool, "--no-cache"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def everything(name: str) -> list[list[str]]:
    found: list[list[str]] = [[]]

    def walk(at: click.Command, path: list[str]) -> None:
        for child, below in getattr(at, "commands", {}).items():
            found.append([*path, child])
            walk(below, [*path, child])

    walk(command(name), [])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str) -> None:
    for path in everything(name):
        done = CliRunner().invoke(typer_of(name), [*path, "--help"])
        assert done.exit_code == 0, path
        assert "Usage" in done.output
        at = command(name)
        for part in path:
            at = at.commands[part]  # type: ignore[attr-defined]
        assert at.help, path
        if not getattr(at, "commands", None):
            assert any("--json" in p.opts for p in at.params), path
        helpless = [p.name for p in at.params if not getattr(p, "help", None)]
        assert not helpless, path


@pytest.mark.parametrize("name", COMMANDS)
def test_the_installed_command_starts(name: str) -> None:
    tool = Path(sys.executable).with_name(name)
    if not tool.exists():
        pytest.skip("fedward is not installed")
    done = subprocess.run([tool, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_help_of_a_site_loads_no_torch() -> None:
    work = "import sys; import client.cli; print('torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# --- a hospital's day


def test_approve_spend_look_revoke(site: SiteFolder, file: Path) -> None:
    assert run("fedward-site", "check", site.root, file)["study"] == WANTED.digest
    told = run("fedward-site", "approve", site.root, file, "--yes", "--sessions", 2)
    assert told["epsilon"] == 4.0
    header = JobHeader(session="one", round=1, study=WANTED.digest)
    vault = open_vault(site, durable=False)
    vault.answer(encode(Job(header, parameter_arrays(study_model(WANTED)))))
    (row,) = run("fedward-site", "budget", site.root)["studies"]  # while the vault runs
    vault.close()
    assert row["sessions"] == 1
    assert 1.9 < row["epsilon_reserved"] <= 2.0
    assert row["epsilon_approved"] == 4.0
    run("fedward-site", "revoke", site.root, WANTED.digest[:8])
    assert load_policy(site).standing(WANTED.digest) is None
    (row,) = run("fedward-site", "budget", site.root)["studies"]
    assert row["revoked"]
    assert 1.9 < row["epsilon_reserved"] <= 2.0  # what was spent stays spent
    assert run("fedward-site", "ledger", "verify", site.root)["entries"] >= 3


def test_approving_asks_first(site: SiteFolder, file: Path) -> None:
    assert run("fedward-site", "approve", site.root, file, expect=6)["error"] == "refused"
    app = importlib.import_module("client.cli").app
    done = CliRunner().invoke(app, ["approve", str(site.root), str(file)], input="n\n")
    assert done.exit_code == 6
    assert load_policy(site).approved == ()
    assert not site.approved.exists()
    done = CliRunner().invoke(app, ["approve", str(site.root), str(file)], input="y\n")
    assert done.exit_code == 0
    assert len(load_policy(site).approved) == 1


def test_an_approval_that_fails_declares_nothing_public(site: SiteFolder, file: Path) -> None:
    allow(site, WANTED)
    run("fedward-site", "approve", site.root, file, "--yes", "--public-cohort", expect=3)
    assert not any(a.public for a in load_policy(site).approved)


def test_approving_twice_is_refused(site: SiteFolder, file: Path) -> None:
    run("fedward-site", "approve", site.root, file, "--yes")
    before = site.policy_path.read_bytes()
    run("fedward-site", "approve", site.root, file, "--yes", "--sessions", 9, expect=3)
    assert site.policy_path.read_bytes() == before


def test_a_study_without_privacy_needs_a_public_cohort(site: SiteFolder, tmp_path: Path) -> None:
    bare = toml(study(privacy={"mode": "none"}), tmp_path / "bare.json")
    assert run("fedward-site", "approve", site.root, bare, "--yes", expect=6)["error"] == "refused"
    assert run("fedward-site", "approve", site.root, bare, "--yes", "--public-cohort")["public"]


def test_revoking_needs_a_digest_that_is_there(site: SiteFolder, file: Path) -> None:
    run("fedward-site", "approve", site.root, file, "--yes")
    for digest in ("", WANTED.digest[:5], "0" * 64):
        assert run("fedward-site", "revoke", site.root, digest, expect=6)["error"] == "not-approved"
    assert load_policy(site).standing(WANTED.digest) is not None
    run("fedward-site", "revoke", site.root, WANTED.digest)
    assert run("fedward-site", "revoke", site.root, WANTED.digest, expect=6)["error"] == "not-approved"


def test_data_that_does_not_fit(site: SiteFolder, file: Path) -> None:
    lines = site.data_path.read_text().splitlines()
    site.data_path.write_text("\n".join([*lines, "PATIENT-YAK,5.4321,0,0,0,1,0"]) + "\n")
    told = run("fedward-site", "check", site.root, file, expect=4)
    assert told["error"] == "data-invalid"
    assert "5.4321" not in json.dumps(told)
    assert "PATIENT-YAK" not in json.dumps(told)


@pytest.mark.parametrize("action", ["check", "approve"])
def test_what_is_not_there(site: SiteFolder, file: Path, tmp_path: Path, action: str) -> None:
    assert run("fedward-site", action, tmp_path / "nowhere", file, expect=3)["error"] == "site-invalid"
    assert run("fedward-site", action, site.root, tmp_path / "no", expect=2)["error"] == "study-invalid"


def test_a_damaged_ledger_is_told(site: SiteFolder, file: Path) -> None:
    run("fedward-site", "approve", site.root, file, "--yes")
    site.ledger_path.parent.mkdir()
    site.ledger_path.write_text("{}\n")
    for words in (["budget"], ["ledger", "verify"], ["withdrawals"]):
        assert run("fedward-site", *words, site.root, expect=7)["error"] == "ledger"
    assert run("fedward-site", "certificate", site.root, "one", expect=7)["error"] == "ledger"


# --- a researcher's day


def test_a_small_simulation(tmp_path: Path, file: Path) -> None:
    for name in ("north", "south"):
        make_site(tmp_path / "sites" / name, name)
    told = run(
        "fedward-sim", "run", file, "--sites", tmp_path / "sites", "--out", tmp_path / "o", "--seed", 1
    )
    (one,) = told["runs"]
    assert one["status"] == "finished"
    assert [s["site"] for s in one["sites"]] == ["north", "south"]
    assert all(s["epsilon"] <= 2.0 for s in one["sites"])
    again = run(
        "fedward-sim", "run", file, "--sites", tmp_path / "sites", "--out", tmp_path / "o", "--seed", 1
    )
    assert again["runs"][0]["sites"] == one["sites"]
    left = Path(one["folder"])
    for path in left.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"PATIENT-ZEBRA" not in content, path
            assert b"123.4567" not in content, path


def test_ten_studies_on_one_cohort_stop_where_its_policy_says(tmp_path: Path) -> None:
    """Two hospitals, of which one has a tight lifetime budget: it drops out, and the other goes on.

    Without sampling, a round of n steps with noise σ costs n α / (2 σ²) at Rényi order α.
    """
    lifetime, delta = 1.1, 1e-2
    for name in ("north", "south"):
        make_site(tmp_path / "sites" / name, name)
    south = SiteFolder(tmp_path / "sites" / "south", tmp_path / "state" / "south")
    south.state.mkdir(parents=True)
    limit = set_policy(south, {"cohort": {"epsilon": lifetime, "delta": delta}}).cohort
    assert limit is not None
    order = limit.filter().order
    most = lifetime - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)
    spent, took_part = 0.0, []
    for number in range(10):
        privacy = {**WANTED.privacy.model_dump(), "epsilon": 0.5 + 0.05 * (number % 3)}
        wanted = study(name=f"study-{number}", algorithm={"rounds": 1}, privacy=privacy)
        plan = plan_study(wanted, 50)
        noises = [[plan.step.noise_multiplier] * 2, [plan.final_histogram.noise_multiplier]]
        cost = max(sum(order / (2 * s**2) for s in each) for each in noises)
        fits = spent + cost <= most
        spent += cost if fits else 0.0
        path = toml(wanted, tmp_path / f"{number}.json")
        (one,) = run(
            "fedward-sim", "run", path, "--sites", tmp_path / "sites", "--out", tmp_path / "runs",
            "--seed", number, "--state", tmp_path / "state", "--quorum", 1,
        )["runs"]  # fmt: skip
        assert one["status"] == "finished"
        assert [s["site"] for s in one["sites"]] == (["north", "south"] if fits else ["north"])
        took_part.append(fits)
    assert 2 <= sum(took_part) < 10
    assert not took_part[-1]
    account = read_account(south.ledger_path)
    assert account.rdp(order) == pytest.approx(spent, rel=1e-6)
    assert len(account.studies()) == sum(took_part)
    north = SiteFolder(tmp_path / "sites" / "north", tmp_path / "state" / "north")
    assert len(read_account(north.ledger_path).studies()) == 10


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["check", "no-such-study"], 2, "study-invalid"),
        (["check", "./no-such-file.toml"], 2, "study-invalid"),
        (["run", "breast-cancer", "--sites", "./nowhere"], 3, "site-invalid"),
        (["run", "breast-cancer", "--sites", ".", "--repeat", "2"], 2, "study-invalid"),
        (["datasets", "fetch", "no-such-data"], 9, "dataset"),
    ],
)
def test_errors_of_the_researcher(
    arguments: list[str], status: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("fedward-sim", *arguments, expect=status)["error"] == error


def test_ready_studies_are_sound() -> None:
    for each in run("fedward-sim", "studies")["studies"]:
        assert run("fedward-sim", "check", each["name"])["digest"] == each["digest"]


def test_an_error_in_a_pipe_is_plain_text(site: SiteFolder, tmp_path: Path) -> None:
    tool = shutil.which("fedward-site", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("fedward is not installed")
    done = subprocess.run([tool, "budget", str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "\x1b" not in done.stderr
