"""`fedward-site` at the prompt: plain words, and one clear error for whatever is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from malformed import CASES, SECRETS, Case, fingerprint, write_sound
from small import allow, answered, job, make_site, refused, study, toml
from typer.testing import CliRunner

from client.account import read_account
from client.cli import app
from client.policy_file import load_policy, save_policy, set_policy
from client.settings import SiteFolder
from client.site import make_site_keys, open_vault, read_split_key
from client.withdrawal import load_withdrawn, patient_hash
from common.errors import CertificateError, DataError, LedgerError, Refused, SiteError, StudyError
from common.journal import GENESIS, Entry, _linked, read_journal
from common.keys import SigningKey, read_public_key
from common.privacy.certificate import read_certificate
from common.privacy.plan import plan_study

STATUS = {
    StudyError: StudyError.exit_status,
    SiteError: SiteError.exit_status,
    DataError: DataError.exit_status,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_check_ends_in_one_clear_error(case: Case, tmp_path: Path) -> None:
    site, study = case.build(tmp_path)
    if site.is_dir():
        (site / "keys").mkdir()
        (site / "keys" / "split.key").write_bytes(bytes(range(32)))
        (site / "keys" / "split.key").chmod(0o600)
    before = fingerprint(tmp_path)
    done = CliRunner().invoke(app, ["check", str(site), str(study)])
    assert done.exit_code == STATUS[case.error], done.output
    assert done.output.count("error:") == 1
    assert "remedy:" in done.output
    assert case.file in done.output
    assert "Traceback" not in done.output
    assert not any(secret in done.output for secret in SECRETS)
    assert fingerprint(tmp_path) == before


def test_a_sound_site_passes_and_programs_can_read_it(tmp_path: Path) -> None:
    write_sound(tmp_path)
    make_site_keys(SiteFolder(tmp_path / "site"))
    done = CliRunner().invoke(app, ["check", str(tmp_path / "site"), str(tmp_path / "study.toml"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["training_patients"] + told["test_patients"] == 20


def test_errors_are_one_json_object_for_programs(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", str(tmp_path), str(tmp_path / "none.toml"), "--json"])
    assert done.exit_code == SiteError.exit_status
    assert set(json.loads(done.stdout)) == {"error", "message", "remedy"}


# --- the privacy officer's day

WANTED = study(
    evaluation={"every": 1}, statistics={"epsilon": 20.0, "delta": 1e-4, "bins": 4}, name="small-study"
)


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    return make_site(tmp_path / "site")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return toml(WANTED, tmp_path / "study.json")


def ask(*words: object, expect: int = 0, answer: str | None = None) -> Result:
    """A command as a person sees it; an error is one sentence with its remedy."""
    done = CliRunner().invoke(app, [str(w) for w in words], input=answer)
    assert done.exit_code == expect, (done.output, done.exception)
    assert "Traceback" not in done.output
    if expect:
        assert done.output.count("error:") == 1
        assert done.output.count("remedy:") == 1
    return done


def told(*words: object, expect: int = 0) -> dict[str, Any]:
    """A command as a program sees it."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == expect, (done.output, done.exception)
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    if expect:
        assert set(value) == {"error", "message", "remedy"}
        assert value["remedy"]
    return value


def test_a_site_without_a_policy_says_that_nothing_may_run(site: SiteFolder) -> None:
    done = ask("policy", site.root)
    for words in ("Policy of north", "none, so nothing private may run", "approved studies: 0"):
        assert words in done.stdout
    assert not site.policy_path.exists()  # looking writes nothing
    assert told("policy", site.root)["approved"] == []


def test_a_policy_is_set_and_shown(site: SiteFolder) -> None:
    numbers = {
        "epsilon": 8,
        "delta": 1e-4,
        "noise-multiplier": 1.5,
        "clipping-norm": 0.7,
        "public-size": 40,
        "patients-per-step": 20,
        "minimum-patients": 25,
    }
    options = [word for name, value in numbers.items() for word in (f"--{name}", value)]
    options += ["--allow", "training", "--allow", "statistics", "--secure-aggregation", "optional"]
    done = ask("policy", site.root, *options)
    for words in (
        "ε = 8, δ = 0.0001",
        "training, statistics",
        "noise multiplier ≥ 1.5",
        "clipping norm ≤ 0.7",
        "public size ≥ 40",
        "patients a step ≥ 20",
        "≥ 25 patients",
        "unit: patient",
    ):
        assert words in done.stdout, words
    found = told("policy", site.root)
    assert found["cohort"] == {"epsilon": 8.0, "delta": 1e-4}
    assert found["floors"]["clipping_norm"] == 0.7
    assert found["releases"] == ["training", "statistics"]
    assert (found["site"], found["digest"]) == ("north", load_policy(site).digest)
    ask("policy", site.root, "--epsilon", 9)
    assert told("policy", site.root)["cohort"] == {"epsilon": 9.0, "delta": 1e-4}
    assert told("policy", site.root)["floors"]["clipping_norm"] == 0.7


