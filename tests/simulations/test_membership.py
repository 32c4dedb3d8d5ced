"""Membership inference: each formula against another way to it, and what privacy is seen to change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import small
import torch
from scipy.stats import binomtest, norm
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from client.cohort import Patients
from common.errors import FedwardError
from common.models import parameter_arrays, study_model
from common.privacy.mechanism import SubsampledGaussian
from common.privacy.noise import Seeded
from common.study import Study
from simulations.audit import membership as module
from simulations.audit.membership import lira, membership, rmia
from simulations.audit.plots import log_log
from simulations.audit.roc import Ceiling, ceiling_of, curve_of, each_auc, interval, largest_tpr
from simulations.audit.shadows import Shadows, chosen_of, confidences, pool_of, pooled

MODELS = 32
WIDTH = 30
SVG = "{http://www.w3.org/2000/svg}"


def asked(model: dict[str, Any], privacy: dict[str, Any], rounds: int, **training: Any) -> Study:
    column = {"kind": "numeric", "name": "x", "unit": "1", "range": [-20, 20], "repeat": WIDTH}
    return small.study(
        data={"columns": [column]},
        model=model,
        privacy=privacy,
        algorithm={"rounds": rounds},
        training={"sample_rate": 1.0, "local_steps": 1, **training},
    )


def biopsies(wrong: np.ndarray | None = None) -> Patients:
    """569 patients with one record each; `wrong` ones have the other label."""
    features, labels = load_breast_cancer(return_X_y=True)
    labels = labels if wrong is None else np.where(wrong, 1 - labels, labels)
    scaled = StandardScaler().fit_transform(features).astype(np.float32)
    return Patients(
        torch.from_numpy(scaled), torch.from_numpy(labels.astype(np.int64)), torch.arange(len(labels) + 1)
    )


def made_up(models: int = 20, patients: int = 30) -> Shadows:
    random = np.random.default_rng(5)
    member = random.random((models, patients)) < 0.5
    confidence = random.normal(size=member.shape) + 0.5 * member
    return Shadows(member, confidence, 1 / (1 + np.exp(-confidence)), None)


# --- the formulas


def test_curves_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    member = random.random(500) < 0.4
    scores = np.round(random.normal(size=500) + member, 1)  # with ties
    curve = curve_of(scores[:, None], member[:, None])  # a model each: independent
    assert curve.auc == pytest.approx(roc_auc_score(member, scores), abs=1e-12)
    for rate in (0.0, 0.001, 0.01, 0.2, 1.0):
        point = curve.at(rate)
        best = max(
            (scores[member] >= t).mean()
            for t in [*np.unique(scores), math.inf]
            if (scores[~member] >= t).mean() <= rate
        )
        assert point.tpr == pytest.approx(best)
        assert point.fpr <= rate
        assert point.low <= point.tpr <= point.high
        assert point.least <= point.fpr <= point.most
    with pytest.raises(ValueError, match="members and others"):
        curve_of(scores[:, None], np.ones((500, 1), dtype=np.bool_))


def test_aucs_of_single_patients() -> None:
    shadows = made_up()
    member = shadows.member.copy()
    member[:, 0] = True
    found = each_auc(shadows.confidence, member)
    assert found[0] == 0.5
    expected = [roc_auc_score(member[:, i], shadows.confidence[:, i]) for i in range(1, member.shape[1])]
    np.testing.assert_allclose(found[1:], expected)


@pytest.mark.parametrize(("count", "trials"), [(0, 50), (3, 50), (50, 50), (120, 1000)])
def test_intervals_are_clopper_and_pearson_s(count: int, trials: int) -> None:
    expected = binomtest(count, trials).proportion_ci(0.95, method="exact")
    assert interval(count, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_intervals_allow_for_patients_of_one_model() -> None:
    """Ten copies of each trial make no interval shorter; and they hold as often as they say."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        member = random.random((60, 1)) < 0.5
        scores = random.normal(size=(60, 1)) + member
        single, copied = (curve_of(np.repeat(scores, n, 1), np.repeat(member, n, 1)).at(0.2) for n in (1, 10))
        assert single.tpr == copied.tpr
        assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.06)
        share = (scores[member] >= 1.0).mean()
        curve = curve_of(np.repeat(scores, 10, 1), np.repeat(member, 10, 1))
        low, high = curve._interval(curve.scores >= 1.0, curve.member, 0.95)
        assert low <= share <= high
        held += low <= 0.5 <= high
    assert held >= 180


