"""Consent withdrawn: honoured from the next step on, told by keyed hashes only, accounted for afterwards."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import WIDTH, allow, answered, epsilon_of_gaussians, job, make_site, refused, study, write_rows

from client import training
from client.account import read_account
from client.batches import Batch, draw_batch
from client.cohort import Patients, load_cohort, load_records
from client.participation import Participation, participations
from client.policy import approval_of
from client.policy_file import approve, revoke, set_policy
from client.settings import SiteFolder
from client.site import make_site_keys, open_vault, read_split_key
from client.vault import Vault
from client.withdrawal import (
    WithdrawnReader,
    key_line,
    list_of,
    listing,
    load_withdrawn,
    patient_hash,
    withdraw,
)
from common.cells import dense
from common.errors import SiteError
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import StepPlan, plan_study
from common.study import Study

COUNT = 60
NAMES = ["PATIENT-ZEBRA" if p == 3 else f"patient-{p}" for p in range(COUNT)]
WANTED = study(training={"local_steps": 4}, evaluation={"every": 1})
SURVEY = study(
    evaluation={"every": 1}, statistics={"epsilon": 100.0, "delta": 1e-2, "bins": 4}, name="survey"
)


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return make_site(tmp_path / "site", count=COUNT)


@pytest.fixture
def vault(folder: SiteFolder) -> Iterator[Vault]:
    opened = open_vault(folder, durable=False)
    yield opened
    opened.close()


@pytest.fixture
def key(folder: SiteFolder) -> bytes:
    return read_split_key(folder)


def by_part(folder: SiteFolder, wanted: Study, key: bytes) -> dict[str, list[str]]:
    """Names of those who train and of those who test, by the rule as schema and README state it."""
    border = int(wanted.data.split.test_fraction * 2**64)
    found: dict[str, list[str]] = {"train": [], "test": []}
    for name in NAMES:
        place = int.from_bytes(hmac.new(key, name.encode(), hashlib.sha256).digest()[:8], "big")
        found["test" if place < border else "train"].append(name)
    return found


# --- the list


def test_only_keyed_hashes_are_kept(folder: SiteFolder, key: bytes) -> None:
    assert withdraw(folder, key, ["PATIENT-ZEBRA", "patient-7"]) == 2
    assert withdraw(folder, key, ["patient-7", " patient-8 ", "", "  "]) == 1
    assert withdraw(folder, key, ["patient-8"]) == 0
    expected = {
        hmac.new(key, n.encode(), hashlib.sha256).digest()
        for n in ("PATIENT-ZEBRA", "patient-7", "patient-8")
    }
    assert load_withdrawn(folder, key).patients == expected
    for path in [folder.withdrawn_path, *folder.withdrawn_lists.iterdir()]:
        content = path.read_text()
        assert "ZEBRA" not in content
        assert "patient-" not in content
        assert path.stat().st_mode & 0o077 == 0
        lines = [line for line in content.splitlines() if not line.startswith("#")]
        assert lines == sorted(lines)  # the order doesn't tell who came when
        assert all(len(line) == 64 for line in lines)
    assert len(list(folder.withdrawn_lists.iterdir())) == 2
    assert "ZEBRA" not in repr(load_withdrawn(folder, key))
    assert "3" not in repr(load_withdrawn(folder, key))  # how many withdrew is private


ids = st.one_of(
    st.integers(0, 10**9).map(str),
    st.integers(0, 10**6).map(lambda n: f"{n}.0"),
    st.from_regex(r"0[0-9]{1,6}", fullmatch=True),
    st.from_regex(r"[A-Za-z][A-Za-z0-9 ./-]{0,10}[A-Za-z0-9]", fullmatch=True).filter(
        lambda s: s.lower() not in {"na", "nan", "null", "none", "n/a", "inf", "infinity", "nat"}
    ),
    st.text("äöéßñ中文ÅΩ", min_size=1, max_size=8),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(ids, min_size=1, max_size=5, unique_by=lambda s: s.removesuffix(".0")), st.booleans())
def test_an_id_is_found_however_the_table_writes_it(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], spaced: bool
) -> None:
    """What `withdraw` is given and what the data hold come to the same hash."""
    root = tmp_path_factory.mktemp("site")
    site = make_site(root, count=1)
    header = "patient_id," + ",".join(f"x_{i}" for i in range(WIDTH)) + ",y"
    cell = (lambda n: f'" {n} "') if spaced else (lambda n: f'"{n}"')
    rows = [",".join([cell(n), *["0.5"] * WIDTH, "1"]) for n in names]
    site.data_path.write_text("\n".join([header, *rows]) + "\n")
    secret = read_split_key(site)
    found = load_records(site, study(), secret).hashes
    assert set(found) == {patient_hash(secret, n) for n in names}


def test_the_digest_tells_nobody_else_which_list_it_is(folder: SiteFolder, key: bytes) -> None:
    empty = load_withdrawn(folder, key)
    assert empty.digest == hmac.new(key, b"withdrawn", hashlib.sha256).hexdigest()
    withdraw(folder, key, ["patient-1"])
    one = load_withdrawn(folder, key)
    assert (
        one.digest == hmac.new(key, b"withdrawn" + patient_hash(key, "patient-1"), hashlib.sha256).hexdigest()
    )
    assert one.digest != empty.digest
    assert listing(b"another secret, also long", one.patients).digest != one.digest
    assert one == listing(key, one.patients)


@pytest.mark.parametrize(
    "text", ["PATIENT-ZEBRA\n", "ab\n", "AB" * 32 + "\n", "ab" * 33 + "\n", "ab" * 32 + " x\n", "\xff\xfe\n"]
)
def test_a_bad_list_refuses_and_quotes_nothing(
    folder: SiteFolder, vault: Vault, key: bytes, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    allow(folder, SURVEY)
    withdraw(folder, key, ["patient-1"])
    sound = folder.withdrawn_path.read_bytes()
    folder.withdrawn_path.write_bytes(sound + text.encode("latin-1"))
    for number in (0, 1, 4):
        assert refused(vault, job(SURVEY, number)).code == "unavailable"
    assert read_account(folder.ledger_path).reserved == {}
    with pytest.raises(SiteError, match="line 4") as error:
        load_withdrawn(folder, key)
    assert text.strip() not in error.value.message
    assert "PATIENT-ZEBRA" not in caplog.text
    with pytest.raises(SiteError):
        withdraw(folder, key, ["patient-2"])
    folder.withdrawn_path.write_bytes(sound)
    answered(vault, job(SURVEY, 1))


def test_a_list_that_is_gone_is_not_an_empty_one(folder: SiteFolder, vault: Vault, key: bytes) -> None:
    allow(folder, WANTED)
    answered(vault, job(WANTED))
    withdraw(folder, key, ["patient-1"])
    kept = folder.withdrawn_path.read_bytes()
    answered(vault, job(WANTED, 2))
    folder.withdrawn_path.unlink()
    assert refused(vault, job(WANTED, 3)).code == "unavailable"
    for again in (load_withdrawn, lambda f, k: WithdrawnReader(f, k)()):
        with pytest.raises(SiteError, match="gone") as error:
            again(folder, key)
        assert str(folder.withdrawn_lists) in error.value.remedy
    with pytest.raises(SiteError):
        withdraw(folder, key, ["patient-2"])
    folder.withdrawn_path.write_bytes(kept)
    answered(vault, job(WANTED, 3))
    folder.withdrawn_path.write_text("")  # said by the site's operator: all consent again
    answered(vault, job(WANTED, 4))


def test_a_reader_looks_again_only_at_a_changed_file(folder: SiteFolder, key: bytes) -> None:
    reader = WithdrawnReader(folder, key)
    first = reader()
    assert first.patients == frozenset()
    assert reader() is first
    for names in (["patient-1"], ["patient-2", "patient-3"]):
        withdraw(folder, key, names)
        found = reader()
        assert found == load_withdrawn(folder, key)
        assert reader() is found
    assert len(found.patients) == 3


def test_every_list_that_was_in_force_is_kept(folder: SiteFolder, key: bytes) -> None:
    """Also one that was written by hand, with comments."""
    reader = WithdrawnReader(folder, key)
    hashes = [patient_hash(key, n).hex() for n in NAMES[:3]]
    digests = [reader().digest]
    for lines in (hashes[:1], hashes, hashes[1:]):
        folder.withdrawn_path.write_text("\n".join(["# by hand", "", key_line(key), *lines, ""]))
        digests.append(reader().digest)
    assert len(set(digests)) == 4
    found = [list_of(folder, key, d).patients for d in digests]
    assert [len(f) for f in found] == [0, 1, 3, 2]
    path = folder.withdrawn_lists / f"{digests[1]}.txt"
    path.write_text(f"{key_line(key)}\n{hashes[2]}\n")
    with pytest.raises(SiteError, match="not the list that was in force"):
        list_of(folder, key, digests[1])
    path.unlink()
    with pytest.raises(SiteError):
        list_of(folder, key, digests[1])


# --- honoured from the next step on


class Steps:
    """Sees who takes part in each step, and acts between steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, key: bytes) -> None:
        self.names = {patient_hash(key, n): n for n in NAMES}
        self.took_part: list[set[str]] = []
        self.before: dict[int, Any] = {}
        monkeypatch.setattr(training, "draw_batch", self.draw)

    def draw(self, patients: Patients, plan: StepPlan, stream: Stream) -> Batch:
        batch = draw_batch(patients, plan, stream)
        assert patients.hashes is not None
        first = np.searchsorted(patients.offsets.numpy(), batch.records.numpy(), side="right") - 1
        self.took_part.append({self.names[patients.hashes[i]] for i in set(first.tolist())})
        self.before.pop(len(self.took_part), lambda: None)()  # before the next step
        return batch