@pytest.mark.parametrize(
    "options",
    [
        ["--epsilon", "8"],  # δ is missing
        ["--epsilon", "-1", "--delta", "1e-4"],
        ["--epsilon", "8", "--delta", "0.5"],
        ["--noise-multiplier", "-1"],
        ["--clipping-norm", "0"],
        ["--public-size", "0"],
        ["--patients-per-step", "0.5"],
        ["--minimum-patients", "0"],
        ["--allow", "rows"],
        ["--secure-aggregation", "maybe"],
    ],
    ids=str,
)
def test_a_policy_that_makes_no_sense_is_not_written(site: SiteFolder, options: list[str]) -> None:
    before = fingerprint(site.root)
    done = ask("policy", site.root, *options, expect=SiteError.exit_status)
    assert "policy.toml" in done.output
    assert told("policy", site.root, *options, expect=SiteError.exit_status)["error"] == "site-invalid"
    assert fingerprint(site.root) == before


def test_approving_says_what_a_study_learns_spends_and_leaves(site: SiteFolder, file: Path) -> None:
    ask("policy", site.root, "--epsilon", 8, "--delta", 1e-4, "--allow", "training", "--allow", "statistics")
    before = fingerprint(site.root)
    done = ask("approve", site.root, file, expect=Refused.exit_status, answer="n\n")
    assert fingerprint(site.root) == before
    plan = plan_study(WANTED, 50)
    for words in (
        "Study small-study (A small study), digest " + WANTED.digest[:12],
        "Learns: y (no / yes), with logistic-regression, 5 numbers.",
        "From: x (x4).",
        "(ε = 2, δ = 0.001) for each patient over a session",
        "clipped to norm 1",
        "Leaves the site: 3 noised updates and 3 noised histograms",
        "Rows, ids and exact counts stay.",
        "Also leaves: noised counts, means, variances and histograms of numbers, codes and the label",
        "(ε = 20, δ = 0.0001) more",
        f"One session costs a patient here ε = {plan.epsilon:.3f} at δ = 0.001",
        f"noise multiplier {plan.step.noise_multiplier:g}",
        f"statistics, once, ε = {plan.statistics_epsilon:.3f} at δ = 0.0001",
        "Your policy keeps here: evaluation.",
        "Lifetime budget of a patient, ε = 8 at δ = 0.0001: 0.0% is reserved",
    ):
        assert words in done.stdout, words
    assert "not approved" in done.output
    done = ask("approve", site.root, file, "--by", "dean", "--sessions", 2, answer="y\n")
    assert f"Approved: small-study {WANTED.digest[:12]}, by dean." in done.stdout
    (made,) = load_policy(site).approved
    assert (made.approved_by, made.epsilon) == ("dean", 2 * 2.0 + 20.0)
    done = ask("approve", site.root, file, expect=SiteError.exit_status)  # before anything is asked
    assert "is approved already" in done.output
    assert "One session costs" not in done.output


def test_approving_counts_what_is_reserved(site: SiteFolder, file: Path) -> None:
    allow(site, WANTED, lifetime=60.0)
    vault = open_vault(site, durable=False)
    answered(vault, job(WANTED))
    vault.close()
    other = toml(study(name="other"), site.root / "other.json")
    done = ask("approve", site.root, other, expect=Refused.exit_status, answer="n\n")
    cohort = load_policy(site).cohort
    assert cohort is not None
    budget = cohort.filter()
    share = read_account(site.ledger_path).rdp(budget.order) / budget.capacity
    assert share > 0.001
    assert f"{share:.1%} is reserved; one session takes {share:.1%}" in done.stdout


def test_approving_tells_that_no_session_fits(site: SiteFolder, file: Path) -> None:
    set_policy(site, {"cohort": {"epsilon": 0.1, "delta": 1e-2}})
    assert "NO SESSION FITS" in ask("approve", site.root, file, "--yes").stdout
    set_policy(site, {"cohort": {"epsilon": 100.0, "delta": 1e-2}})
    other = toml(study(name="other"), site.root / "other.json")
    assert "NO SESSION FITS" not in ask("approve", site.root, other, "--yes").stdout


