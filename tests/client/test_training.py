"""The trainer: one flat tensor of parameters, data larger than memory, devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import allow, answered, job, make_site, patients, study
from torch import nn

from client.batches import batch_of
from client.cohort import Cohort, Patients
from client.device import Computing, resolve
from client.flat import FlatParameters, flat_step
from client.settings import SiteFolder
from client.site import open_vault
from client.training import Trainer
from common.errors import SiteError
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import plan_study
from common.study import Optimizer, Study


def stream(name: str) -> Stream:
    return Seeded(3).stream("test", name)


def torch_optimizer(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if settings.name == "adam":
        return torch.optim.Adam(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=False
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


# --- one flat tensor


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["sgd", "adam"]),
    rate=st.floats(1e-4, 1.0),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 0.01]),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6),
)
def test_a_flat_step_is_torchs_bit_for_bit(
    name: str, rate: float, momentum: float, decay: float, sizes: list[int]
) -> None:
    chosen = Optimizer(
        name=name, learning_rate=rate, momentum=momentum if name == "sgd" else 0.0, weight_decay=decay
    )
    torch.manual_seed(sum(sizes))
    apart = [nn.Parameter(torch.randn(size)) for size in sizes]
    flat = nn.Parameter(torch.cat([p.detach() for p in apart]))
    optimizer, step = torch_optimizer(chosen, apart), flat_step(chosen, flat)
    for _ in range(5):
        for parameter in apart:
            parameter.grad = torch.randn_like(parameter)
        step(torch.cat([p.grad for p in apart if p.grad is not None]))
        optimizer.step()
        assert torch.equal(flat, torch.cat(apart))


def test_parameters_are_views_of_one_tensor() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    network[0].bias.requires_grad_(False)
    before = parameter_arrays(network)
    flat = FlatParameters(network, torch.device("cpu"))
    assert all((parameter_arrays(network)[n] == a).all() for n, a in before.items())
    assert flat.trainable.shape == (flat.size,) == (3 * 2 + 2 * 2 + 2,)
    with torch.no_grad():
        flat.trainable.add_(1.0)
    assert all(np.allclose(a, 1.0) for n, a in flat.since(before).items() if n != "0.bias")
    assert (flat.since(before)["0.bias"] == 0).all()
    assert list(flat.since(before)) == list(before)
    flat.load(before)
    assert all((parameter_arrays(network)[n] == a).all() for n, a in before.items())
    taken = flat.since(before)
    flat.values.fill_(5.0)
    assert all((a == 0).all() for a in taken.values())  # what left is a copy


# --- without privacy


def steps_by_torch(wanted: Study, cohort: Patients, start: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Shuffled mini-batches with autograd and torch.optim, parameter by parameter."""
    network, plan, sampling = study_model(wanted), plan_study(wanted, 50), stream("sampling")
    network.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in start.items()})
    optimizer = torch_optimizer(wanted.training.optimizer, list(network.parameters()))
    size = len(cohort) if plan.step.sample_rate == 1 else max(1, round(plan.step.divisor))
    waiting = np.empty(0, dtype=np.intp)
    for _ in range(plan.steps_per_round):
        if not len(waiting):
            waiting = sampling.permutation(len(cohort))
        batch = batch_of(cohort, waiting[:size], plan.step, sampling)
        waiting = waiting[size:]
        outputs = network(cohort.features[batch.records])
        losses = record_losses(wanted.objective, outputs, cohort.labels[batch.records])
        optimizer.zero_grad()
        ((losses * batch.weights).sum() / batch.patients).backward()
        optimizer.step()
    return {n: a - start[n] for n, a in parameter_arrays(network).items()}


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "learning_rate": 0.3},
        {"name": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.01},
        {"name": "adam", "learning_rate": 0.1, "weight_decay": 0.01},
    ],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("counts", [[1] * 40, [1, 5, 2] * 13], ids=["one record", "several"])
def test_plain_steps_are_torchs_bit_for_bit(
    optimizer: dict[str, Any], rate: float, counts: list[int]
) -> None:
    wanted = study(
        model={"name": "mlp", "parameters": {"hidden": [7, 3]}},
        training={"optimizer": optimizer, "local_steps": 9, "sample_rate": rate},
        privacy={"mode": "none"},
    )
    cohort = patients(counts)
    start = parameter_arrays(study_model(wanted))
    trainer = Trainer(wanted, Cohort(cohort, cohort), plan_study(wanted, 50))
    update = trainer.train(start, stream("sampling"), stream("noise"))
    expected = steps_by_torch(wanted, cohort, start)
    assert all((update[n] == expected[n]).all() for n in expected)


