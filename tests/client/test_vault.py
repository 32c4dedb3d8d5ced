"""The vault's one way in: what it refuses, what a refusal may say, and what a reply is made of."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from small import SECRETS, WIDTH, allow, answered, make_site, study, write_rows
from small import job as request_of

from client import training
from client import vault as module
from client.account import read_account, spending
from client.ledger import check_certificates
from client.policy import Policy, approval_of
from client.policy_file import approve, load_policy, revoke, save_policy, set_policy
from client.settings import SiteFolder
from client.site import open_vault
from client.vault import Vault
from common.cells import dense
from common.errors import DataError, LedgerError, SiteError
from common.histograms import EXACT_BINS
from common.journal import read_journal
from common.keys import read_public_key
from common.messages import Refusal, Reply, decode, encode, released
from common.models import parameter_arrays, study_model
from common.privacy.certificate import read_certificate
from common.privacy.noise import Seeded
from common.privacy.plan import plan_study
from common.statistics import layout
from common.study import Study

OPEN = {"mode": "none"}
WANTED = study()


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return make_site(tmp_path / "site")


@pytest.fixture
def vault(folder: SiteFolder) -> Iterator[Vault]:
    opened = open_vault(folder, durable=False)
    yield opened
    opened.close()


def job(wanted: Study = WANTED, number: int = 1, session: str = "first", **more: Any) -> bytes:
    return request_of(wanted, number, session, **more)


def refused(vault: Vault, request: bytes) -> str:
    content = vault.answer(request)
    assert_silent(content)
    message = decode(content)
    assert isinstance(message, Refusal), "it should have refused"
    return message.header.code


def assert_silent(content: bytes) -> None:
    for secret in SECRETS:
        assert secret.encode() not in content
        assert secret.encode().lower() not in content.lower()


def spent(folder: SiteFolder, wanted: Study = WANTED) -> float:
    found = spending(folder.ledger_path).get(wanted.digest)
    return found.epsilon if found else 0.0


# --- what is refused, and costs nothing


def test_without_a_policy_nothing_is_allowed(vault: Vault, folder: SiteFolder) -> None:
    assert not folder.policy_path.exists()
    assert refused(vault, job()) == "not-approved"
    assert spent(folder) == 0


def test_another_study_than_the_approved_one(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    assert refused(vault, job(study(algorithm={"rounds": 4}))) == "not-approved"
    answered(vault, job())


def test_a_policy_that_cannot_be_read_allows_nothing(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    whole = folder.policy_path.read_text()
    for broken in ("[[approved", whole + "\nextra = 1\n", whole.replace("epsilon = ", "epsilon = -"), "\xff"):
        folder.policy_path.write_text(broken)
        assert refused(vault, job()) == "unavailable"
    assert spent(folder) == 0
    folder.policy_path.unlink()
    assert refused(vault, job()) == "not-approved"


def test_revoked_in_the_middle(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    answered(vault, job())
    revoke(folder, WANTED.digest, "officer")
    assert refused(vault, job(number=2)) == "not-approved"
    assert refused(vault, job()) == "not-approved"  # not even what was answered before
    assert spent(folder) == pytest.approx(plan_study(WANTED, 50).epsilon)


def test_the_approved_copy_was_changed(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    path = folder.approved / f"{WANTED.digest}.json"
    path.write_bytes(path.read_bytes().replace(b'"rounds":3', b'"rounds":9'))
    assert refused(vault, job()) == "unavailable"
    path.write_bytes(b"{")
    assert refused(vault, job()) == "unavailable"
    path.unlink()
    assert refused(vault, job()) == "unavailable"
    assert spent(folder) == 0


def test_exact_metrics_of_private_patients(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    for number in (1, 4):
        assert refused(vault, job(number=number, metrics="exact")) == "refused"
    assert spent(folder) == 0


def no_longer_public(policy: Policy) -> Policy:
    kept = tuple(a.model_copy(update={"public": False}) for a in policy.approved)
    return policy.model_copy(update={"approved": kept})


def test_exact_metrics_after_the_cohort_stopped_being_public(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED, public=True)
    assert answered(vault, job(number=4, metrics="exact")).header.exact
    policy = load_policy(folder)
    save_policy(folder, no_longer_public(policy))
    assert refused(vault, job(number=4, metrics="exact")) == "refused"


def test_a_study_without_privacy(vault: Vault, folder: SiteFolder) -> None:
    bare = study(privacy=OPEN)
    with pytest.raises(Exception, match="public cohorts only"):
        allow(folder, bare)
    allow(folder, bare, public=True)
    policy = load_policy(folder)
    save_policy(folder, no_longer_public(policy))
    assert refused(vault, job(bare)) == "refused"
    protected = policy.approved[0].model_copy(update={"public": False, "epsilon": 9.0, "delta": 0.1})
    save_policy(folder, policy.model_copy(update={"approved": (protected,)}))
    assert refused(vault, job(bare)) == "refused"


@pytest.mark.parametrize("number", [5, 6, 1_000_000])
def test_a_round_beyond_the_plan(vault: Vault, folder: SiteFolder, number: int) -> None:
    allow(folder, WANTED)
    assert refused(vault, job(number=number)) == "refused"
    assert spent(folder) == 0


def test_a_second_session_beyond_the_budget(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    answered(vault, job())
    assert refused(vault, job(session="second")) == "budget-exhausted"
    answered(vault, job(number=2))
    assert spent(folder) <= (load_policy(folder).approved[0].epsilon or 0)


def test_the_budget_survives_revoking_and_approving_again(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    answered(vault, job())
    revoke(folder, WANTED.digest, "officer")
    allow(folder, WANTED)
    assert refused(vault, job(session="second")) == "budget-exhausted"


def test_another_study_in_the_same_session(vault: Vault, folder: SiteFolder) -> None:
    other = study(name="other")
    allow(folder, WANTED)
    allow(folder, other)
    answered(vault, job())
    assert refused(vault, job(other, number=2)) == "refused"
    assert spent(folder, other) == 0


def test_other_parameters_for_the_same_round(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    arrays = {n: a + 1 for n, a in parameter_arrays(study_model(WANTED)).items()}
    vault = open_vault(folder, durable=False)
    first = vault.answer(job())
    for _ in range(2):
        assert refused(vault, job(arrays=arrays)) == "refused"
        assert vault.answer(job()) == first
        vault.close()
        vault = open_vault(folder, durable=False)
    vault.close()


def bad_parameters() -> dict[str, dict[str, np.ndarray]]:
    good = parameter_arrays(study_model(WANTED))
    weight = next(n for n in good if n.endswith("weight"))
    return {
        "none": {},
        "one too many": {**good, "extra": np.zeros(3, np.float32)},
        "another name": {n.upper(): a for n, a in good.items()},
        "another shape": {**good, weight: good[weight].T.copy()},
        "doubles": {n: a.astype(np.float64) for n, a in good.items()},
        "whole numbers": {n: a.astype(np.int64) for n, a in good.items()},
        "NaN": {**good, weight: good[weight] * np.float32("nan")},
        "infinity": {**good, weight: good[weight] + np.float32("inf")},
    }


@pytest.mark.parametrize("kind", bad_parameters())
def test_parameters_of_another_model(vault: Vault, folder: SiteFolder, kind: str) -> None:
    allow(folder, WANTED)
    assert refused(vault, job(arrays=bad_parameters()[kind])) == "refused"
    answered(vault, job(number=2))  # the vault still works


@pytest.mark.parametrize("value", [1e30, 3e38])
@pytest.mark.parametrize(
    "model", [{"name": "logistic-regression"}, {"name": "mlp", "parameters": {"hidden": [3]}}]
)
def test_huge_parameters_bring_out_no_bit_of_the_data(
    tmp_path: Path, value: float, model: dict[str, Any]
) -> None:
    """Whether the answer is a refusal must not depend on the patients."""
    wanted = study(model=model)
    random = np.random.default_rng(0)
    arrays = {
        n: (np.sign(random.normal(size=a.shape)) * value).astype(np.float32)
        for n, a in parameter_arrays(study_model(wanted)).items()
    }
    for seed in range(3):
        folder = make_site(tmp_path / f"site-{seed}")
        write_rows(folder.root, 60, seed)
        allow(folder, wanted)
        vault = open_vault(folder, durable=False)
        for number in (1, 4):
            answered(vault, job(wanted, number, arrays=arrays))
        vault.close()


# --- an older copy


def heads_of(folder: SiteFolder) -> list[str]:
    return [entry.hash for entry in read_journal(folder.ledger_path)]


def test_an_older_state_folder_is_found_by_the_coordinators_anchor(tmp_path: Path) -> None:
    """Policy, ledger, head, replies, keys and certificates of an earlier day, all of them sound."""
    folder = make_site(tmp_path / "site")
    allow(folder, WANTED)
    vault = open_vault(folder)
    seen = answered(vault, job()).header.head
    vault.close()
    shutil.copytree(folder.root, tmp_path / "copy")
    vault = open_vault(folder)
    later = [answered(vault, job(number=n)).header.head for n in (2, 3)]
    vault.close()
    shutil.rmtree(folder.root)
    shutil.copytree(tmp_path / "copy", folder.root)

    vault = open_vault(folder)
    before = folder.ledger_path.read_bytes()
    for head in later:
        for wanted, number in ((WANTED, 1), (WANTED, 2), (study(name="other"), 1)):
            header = refused(vault, job(wanted, number, anchors={"north": head, "south": "0" * 64}))
            assert header == "ledger-rolled-back"
    message = decode(vault.answer(job(number=2, anchors={"north": later[0]})))
    assert isinstance(message, Refusal)
    assert "restore the latest ledger" in message.header.remedy
    assert folder.ledger_path.read_bytes() == before  # nothing was spent
    # who has seen no more than the copy, or only others, is answered
    answered(vault, job(number=2, anchors={"north": seen, "south": "f" * 64}))
    vault.close()


def test_a_whole_ledger_knows_all_that_it_ever_told(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    vault = open_vault(folder, durable=False)
    heads = [answered(vault, job(number=n, anchors={"north": "0" * 64})).header.head for n in (1, 2, 3)]
    assert len({*heads}) == 3
    reserved = [e.hash for e in read_journal(folder.ledger_path) if e.kind == "reserve"]
    assert heads == reserved
    for _ in range(2):
        for head in [*heads_of(folder), "0" * 64]:
            answered(vault, job(number=3, anchors={"north": head}))
        assert refused(vault, job(number=3, anchors={"north": "f" * 64})) == "ledger-rolled-back"
        vault.close()
        vault = open_vault(folder, durable=False)
    vault.close()


def test_what_the_coordinator_remembers_does_not_change_the_question(
    vault: Vault, folder: SiteFolder
) -> None:
    allow(folder, WANTED)
    first = vault.answer(job())
    head = heads_of(folder)[-1]
    for anchors in ({"north": head}, {"south": "f" * 64}, {}):
        assert vault.answer(job(anchors=anchors)) == first
    assert len(vault._ledger.account.reserved) == 1


def test_one_vault_a_site(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    for durable in (True, False):
        vault = open_vault(folder, durable=durable)
        with pytest.raises(LedgerError, match="another vault"):
            open_vault(folder, durable=durable)
        answered(vault, job())
        vault.close()


# --- what is given back


def failing_with(error: Exception) -> Callable[..., Any]:
    def failing(*_: object) -> None:
        raise error

    return failing


def patched(vault: Vault, records: Callable[..., Any]) -> None:
    vault._warm.holdings = type(vault._warm.holdings)(**{**vars(vault._warm.holdings), "records": records})


def test_what_failed_before_any_row_was_read_is_given_back(folder: SiteFolder) -> None:
    """The site's own files are wrong; when they are mended, its budget is whole."""
    allow(folder, WANTED)
    path = folder.root / "site.toml"
    sound = path.read_text()
    path.write_text(sound + '\n[data.columns.x]\nunit = "furlong"\n')
    vault = open_vault(SiteFolder(folder.root), durable=False)
    for session in ("first", "second"):  # one session is all that was granted
        assert refused(vault, job(session=session)) == "unavailable"
        assert spent(folder) == 0
    vault.close()
    kinds = [e.kind for e in read_journal(folder.ledger_path)]
    assert kinds == ["policy", "reserve", "abandon", "reserve", "abandon"]
    path.write_text(sound)
    vault = open_vault(SiteFolder(folder.root), durable=False)
    answered(vault, job(session="third"))
    assert spent(folder) > 0
    vault.close()