def test_the_budget_tells_whether_an_approval_stands(site: SiteFolder, file: Path) -> None:
    set_policy(site, {"cohort": {"epsilon": 100.0, "delta": 1e-2}})
    ask("approve", site.root, file, "--yes", "--valid-from", "2127-01-01")
    assert told("budget", site.root)["studies"][0]["standing"] == "from 2127-01-01"
    (made,) = load_policy(site).approved
    ended = made.model_copy(update={"valid_from": None, "valid_until": datetime(2020, 1, 2, tzinfo=UTC)})
    save_policy(site, load_policy(site).model_copy(update={"approved": (ended,)}))
    assert told("budget", site.root)["studies"][0]["standing"] == "ended 2020-01-02"


def test_a_header_of_one_column_asks_for_the_delimiter(site: SiteFolder, file: Path) -> None:
    site.data_path.write_text(site.data_path.read_text().replace(",", ";"))
    assert "[data] delimiter" in told("check", site.root, file, expect=DataError.exit_status)["remedy"]


def test_check_tells_how_many_who_withdrew_the_data_hold(site: SiteFolder, file: Path) -> None:
    assert "withdrawn_listed" not in told("check", site.root, file)
    patient = site.data_path.read_text().splitlines()[1].split(",")[0]
    ask("withdraw", site.root, "--id", patient, "--id", "misspelt")
    found = told("check", site.root, file)
    assert (found["withdrawn_listed"], found["withdrawn_of_these_here"]) == (2, 1)


def test_caps_and_dates_of_an_approval(site: SiteFolder, file: Path) -> None:
    set_policy(site, {"cohort": {"epsilon": 100.0, "delta": 1e-2}})
    made = told("approve", site.root, file, "--yes", "--epsilon", 0.5, "--delta", 1e-5, "--descriptions", 0,
                "--valid-from", "2127-01-01", "--valid-until", "2127-12-31")  # fmt: skip
    assert (made["session_epsilon"], made["session_delta"]) == (0.5, 1e-5)
    assert (made["epsilon"], made["delta"]) == (0.5, 1e-5)
    (found,) = load_policy(site).approved
    assert found.valid_from is not None
    assert found.valid_until is not None
    assert found.valid_from.isoformat() == "2127-01-01T00:00:00+00:00"
    assert found.valid_until.isoformat() == "2127-12-31T23:59:59+00:00"  # the last day, too


EIGHT = {"epsilon": 8.0, "delta": 1e-4}


