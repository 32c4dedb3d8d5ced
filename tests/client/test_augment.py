"""Augmentation: each record by itself, by its own draws, inside its patient's clip; never in evaluation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import small
import torch
from torch import nn

from client.ahead import drawn_ahead
from client.augment import Augmenter, Picture, augmenter_of, turned
from client.batches import Batch, batch_of, draw_batch
from client.cohort import Cohort, Patients
from client.dpsgd import engine_of
from client.flat import FlatParameters, flat_step
from client.stacking import groups, together
from client.tasks import Training
from client.training import Trainer, private_step
from common.errors import StudyError
from common.messages import Arrays
from common.modalities import Augmentation, ImageColumn
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import plan_study
from common.study import Study

SIZE = (6, 6)
EVERYTHING = {"flip": ["width", "height"], "shift": 0.3, "rotate": 25, "stretch": 0.2, "brightness": 0.2}


def stream(name: str = "sampling", seed: int = 3) -> Stream:
    return Seeded(seed).stream(name)


def a_study(augmentation: dict[str, Any] | None, **changes: Any) -> Study:
    """Two numbers, an image, one more number."""
    number = {"kind": "numeric", "unit": "1", "range": [-1, 1]}
    image: dict[str, Any] = {"kind": "image", "name": "scan", "size": SIZE}
    if augmentation is not None:
        image["augmentation"] = augmentation
    columns = [{**number, "name": "a", "repeat": 2}, image, {**number, "name": "b"}]
    values: dict[str, Any] = {
        "data": {"columns": columns},
        "model": {"name": "mlp", "parameters": {"hidden": [5]}},
        "training": {"sample_rate": 0.5, "local_steps": 3, "max_records_per_patient": 2},
    }
    return small.study(**{**values, **changes})


def cohort(counts: list[int], seed: int = 0) -> Patients:
    found = small.patients(counts, seed=seed, width=3 + math.prod(SIZE), scale=0.4)
    return Patients(found.features.clamp(-1, 1), found.labels, found.offsets)


def picture(shape: tuple[int, ...] = (1, *SIZE), **augmentation: Any) -> Picture:
    return Picture(2, shape, Augmentation.model_validate(augmentation))


def pixels(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32))


# --- one image


def test_mirrors_by_a_coin() -> None:
    image = pixels(3, 5, 7)
    draws = np.full(6, 0.5)
    for height, width in ((0.4, 0.4), (0.4, 0.6), (0.6, 0.4), (0.6, 0.6)):
        draws[:2] = height, width
        axes = [axis for axis, coin in ((1, height), (2, width)) if coin < 0.5]
        both = picture((3, 5, 7), flip=["height", "width"])
        assert torch.equal(both.varied(image, draws), image.flip(axes))
        alone = picture((3, 5, 7), flip=True)  # left and right
        assert torch.equal(alone.varied(image, draws), image.flip(2) if 2 in axes else image)


@pytest.mark.parametrize("shape", [(1, 10, 20), (3, 8, 6), (1, 4, 10, 6)])
def test_shifts_by_whole_pixels_and_repeats_the_edge(shape: tuple[int, ...]) -> None:
    image, random = pixels(*shape), np.random.default_rng(2)
    space = len(shape) - 1
    seen = set()
    for _ in range(30):
        draws = random.random(2 * space + 2)
        moves = [round(0.25 * n * (2 * float(d) - 1)) for n, d in zip(shape[1:], draws[space:], strict=False)]
        assert all(abs(move) <= 0.25 * n + 0.5 for move, n in zip(moves, shape[1:], strict=True))
        expected = scipy.ndimage.shift(image.numpy(), (0, *moves), order=0, mode="nearest")
        np.testing.assert_array_equal(picture(shape, shift=0.25).varied(image, draws).numpy(), expected)
        seen.update(moves)
    assert min(seen) < 0 < max(seen)


@pytest.mark.parametrize("size", [(9, 9), (8, 12), (13, 7)])
def test_turns_as_scipy_does(size: tuple[int, int]) -> None:
    image = pixels(2, *size)
    for degrees in (-90.0, -31.0, -1.0, 0.0, 12.5, 45.0, 180.0):
        found = turned(image, math.radians(degrees)).numpy()
        expected = scipy.ndimage.rotate(
            image.numpy(), degrees, axes=(1, 2), reshape=False, order=1, mode="nearest"
        )
        np.testing.assert_allclose(found, expected, atol=2e-5)
    if size == (9, 9):
        np.testing.assert_allclose(turned(image, math.pi / 2), torch.rot90(image, 1, (1, 2)), atol=1e-5)


@pytest.mark.parametrize("factors", [(1.25, 0.8), (0.75, 1.0), (1.0, 2.0)])
def test_stretches_as_scipy_does(factors: tuple[float, float]) -> None:
    image, middle = pixels(2, 9, 12), np.array([4.0, 5.5])
    back = np.diag(1 / np.array(factors))
    expected = np.stack(
        [
            scipy.ndimage.affine_transform(
                channel.numpy(), back, offset=middle - back @ middle, order=1, mode="nearest"
            )
            for channel in image
        ]
    )
    np.testing.assert_allclose(turned(image, 0.0, factors).numpy(), expected, atol=2e-5)


def test_a_stretch_has_draws_of_its_own_for_each_axis() -> None:
    image, stretched = pixels(1, *SIZE), picture(stretch=0.5)
    assert stretched.draws == picture(rotate=10).draws + 2
    draws = np.full(stretched.draws, 0.5)
    torch.testing.assert_close(stretched.varied(image, draws), image, atol=1e-5, rtol=0)
    draws[4], draws[5] = 1.0, 0.0
    torch.testing.assert_close(stretched.varied(image, draws), turned(image, 0.0, (1.5, 1 / 1.5)))


def test_brightness_stays_in_the_window() -> None:
    image = pixels(1, *SIZE)
    draws = np.full(6, 0.5)
    for draw in (0.0, 0.25, 0.5, 0.9):
        draws[-1] = draw
        expected = (image + 2 * 0.3 * (2 * draw - 1)).clamp(-1, 1)
        torch.testing.assert_close(picture(brightness=0.3).varied(image, draws), expected)


# --- a batch


def test_only_the_image_varies_and_each_record_by_its_own_draws() -> None:
    patients, augmenter = cohort([1, 3, 2, 1]), augmenter_of(a_study(EVERYTHING))
    assert augmenter is not None
    (own,) = augmenter.pictures
    assert (own.start, own.shape) == (2, (1, *SIZE))
    plan = small.step_plan(max_records=2)
    batch = batch_of(patients, np.array([1, 2, 3]), plan, stream("records"))
    before = patients.features.clone()
    shown, place = augmenter.varied(patients, batch, stream())
    assert torch.equal(patients.features, before)
    draws = stream().uniform(len(batch.records) * own.draws).reshape(-1, own.draws)
    end = 2 + math.prod(SIZE)
    for i, record in enumerate(batch.records.tolist()):
        alone = own.varied(before[record, 2:end].view(own.shape), draws[i]).flatten()
        assert torch.equal(shown.features[i, 2:end], alone)  # bit for bit, whoever is beside it
        assert not torch.equal(alone, before[record, 2:end])
        assert torch.equal(shown.features[i, [0, 1, end]], before[record, [0, 1, end]])
    assert torch.equal(shown.labels, patients.labels[batch.records])
    assert shown.features.abs().max() <= 1
    assert shown.offsets.diff().tolist() == torch.bincount(batch.patient).tolist() == [2, 2, 1]
    assert place.records.tolist() == list(range(5))
    assert torch.equal(place.patient, batch.patient)
    assert torch.equal(place.weights, batch.weights)
    assert place.patients == 3


def test_nothing_declared_is_nothing_done() -> None:
    assert augmenter_of(a_study(None)) is None
    assert augmenter_of(a_study({})) is None
    assert augmenter_of(small.study()) is None
    assert augmenter_of(a_study({"flip": True})) is not None


# --- sums


def reference(network: nn.Module, study: Study, patients: Patients, batch: Batch, C: float) -> torch.Tensor:
    """Σ min(1, C / |g|) g by autograd, a patient at a time."""
    total = torch.zeros(sum(p.numel() for p in network.parameters()), dtype=torch.float64)
    for p in range(batch.patients):
        own = batch.patient == p
        records = batch.records[own]
        losses = record_losses(study.objective, network(patients.features[records]), patients.labels[records])
        loss = (losses * batch.weights[own]).sum()
        parts = torch.autograd.grad(loss, list(network.parameters()))
        g = torch.cat([part.flatten() for part in parts]).double()
        total += g * min(1.0, C / float(g.norm()))
    return total


MODELS = [
    {"name": "logistic-regression"},
    {"name": "mlp", "parameters": {"hidden": [5]}},
    {"name": "cnn", "parameters": {"channels": [4]}},
]


def columns_for(model: dict[str, Any]) -> dict[str, Any]:
    """A CNN takes nothing but the image."""
    data = a_study(EVERYTHING).data.model_dump(mode="json")["columns"]
    return {"columns": [c for c in data if c["kind"] == "image"] if model["name"] == "cnn" else data}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: str(model["name"]))
def test_a_private_step_is_the_clipped_sum_over_varied_records(model: dict[str, Any]) -> None:
    study = a_study(EVERYTHING, model=model, data=columns_for(model))
    network = study_model(study, seed=5)
    augmenter = augmenter_of(study)
    assert augmenter is not None
    counts = [1, 3, 2, 1, 4, 1, 2]
    width = next(iter(augmenter.pictures)).start + math.prod(SIZE) + (0 if model["name"] == "cnn" else 1)
    patients = small.patients(counts, width=width, scale=0.4)
    C = 0.05
    plan = small.step_plan(sample_rate=0.7, clipping_norm=C, noise_multiplier=1e-9, max_records=2)
    sampling = stream()
    batch = draw_batch(patients, plan, sampling)
    shown, place = augmenter.varied(patients, batch, sampling)
    expected = reference(network, study, shown, place, C)
    unvaried = reference(network, study, patients, batch, C)

    found: list[torch.Tensor] = []
    engine = engine_of(network, study.objective, 8.0)
    noise = stream("noise")
    with drawn_ahead(noise, engine.size) as normals:
        private_step(engine, patients, plan, found.append, stream(), normals, augmenter)
    scale = float(expected.norm())
    assert scale > 0
    np.testing.assert_allclose(found[0].double() * plan.divisor, expected, atol=6e-3 * scale)
    assert float((unvaried - expected).norm()) > 0.1 * scale


def test_one_patient_more_changes_the_sum_by_the_clipping_norm_at_most() -> None:
    """Given everybody's draws."""
    study = a_study(EVERYTHING)
    augmenter, C = augmenter_of(study), 0.3
    assert augmenter is not None
    engine = engine_of(study_model(study, seed=5), study.objective, 8.0)
    patients = cohort([2] * 12)
    plan = small.step_plan()

    def total(chosen: np.ndarray) -> torch.Tensor:
        shown, place = augmenter.varied(patients, batch_of(patients, chosen, plan, stream("r")), stream())
        return engine.sum(shown, place, C)

    for count in (1, 5, 12):  # the last one leaves: the others' draws stay theirs
        whole, less = total(np.arange(count)), total(np.arange(count - 1))
        assert float((whole - less).norm()) <= C


