"""Patient-level DP-SGD against a plain loop over patients, written by hand in float64.

Statistical tests have fixed seeds and a false-alarm rate of 1e-6 each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small import WIDTH, classes, patients, step_plan, study, without

from client.batches import Batch, batch_of, draw_batch, pieces
from client.cohort import Cohort, Patients
from client.dpsgd import ClippedGradients, Engine, engine_of, noised_mean
from client.rowwise import CLIPPING_MARGIN
from client.training import Trainer
from common.models import parameter_arrays, study_model
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import StepPlan, plan_study
from common.study import Study

FALSE_ALARM = 1e-6
NO_NOISE = 1e-30  # a plan with none at all would train without privacy

# Every model for tables, with parameters; tests/client/test_models_exact has those for other columns too.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("logistic-regression", {}),
    ("linear-svm", {}),
    ("mlp", {"hidden": [3]}),
    ("mlp", {"hidden": [5, 2], "activation": "tanh"}),
    ("mlp", {"hidden": [1, 4, 3], "activation": "gelu"}),
]
OBJECTIVES = [("binary", "cross-entropy"), ("binary", "hinge"), ("multi-class", "cross-entropy"),
              ("multi-class", "hinge")]  # fmt: skip
every_kind = pytest.mark.parametrize(
    ("model", "parameters", "task", "loss"), [(*m, *o) for m in MODELS for o in OBJECTIVES]
)
records_of = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def stream(*context: str | int) -> Stream:
    return Seeded(7).stream("test", *context)


def of_kind(model: str, parameters: dict[str, Any], task: str, loss: str, **changes: Any) -> Study:
    made = study(
        model={"name": model, "parameters": parameters}, objective={"task": task, "loss": loss}, **changes
    )
    if task == "binary":
        return made
    return study(
        data={"label": classes(3)},
        model={"name": model, "parameters": parameters},
        objective={"task": task, "loss": loss},
        **changes,
    )


def random_parameters(wanted: Study, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    start = parameter_arrays(study_model(wanted))
    return {n: random.normal(size=a.shape).astype(np.float32) for n, a in start.items()}


def loss_by_hand(wanted: Study, outputs: torch.Tensor, label: int) -> torch.Tensor:
    """The loss of one record from its outputs [outputs]."""
    if wanted.objective.task == "binary":
        margin = outputs[0] * (1 if label == 1 else -1)
        if wanted.objective.loss == "hinge":
            return torch.relu(1 - margin)
        return torch.nn.functional.softplus(-margin)
    if wanted.objective.loss == "hinge":
        others = [j for j in range(len(outputs)) if j != label]
        return sum(torch.relu(1 - outputs[label] + outputs[j]) for j in others) / len(outputs)
    return torch.logsumexp(outputs, dim=0) - outputs[label]


def clipped_by_hand(wanted: Study, weights: dict[str, np.ndarray], cohort: Patients, batch: Batch,
                    C: float) -> np.ndarray:  # fmt: skip
    """Σ of clipped gradients: a loop over patients, autograd for each record, all in float64. What is
    clipped to is below C by the margin for rounding."""
    C *= 1 - CLIPPING_MARGIN
    network = study_model(wanted).double()
    network.load_state_dict({n: torch.from_numpy(a).double() for n, a in weights.items()})
    tensors = list(network.parameters())
    total = np.zeros(sum(t.numel() for t in tensors))
    for patient in range(batch.patients):
        records = batch.records[batch.patient == patient].tolist()
        gradient = np.zeros_like(total)
        for record in records:
            outputs = network(cohort.features[record].double()[None])[0]
            loss = loss_by_hand(wanted, outputs, int(cohort.labels[record]))
            parts = torch.autograd.grad(loss, tensors)
            gradient += torch.cat([p.flatten() for p in parts]).numpy()
        if wanted.training.records == "mean":
            gradient /= len(records)
        norm = np.linalg.norm(gradient)
        total += gradient * min(1.0, C / norm) if norm > 0 else 0.0
    return total


def clipped(wanted: Study, weights: dict[str, np.ndarray], cohort: Patients, batch: Batch, C: float,
            engine: Callable[..., Engine] = engine_of) -> torch.Tensor:  # fmt: skip
    network = study_model(wanted)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in weights.items()})
    return engine(network, wanted.objective).sum(cohort, batch, C)


def everybody(cohort: Patients, plan: StepPlan) -> Batch:
    return batch_of(cohort, np.arange(len(cohort)), plan, stream())


@every_kind
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    counts=records_of,
    mean=st.booleans(),
    C=st.sampled_from([0.01, 0.7, 3.0, 1e4]),
    seed=st.integers(0, 10_000),
    cap=st.sampled_from([1, 3, 40]),
    q=st.sampled_from([0.3, 0.8, 1.0]),
)
def test_clipped_sum_is_the_loop_over_patients(
    model: str, parameters: dict[str, Any], task: str, loss: str,
    counts: list[int], mean: bool, C: float, seed: int, cap: int, q: float,
) -> None:  # fmt: skip
    wanted = of_kind(model, parameters, task, loss, training={"records": "mean" if mean else "sum"})
    cohort = patients(counts, seed, 2 if task == "binary" else 3)
    plan = step_plan(max_records=cap, average_records=mean, sample_rate=q)
    batch = draw_batch(cohort, plan, stream(seed))
    weights = random_parameters(wanted, seed)
    expected = clipped_by_hand(wanted, weights, cohort, batch, C)
    largest = max(1.0, float(np.abs(expected).max(initial=0)))
    for engine in (engine_of, ClippedGradients):
        found = clipped(wanted, weights, cohort, batch, C, engine).numpy()
        assert np.abs(found - expected).max(initial=0) <= 1e-5 * largest


def sgd_by_hand(start: np.ndarray, gradients: list[np.ndarray], momentum: float, decay: float) -> np.ndarray:
    value, velocity = start.copy(), None
    for g in gradients:
        g = g(value) + decay * value
        velocity = g if velocity is None else momentum * velocity + g
        value = value - 0.5 * velocity
    return value


def adam_by_hand(start: np.ndarray, gradients: list[Any], decay: float) -> np.ndarray:
    value, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, of in enumerate(gradients, start=1):
        g = of(value) + decay * value
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        value = value - 0.5 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return value


def split_up(wanted: Study, flat: np.ndarray) -> dict[str, np.ndarray]:
    arrays, offset = {}, 0
    for name, p in study_model(wanted).named_parameters():
        arrays[name] = flat[offset : offset + p.numel()].reshape(tuple(p.shape))
        offset += p.numel()
    return arrays


def quiet_trainer(wanted: Study, cohort: Patients, public_size: int = 50, noise: float = NO_NOISE) -> Trainer:
    plan = plan_study(wanted, public_size)
    plan = dataclasses.replace(plan, step=dataclasses.replace(plan.step, noise_multiplier=noise))
    return Trainer(wanted, Cohort(cohort, cohort), plan)


@every_kind
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(counts=records_of, seed=st.integers(0, 1000), mean=st.booleans(), q=st.sampled_from([0.2, 0.6, 1.0]))
def test_whole_round_without_noise(
    model: str, parameters: dict[str, Any], task: str, loss: str, optimizer: str,
    counts: list[int], seed: int, mean: bool, q: float,
) -> None:  # fmt: skip
    chosen = {"name": optimizer, "learning_rate": 0.5, "weight_decay": 0.01}
    if optimizer == "sgd":
        chosen["momentum"] = 0.9
    training = {
        "records": "mean" if mean else "sum", "optimizer": chosen, "local_steps": 3, "sample_rate": q,
    }  # fmt: skip
    wanted = of_kind(model, parameters, task, loss, training=training)
    cohort = patients(counts, seed, 2 if task == "binary" else 3)
    trainer, weights = quiet_trainer(wanted, cohort), random_parameters(wanted, seed)
    update = trainer.train(weights, stream("sampling", seed), stream("noise", seed))

    step, sampling = trainer.plan.step, stream("sampling", seed)
    assert step.divisor == max(1.0, q * 40)

    def gradient(value: np.ndarray) -> np.ndarray:
        batch = draw_batch(cohort, step, sampling)
        return clipped_by_hand(wanted, split_up(wanted, value), cohort, batch, 1.0) / step.divisor

    start = np.concatenate([weights[n].ravel() for n, _ in study_model(wanted).named_parameters()])
    start = start.astype(np.float64)
    expected = (
        adam_by_hand(start, [gradient] * 3, 0.01)
        if optimizer == "adam"
        else sgd_by_hand(start, [gradient] * 3, 0.9, 0.01)
    )
    # Adam divides by the size of the gradient: rounding of a tiny one weighs more.
    tolerance = 2e-5 if optimizer == "sgd" else 2e-3
    for name, value in split_up(wanted, expected - start).items():
        assert np.abs(update[name] - value).max() <= tolerance * max(1.0, float(np.abs(value).max()))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_empty_batch_is_a_noised_step_all_the_same(name: str) -> None:
    wanted = study(
        training={"sample_rate": 1e-9, "optimizer": {"name": name, "learning_rate": 0.5}, "local_steps": 1}
    )
    trainer = quiet_trainer(wanted, patients([1] * 20), noise=2.0)
    weights = random_parameters(wanted, 0)
    update = trainer.train(weights, stream("sampling"), stream("noise"))
    noise = 2.0 * stream("noise").normal(WIDTH + 1).numpy() / trainer.plan.step.divisor
    found = np.concatenate([a.ravel() for a in update.values()])
    expected = -0.5 * noise if name == "sgd" else -0.5 * np.sign(noise)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-6)
    # … and who is in the cohort makes no difference to it
    other = quiet_trainer(wanted, patients([3] * 700, seed=5), noise=2.0)
    again = other.train(weights, stream("sampling"), stream("noise"))
    assert all((again[n] == update[n]).all() for n in update)


def test_momentum_does_not_outlive_a_round() -> None:
    wanted = study(training={"optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9}})
    trainer, weights = quiet_trainer(wanted, patients([2] * 9)), random_parameters(wanted, 0)
    first = trainer.train(weights, stream("a"), stream("b"))
    trainer.train(random_parameters(wanted, 1), stream("c"), stream("d"))
    again = trainer.train(weights, stream("a"), stream("b"))
    assert all((first[n] == again[n]).all() for n in first)


@pytest.mark.parametrize("limit", [1, 60, 400, 10**9])
@pytest.mark.parametrize("mean", [True, False])
def test_the_memory_bound_changes_nothing(limit: int, mean: bool) -> None:
    wanted = study(model={"name": "mlp", "parameters": {"hidden": [3]}})
    cohort, weights = patients([1, 40, 2, 7, 1, 1, 30, 5]), random_parameters(wanted, 0)
    batch = everybody(cohort, step_plan(average_records=mean))
    whole = clipped(wanted, weights, cohort, batch, 0.5)
    bounded = clipped(wanted, weights, cohort, batch, 0.5, partial(ClippedGradients, memory=16 * limit))
    assert torch.allclose(bounded, whole, rtol=1e-5, atol=1e-6)


@settings(deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(1, 9), max_size=12), limit=st.integers(1, 30))
def test_pieces_hold_every_record_once_and_tear_no_patient(counts: list[int], limit: int) -> None:
    cohort = patients(counts)
    batch = everybody(cohort, step_plan())
    parts = pieces(batch, limit)
    joined = torch.cat([p.records for p in parts]) if parts else torch.empty(0, dtype=torch.int64)
    assert joined.tolist() == batch.records.tolist()
    assert sum(p.patients for p in parts) == len(cohort)
    for part in parts:
        assert len(part.records) <= limit or part.patients == 1
        assert sorted(set(part.patient.tolist())) == list(range(part.patients))


# --- sensitivity: what one patient can change


@every_kind
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("mean", [True, False])
def test_one_patient_changes_the_sum_by_at_most_c(
    model: str, parameters: dict[str, Any], task: str, loss: str, scale: float, mean: bool
) -> None:
    wanted = of_kind(model, parameters, task, loss)
    C = 0.8
    cohort = patients([40, 1, 5, 40, 2], 3, 2 if task == "binary" else 3)
    a, b = int(cohort.offsets[3]), int(cohort.offsets[4])
    cohort.features[a:b] *= scale
    weights = random_parameters(wanted, 1)
    plan = step_plan(average_records=mean)
    whole = clipped(wanted, weights, cohort, everybody(cohort, plan), C).double()
    assert whole.isfinite().all()
    for index in range(len(cohort)):
        less = without(cohort, index)
        rest = clipped(wanted, weights, less, everybody(less, plan), C).double()
        assert float((whole - rest).norm()) <= C * (1 + 1e-5)


@pytest.mark.parametrize("weight", [1e20, 1e37, 3e38])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_no_parameters_make_a_patient_stick_out(model: tuple[str, dict[str, Any]], weight: float) -> None:
    """A coordinator chooses the parameters; NaN of one patient must not drown everybody's noise."""
    wanted = study(model={"name": model[0], "parameters": model[1]})
    cohort = patients([1, 3, 2, 1], 0, scale=2.0)
    signs = random_parameters(wanted, 5)
    weights = {n: (np.sign(a) * weight).astype(np.float32) for n, a in signs.items()}
    plan = step_plan()
    whole = clipped(wanted, weights, cohort, everybody(cohort, plan), 1.0).double()
    assert whole.isfinite().all()
    for index in range(len(cohort)):
        less = without(cohort, index)
        rest = clipped(wanted, weights, less, everybody(less, plan), 1.0).double()
        assert float((whole - rest).norm()) <= 1 + 1e-5