# --- data larger than memory


def own_memory() -> float:
    """MiB of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Patients]:
    """1.6 GB of features in a sparse file, a hundred of whose rows hold numbers."""
    records, width = 100_000, 4000
    path = tmp_path / "features"
    with path.open("wb") as file:
        file.truncate(4 * records * width)
    features = np.memmap(path, np.float32, "r+", shape=(records, width))
    random = np.random.default_rng(0)
    features[:100] = random.normal(size=(100, width))
    yield Patients(
        torch.from_numpy(features),
        torch.from_numpy(random.integers(0, 2, records)),
        torch.arange(records + 1),
    )
    path.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read as Linux tells it")
@pytest.mark.parametrize(
    "model", [{"name": "logistic-regression"}, {"name": "mlp", "parameters": {"hidden": [4]}}]
)
@pytest.mark.parametrize("private", [True, False])
def test_features_on_disk_stay_there(on_disk: Patients, model: dict[str, Any], private: bool) -> None:
    changes: dict[str, Any] = {} if private else {"privacy": {"mode": "none"}}
    columns = [{"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4000}]
    wanted = study(
        data={"columns": columns}, model=model, training={"sample_rate": 1e-3, "local_steps": 3}, **changes
    )
    few = Patients(on_disk.features[:50], on_disk.labels[:50], torch.arange(51))
    trainer = Trainer(wanted, Cohort(on_disk, few), plan_study(wanted, 100_000))
    start = parameter_arrays(study_model(wanted))
    before = own_memory()
    trainer.train(start, stream("sampling"), stream("noise"))
    trainer.evaluate(start, 10)
    assert trainer.cohort.train.features.data_ptr() == on_disk.features.data_ptr()
    assert own_memory() - before < 150


# --- devices


def test_devices() -> None:
    assert resolve("cpu").type == "cpu"
    assert resolve("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_multiplies_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven bits, as convolutions have by default there, are too few for the clipping margin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    places: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        assert resolve("auto").type == "cuda"
        assert not any(place.allow_tf32 for place in places)
    finally:
        for place, was in zip(places, before, strict=True):
            place.allow_tf32 = was


def test_an_absent_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto").type == "cpu"
    cohort = patients([1] * 5)
    wanted = study()
    with pytest.raises(SiteError, match="no CUDA device"):
        Trainer(wanted, Cohort(cohort, cohort), plan_study(wanted, 50), computing=Computing("cuda"))
    trainer = Trainer(wanted, Cohort(cohort, cohort), plan_study(wanted, 50), computing=Computing("auto"))
    assert trainer.cohort.train is cohort


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "model", [{"name": "logistic-regression"}, {"name": "mlp", "parameters": {"hidden": [9]}}]
)
@pytest.mark.parametrize("counts", [[1] * 40, [1, 5, 2] * 13], ids=["one record", "several"])
@pytest.mark.parametrize("mode", ["patient-dp", "none"])
def test_cuda_and_processor_agree(model: dict[str, Any], counts: list[int], mode: str) -> None:
    changes: dict[str, Any] = {} if mode == "patient-dp" else {"privacy": {"mode": "none"}}
    wanted, cohort = study(model=model, **changes), patients(counts)
    start = parameter_arrays(study_model(wanted))
    found = []
    for device in ("cpu", "cuda"):
        trainer = Trainer(wanted, Cohort(cohort, cohort), plan_study(wanted, 50), computing=Computing(device))  # type: ignore[arg-type]
        update = trainer.train(start, stream("sampling"), stream("noise"))
        found.append((update, trainer.evaluate(start, 10)))
    for one, other in zip(found[0], found[1], strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_the_site_says_where_to_compute(tmp_path: Path) -> None:
    """`device` of site.toml counts; CUDA that isn't there is the operator's error, before any round."""
    folder = make_site(tmp_path / "site")
    file = folder.root / "site.toml"
    assert folder.file.device == "auto"
    file.write_text('device = "cuda"\n' + file.read_text())
    asked = study()
    allow(SiteFolder(folder.root), asked)
    if not torch.cuda.is_available():
        with pytest.raises(SiteError, match="no CUDA device"):
            open_vault(SiteFolder(folder.root), durable=False)
        return
    vault = open_vault(SiteFolder(folder.root), durable=False)
    answered(vault, job(asked))
    vault.close()