def test_an_empty_batch_is_a_step_like_any_other() -> None:
    study = a_study(EVERYTHING)
    network = study_model(study)
    engine, augmenter = engine_of(network, study.objective), augmenter_of(study)
    flat = FlatParameters(network, torch.device("cpu"))
    step = flat_step(study.training.optimizer, flat.trainable)
    before = flat.trainable.detach().clone()
    patients, plan = cohort([1, 2]), small.step_plan(sample_rate=1e-12)
    with drawn_ahead(stream("noise"), engine.size) as normals:
        private_step(engine, patients, plan, step, stream(), normals, augmenter)
    moved = (flat.trainable.detach() - before).double()
    assert 0 < float(moved.std()) < 1


# --- trainings


def training(study: Study, site: int, counts: list[int]) -> Training:
    patients = cohort(counts, seed=site)
    trainer = Trainer(study, Cohort(patients, patients), plan_study(study, len(counts)))

    def streams() -> tuple[Stream, Stream]:
        return stream("sampling", site), stream("noise", site)

    return Training(trainer, parameter_arrays(study_model(study, seed=7)), streams)


PRIVATE: dict[str, Any] = {}
PLAIN: dict[str, Any] = {
    "privacy": {"mode": "none"},
    "training": {"sample_rate": None, "patients_per_step": 4, "local_steps": 7, "max_records_per_patient": 2},
}