@pytest.mark.parametrize(
    ("policy", "options", "status", "words"),
    [
        ({}, [], SiteError, "no lifetime budget"),
        ({"cohort": EIGHT}, ["--valid-until", "soon"], SiteError, "not a day"),
        ({"cohort": EIGHT}, ["--valid-until", "2020-01-01"], SiteError, "is over"),
        ({"cohort": EIGHT}, ["--valid-from", "2027-02-30"], SiteError, "not a day"),
        ({"cohort": EIGHT}, ["--epsilon", "-1"], SiteError, "session_epsilon"),
        (
            {"cohort": {"epsilon": 8.0, "delta": 1e-4}, "floors": {"public_size": 60}},
            [],
            Refused,
            "60 is the",
        ),
        (
            {"cohort": {"epsilon": 8.0, "delta": 1e-4}, "secure_aggregation": "required"},
            [],
            Refused,
            "secure",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_approved(
    site: SiteFolder, file: Path, policy: dict[str, Any], options: list[str], status: type, words: str
) -> None:
    if policy:
        set_policy(site, policy)
    before = fingerprint(site.root)
    done = ask("approve", site.root, file, "--yes", *options, expect=status.exit_status)
    assert words in done.output
    told("approve", site.root, file, "--yes", *options, expect=status.exit_status)
    assert fingerprint(site.root) == before


def test_programs_must_say_yes(site: SiteFolder, file: Path) -> None:
    set_policy(site, {"cohort": {"epsilon": 8.0, "delta": 1e-4}})
    assert told("approve", site.root, file, expect=Refused.exit_status)["error"] == "refused"
    assert load_policy(site).approved == ()


def test_a_public_cohort_is_declared_in_capitals(site: SiteFolder, tmp_path: Path) -> None:
    set_policy(site, {"cohort": {"epsilon": 8.0, "delta": 1e-4}})
    bare = toml(study(privacy={"mode": "none"}), tmp_path / "bare.json")
    done = ask("approve", site.root, bare, "--public-cohort", answer="y\n")
    assert "Privacy: NONE." in done.stdout
    assert "You declare that these records are PUBLIC" in done.stdout
    assert load_policy(site).approved[0].public


def test_revoking_says_whose(site: SiteFolder) -> None:
    allow(site, WANTED)
    done = ask("revoke", site.root, WANTED.digest[:8], "--by", "dean")
    assert "Revoked" in done.stdout
    assert load_policy(site).approved[0].revoked_by == "dean"
    done = ask("revoke", site.root, WANTED.digest[:8], expect=6)
    assert "0 approved studies begin with" in done.output
    allow(site, WANTED)
    assert told("revoke", site.root, WANTED.digest)["revoked"] == WANTED.digest
    assert told("revoke", site.root, WANTED.digest, expect=6)["error"] == "not-approved"
    assert "approved studies: 0" in ask("policy", site.root).stdout


# --- a site that has worked


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole session with statistics, one that ended after its first round; and a patient who withdrew."""
    folder = make_site(tmp_path_factory.mktemp("worked") / "site")
    allow(folder, WANTED, sessions=2)
    vault = open_vault(folder)
    for number in (0, 1, 2):
        answered(vault, job(WANTED, number, "whole"))
    ask("withdraw", folder.root, "--id", "PATIENT-ZEBRA")
    for number in (3, 4):
        answered(vault, job(WANTED, number, "whole"))
    answered(vault, job(WANTED, 1, "half"))
    vault.close()
    return folder.root


@pytest.fixture
def used(worked: Path, tmp_path: Path) -> SiteFolder:
    shutil.copytree(worked, tmp_path / "used")
    return SiteFolder(tmp_path / "used")


def test_withdrawing_by_id_and_by_file(site: SiteFolder, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_bytes("\ufeffpatient-1\r\n\n  patient-2 \npatient-1\n".encode())
    done = ask("withdraw", site.root, "--id", "PATIENT-ZEBRA", "--ids", ids)
    assert done.stdout.startswith("3 patients more on the list")
    assert "ZEBRA" not in done.output  # terminals are logged
    again = told("withdraw", site.root, "--id", "patient-2", "--id", "patient-3")
    assert again == {"site": "north", "added": 1, "list": str(site.withdrawn_path)}
    key = read_split_key(site)
    names = ("PATIENT-ZEBRA", "patient-1", "patient-2", "patient-3")
    assert load_withdrawn(site, key).patients == {patient_hash(key, n) for n in names}


@pytest.mark.parametrize("options", [[], ["--id", " "], ["--ids", "nowhere.txt"], ["--ids", "."]], ids=str)
def test_withdrawing_needs_somebody(site: SiteFolder, options: list[str]) -> None:
    ask("withdraw", site.root, *options, expect=SiteError.exit_status)
    assert not site.withdrawn_path.exists()


def test_withdrawing_needs_the_sites_secret(site: SiteFolder) -> None:
    site.split_key_path.unlink()
    for command in ("withdraw", "withdrawals"):
        done = ask(command, site.root, "--id", "patient-1", expect=SiteError.exit_status)
        assert "split.key: no such file" in done.output


def test_what_withdrawn_patients_took_part_in(used: SiteFolder) -> None:
    found = told("withdrawals", used.root)
    key = read_split_key(used)
    zebra = patient_hash(key, "PATIENT-ZEBRA").hex()
    assert (found["site"], found["patients"]) == ("north", 1)
    (one,) = found["took_part"]
    assert (one["patient"], one["study"], one["session"]) == (zebra, "small-study", "whole")
    assert one["statistics"] is True
    tests = int(zebra[:16], 16) < int(0.2 * 2**64)
    assert (one["rounds"], one["evaluations"]) == ((0, 1) if tests else (2, 0))
    assert 19.9 < one["epsilon"] < 22
    done = ask("withdrawals", used.root)
    assert "What 1 patients took part in" in done.stdout
    assert f"{zebra[:12]}…" in done.stdout
    assert "ZEBRA" not in done.stdout
    assert "A model that has left can't be called back." in done.stdout
    both = ask("withdrawals", used.root, "--id", "patient-5", "--id", "PATIENT-ZEBRA")
    assert both.stdout.count("PATIENT-ZEBRA") == 1
    assert both.stdout.count("patient-5") == 2  # two sessions
    assert told("withdrawals", used.root, "--id", "nobody")["patients"] == 1


def test_the_budget_of_a_site_that_has_worked(used: SiteFolder) -> None:
    found = told("budget", used.root)
    (row,) = found["studies"]
    plan = plan_study(WANTED, 50)
    assert row["sessions"] == 2
    assert row["epsilon_reserved"] == pytest.approx(2 * plan.epsilon + plan.statistics_epsilon)
    assert (row["epsilon_approved"], row["revoked"]) == (24.0, False)
    cohort = load_policy(used).cohort
    assert cohort is not None
    budget = cohort.filter()
    share = read_account(used.ledger_path).rdp(budget.order) / budget.capacity
    assert found["lifetime"] == {"epsilon": 1000.0, "delta": 0.01, "share_reserved": pytest.approx(share)}
    done = ask("budget", used.root)
    assert f"{row['epsilon_reserved']:.3f}" in done.stdout
    assert f"{share:.1%} of it is reserved" in done.stdout
    ask("revoke", used.root, WANTED.digest)
    assert "revoked" in ask("budget", used.root).stdout
    vault = open_vault(used)
    assert told("budget", used.root)["studies"][0]["sessions"] == 2  # while the vault runs
    vault.close()


def test_the_budget_of_a_site_that_has_not(site: SiteFolder) -> None:
    assert told("budget", site.root) == {"site": "north", "lifetime": None, "studies": []}
    assert "Budget of north" in ask("budget", site.root).stdout


# --- is the ledger whole?


def test_a_whole_ledger_is_verified(used: SiteFolder) -> None:
    entries = read_journal(used.ledger_path)
    found = told("ledger", "verify", used.root)
    head = entries[-1].hash
    assert found == {"site": "north", "entries": len(entries), "head": head, "certificates": 1}
    done = ask("ledger", "verify", used.root)
    for words in (
        f"{len(entries)} entries",
        "signed by this site",
        f"head: {head}",
        "only the coordinator notices",
    ):
        assert words in done.stdout
    vault = open_vault(used)
    assert told("ledger", "verify", used.root)["entries"] == len(entries)  # while it runs
    vault.close()


def test_a_ledger_that_is_not_begun_is_whole(site: SiteFolder) -> None:
    assert told("ledger", "verify", site.root)["entries"] == 0
    assert "head: none yet" in ask("ledger", "verify", site.root).stdout


def relinked(entries: list[Entry], key: SigningKey | None = None) -> list[Entry]:
    """Numbers, links and hashes made good, and signatures by a key that is not the site's."""
    found: list[Entry] = []
    for number, entry in enumerate(entries, start=1):
        made = _linked(number, entry.time, entry.kind, entry.body, found[-1].hash if found else GENESIS)
        signature = key.sign(bytes.fromhex(made.hash)).hex() if key else entry.signature
        found.append(replace(made, signature=signature))
    return found


STRANGER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
TAMPERING: dict[str, Callable[[list[Entry]], list[Entry]]] = {
    "the first is dropped": lambda e: e[1:],
    "one in the middle is dropped": lambda e: e[:4] + e[5:],
    "the last is dropped": lambda e: e[:-1],
    "all are dropped": lambda e: [],
    "two are swapped": lambda e: [*e[:3], e[4], e[3], *e[5:]],
    "one is doubled": lambda e: [*e[:4], e[3], *e[4:]],
    "one is cheaper": lambda e: [
        replace(x, body={**x.body, "epsilon": 0.01}) if x.kind == "reserve" else x for x in e
    ],
    "one is cheaper, and relinked": lambda e: relinked(
        [replace(x, body={**x.body, "epsilon": 0.01}) if x.kind == "reserve" else x for x in e]
    ),
    "one is dropped, and relinked": lambda e: relinked(e[:4] + e[5:]),
    "one is dropped, and all signed anew": lambda e: relinked(e[:4] + e[5:], STRANGER),
    "all signed anew": lambda e: relinked(e, STRANGER),
    "one signed anew": lambda e: [e[0], relinked(e, STRANGER)[1], *e[2:]],
    "a signature in capitals": lambda e: [replace(e[0], signature=e[0].signature.upper()), *e[1:]],
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_found_by_verify_and_by_the_vault(used: SiteFolder, kind: str) -> None:
    changed = TAMPERING[kind](read_journal(used.ledger_path))
    used.ledger_path.write_bytes(b"".join(e.line() for e in changed))
    before = fingerprint(used.root)
    done = ask("ledger", "verify", used.root, expect=LedgerError.exit_status)
    assert "ledger" in done.output
    assert told("ledger", "verify", used.root, expect=LedgerError.exit_status)["error"] == "ledger"
    with pytest.raises(LedgerError):
        open_vault(used)
    assert fingerprint(used.root) == before


def test_an_older_ledger_with_its_head_and_replies_is_found_by_the_certificates(used: SiteFolder) -> None:
    """Put back as of the second round: sound by itself."""
    lines = used.ledger_path.read_bytes().splitlines(keepends=True)
    used.ledger_path.write_bytes(b"".join(lines[:4]))
    used.head_path.unlink()
    shutil.rmtree(used.replies)
    done = ask("ledger", "verify", used.root, expect=LedgerError.exit_status)
    assert "whole.jws: certifies a head that the ledger does not have" in done.output
    assert "count this cohort's budget as spent" in done.output


def test_a_forged_certificate_is_found(used: SiteFolder) -> None:
    path = used.certificates / "whole.jws"
    token = path.read_text()
    path.write_text(token[:-2] + ("A" if token[-2] != "A" else "B") + token[-1])
    assert ask("ledger", "verify", used.root, expect=CertificateError.exit_status)


def test_verifying_needs_the_public_key(used: SiteFolder) -> None:
    used.signing_key_path.unlink()  # not the secret one: an auditor hasn't it
    ask("ledger", "verify", used.root)
    used.signing_key_path.with_suffix(".pub").unlink()
    assert "site.pub" in ask("ledger", "verify", used.root, expect=SiteError.exit_status).output


# --- what others can check


def test_the_certificate_of_a_finished_session(used: SiteFolder, tmp_path: Path) -> None:
    token = ask("certificate", used.root, "whole").stdout.strip()
    assert token == (used.certificates / "whole.jws").read_text()
    assert told("certificate", used.root, "whole") == {
        "site": "north",
        "session": "whole",
        "certificate": token,
    }
    done = ask("certificate", used.root, "whole", "--out", tmp_path / "proof.jws")
    assert f"fedward-audit verify {tmp_path / 'proof.jws'}" in done.stdout
    assert (tmp_path / "proof.jws").read_text() == token
    certified = read_certificate(token)
    assert certified.key == read_public_key(used.signing_key_path.with_suffix(".pub"))
    assert certified.claims.complete
    assert [r.round for r in certified.claims.releases] == [0, 1, 2, 3, 4]


def test_the_certificate_of_a_session_that_did_not_end(used: SiteFolder) -> None:
    vault = open_vault(used)
    claims = read_certificate(told("certificate", used.root, "half")["certificate"]).claims
    vault.close()
    assert (claims.session, claims.complete) == ("half", False)
    assert [r.round for r in claims.releases] == [1]
    assert claims.ledger.head == read_journal(used.ledger_path)[-1].hash
    assert claims.epsilon.training is not None
    assert 0 < claims.epsilon.training < 2
    assert not (used.certificates / "half.jws").exists()  # that is for the session's end


@pytest.mark.parametrize("session", ["nobody", "../whole", ""])
def test_a_session_that_left_nothing_has_no_certificate(used: SiteFolder, session: str) -> None:
    done = ask("certificate", used.root, session, expect=SiteError.exit_status)
    assert "nothing has left in a session" in done.output
    missing = used.root / "nowhere" / "x.jws"
    ask("certificate", used.root, "whole", "--out", missing, expect=SiteError.exit_status)


@pytest.mark.parametrize(
    "words",
    [["policy"], ["revoke", "abcdef"], ["withdraw", "--id", "x"], ["withdrawals"], ["budget"],
     ["ledger", "verify"], ["certificate", "one"]],
    ids=str,
)  # fmt: skip
def test_a_folder_that_is_no_site(tmp_path: Path, words: list[str]) -> None:
    place = 2 if words[0] == "ledger" else 1
    line = [*words[:place], tmp_path / "nowhere", *words[place:]]
    assert "site.toml" in ask(*line, expect=SiteError.exit_status).output
    assert told(*line, expect=SiteError.exit_status)["error"] == "site-invalid"


def test_a_revoked_study_is_refused_from_the_next_message_on(used: SiteFolder) -> None:
    vault = open_vault(used)
    answered(vault, job(WANTED, 2, "half"))
    ask("revoke", used.root, WANTED.digest)
    assert refused(vault, job(WANTED, 3, "half")).code == "not-approved"
    vault.close()
    assert told("ledger", "verify", used.root)["entries"] > 0