def test_a_patient_not_a_number_counts_as_zero() -> None:
    wanted = study()
    cohort = patients([2, 3, 1])
    cohort.features[3] = float("nan")
    plan, weights = step_plan(), random_parameters(wanted, 0)
    less = without(cohort, 1)
    found = clipped(wanted, weights, cohort, everybody(cohort, plan), 1.0)
    assert torch.allclose(found, clipped(wanted, weights, less, everybody(less, plan), 1.0), atol=1e-6)


# --- sampling


def memberships(count: int, rate: float, steps: int) -> np.ndarray:
    cohort, plan, source = patients([1] * count), step_plan(sample_rate=rate), stream("members", count)
    chosen = np.zeros((steps, count), dtype=bool)
    for step in range(steps):
        chosen[step, draw_batch(cohort, plan, source).records.numpy()] = True
    return chosen


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_patients_take_part_by_independent_coins(rate: float) -> None:
    count, steps = 25, 3000
    chosen = memberships(count, rate, steps)
    spread = steps * rate * (1 - rate)
    per_patient = ((chosen.sum(axis=0) - steps * rate) ** 2 / spread).sum()
    assert stats.chi2.sf(per_patient, count) > FALSE_ALARM
    assert stats.chi2.cdf(per_patient, count) > FALSE_ALARM  # nor too even, as a shuffle would be
    # sizes of batches are binomial: they would be constant with fixed batches
    sizes = np.bincount(chosen.sum(axis=1), minlength=count + 1)
    law = stats.binom.pmf(np.arange(count + 1), count, rate) * steps
    common = law >= 5
    observed = np.append(sizes[common], sizes[~common].sum())
    expected = np.append(law[common], law[~common].sum())
    assert stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(observed) - 1) > FALSE_ALARM
    # neighbours in the cohort, and neighbouring steps, know nothing of each other
    centred = (chosen - rate) / np.sqrt(rate * (1 - rate))
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        z = product.sum() / np.sqrt(product.size)
        assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM


