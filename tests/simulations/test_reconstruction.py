"""Reconstruction: the attacks succeed where nothing protects, and fail under privacy."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import audited
import numpy as np
import pytest
import small
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler

from client.account import Spending, spending
from client.cohort import Patients
from client.site import open_vault
from common.errors import FedwardError, StudyError
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy.noise import Seeded
from common.study import Study
from simulations.audit.attacks import Attacks, sections
from simulations.audit.attempts import Target
from simulations.audit.canaries import admit, canaries, canary_study, make_site
from simulations.audit.inversion import Picture, correlation, invert, picture_shape
from simulations.audit.membership import Membership
from simulations.audit.plots import pictures, png
from simulations.audit.reconstruction import (
    NEAR,
    PROTECTIONS,
    bins,
    distances,
    gradient_of,
    imprint,
    one_step,
    planted,
    seen,
    undeclared_models,
)

PRIVATE = {"mode": "patient-dp", "epsilon": 8.0, "delta": 1e-4, "clipping_norm": 1.0}


def tabular(hidden: list[int], **changes: Any) -> Study:
    column = {"kind": "numeric", "name": "x", "unit": "1", "range": [-20, 20], "repeat": 30}
    model = {"name": "mlp", "parameters": {"hidden": hidden}}
    return small.study(**{"data": {"columns": [column]}, "model": model, "privacy": PRIVATE, **changes})


def biopsies() -> tuple[np.ndarray, np.ndarray]:
    features, labels = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return (StandardScaler().fit_transform(features)[order] / 2).astype(np.float32), labels[order]


def hospitals(count: int, size: int) -> list[Patients]:
    features, labels = biopsies()
    parts = [slice(size * i, size * (i + 1)) for i in range(count)]
    return [
        Patients(torch.from_numpy(features[p]), torch.from_numpy(labels[p]).long(), torch.arange(size + 1))
        for p in parts
    ]


def streams(seed: int = 0) -> tuple[Any, Any]:
    return Seeded(seed).stream("sampling"), Seeded(seed).stream("noise")


# --- what the coordinator receives


def test_what_a_site_sends_is_its_mean_gradient() -> None:
    wanted = one_step(tabular([8]), private=False)
    people = hospitals(1, 20)[0]
    network = study_model(wanted, seed=3)
    found = gradient_of(wanted, people, parameter_arrays(network), streams())
    record_losses(wanted.objective, network(people.features), people.labels).mean().backward()
    for name, parameter in network.named_parameters():
        np.testing.assert_allclose(found[name], parameter.grad, atol=1e-6)


def test_secure_aggregation_leaves_the_sum() -> None:
    wanted, sites = tabular([8]), hospitals(3, 10)
    parameters = parameter_arrays(study_model(wanted, seed=3))
    whole = seen(wanted, sites, parameters, "secure aggregation")
    parts = [seen(wanted, [site], parameters, "none") for site in sites]
    for name, array in whole.items():
        np.testing.assert_allclose(array, sum(part[name] for part in parts), atol=1e-6)


def test_sites_noise_is_each_one_s_own() -> None:
    """Also where a seed makes it: with the same noise twice the sum would have twice its deviation."""
    wanted = tabular([64])
    sites = [hospitals(1, 10)[0]] * 2
    parameters = parameter_arrays(study_model(wanted, seed=3))
    both = seen(wanted, sites, parameters, "secure aggregation and privacy", Seeded(0))["0.weight"]
    one = seen(wanted, sites[:1], parameters, "privacy", Seeded(0))["0.weight"]
    assert both.std() / one.std() == pytest.approx(np.sqrt(2), rel=0.1)


def test_one_step_keeps_the_model_and_the_target() -> None:
    wanted = tabular([8])
    asked = one_step(wanted, private=True)
    assert (asked.model, asked.privacy) == (wanted.model, wanted.privacy)
    assert (asked.algorithm.rounds, asked.training.local_steps, asked.training.sample_rate) == (1, 1, 1.0)
    with pytest.raises(StudyError, match="promises no privacy"):
        one_step(tabular([8], privacy={"mode": "none"}), private=True)


# --- a planted layer


def test_a_planted_layer_takes_records_apart() -> None:
    """Neighbouring units differ by the records between their thresholds; by plain automatic derivatives."""
    wanted = one_step(tabular([16]), private=False)
    features, labels = biopsies()
    parameters, signs = planted(wanted, features[300:])
    network = study_model(wanted)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in parameters.items()})
    network.double()
    direction, thresholds = parameters["0.weight"][0], -parameters["0.bias"]
    assert (np.diff(thresholds) > 0).all()
    place = np.searchsorted(thresholds, features[:300] @ direction)
    chosen = [np.flatnonzero(place == bin)[0] for bin in (3, 9, 16)]
    outputs = network(torch.from_numpy(features[chosen]).double())
    record_losses(wanted.objective, outputs, torch.from_numpy(labels[chosen])).mean().backward()
    gradient = {n: p.grad.numpy() for n, p in network.named_parameters() if p.grad is not None}
    found = bins(gradient, signs)
    assert distances(found, features[chosen], features.std(axis=0)).max() < 1e-6
    assert len(found) == 3


def test_privacy_leaves_nothing_of_the_records_and_secure_aggregation_does() -> None:
    features, _ = biopsies()
    told = imprint(tabular([256]), hospitals(4, 32), features[200:], randomness=Seeded(1))
    found = {each.protection: each for each in told}
    assert tuple(found) == PROTECTIONS
    assert [each.records for each in told] == [32, 128, 32, 128]
    assert found["none"].recovered > 0.6 * 32
    assert found["secure aggregation"].recovered > 0.4 * 128
    assert found["privacy"].recovered == found["secure aggregation and privacy"].recovered == 0
    assert [each.guessed for each in told] == [0, 0, 0, 0]
    assert [each.attributed for each in told] == [True, False, True, False]
    assert found["privacy"].epsilon == 8.0
    assert json.loads(json.dumps(told[0].as_json()))["near"] == NEAR


def test_a_deeper_network_is_imprinted_too() -> None:
    features, _ = biopsies()
    open_study = tabular([128, 8], privacy={"mode": "none"})
    told = imprint(open_study, hospitals(2, 16), features[200:])
    assert [each.protection for each in told] == ["none", "secure aggregation"]
    assert told[0].recovered > 8


def test_only_units_that_can_be_switched_off_are_imprinted() -> None:
    features, _ = biopsies()
    smooth = {"name": "mlp", "parameters": {"activation": "tanh"}}
    for model in (smooth, {"name": "logistic-regression"}):
        with pytest.raises(StudyError, match="imprinted"):
            imprint(tabular([], model=model), hospitals(1, 8), features[200:])


def test_distances_are_to_the_nearest_reconstruction() -> None:
    records = np.array([[0.0, 0.0], [2.0, 4.0]])
    found = np.array([[2.0, 4.0], [1.0, 2.0]])
    expected = [np.sqrt(((1 / 1) ** 2 + (2 / 2) ** 2) / 2), 0.0]
    np.testing.assert_allclose(distances(found, records, np.array([1.0, 2.0])), expected)
    assert np.isinf(distances(found[:0], records, np.ones(2))).all()


# --- a model that the study didn't declare


def test_a_vault_refuses_another_model_before_anything_is_spent(tmp_path: Path) -> None:
    who = canaries(24, 0)
    wanted = canary_study("mlp", who.columns, epsilon=2.0, rounds=2)
    folder = make_site(tmp_path / "site", "attacked", who)
    plan = admit(folder, wanted)
    vault = open_vault(folder, durable=False)

    def spent() -> Spending:
        return spending(folder.ledger_path).get(wanted.digest, Spending(0, 0.0, 0.0, 0))

    cases = list(undeclared_models(Target(vault.answer, wanted, plan, "planted", spent)))
    assert len({case.name for case in cases}) == 7
    assert {case.outcome for case in cases} == {"refused: refused"}
    assert all(case.sound and case.before == case.after == 0.0 for case in cases)
    assert spent().rounds == 0
    vault.close()


# --- pictures


@pytest.fixture(scope="module")
def found() -> tuple[Picture, ...]:
    bunch = load_digits()
    features = torch.from_numpy((bunch.data / 8 - 1).astype(np.float32))
    labels = torch.from_numpy(bunch.target)
    sites = [Patients(features[i : i + 1], labels[i : i + 1], torch.arange(2)) for i in range(4)]
    column = {"kind": "numeric", "name": "x", "unit": "1", "range": [0, 16], "repeat": 64}
    wanted = tabular(
        [32],
        data={"columns": [column], "label": small.classes(10)},
        objective={"task": "multi-class"},
    )
    return invert(wanted, sites, steps=250, starts=1, randomness=Seeded(1))


def test_a_picture_comes_back_without_privacy_and_not_with_it(found: tuple[Picture, ...]) -> None:
    assert tuple(each.protection for each in found) == PROTECTIONS
    open_one, summed, private, both = found
    assert open_one.correlation > 0.95
    assert open_one.psnr > 20
    assert summed.correlation > 0.8  # four pictures at once
    assert max(private.correlation, both.correlation) < 0.6
    assert max(private.psnr, both.psnr) < 12
    assert json.loads(json.dumps(private.as_json()))["epsilon"] == 8.0
    assert open_one.guessed is not None
    assert open_one.guessed < 0.9


def blobs(seed: int, side: int) -> Patients:
    """A patient with one picture of three bright blobs."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:side, :side] / side
    parts = [np.exp(-((across - x) ** 2 + (down - y) ** 2) / 0.03) for x, y in random.random((3, 2))]
    features = torch.from_numpy(np.clip(2 * sum(parts) - 1, -1, 1).astype(np.float32).reshape(1, -1))
    return Patients(features, torch.tensor([seed % 2]), torch.arange(2))