def equal(one: Arrays, other: Arrays) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize("changes", [PRIVATE, PLAIN], ids=["private", "plain"])
@pytest.mark.parametrize("counts", [[1] * 9, [1, 2, 3, 1, 2]], ids=["one record", "several"])
def test_sites_end_alike_beside_others_and_alone(changes: dict[str, Any], counts: list[int]) -> None:
    def trainings(augmentation: dict[str, Any] | None) -> list[Training]:
        return [training(a_study(augmentation, **changes), site, counts) for site in range(3)]

    varied, plain = trainings(EVERYTHING), trainings(None)
    assert groups(varied) == [[0], [1], [2]]  # trained one by one
    alone = [each.alone() for each in varied]
    for found, own, again in zip(together(varied), alone, trainings(EVERYTHING), strict=True):
        assert not isinstance(found, Exception), found
        assert equal(found, own)
        assert equal(again.alone(), own)
    assert not any(equal(own, other.alone()) for own, other in zip(alone, plain, strict=True))


def test_a_plain_step_descends_on_the_varied_records() -> None:
    study = a_study(EVERYTHING, **{**PLAIN, "training": {**PLAIN["training"], "local_steps": 1}})
    own = training(study, 1, [1, 2, 3, 1])
    found = own.alone()
    patients, augmenter = own.trainer.cohort.train, own.trainer.augmenter
    assert augmenter is not None
    sampling = stream("sampling", 1)
    chosen = sampling.permutation(4)
    batch = batch_of(patients, chosen, own.trainer.plan.step, sampling)
    shown, place = augmenter.varied(patients, batch, sampling)
    network = study_model(study, seed=7)
    losses = record_losses(study.objective, network(shown.features), shown.labels)
    loss = (losses * place.weights).sum() / 4
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    for (name, _), gradient in zip(network.named_parameters(), gradients, strict=True):
        np.testing.assert_allclose(found[name], -0.5 * gradient, atol=1e-6)