def test_within_a_running_round(
    folder: SiteFolder, vault: Vault, key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(folder, WANTED)
    train = by_part(folder, WANTED, key)["train"]
    gone = train[:5]
    steps = Steps(monkeypatch, key)
    steps.before[2] = lambda: withdraw(folder, key, gone[:3])  # between the second and the third step
    steps.before[3] = lambda: withdraw(folder, key, gone)
    first = answered(vault, job(WANTED))
    answered(vault, job(WANTED, 2))
    everybody = set(train)
    assert steps.took_part == [everybody, everybody, everybody - {*gone[:3]}, *[everybody - {*gone}] * 5]
    # what it costs doesn't tell
    assert first.header.training == plan_study(WANTED, 50).training_event()
    (one, two) = (read_account(folder.ledger_path).committed["first", n] for n in (1, 2))
    empty, full = listing(key, frozenset()).digest, load_withdrawn(folder, key).digest
    assert (one.reservation.withdrawn, one.withdrawn) == (empty, full)
    assert (two.reservation.withdrawn, two.withdrawn) == (full, full)


def test_a_withdrawn_patient_is_as_one_who_never_was(tmp_path: Path) -> None:
    """With the same seeds, a site that never had the patients gives the very same numbers."""
    updates, metrics = [], []
    for present in (True, False):
        site = make_site(tmp_path / str(present), count=COUNT)
        secret = bytes(range(32))
        names = by_part(site, WANTED, secret)
        gone = names["train"][:7] + names["test"][:3]
        if present:
            withdraw(site, secret, gone)
        else:
            lines = site.data_path.read_text().splitlines()
            site.data_path.write_text("\n".join(x for x in lines if x.split(",")[0] not in gone) + "\n")
        allow(site, WANTED)
        vault = open_vault(site, randomness=Seeded(3), split_key=secret, durable=False)
        told = [answered(vault, job(WANTED, n)) for n in (1, 2, 4)]
        updates.append([a.tobytes() for t in told for _, a in sorted(t.update.items())])
        metrics.append([a.tobytes() for t in told for _, a in sorted(t.metrics.items())])
        vault.close()
    assert updates[0] == updates[1]
    assert metrics[0] == metrics[1]
    assert metrics[0]


def test_at_the_next_message_in_evaluation(folder: SiteFolder, vault: Vault, key: bytes) -> None:
    """Of a public cohort, whose metrics are exact: they can be counted."""
    allow(folder, WANTED, public=True)
    test = by_part(folder, WANTED, key)["test"]
    counts = []
    for number, gone in ((2, []), (3, test[:2]), (4, test[:3])):
        withdraw(folder, key, gone)
        told = answered(vault, job(WANTED, number, metrics="exact"))
        counts.append(round(float(dense(told.metrics)["scores"].sum()), 6))
    assert counts == [len(test), len(test) - 2, len(test) - 3]


def test_at_the_next_message_in_statistics(tmp_path: Path) -> None:
    """Four hundred patients, of whom three quarters withdraw; a little noise."""
    site = make_site(tmp_path / "site", count=400)
    allow(site, SURVEY)
    set_policy(site, {"cohort": {"epsilon": 1000.0}})
    vault = open_vault(site, durable=False)
    secret = read_split_key(site)
    revoke(site, SURVEY.digest, "dean")
    approve(site, SURVEY, approval_of(SURVEY, "officer", descriptions=3), plan_study(SURVEY, 50))
    counts = []
    for session, gone in (("a", []), ("b", [f"patient-{i}" for i in range(100, 400)])):
        withdraw(site, secret, gone)
        counts.append(float(answered(vault, job(SURVEY, 0, session)).metrics["label"].sum()))
    assert counts[0] == pytest.approx(400, abs=40)
    assert counts[1] == pytest.approx(100, abs=40)
    withdraw(site, secret, [*(f"patient-{i}" for i in range(100)), "PATIENT-ZEBRA"])
    header = refused(vault, job(SURVEY, 0, "c"))
    assert (header.code, "fewer than" in header.message) == ("policy-forbids", True)
    vault.close()


def test_when_all_have_withdrawn_only_noise_is_left(folder: SiteFolder, vault: Vault, key: bytes) -> None:
    allow(folder, WANTED)
    first = answered(vault, job(WANTED))
    withdraw(folder, key, NAMES)
    plan = plan_study(WANTED, 50)
    for number in (2, 3, 4):
        told = answered(vault, job(WANTED, number))
        assert told.header.training == (first.header.training if number < 4 else None)
        assert told.header.weight == first.header.weight
        if number < 4:
            numbers = np.concatenate([a.ravel() for a in told.update.values()])
            step = plan.step
            assert step.clipping_norm is not None
            # σ C / divisor a step, times the learning rate, over four steps
            deviation = 0.5 * step.noise_multiplier * step.clipping_norm / step.divisor * 2
            assert np.isfinite(numbers).all()
            assert numbers.std() > 0
            assert np.abs(numbers).max() < 8 * deviation
        scores = told.metrics["scores"]
        noise = plan.histogram_of(number).noise_multiplier * plan.histogram.sensitivity
        assert np.abs(scores).max() < 8 * noise
        assert (scores != 0).all()


def test_no_file_but_the_data_holds_an_id(folder: SiteFolder, vault: Vault, key: bytes) -> None:
    allow(folder, WANTED)
    withdraw(folder, key, ["PATIENT-ZEBRA"])
    for number in (1, 2, 3, 4):
        answered(vault, job(WANTED, number))
    for path in folder.root.rglob("*"):
        if path.is_file() and path != folder.data_path:
            assert b"PATIENT-ZEBRA" not in path.read_bytes(), path


# --- afterwards: what a patient took part in


def report(folder: SiteFolder, key: bytes, *names: str) -> dict[tuple[str, str], Participation]:
    """(name, session) → what it says."""
    hashes = {patient_hash(key, n).hex(): n for n in names}
    found = participations(folder, key, [bytes.fromhex(h) for h in hashes])
    assert len({(p.patient, p.session) for p in found}) == len(found)
    return {(hashes[p.patient], p.session): p for p in found}


def test_the_report_is_what_a_hand_computes(folder: SiteFolder, key: bytes) -> None:
    """Four patients: one of each part withdraws after round 2, the others from the start, or never."""
    wanted = study(evaluation={"every": 1}, statistics={"epsilon": 100.0, "delta": 1e-4, "bins": 4})
    parts = by_part(folder, wanted, key)
    trainer, tester = parts["train"][0], parts["test"][0]
    never, before = parts["train"][1], parts["train"][2]
    allow(folder, wanted, sessions=2)
    withdraw(folder, key, [before])
    vault = open_vault(folder, durable=False)
    for number in (0, 1, 2):
        answered(vault, job(wanted, number))
    withdraw(folder, key, [trainer, tester])
    for number in (3, 4):
        answered(vault, job(wanted, number))
    answered(vault, job(wanted, 1, "later"))
    vault.close()

    plan = plan_study(wanted, 50)
    sigma, steps = plan.step.noise_multiplier, plan.steps_per_round
    histogram, final = plan.histogram.noise_multiplier, plan.final_histogram.noise_multiplier
    assert plan.statistics is not None
    statistics = epsilon_of_gaussians([plan.statistics.noise_multiplier], 1e-4)
    found = report(folder, key, trainer, tester, never, before)
    assert set(found) == {(trainer, "first"), (tester, "first"), (never, "first"), (never, "later")}

    one = found[trainer, "first"]
    assert (one.group, one.rounds, one.evaluations, one.statistics) == ("training", 2, 0, True)
    assert one.epsilon == pytest.approx(
        epsilon_of_gaussians([sigma] * 2 * steps, 1e-3) + statistics, rel=1e-6
    )
    assert one.delta == pytest.approx(1e-3 + 1e-4)
    two = found[tester, "first"]
    assert (two.group, two.rounds, two.evaluations, two.statistics) == ("test", 0, 1, True)
    assert two.epsilon == pytest.approx(epsilon_of_gaussians([histogram], 1e-3) + statistics, rel=1e-6)
    whole = found[never, "first"]
    assert (whole.group, whole.rounds, whole.evaluations, whole.statistics) == ("training", 3, 0, True)
    assert whole.epsilon == pytest.approx(
        epsilon_of_gaussians([sigma] * 3 * steps, 1e-3) + statistics, rel=1e-6
    )
    assert whole.epsilon == pytest.approx(2.0 + 100.0, rel=1e-3)
    later = found[never, "later"]
    assert (later.rounds, later.statistics, later.delta) == (1, False, 1e-3)
    assert later.epsilon == pytest.approx(epsilon_of_gaussians([sigma] * steps, 1e-3), rel=1e-6)
    assert {p.study for p in found.values()} == {wanted.name}

    everyone = report(folder, key, parts["test"][1])["first" and parts["test"][1], "first"]
    assert everyone.evaluations == 3  # in rounds 2 and 3, and at the end
    assert everyone.epsilon == pytest.approx(
        epsilon_of_gaussians([histogram, histogram, final], 1e-3) + statistics, rel=1e-6
    )


def test_who_withdraws_within_a_round_took_part_in_it(
    folder: SiteFolder, vault: Vault, key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(folder, WANTED)
    name = by_part(folder, WANTED, key)["train"][0]
    steps = Steps(monkeypatch, key)
    steps.before[1] = lambda: withdraw(folder, key, [name])
    answered(vault, job(WANTED))
    answered(vault, job(WANTED, 2))
    assert report(folder, key, name)[name, "first"].rounds == 1


def test_what_did_not_leave_does_not_count(folder: SiteFolder, key: bytes) -> None:
    allow(folder, WANTED)
    vault = open_vault(folder, durable=False)
    name = by_part(folder, WANTED, key)["train"][0]
    assert report(folder, key, name) == {}
    data = folder.data_path.read_bytes()
    folder.data_path.write_bytes(b"broken")
    assert refused(vault, job(WANTED)).code == "unavailable"
    assert report(folder, key, name) == {}
    folder.data_path.write_bytes(data)
    answered(vault, job(WANTED))
    assert report(folder, key, name)[name, "first"].rounds == 1
    vault.close()


def test_without_noise_there_is_no_bound(folder: SiteFolder, vault: Vault, key: bytes) -> None:
    """Never a zero: it would say that nothing was given away."""
    bare = study(privacy={"mode": "none"}, name="bare")
    for wanted in (bare, WANTED):
        allow(folder, wanted, sessions=2, public=True)
    parts = by_part(folder, WANTED, key)
    trainer, tester = parts["train"][0], parts["test"][0]
    answered(vault, job(bare, 1, "bare"))
    answered(vault, job(WANTED, 4, "exact", metrics="exact"))
    answered(vault, job(WANTED, 1, "noised"))
    found = report(folder, key, trainer, tester)
    assert found[trainer, "bare"].epsilon is None
    assert found[trainer, "bare"].rounds == 1
    assert found[tester, "exact"].epsilon is None
    assert found[tester, "exact"].evaluations == 1
    assert found[trainer, "exact"].epsilon == 0.0
    noised = found[trainer, "noised"].epsilon
    assert noised is not None
    assert 0 < noised < 2


def test_where_a_column_splits_nobody_knows_the_part(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", count=COUNT)
    lines = site.data_path.read_text().splitlines()
    told = [
        line + ("," + ("part" if i == 0 else "test" if line.split(",")[0].endswith(("1", "2")) else "train"))
        for i, line in enumerate(lines)
    ]
    site.data_path.write_text("\n".join(told) + "\n")
    split = {"by": "column", "column": "part", "test_fraction": 0.2}
    data = {**WANTED.data.model_dump(mode="json"), "split": split}
    wanted = study(data=data, evaluation={"every": 1})
    allow(site, wanted)
    vault = open_vault(site, durable=False)
    answered(vault, job(wanted, 1))
    answered(vault, job(wanted, 2))
    vault.close()
    plan, secret = plan_study(wanted, 50), read_split_key(site)
    (found,) = report(site, secret, "patient-5").values()
    assert (found.group, found.rounds, found.evaluations) == ("either", 2, 1)
    dearer = max(
        epsilon_of_gaussians([plan.step.noise_multiplier] * 4, 1e-3),
        epsilon_of_gaussians([plan.histogram.noise_multiplier], 1e-3),
    )
    assert found.epsilon == pytest.approx(dearer, rel=1e-6)


def test_a_lost_list_or_study_is_named(folder: SiteFolder, vault: Vault, key: bytes) -> None:
    allow(folder, WANTED)
    withdraw(folder, key, ["patient-1"])
    answered(vault, job(WANTED))
    (kept,) = folder.withdrawn_lists.iterdir()
    content = kept.read_bytes()
    kept.unlink()
    with pytest.raises(SiteError, match=kept.name):
        report(folder, key, "patient-2")
    kept.write_bytes(content)
    path = folder.approved / f"{WANTED.digest}.json"
    path.unlink()
    with pytest.raises(SiteError, match=path.name):
        report(folder, key, "patient-2")


def test_the_cohort_is_split_as_the_report_says(folder: SiteFolder, key: bytes) -> None:
    cohort = load_cohort(folder, WANTED, key)
    parts = by_part(folder, WANTED, key)
    assert cohort.train.hashes is not None
    assert cohort.test.hashes is not None
    assert set(cohort.train.hashes) == {patient_hash(key, n) for n in parts["train"]}
    assert set(cohort.test.hashes) == {patient_hash(key, n) for n in parts["test"]}
    write_rows(folder.root, COUNT, seed=9)  # another export of the same patients
    again = load_cohort(folder, WANTED, key)
    assert again.train.hashes == cohort.train.hashes


def test_another_split_key_does_not_bring_withdrawn_patients_back(
    folder: SiteFolder, vault: Vault, key: bytes
) -> None:
    """Its hashes match nobody, so the list would be honoured for nobody."""
    withdraw(folder, key, NAMES[:2])
    vault.close()
    folder.split_key_path.unlink()
    with pytest.raises(SiteError, match="no such file") as missing:
        open_vault(folder, durable=False)
    assert "forgets who withdrew" in missing.value.remedy
    make_site_keys(folder)
    with pytest.raises(SiteError, match="another secret"):
        load_withdrawn(folder, read_split_key(folder))
    again = open_vault(folder, durable=False)
    allow(folder, SURVEY)
    assert refused(again, job(SURVEY, 1)).code == "unavailable"
    again.close()
