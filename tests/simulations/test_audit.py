"""The audit would catch us: planted faults, sound runs, a served vault, and the report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import audited
import numpy as np
import pytest
import small
from faulty import FAULTS, planted
from jwt import PyJWS
from typer.testing import CliRunner

from common.errors import StudyError
from common.keys import make_signing_key
from common.privacy.plan import plan_study
from common.study import Study
from simulations.audit.cli import app
from simulations.audit.conformance import FALSE_ALARM
from simulations.audit.differences import differences
from simulations.audit.lower_bound import one_run
from simulations.audit.report import as_html, as_json, write_report
from simulations.audit.run import Size, audit, sent

SIZE = Size(300, 40)


def study(model: str = "logistic-regression", epsilon: float = 4.0) -> Study:
    return audited.study(model, epsilon=epsilon)


# Of a fault's checks, the one that is named here raises an alarm; others may, too
CAUGHT_BY = {
    "σ halved": "noise variance, empty columns",
    "noise from a fixed seed, the same in each round": "noise is new in each round",
    "the same noise on two sites": "noise is each site's own",
    "no noise on one tensor": "noise variance, 0.bias",
    "uniform noise": "noise is normal, empty columns",
    "no clipping": "clipping and sampling, patients with one record",
    "clipped at 2 C": "clipping and sampling, patients with one record",
    "each layer clipped at C": "noise variance, 0.bias",
    "the batch's mean clipped": "clipping and sampling, patients with one record",
    "micro-batches of four clipped": "clipping and sampling, patients with one record",
    "record instead of patient as the unit": "clipping and sampling, patients with many records",
    "Poisson claimed, but shuffled": "each patient's coins are its own",
    "divided by the batch's true size": "noise variance, empty columns",
    "the cap on a patient's records ignored": "no more records of a patient than the cap",
    "steps under-counted": "noise variance, empty columns",
    "a buffer that data changes leaves without noise": "only the model's parameters leave",
    "Adam's state from gradients without noise": "clipping and sampling, patients with one record",
    "evaluation without noise": "evaluation's noise, scores",
}


def test_every_fault_has_its_check() -> None:
    assert FAULTS.keys() == CAUGHT_BY.keys()


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_planted_fault_is_caught(fault: str) -> None:
    with planted(fault):
        found = sent(study(), 200, size=SIZE)
    assert CAUGHT_BY[fault] in {check.name for check in found.alarms}


@pytest.mark.parametrize("fault", ["clipped at 2 C", "each layer clipped at C"])
def test_finite_differences_go_through_the_trainer(fault: str) -> None:
    asked = audited.study("mlp", clipping_norm=0.1)
    plan = plan_study(asked, 200)
    assert all(each.sound for each in differences(asked, plan))
    with planted(fault):
        assert not all(each.sound for each in differences(asked, plan))


@pytest.mark.parametrize("model", ["logistic-regression", "linear-svm", "mlp"])
def test_a_sound_site_raises_no_alarm(model: str) -> None:
    """Once in a hundred runs it may, by chance; so the test asks for p-values that are not tiny."""
    found = audit(study(model), 200, size=SIZE, seed=1)
    assert min(c.p for c in found.conformance.checks) > FALSE_ALARM / 1000
    assert not any(bound.refuted for bound in found.bounds)


def test_the_bound_is_near_the_claim() -> None:
    found = audit(study(epsilon=8.0), 200, size=Size(1000, 40))
    for bound in found.bounds:
        assert bound.claimed == pytest.approx(8.0, rel=0.01)
        assert bound.by_trade_off > 4.0
        assert 7.0 < bound.by_noise < 8.5


def test_one_run_knows_nothing_of_coins() -> None:
    """Theorem 5.2 on guesses that are no better than chance, and on perfect ones."""
    random = np.random.default_rng(0)
    present = random.random(2000) < 0.5
    assert one_run(random.random(2000), present, 1e-5) < 0.3
    assert one_run(present + 0.1 * random.random(2000), present, 0.0) > 3.0


def test_a_served_vault_passes_through_its_socket() -> None:
    found = audit(study(), 200, size=Size(100, 10), deployed=True)
    assert found.deployed
    assert min(c.p for c in found.conformance.checks) > FALSE_ALARM / 1000


def test_the_report_is_signed_and_escaped(tmp_path: Path) -> None:
    asked = study().model_copy(update={"title": "<script>alert(1)</script>"})
    found = audit(asked, 200, size=Size(60, 4))
    key = make_signing_key(tmp_path / "auditor.pem")
    page = write_report(tmp_path / "out", found, key)
    signed = PyJWS(algorithms=["EdDSA"]).decode(
        (tmp_path / "out" / "audit.jws").read_text(), key.public.native, algorithms=["EdDSA"]
    )
    digests = json.loads(signed)
    assert digests["audit.html"] == hashlib.sha256(page.read_bytes()).hexdigest()
    told = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert told["claim"]["epsilon"] == 4.0
    assert told["checks"]
    assert "<script>" not in page.read_text()


def test_a_claim_that_fails_is_marked() -> None:
    with planted("σ halved"):
        found = audit(study(), 200, size=Size(60, 8))
    told = as_json(found)
    assert not told["sound"]
    page = as_html(told)
    assert "does not hold" in page
    assert "<tr class=no>" in page


def test_what_has_no_claim_is_refused() -> None:
    with pytest.raises(StudyError, match="promises no privacy"):
        audit(small.study(privacy={"mode": "none"}), 200)


def test_the_command_writes_the_report(tmp_path: Path) -> None:
    file = small.toml(study(), tmp_path / "study.json")
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["sound"]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"audit.html", "audit.json", "audit.jws"}