def test_evaluation_varies_nothing() -> None:
    patients = cohort([1, 2, 3, 1, 2])
    found = []
    for augmentation in (EVERYTHING, None):
        study = a_study(augmentation)
        trainer = Trainer(study, Cohort(patients, patients), plan_study(study, 5))
        found.append(trainer.evaluate(parameter_arrays(study_model(study, seed=7)), 10))
    assert equal(*found)


# --- the study's file


def test_flip_true_is_left_and_right() -> None:
    assert a_study({"flip": True}).digest == a_study({"flip": ["width"]}).digest
    assert a_study({"flip": False}).digest == a_study(None).digest == a_study({}).digest
    again = Study.model_validate_json(a_study(EVERYTHING).canonical)
    assert again.digest == a_study(EVERYTHING).digest


@pytest.mark.parametrize(
    ("augmentation", "says"),
    [
        ({"flip": ["depth"]}, "a 2-D image has no depth to flip"),
        ({"flip": ["up"]}, "flip"),
        ({"shift": 0.6}, "shift"),
        ({"rotate": -1}, "rotate"),
        ({"stretch": 2}, "stretch"),
        ({"brightness": "much"}, "brightness"),
        ({"zoom": 2}, "zoom"),
    ],
)
def test_what_cannot_be_declared(augmentation: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        a_study(augmentation)


def test_volumes_are_flipped_and_shifted() -> None:
    values = {"kind": "image", "name": "scan", "size": (4, 6, 8)}
    declared = {"flip": ["depth", "height", "width"], "shift": 0.2}
    ImageColumn.model_validate({**values, "augmentation": declared})
    with pytest.raises(ValueError, match="volumes are flipped and shifted, not rotated"):
        ImageColumn.model_validate({**values, "augmentation": {"rotate": 5}})
    volume, draws = pixels(1, 4, 6, 8), np.full(8, 0.5)
    draws[0] = 0.1
    own = Augmenter((picture((1, 4, 6, 8), **declared),)).pictures[0]
    assert torch.equal(own.varied(volume, draws), volume.flip(1))
