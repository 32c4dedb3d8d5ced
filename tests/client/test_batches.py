"""Batches gathered in one go hold what a loop over patients would have put there."""

from __future__ import annotations

import numpy as np
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import batch_of
from client.cohort import Patients
from client.stacking import _Batches, _Round
from common.privacy.noise import Seeded, Stream
from common.privacy.plan import StepPlan

records_of = st.lists(st.integers(1, 6), min_size=1, max_size=12)


def stream() -> Stream:
    return Seeded(3).stream("records")


def by_loop(
    patients: Patients, chosen: list[int], plan: StepPlan, source: Stream
) -> tuple[list[int], list[int], list[float]]:
    """Records, their patients' places in the batch and their weights; of who has too many records those of
    the smallest words, a word being drawn for each record of the batch."""
    offsets = patients.offsets.tolist()
    held = [list(range(offsets[p], offsets[p + 1])) for p in chosen]
    if any(len(own) > plan.max_records for own in held):
        words = iter(source.words(sum(len(own) for own in held)).tolist())
        for place, own in enumerate(held):
            drawn = sorted((next(words), record) for record in own)
            held[place] = sorted(record for _, record in drawn[: plan.max_records])
    owners = [place for place, own in enumerate(held) for _ in own]
    weights = [1 / len(own) if plan.average_records else 1.0 for own in held for _ in own]
    return [record for own in held for record in own], owners, weights


@settings(max_examples=200, deadline=None)
@given(counts=records_of, cap=st.sampled_from([1, 2, 3, 40]), mean=st.booleans(), data=st.data())
def test_a_batch_is_the_loop_over_its_patients(
    counts: list[int], cap: int, mean: bool, data: st.DataObject
) -> None:
    patients = small.patients(counts)
    chosen = data.draw(st.lists(st.sampled_from(range(len(counts))), unique=True))  # in any order
    plan = small.step_plan(max_records=cap, average_records=mean)
    batch = batch_of(patients, np.array(chosen, dtype=np.int64), plan, stream())
    records, owners, weights = by_loop(patients, chosen, plan, stream())
    assert batch.patients == len(chosen)
    assert batch.records.tolist() == records
    assert batch.patient.tolist() == owners
    np.testing.assert_array_equal(batch.weights.numpy(), np.array(weights, dtype=np.float32))


@st.composite
def rounds(draw: st.DrawFn) -> list[_Round]:
    """Of some sites, the one with the most steps first; steps of unequal numbers of records."""
    found = []
    for site in range(draw(st.integers(1, 4))):
        patients = small.patients(draw(records_of), seed=site)
        held = len(patients.labels)
        counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        random = np.random.default_rng(draw(st.integers(0, 999)))
        records = random.integers(0, held, sum(counts))
        found.append(_Round(patients, counts, records, random.random(sum(counts), dtype=np.float32)))
    return sorted(found, key=lambda each: -len(each.counts))


@settings(max_examples=200, deadline=None)
@given(held=rounds())
def test_a_stack_of_batches_is_the_loop_over_sites_steps_and_records(held: list[_Round]) -> None:
    steps = list(_Batches(held, torch.device("cpu")).steps())
    assert len(steps) == len(held[0].counts)
    for step, (features, labels, weights) in enumerate(steps):
        active = [each for each in held if len(each.counts) > step]
        width = max(each.counts[step] for each in active)
        assert features.shape == (len(active), width, small.WIDTH)
        assert (labels.shape, weights.shape) == ((len(active), width), (len(active), width))
        assert features.isfinite().all()  # what fills up is somebody's record, of weight 0
        for site, each in enumerate(active):
            first = sum(each.counts[:step])
            for place in range(width):
                if place >= each.counts[step]:
                    assert weights[site, place] == 0
                    continue
                record = int(each.records[first + place])
                assert torch.equal(features[site, place], each.patients.features[record])
                assert labels[site, place] == each.patients.labels[record]
                assert weights[site, place] == each.weights[first + place]