@pytest.mark.parametrize(("eps", "delta"), [(0.1, 0.0), (1.0, 1e-4), (2.0, 0.05), (8.0, 1e-5)])
def test_no_attack_on_a_mechanism_with_epsilon_and_delta_reaches_more(eps: float, delta: float) -> None:
    """The pair that all (ε, δ) mechanisms come from has four outcomes; its best tests are known (Neyman and
    Pearson)."""
    likely, seldom = (1 - delta) * math.exp(eps) / (1 + math.exp(eps)), (1 - delta) / (1 + math.exp(eps))
    without, present = np.array([0.0, seldom, likely, delta]), np.array([delta, likely, seldom, 0.0])
    fpr, tpr = np.append(0, np.cumsum(without)), np.append(0, np.cumsum(present))
    for rate in (0.0, 0.001, 0.01, 0.3, 0.9, 1.0):
        assert largest_tpr(eps, delta, rate) == pytest.approx(np.interp(rate, fpr, tpr), abs=1e-9)


def test_a_gaussian_mechanism_s_ceiling_is_its_trade_off_function() -> None:
    """16 releases at σ = 8 are one at μ = 1/2 (Dong, Roth and Su 2022)."""
    ceiling = ceiling_of(SubsampledGaussian(noise_multiplier=8.0, sample_rate=1.0, steps=16), 1e-4)
    for rate in (0.001, 0.01, 0.1, 0.5):
        exact = norm.cdf(norm.ppf(rate) + 0.5)
        assert exact - 1e-9 <= ceiling.at(rate) <= 1.05 * exact
        assert ceiling.at(rate) <= ceiling.of_claim(rate)


def test_confidences_are_log_odds_of_the_true_label() -> None:
    for count in (2, 3):
        task = {"task": "binary" if count == 2 else "multi-class"}
        wanted = small.study(data={"label": small.classes(count)}, objective=task, model={"name": "mlp"})
        people = small.patients([1, 3, 2, 1], outputs=count)
        network = study_model(wanted, seed=4)
        found, right = confidences(wanted, parameter_arrays(network), people)
        with torch.no_grad():
            outputs = network(people.features).double()
        logits = torch.cat([torch.zeros_like(outputs), outputs], dim=1) if count == 2 else outputs
        p = logits.softmax(dim=1).gather(1, people.labels[:, None])[:, 0].numpy()
        odds, owner = np.log(p / (1 - p)), np.repeat(np.arange(4), [1, 3, 2, 1])
        expected = [odds[owner == patient].mean() for patient in range(4)]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        if count == 2:
            np.testing.assert_array_equal(right, np.array(expected) > 0)


def test_confidences_in_regression_are_losses() -> None:
    label = {"column": "y", "range": [0, 10], "unit": "1"}
    wanted = small.study(data={"label": label}, objective={"task": "regression"}, model={"name": "mlp"})
    people = small.patients([1, 1, 1])
    people = Patients(people.features, people.labels.float() / 2, people.offsets)
    network = study_model(wanted, seed=4)
    found, _ = confidences(wanted, parameter_arrays(network), people)
    with torch.no_grad():
        expected = -(network(people.features)[:, 0] - people.labels).square()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