def test_what_failed_after_a_row_was_read_stays_spent(
    vault: Vault, folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(folder, WANTED)
    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_batch", failing_with(SiteError("late")))
        assert refused(vault, job()) == "unavailable"
    assert spent(folder) > 0
    answered(vault, job(number=2))
    with monkeypatch.context() as patch:  # the cohort is in memory by now
        patch.setattr(training, "draw_batch", failing_with(SiteError("warm")))
        assert refused(vault, job(number=3)) == "unavailable"
    assert sorted(vault._ledger.account.reserved) == [("first", 1), ("first", 2), ("first", 3)]
    assert refused(vault, job(session="second")) == "budget-exhausted"


@pytest.mark.parametrize("restart", [False, True])
def test_what_an_earlier_attempt_read_is_not_given_back_by_a_later_one(
    folder: SiteFolder, restart: bool
) -> None:
    """The first attempt read rows and failed, which the coordinator was told; the second failed before."""
    allow(folder, WANTED)
    vault = open_vault(folder, durable=False)
    real = vault._warm.holdings.records
    patched(vault, failing_with(DataError("a row that does not fit")))
    assert refused(vault, job()) == "unavailable"
    if restart:
        vault.close()
        vault = open_vault(folder, durable=False)
    patched(vault, failing_with(SiteError("no such file")))
    for _ in range(2):
        assert refused(vault, job()) == "unavailable"
        assert spent(folder) > 0
        assert [e.kind for e in read_journal(folder.ledger_path)] == ["policy", "reserve"]
    assert refused(vault, job(session="second")) == "budget-exhausted"
    patched(vault, real)
    answered(vault, job())
    vault.close()


def test_a_session_goes_on_after_a_round_that_was_given_back(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    answered(vault, job())
    whole = spent(folder)
    real = vault._warm.holdings.records
    patched(vault, failing_with(SiteError("no such file")))
    vault._warm.clear()
    assert refused(vault, job(number=2)) == "unavailable"
    patched(vault, real)
    assert spent(folder) == whole
    for number in (2, 3, 4):
        answered(vault, job(number=number))
    assert spent(folder) == whole


# --- what an error may say


@pytest.mark.parametrize("trouble", ["a secret value", "a column less", "no file", "broken", "duplicate"])
def test_trouble_with_the_data_stays_at_the_site(
    vault: Vault, folder: SiteFolder, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    allow(folder, WANTED)
    path = folder.data_path
    lines = path.read_text().splitlines()
    if trouble == "a secret value":
        path.write_text("\n".join([*lines, "PATIENT-ZEBRA,123.4567,0,0,0,sekretcode,123.4567"]) + "\n")
    elif trouble == "a column less":
        path.write_text("\n".join(line.replace("x_2", "secretcolumn2") for line in lines))
    elif trouble == "no file":
        path.unlink()
    elif trouble == "broken":
        path.write_bytes(b"\x00\xff" * 50)
    else:
        path.write_text("\n".join([*lines, lines[5]]) + "\n")
    content = vault.answer(job())
    assert_silent(content)
    message = decode(content)
    assert isinstance(message, Refusal)
    assert message.header.message == module.refusal("x", ValueError("y")).header.message
    text = f"{message.header.message} {message.header.remedy}"
    assert not any(character.isdigit() for character in text)
    assert str(folder.root) not in text
    for secret in ("PATIENT-ZEBRA", "123.4567", "sekretcode"):
        assert secret not in caplog.text
    # mended, the same request is answered on the same reservation
    path.write_text("\n".join(lines) + "\n")
    answered(vault, job())
    assert len(vault._ledger.account.reserved) == 1


def test_an_unforeseen_error_says_nothing(
    vault: Vault,
    folder: SiteFolder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    allow(folder, WANTED)

    def failing(*_: object) -> None:
        raise ValueError(f"row of {SECRETS[1]}: {SECRETS[2]}")

    with monkeypatch.context() as patched:
        patched.setattr(training, "draw_batch", failing)
        assert refused(vault, job()) == "unavailable"
    printed = "".join(capfd.readouterr())  # a service's output ends in a journal that others read
    for secret in SECRETS[1:3]:
        assert secret not in caplog.text
        assert secret not in printed
    answered(vault, job())


def test_a_failure_in_the_middle_leaves_nothing_in_the_warm_model(
    folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine keeps from step to step must not be half of a step."""
    allow(folder, WANTED)
    clean = open_vault(folder, randomness=Seeded(1), durable=False)
    expected = answered(clean, job(number=2)).update
    clean.close()
    folder.ledger_path.unlink()
    for path in folder.replies.iterdir():
        path.unlink()
    vault = open_vault(folder, randomness=Seeded(1), durable=False)

    def failing(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("client.linear.LinearGradients._many_each", failing)
        assert refused(vault, job()) == "unavailable"
    found = answered(vault, job(number=2)).update
    assert all((found[n] == expected[n]).all() for n in expected)
    vault.close()


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"x", b"\xff" * 100, save({"a": np.zeros(2)}), job()[:-3], job() + b"x",
     encode(Refusal(module.refusal("x", ValueError()).header))],
    ids=["nothing", "a byte", "noise", "no header", "cut", "longer", "a refusal"],
)  # fmt: skip
def test_bytes_that_are_no_job(vault: Vault, folder: SiteFolder, request_bytes: bytes) -> None:
    allow(folder, WANTED)
    assert refused(vault, request_bytes) == "message-malformed"
    assert spent(folder) == 0


def test_a_refusal_that_came_of_the_work_is_final(
    folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking again must not draw fresh noise: each outcome would tell something, for one price."""
    allow(folder, WANTED)
    vault = open_vault(folder, durable=False)

    def diverged(update: object) -> object:
        from common.errors import Refused

        raise Refused("local training diverged")

    with monkeypatch.context() as patched:
        patched.setattr(module, "finite", diverged)
        first = vault.answer(job())
    assert isinstance(decode(first), Refusal)
    for _ in range(2):
        assert vault.answer(job()) == first
        vault.close()
        vault = open_vault(folder, durable=False)
    vault.close()


# --- what a reply is made of


def test_a_whole_session(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    plan = plan_study(WANTED, 50)
    for number in (1, 2, 3):
        told = answered(vault, job(number=number))
        assert told.header.training == plan.training_event()
        assert told.header.evaluation is None
        assert not told.metrics
        assert {n: a.shape for n, a in told.update.items()} == {
            n: a.shape for n, a in parameter_arrays(study_model(WANTED)).items()
        }
    last = answered(vault, job(number=4))
    assert not last.update
    assert last.header.training is None
    assert last.header.evaluation == plan.evaluation_event(4)
    assert last.header.statistics is None
    assert last.header.weight == 40
    assert last.metrics["scores"].shape == (2, WANTED.evaluation.bins)
    assert (last.metrics["scores"] % 1 != 0).all()  # every cell is noised, the empty ones too
    assert spent(folder) <= 2.0


def test_noise_is_new_in_every_session_and_round(folder: SiteFolder) -> None:
    allow(folder, WANTED, sessions=3)
    vault = open_vault(folder, durable=False)
    updates = [answered(vault, job(session=s, number=n)).update for s in ("a", "b", "c") for n in (1, 2, 3)]
    flat = {np.concatenate([a.ravel() for a in u.values()]).tobytes() for u in updates}
    assert len(flat) == 9
    vault.close()


def test_the_weight_and_the_header_say_nothing_of_the_true_size(tmp_path: Path) -> None:
    headers = []
    for count in (51, 500):
        folder = make_site(tmp_path / f"site-{count}", count=count)
        allow(folder, WANTED)
        vault = open_vault(folder, durable=False)
        told = [answered(vault, job(number=n)).header for n in (1, 4)]
        headers.append([h.model_copy(update={"head": "", "certificate": None}) for h in told])
        claims = read_certificate(told[1].certificate or "").claims.model_dump()
        for name in ("issued_at", "policy", "ledger"):  # of its own date and its own keys
            del claims[name]
        for release in claims["releases"]:
            for name in ("head", "released", "withdrawn"):
                release.pop(name, None)
        headers[-1].append(claims)
        sizes = [len(vault.answer(job(number=n))) for n in (1, 4)]
        headers[-1].append(sizes)
        vault.close()
    assert headers[0] == headers[1]


def test_the_budget_is_reserved_before_the_data_is_read(
    folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(folder, WANTED)
    vault = open_vault(folder, durable=False)
    seen = []
    real = vault._warm.holdings.records

    def watched(wanted: Study) -> object:
        seen.append(spending(folder.ledger_path)[WANTED.digest].rounds)
        return real(wanted)

    monkeypatch.setattr(
        vault._warm,
        "holdings",
        type(vault._warm.holdings)(**{**vars(vault._warm.holdings), "records": watched}),
    )
    answered(vault, job())
    assert seen == [1]
    vault.close()


def test_a_public_cohort_may_be_exact(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED, public=True)
    told = answered(vault, job(number=4, metrics="exact"))
    assert told.header.exact
    assert dense(told.metrics)["scores"].shape == (2, EXACT_BINS)
    assert told.header.evaluation is None


def test_a_changed_public_size_does_not_go_on_with_an_old_session(folder: SiteFolder) -> None:
    wanted = study(training={"sample_rate": None, "patients_per_step": 10})
    allow(folder, wanted)
    vault = open_vault(folder, durable=False)
    answered(vault, job(wanted))
    vault.close()
    text = (folder.root / "site.toml").read_text().replace("public_size = 50", "public_size = 30")
    (folder.root / "site.toml").write_text(text)
    vault = open_vault(SiteFolder(folder.root), durable=False)
    assert refused(vault, job(wanted, number=2)) == "refused"
    vault.close()


def test_a_site_needs_its_split_key(folder: SiteFolder) -> None:
    folder.split_key_path.chmod(0o640)
    with pytest.raises(SiteError, match="others may read"):
        open_vault(folder)
    folder.split_key_path.unlink()
    with pytest.raises(SiteError, match="no such file"):
        open_vault(folder)


def test_nothing_of_the_data_is_in_any_file_it_writes(folder: SiteFolder) -> None:
    allow(folder, WANTED)
    vault = open_vault(folder, durable=False)
    for number in (1, 2, 3, 4):
        vault.answer(job(number=number))
    vault.close()
    for path in folder.root.rglob("*"):
        if path.is_file() and path != folder.data_path:
            assert_silent(path.read_bytes())


# --- statistics and the certificate

SURVEY = study(name="survey", statistics={"epsilon": 20.0, "delta": 1e-4, "bins": 4})


def test_statistics_are_answered_once_and_charged_apart(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, SURVEY)
    plan = plan_study(SURVEY, 50)
    first = vault.answer(job(SURVEY, 0))
    told = decode(first)
    assert isinstance(told, Reply)
    assert told.header.statistics == plan.statistics_event()
    assert (told.header.training, told.header.evaluation, told.header.certificate) == (None, None, None)
    assert {n: (a.shape, a.dtype) for n, a in told.metrics.items()} == {
        n: (s, np.dtype(np.float64)) for n, s in layout(SURVEY).items()
    }
    assert not told.update
    assert all((a % 1 != 0).any() for a in told.metrics.values() if a.size)
    assert vault.answer(job(SURVEY, 0)) == first
    assert spent(folder, SURVEY) == pytest.approx(plan.statistics_epsilon)
    answered(vault, job(SURVEY, 1))
    assert spent(folder, SURVEY) == pytest.approx(plan.statistics_epsilon + plan.epsilon)
    assert refused(vault, job(SURVEY, 0, "second")) == "budget-exhausted"


def test_statistics_that_nobody_asked_for(vault: Vault, folder: SiteFolder) -> None:
    allow(folder, WANTED)
    allow(folder, SURVEY)
    assert refused(vault, job(WANTED, 0)) == "refused"
    assert refused(vault, job(SURVEY, 0, arrays=parameter_arrays(study_model(SURVEY)))) == "refused"
    assert refused(vault, job(SURVEY, 0, metrics="exact")) == "refused"
    for wanted in (WANTED, SURVEY):
        scaling = {"mean": np.zeros(WIDTH), "deviation": np.ones(WIDTH)}
        for number in (0, 1):
            assert refused(vault, job(wanted, number, scaling=scaling)) == "refused"
        assert spent(folder, wanted) == 0


@pytest.mark.parametrize("kind", ["none", "half", "long", "infinite", "negative", "another type"])
def test_a_scaling_that_does_not_fit(vault: Vault, folder: SiteFolder, kind: str) -> None:
    data = {**SURVEY.data.model_dump(mode="json"), "scaling": "moments"}
    wanted = study(data=data, statistics={"epsilon": 20.0, "delta": 1e-4, "bins": 4})
    allow(folder, wanted)
    good = {"mean": np.zeros(WIDTH), "deviation": np.ones(WIDTH)}
    answered(vault, job(wanted, 0))
    before = spent(folder, wanted)
    bad: dict[str, dict[str, np.ndarray]] = {
        "none": {},
        "half": {"mean": good["mean"]},
        "long": {n: np.repeat(a, 2) for n, a in good.items()},
        "infinite": {**good, "mean": good["mean"] + np.inf},
        "negative": {**good, "deviation": -good["deviation"]},
        "another type": {n: a.astype(np.float32) for n, a in good.items()},
    }
    assert refused(vault, job(wanted, 1, scaling=bad[kind])) == "refused"
    assert spent(folder, wanted) == before
    answered(vault, job(wanted, 1, scaling=good))


def test_the_certificate_says_what_left(vault: Vault, folder: SiteFolder) -> None:
    """With the session's end, and the same to whoever asks again."""
    allow(folder, SURVEY)
    replies = {n: answered(vault, job(SURVEY, n)) for n in (0, 1, 2, 3, 4)}
    assert [n for n, r in replies.items() if r.header.certificate] == [4]
    token = replies[4].header.certificate or ""
    found = read_certificate(token)
    claims = found.claims
    assert answered(vault, job(SURVEY, 4)).header.certificate == token
    assert (folder.certificates / "first.jws").read_text() == token
    assert found.key == read_public_key(folder.signing_key_path.with_suffix(".pub"))
    assert [r.round for r in claims.releases] == [0, 1, 2, 3, 4]
    for release in claims.releases:
        reply = replies[release.round]
        assert release.released == released(reply.update, reply.metrics)
        assert release.head == reply.header.head
        assert release.training == reply.header.training
        assert release.evaluation == reply.header.evaluation
        assert release.statistics == reply.header.statistics
    assert claims.ledger.head in heads_of(folder)
    assert (claims.complete, claims.randomness, claims.policy) == (
        True,
        "operating-system",
        load_policy(folder).digest,
    )
    assert check_certificates(folder.certificates, read_account(folder.ledger_path)) == 1


def test_a_round_that_failed_does_not_run_again_under_another_plan(folder: SiteFolder) -> None:
    """Its price was that of the plan it was reserved with."""
    if load_policy(folder).cohort is None:
        set_policy(folder, {"cohort": {"epsilon": 1000.0, "delta": 1e-2}})
    capped = approval_of(WANTED, "officer", session_epsilon=0.1)
    plan = plan_study(WANTED, 50, load_policy(folder).limits(capped))
    approve(folder, WANTED, capped, plan)
    data = folder.data_path.read_bytes()
    folder.data_path.write_bytes(data.replace(b"0.", b"zero", 1))
    vault = open_vault(folder, durable=False)
    assert refused(vault, job()) == "unavailable"
    folder.data_path.write_bytes(data)
    revoke(folder, WANTED.digest, "officer")
    allow(folder, WANTED)
    assert b"planned otherwise" in vault.answer(job())
    assert spent(folder) == pytest.approx(plan.epsilon)
    vault.close()


def test_who_asks_meanwhile_does_not_learn_when_the_work_ended(
    folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vault takes the next request only once the padded answer has left."""
    wanted = study(privacy={**WANTED.privacy.model_dump(), "reply_seconds": 1.0})
    allow(folder, wanted)
    vault = open_vault(folder)
    slept: list[bool] = []
    monkeypatch.setattr("client.vault.time.sleep", lambda _: slept.append(vault._lock.locked()))
    answered(vault, job(wanted))
    assert slept == [True]
    vault.close()


def test_a_split_column_whose_file_changes_ends_the_session(tmp_path: Path) -> None:
    """Else a patient could train in one round and test in the next, for the price of one of them."""
    site = make_site(tmp_path / "column")
    lines = site.data_path.read_text().splitlines()
    sides = [",part", *(f",{'test' if hash_of(line) else 'train'}" for line in lines[1:])]
    site.data_path.write_text("\n".join(a + b for a, b in zip(lines, sides, strict=True)) + "\n")
    wanted = study(data={"split": {"by": "column", "column": "part"}})
    allow(site, wanted)
    vault = open_vault(site, durable=False)
    answered(vault, job(wanted))
    text = site.data_path.read_text()
    site.data_path.write_text(text.replace(",train", ",x").replace(",test", ",train").replace(",x", ",test"))
    assert b"planned otherwise" in vault.answer(job(wanted, 2))
    vault.close()


def hash_of(line: str) -> bool:
    """Whether a record's patient tests, by its name."""
    return sum(line.split(",")[0].encode()) % 3 == 0