def test_rate_one_takes_everybody() -> None:
    assert memberships(30, 1.0, 20).all()


def test_a_patients_chance_does_not_grow_with_records() -> None:
    cohort, plan, source = patients([1, 40] * 10), step_plan(sample_rate=0.3), stream("chance")
    taken = np.zeros(20)
    for _ in range(2000):
        batch = draw_batch(cohort, plan, source)
        owner = np.searchsorted(cohort.offsets.numpy(), batch.records.numpy(), side="right") - 1
        assert len(set(owner)) == batch.patients
        taken[list(set(owner))] += 1
    table = np.stack([taken, 2000 - taken])
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


@pytest.mark.parametrize("mean", [True, False])
def test_never_more_records_than_the_cap_and_each_as_likely(mean: bool) -> None:
    cap, steps = 5, 3000
    cohort = patients([1, 12, 5, 6, 40])
    plan, source = step_plan(max_records=cap, average_records=mean), stream("cap")
    offsets = cohort.offsets.numpy()
    times = np.zeros(int(offsets[-1]))
    together = np.zeros((12, 12))
    repeats, before = 0, None
    for _ in range(steps):
        batch = draw_batch(cohort, plan, source)
        counts = torch.bincount(batch.patient).numpy()
        assert (counts == np.minimum(cohort.offsets.diff().numpy(), cap)).all()
        assert len(set(batch.records.tolist())) == len(batch.records)
        shares = torch.zeros(5).index_add(0, batch.patient, batch.weights)
        assert np.allclose(shares, 1.0 if mean else counts)
        owner = np.searchsorted(offsets, batch.records.numpy(), side="right") - 1
        assert (owner == batch.patient.numpy()).all()
        times[batch.records.numpy()] += 1
        mine = tuple(batch.records[batch.patient == 1].numpy() - 1)
        together[np.ix_(mine, mine)] += 1
        repeats += mine == before
        before = mine
    for p, (a, b) in enumerate(pairwise(offsets)):
        chance = min(1.0, cap / (b - a))
        if chance == 1:
            assert (times[a:b] == steps).all()
            continue
        # exactly `cap` a step: the variance within a patient is that of sampling without replacement
        z = ((times[a:b] - steps * chance) ** 2).sum() / (steps * chance * (1 - chance))
        assert stats.chi2.sf(z * (b - a - 1) / (b - a), b - a - 1) > FALSE_ALARM, p
    pair = cap * (cap - 1) / (12 * 11)
    spread = np.sqrt(steps * pair * (1 - pair))
    z = [(together[i, j] - steps * pair) / spread for i, j in combinations(range(12), 2)]
    assert 2 * stats.norm.sf(np.abs(z).max()) * len(z) > FALSE_ALARM
    assert repeats <= stats.binom.isf(FALSE_ALARM, steps, 1 / 792)  # chosen anew at each step