def test_a_picture_comes_back_from_a_cnn_too() -> None:
    column = {**audited.image(12), "augmentation": {"flip": True, "shift": 0.1}}
    model = {"name": "cnn", "parameters": {"channels": [16, 32]}}
    wanted = tabular([], data={"columns": [column]}, model=model)
    sites = [blobs(10 + number, 12) for number in range(3)]
    open_one, summed, private, both = invert(wanted, sites, steps=200, starts=1, randomness=Seeded(1))
    assert open_one.original.shape == (12, 12)
    assert open_one.correlation > 0.8
    assert summed.correlation > 0.5
    assert max(private.correlation, both.correlation) < 0.5


@pytest.mark.parametrize(
    ("column", "shape"),
    [
        ({**audited.image(8), "channels": 3, "size": [6, 8]}, (3, 6, 8)),
        ({"kind": "numeric", "name": "x", "unit": "1", "range": [0, 16], "repeat": 9}, (1, 3, 3)),
        ({**audited.image(8), "size": [4, 4, 4]}, None),
        (audited.SERIES, None),
        ({"kind": "categorical", "name": "c", "codes": {"a": "one", "b": "two"}}, None),
    ],
)
def test_what_a_picture_is(column: dict[str, Any], shape: tuple[int, ...] | None) -> None:
    wanted = tabular([4], data={"columns": [column]})
    if shape is None:
        with pytest.raises(StudyError, match="is no picture"):
            picture_shape(wanted)
    else:
        assert picture_shape(wanted) == shape


