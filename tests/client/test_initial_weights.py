"""Weights from a file: what the study names, and nothing else; frozen layers stay bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_model import patients_of, study_of
from safetensors.numpy import save
from tapped import clipped_by_hand, everybody, gradients_by_hand

from client.cohort import Cohort
from client.dpsgd import engine_of
from client.training import Trainer
from common.errors import StudyError
from common.explain import explain
from common.models import parameter_arrays, study_model
from common.models.initial import initial_parameters, read_initial
from common.privacy.noise import Seeded
from common.privacy.plan import plan_study
from common.study import Study

MODEL = "resnet-18"
FROZEN = ["stem", "stages.0"]


def weights(seed: int = 5, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """The model's, drawn anew; `changes` replace some (dots as __), None takes them out."""
    found: dict[str, Any] = parameter_arrays(study_model(study_of(MODEL), seed))
    for name, array in changes.items():
        found[name.replace("__", ".")] = array
    return {n: a for n, a in found.items() if a is not None}


def naming(content: bytes, task: str = "binary", frozen: Any = (), **more: Any) -> Study:
    named = {"sha256": hashlib.sha256(content).hexdigest(), "label": "of the tests", **more}
    return study_of(MODEL, task, model={"initial_weights": named, "frozen": frozen})


def test_a_model_begins_with_the_files_weights(tmp_path: Path) -> None:
    arrays = weights()
    for content in (save(arrays), save({f"parameters/{n}": a for n, a in arrays.items()})):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        wanted = naming(content)
        assert read_initial(wanted, path) == content
        found = initial_parameters(wanted, 3, content)
        assert list(found) == list(parameter_arrays(study_model(wanted)))
        assert all(np.array_equal(found[n], a) for n, a in arrays.items())
        assert wanted.digest != study_of(MODEL).digest
        assert f"SHA-256 {hashlib.sha256(content).hexdigest()}" in " ".join(explain(wanted, 1).lines)


def test_without_a_name_weights_come_from_the_seed() -> None:
    plain = study_of(MODEL)
    assert read_initial(plain, None) is None
    found = initial_parameters(plain, 4)
    drawn = parameter_arrays(study_model(plain, 4))
    assert all(np.array_equal(found[n], a) for n, a in drawn.items())


def test_half_precision_is_taken() -> None:
    content = save({n: a.astype(np.float16) for n, a in weights().items()})
    found = initial_parameters(naming(content), 0, content)
    assert all(a.dtype == np.float32 for a in found.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tensors at all", "no safetensors file"),
        (save(weights(head__bias=None)), "lacks head.bias"),
        (save(weights(head__bias=np.zeros(3, np.float32))), "head.bias is [3], not [1]"),
        (save(weights(head__more=np.zeros(3, np.float32))), "has head.more, too"),
        (save(weights(head__bias=np.full(1, np.nan, np.float32))), "head.bias holds NaN or infinity"),
        (save(weights(head__bias=np.full(1, 1e300))), "head.bias holds NaN or infinity"),
        (save(weights(head__bias=np.zeros(1, np.int64))), "head.bias is int64"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="initial weights") as told:
        read_initial(naming(content), path)
    assert message in told.value.message


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save(weights(6)))
    with pytest.raises(StudyError, match=r"SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}"):
        read_initial(naming(save(weights())), path)
    with pytest.raises(StudyError, match="names no initial weights"):
        read_initial(study_of(MODEL), path)
    with pytest.raises(StudyError, match=r"begins with the weights of a file \(of the tests\)"):
        read_initial(naming(save(weights())), None)
    with pytest.raises(StudyError, match="cannot be read"):
        read_initial(naming(save(weights())), tmp_path / "absent")


def test_a_head_for_other_classes_begins_at_random() -> None:
    content = save(weights())  # of a model with one output
    with pytest.raises(StudyError, match=r"head.weight is \[1, 16\], not \[3, 16\]"):
        initial_parameters(naming(content, "multi-class"), 0, content)
    wanted = naming(content, "multi-class", strict=False)
    found, drawn = initial_parameters(wanted, 7, content), parameter_arrays(study_model(wanted, 7))
    for name, array in found.items():
        expected = drawn[name] if name.startswith("head.") else weights()[name]
        assert np.array_equal(array, expected), name
    with pytest.raises(StudyError, match=r"frozen, and not in it: head.bias, head.weight"):
        initial_parameters(naming(content, "multi-class", ["head"], strict=False), 0, content)
    stranger = save({"conv1.weight": np.zeros(3, np.float32)})
    with pytest.raises(StudyError, match="no parameter of the model is in it"):
        initial_parameters(naming(stranger, strict=False), 0, stranger)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["stages.9"], "has no parameters 'stages.9'"),
        (["ste"], "has no parameters 'ste'"),
        (["stem", "stages", "head"], "nothing is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused(frozen: list[str], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        study_model(study_of(MODEL, model={"frozen": frozen}))


def test_frozen_layers_stay_and_are_told() -> None:
    wanted = study_of(MODEL, model={"frozen": FROZEN})
    told = explain(wanted, 1).lines
    place = told.index("Of these stay as they begin: stem, stages.0.")
    assert "no site can check it" in told[place + 1]  # the coordinator sends all parameters in every round
    network = study_model(wanted)
    kept = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert kept == {n for n in dict(network.named_parameters()) if n.startswith(("stem.", "stages.0."))}
    for mode in ("patient-dp", "none"):
        chosen = study_of(
            MODEL,
            model={"frozen": FROZEN},
            training={"optimizer": {"name": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}},
            **({} if mode == "patient-dp" else {"privacy": {"mode": "none"}}),
        )
        cohort = patients_of(chosen, [1, 2, 3, 1])
        trainer = Trainer(chosen, Cohort(cohort, cohort), plan_study(chosen, 50))
        update = trainer.train(weights(), Seeded(1).stream("a"), Seeded(1).stream("b"))
        for name, array in update.items():
            assert array.any() == (name not in kept), name


def test_clipping_counts_what_is_trained_only() -> None:
    wanted = study_of(MODEL, "multi-class", model={"frozen": FROZEN})
    cohort = patients_of(wanted, [1, 3, 2])
    network = study_model(wanted)
    everything = study_model(study_of(MODEL, "multi-class"))
    batch, objective = everybody(cohort), wanted.objective
    own, all_ = (gradients_by_hand(n, cohort, batch, objective) for n in (network, everything))
    norms = own.norm(dim=1)
    assert (norms < all_.norm(dim=1)).all()
    bound = float(norms.median())
    found = engine_of(network, objective).sum(cohort, batch, bound)
    expected = clipped_by_hand(own, bound)
    assert found.shape == (sum(p.numel() for p in network.parameters() if p.requires_grad),)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float(found.norm()) <= bound * len(cohort)