def test_lira_is_the_ratio_of_two_normal_laws(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OWN_SPREAD", 2 if own else 1000)
    shadows = made_up()
    found = lira(shadows)
    for target in (0, 7):
        others = [k for k in range(20) if k != target]
        laws: dict[bool, list[np.ndarray]] = {
            there: [
                np.array([shadows.confidence[k, i] for k in others if shadows.member[k, i] == there])
                for i in range(30)
            ]
            for there in (True, False)
        }
        for i in (0, 11, 29):
            log = {}
            for there, values in laws.items():
                free = sum(len(v) - 1 for v in values)
                shared = math.sqrt(sum(len(v) * v.var() for v in values) / free)
                spread = values[i].std(ddof=1) if own else shared
                log[there] = norm.logpdf(shadows.confidence[target, i], values[i].mean(), spread)
            assert found[target, i] == pytest.approx(log[True] - log[False], rel=0.02, abs=0.02)


def test_rmia_counts_whom_a_patient_exceeds() -> None:
    shadows = made_up()
    found = rmia(shadows)
    for target in (0, 7):
        others = [k for k in range(20) if k != target]
        ratio = []
        for i in range(30):
            halves = [
                np.mean([shadows.likelihood[k, i] for k in others if shadows.member[k, i] == there])
                for there in (True, False)
            ]
            ratio.append(shadows.likelihood[target, i] / np.mean(halves))
        counts = [sum(r / other >= 1 for other in ratio) / 30 for r in ratio]
        np.testing.assert_allclose(found[target], counts, atol=1 / 30)
        np.testing.assert_array_equal(np.argsort(found[target]), np.argsort(ratio))


def test_attacks_know_nothing_of_coins_that_changed_nothing() -> None:
    random = np.random.default_rng(2)
    member = random.random((MODELS, 300)) < 0.5
    confidence = random.normal(size=member.shape)
    shadows = Shadows(member, confidence, 1 / (1 + np.exp(-confidence)), None)
    for scores in (lira(shadows), rmia(shadows)):
        assert abs(curve_of(scores, member).auc - 0.5) < 0.03


# --- on models that were trained


@pytest.fixture(scope="module")
def overfit() -> module.Membership:
    """A network without privacy, attacked on the patients with a wrong label."""
    wrong = np.random.default_rng(0).random(569) < 0.05
    wanted = asked(
        {"name": "mlp", "parameters": {"hidden": [64]}},
        {"mode": "none"},
        1,
        local_steps=120,
        optimizer={"name": "adam", "learning_rate": 0.02},
    )
    return membership(wanted, biopsies(wrong), models=MODELS, among=wrong, randomness=Seeded(1))


def test_a_model_without_privacy_tells_who_has_a_wrong_label(overfit: module.Membership) -> None:
    assert overfit.ceiling is None
    assert overfit.right is not None
    assert overfit.right[0] > 0.99
    for attack in overfit.attacks:
        assert attack.curve.auc > 0.8
        assert attack.curve.at(0.01).low > 0.05
        assert attack.scores.shape == (MODELS, 569)
        assert np.median(attack.vulnerable) > 0.8
    assert "scores" not in json.dumps(overfit.as_json())


def test_such_an_attack_would_refute_a_claim_of_privacy(overfit: module.Membership) -> None:
    ceiling = ceiling_of(SubsampledGaussian(noise_multiplier=4.0, sample_rate=1.0, steps=16), 1e-4)
    assert ceiling.epsilon == pytest.approx(small.epsilon_of_gaussians([1.0], 1e-4), rel=1e-3)
    assert any(ceiling.exceeded_by(attack.curve) for attack in overfit.attacks)


@pytest.fixture(scope="module")
def private() -> module.Membership:
    wanted = asked(
        {"name": "logistic-regression"},
        {"mode": "patient-dp", "epsilon": 1.0, "delta": 1e-4, "clipping_norm": 1.0},
        20,
        optimizer={"name": "sgd", "learning_rate": 2.0},
    )
    return membership(wanted, biopsies(), models=MODELS, randomness=Seeded(1))


def test_under_privacy_nothing_is_above_the_ceiling(private: module.Membership) -> None:
    assert private.epsilon == pytest.approx(1.0, rel=0.01)
    assert private.right is not None
    assert private.right[1] > 0.9
    assert private.sound
    assert isinstance(private.ceiling, Ceiling)
    for attack in private.attacks:
        assert attack.curve.auc < 0.6
        assert attack.curve.at(0.01).low <= private.ceiling.at(0.01)


def test_a_result_is_json_and_a_plot(private: module.Membership, overfit: module.Membership) -> None:
    told = json.loads(json.dumps(private.as_json()))
    assert [a["name"] for a in told["attacks"]] == ["LiRA", "RMIA"]
    assert [p["asked"] for p in told["attacks"][0]["points"]] == [0.001, 0.01]
    lines = {f"{a['name']} <{n}>": a["curve"] for n, m in (("ε = 1", private), ("none", overfit))
             for a in m.as_json()["attacks"]}  # fmt: skip
    drawn = ElementTree.fromstring(log_log(lines, {"ceiling": told["ceiling"]["curve"]}, title="A & B"))
    assert len(drawn.findall(f"{SVG}polyline")) == 6
    texts = [t.text for t in drawn.iter(f"{SVG}text")]
    assert "LiRA <ε = 1>" in texts
    assert "0.001" in texts
    places = [
        tuple(map(float, p.split(","))) for p in drawn.findall(f"{SVG}polyline")[0].attrib["points"].split()
    ]
    assert all(62 <= x <= 506 and 14 <= y <= 354 for x, y in places)
    with pytest.raises(FedwardError, match="axis"):
        log_log(lines, {}, title="", least=2.0)


def test_everybody_of_a_site_is_in_its_pool(tmp_path: Path) -> None:
    folders = [small.make_site(tmp_path / name, name, count=20) for name in ("north", "south")]
    pool = pool_of(small.study(), folders)
    assert len(pool) == 40
    assert len(pool.labels) == 2 * sum(1 + p % 3 for p in range(20))


def test_pools_and_what_is_too_few() -> None:
    parts = [small.patients([1, 3]), small.patients([2], seed=1), small.patients([])]
    pool = pooled(parts)
    assert pool.offsets.tolist() == [0, 1, 4, 6]
    kept = chosen_of(pool, np.array([False, True, True]))
    torch.testing.assert_close(kept.features, pool.features[1:])
    assert kept.offsets.tolist() == [0, 3, 5]
    with pytest.raises(FedwardError, match="nobody"):
        pooled([])
    with pytest.raises(FedwardError, match="tell nothing"):
        membership(small.study(), pool, models=4)