def test_the_original_is_the_site_s_picture(found: tuple[Picture, ...]) -> None:
    np.testing.assert_allclose(found[0].original, load_digits().images[0] / 16, atol=1e-6)


def test_correlation_is_pearson_s() -> None:
    one, other = np.random.default_rng(0).random((2, 8, 8))
    assert correlation(one, other) == pytest.approx(np.corrcoef(one.ravel(), other.ravel())[0, 1])
    assert correlation(one, np.ones((8, 8))) == 0.0


def test_only_square_pictures_are_inverted() -> None:
    with pytest.raises(StudyError, match="is no picture"):
        invert(tabular([8]), hospitals(1, 1))


def members() -> Membership:
    return Membership("s", None, None, 8, 4, None, (), None)


def test_pictures_side_by_side(found: tuple[Picture, ...]) -> None:
    rows = {"original <0>": found[0].original[None]} | {p.protection: p.found[None] for p in found}
    drawn = ElementTree.fromstring(pictures(rows, title="what is left", columns=["patient & one"]))
    space = "{http://www.w3.org/2000/svg}"
    images = list(drawn.iter(f"{space}image"))
    assert len(images) == 5
    assert all(i.attrib["href"].startswith("data:image/png;base64,iVBORw0KGgo") for i in images)
    assert "original <0>" in [t.text for t in drawn.iter(f"{space}text")]
    told = "".join(sections(Attacks(members(), members(), (), found, ())))
    assert told.count("<image") == 5
    assert f"<td class=n>{found[0].correlation:.2f}</td>" in told
    with pytest.raises(FedwardError, match="no pictures"):
        pictures({}, title="")


def test_png_files_hold_the_grey_levels() -> None:
    content = png(np.array([[0.0, 0.5, 1.0], [2.0, -1.0, np.nan]]))
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 0, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0, 128, 255, 0, 255, 0, 0])