# --- noise


def test_noise_covers_every_parameter_at_its_size() -> None:
    wanted = study(
        model={"name": "mlp", "parameters": {"hidden": [3, 2]}},
        training={"local_steps": 1, "sample_rate": 0.5, "optimizer": {"name": "sgd", "learning_rate": 1.0}},
    )
    sigma, C = 1.7, 1.0
    trainer, weights = quiet_trainer(wanted, patients([2] * 10), noise=sigma), random_parameters(wanted, 2)
    quiet = quiet_trainer(wanted, patients([2] * 10)).train(weights, stream("s"), stream("n"))
    updates = []
    for i in range(1500):
        update = trainer.train(weights, stream("s"), stream("n", i))
        updates.append(np.concatenate([(update[n] - quiet[n]).ravel() for n in update]))
    drawn = np.array(updates) * trainer.plan.step.divisor / (sigma * C)
    assert trainer.plan.step.divisor == 20.0
    per_parameter = (drawn**2).sum(axis=0)
    tails = np.minimum(stats.chi2.sf(per_parameter, 1500), stats.chi2.cdf(per_parameter, 1500))
    assert tails.min() * 2 * drawn.shape[1] > FALSE_ALARM
    assert stats.kstest(drawn.ravel(), "norm").pvalue > FALSE_ALARM
    correlation = np.corrcoef(drawn.T) - np.eye(drawn.shape[1])
    assert np.abs(correlation).max() < stats.norm.isf(FALSE_ALARM / drawn.shape[1] ** 2) / np.sqrt(1500)


