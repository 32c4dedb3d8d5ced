"""`fedward-audit verify` as an auditor meets it: files, a store, exit codes, one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from certified import STUDY, claims, digest, key, token, transcript
from small import make_site, study, toml
from typer.testing import CliRunner

from common.errors import StudyFailed
from common.messages import MAX_CERTIFICATE_CHARACTERS
from server.store import Settings, SiteAnswer, Store
from simulations.audit.cli import app
from simulations.audit.transcript import transcript_of
from simulations.engine import SimulationSettings, simulate

SOUND = claims()
SOUTH = claims(site="south")
FORGED = {**SOUND, "delta": 0.0001}


def run(*arguments: object, expect: int = 0) -> dict[str, Any]:
    """The command with --json; its one JSON object."""
    done = CliRunner().invoke(app, ["verify", *map(str, arguments), "--json"])
    assert done.exit_code == expect, done.output
    return json.loads(done.stdout)


def said(*arguments: object, expect: int = 0) -> str:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exit_code == expect, done.output
    return done.output


def answers(value: Mapping[str, Any]) -> dict[int, SiteAnswer]:
    """What a coordinator would write down if these claims are true."""
    return {
        r["round"]: SiteAnswer(
            site=value["site"],
            outcome="reply",
            weight=40,
            **{n: r[n] for n in ("training", "evaluation", "statistics", "exact", "released", "head")},
        )
        for r in value["releases"]
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Certificates of two sites, a study, keys and the coordinator's store."""
    (tmp_path / "certificates").mkdir()
    for value, signer in ((SOUND, key(1)), (SOUTH, key(2))):
        (tmp_path / "certificates" / f"{value['site']}.jws").write_text(token(value, signer) + "\n")
        (tmp_path / f"{value['site']}.pub").write_bytes(signer.public.pem())
    toml(STUDY, tmp_path / "study.json")
    store = Store(tmp_path / "store", durable=False)
    store.create("one", STUDY, Settings(sites=2, quorum=1))
    told = answers(SOUND), answers(SOUTH)
    for number in told[0]:
        silent = SiteAnswer("node 9", "silence", "no answer")
        store.record("one", number, {}, (*(t[number] for t in told), silent))
    store.keep_certificate("one", "north", token(SOUND, key(1)))
    return tmp_path


def everything(folder: Path) -> list[object]:
    keys = [f"--key={site}={folder / site}.pub" for site in ("north", "south")]
    return ["--study", folder / "study.json", "--store", folder / "store", *keys]


def test_sound_certificates(folder: Path) -> None:
    told = run(folder / "certificates", *everything(folder), "--software", digest("package"))
    assert told["holds"]
    assert told["without_certificate"] == []
    assert [c["claims"]["site"] for c in told["certificates"]] == ["north", "south"]
    for each in told["certificates"]:
        assert each["reasons"] == each["unchecked"] == []
        assert 1.99 < each["recomputed"]["training"] <= 2


def test_the_text_says_what_is_proven_and_what_must_be_trusted(folder: Path) -> None:
    text = said(folder / "certificates" / "north.jws", "--store", folder / "store")
    assert "proven: The coordinator received the 5 answers listed" in text
    assert "trusted, not proven: That the site runs fedward 0.1.0 unmodified" in text
    assert "not checked: The software's digest" in text
    assert "No certificate was given of south" in text
    assert "2.4999" in text


def test_one_forged_certificate_fails_the_command(folder: Path) -> None:
    (folder / "certificates" / "south.jws").write_text(token({**SOUTH, "public_size": 60}, key(2)))
    told = run(folder / "certificates", *everything(folder), expect=11)
    assert told["error"] == "certificate"
    assert told["remedy"]
    assert [c["holds"] for c in told["certificates"]] == [True, False]
    assert {r["check"] for r in told["certificates"][1]["reasons"]} == {"plan", "transcript"}
    text = said(folder / "certificates", *everything(folder), expect=11)
    assert "refused: (plan) sampling rate 0.25, where 0.208333" in text
    assert "1 of 2 certificates do not hold" in text


def test_what_is_no_certificate_is_one_that_fails(folder: Path) -> None:
    for content in (b"", b"hello", b"\xff" * 9, b"A" * (MAX_CERTIFICATE_CHARACTERS + 9)):
        (folder / "odd.jws").write_bytes(content)
        told = run(folder / "odd.jws", folder / "certificates" / "north.jws", expect=11)
        assert [c["holds"] for c in told["certificates"]] == [False, True]
        assert told["certificates"][0]["reasons"][0]["check"] == "token"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["absent.jws"], 11),
        (["."], 11),
        (["certificates", "--key", "north"], 1),
        (["certificates", "--key", "west=north.pub"], 1),
        (["certificates", "--key", "north=absent.pub"], 3),
        (["certificates", "--key", "north=study.json"], 3),
        (["certificates", "--study", "absent.toml"], 2),
        (["certificates", "--store", "certificates"], 1),
    ],
)
def test_wrong_arguments_have_their_own_status(
    folder: Path, arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert run(*arguments, expect=status)["remedy"]


def test_a_site_s_key_of_another_session_counts(folder: Path) -> None:
    """A store remembers the key that signed before."""
    store = Store(folder / "store")
    store.create("zero", STUDY, Settings(sites=1, quorum=1))
    store.keep_certificate("zero", "south", token(claims(site="south", session="zero"), key(3)))
    told = run(folder / "certificates", "--store", folder / "store", expect=11)
    assert [c["holds"] for c in told["certificates"]] == [True, False]
    assert told["certificates"][1]["reasons"][0]["check"] == "key"
    assert run(folder / "certificates", *everything(folder))["holds"]  # the auditor knows better


def test_a_transcript_is_what_the_store_holds(folder: Path) -> None:
    found = transcript_of(Store(folder / "store"), "one")
    wanted = transcript(SOUND, SOUTH, north=key(1))
    assert found == replace(wanted, received=dict(wanted.received))


def test_a_store_that_nobody_can_read_is_said(folder: Path) -> None:
    store = Store(folder / "store")
    store.create("odd", STUDY, Settings(sites=1, quorum=1))
    store.record("odd", 1, {}, (SiteAnswer("north", "reply", training={"mechanism": "magic"}),))
    with pytest.raises(StudyFailed, match="no readable events of north"):
        transcript_of(store, "odd")


@pytest.mark.parametrize("exact", [False, True])
def test_real_sites_certify_what_a_real_coordinator_received(tmp_path: Path, exact: bool) -> None:
    """A whole session through the vaults, with the operating system's randomness."""
    wanted = study(evaluation={"every": 2}, statistics={"epsilon": 1.0, "delta": 1e-4})
    wanted = study(**{**wanted.model_dump(mode="json", exclude_none=True), "data": {"scaling": "moments"}})
    for name in ("north", "south"):
        make_site(tmp_path / "sites" / name, name)
    chosen = SimulationSettings(workers=1, exact_metrics=exact)
    done = simulate(wanted, tmp_path / "sites", tmp_path / "run", chosen)
    certificates = tmp_path / "run" / "store" / "certificates" / done.session
    told = run(
        certificates, "--study", toml(wanted, tmp_path / "study.json"), "--store", tmp_path / "run" / "store"
    )
    assert [c["claims"]["site"] for c in told["certificates"]] == ["north", "south"]
    for each in told["certificates"]:
        assert each["claims"]["complete"]
        assert each["releases"] == 5
        assert (each["recomputed"]["total"] is None) == exact
        assert 1.99 < each["recomputed"]["training"] <= 2
        assert 0.99 < each["recomputed"]["statistics"] <= 1