def test_noised_mean_is_what_it_says() -> None:
    plan = step_plan(noise_multiplier=3.0, clipping_norm=0.25, divisor=40.0)
    total = torch.arange(1000.0)
    found = noised_mean(total, plan, stream("n"))
    expected = (total.double() + 3.0 * 0.25 * stream("n").normal(1000).double()) / 40.0
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="without clipping"):
        noised_mean(total, step_plan(clipping_norm=None), stream("n"))


def test_the_divisor_is_public() -> None:
    """Twice the patients at the same public size: twice the sum, divided by the same number."""
    wanted = study(training={"local_steps": 1})
    weights = random_parameters(wanted, 0)
    one = patients([1] * 20)
    two = Patients(
        torch.cat([one.features, one.features]), torch.cat([one.labels, one.labels]), torch.arange(41)
    )
    a = quiet_trainer(wanted, one).train(weights, stream("s"), stream("n"))
    b = quiet_trainer(wanted, two).train(weights, stream("s"), stream("n"))
    assert all(np.allclose(2 * a[n], b[n], rtol=1e-4, atol=1e-6) for n in a)


def test_the_trainers_noise_never_comes_from_torch_or_numpy() -> None:
    wanted, weights = study(), random_parameters(study(), 0)
    updates = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        trainer = quiet_trainer(wanted, patients([2] * 10), noise=1.0)
        updates.append(trainer.train(weights, stream("s"), stream("n")))
    assert all((updates[0][n] == updates[1][n]).all() for n in weights)
