"""What a reservation costs a site whose ledger has a long past: policy, filter, signature and disk."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from client.ledger import Ledger
from client.policy import Approval, CohortBudget, Policy
from client.reservation import Reservation
from common.keys import make_signing_key
from common.privacy.mechanism import SubsampledGaussian
from common.privacy.plan import HistogramPlan, StepPlan, StudyPlan
from simulations.benchmarks.measure import Comparison, Result, Timing

PAST = (0, 100, 1000)
MEASURED = 20
STUDY = "0" * 64


def compare_ledger(work: Path) -> Comparison:
    """Seconds a reservation, durable, after so many earlier sessions of different noise."""
    return Comparison(
        name="ledger",
        title=f"One reservation on disk, signed, after many sessions (median of {MEASURED})",
        results=tuple(_after(work / str(count), count) for count in PAST),
    )


def _after(folder: Path, past: int) -> Result:
    folder.mkdir(parents=True)
    key = make_signing_key(folder / "site.key")
    policy = Policy(cohort=CohortBudget(epsilon=1000, delta=1e-2))
    approval = Approval.model_validate(
        {
            "study": "benchmark",
            "digest": STUDY,
            "epsilon": 1e9,
            "delta": 0.999,
            "approved_by": "benchmark",
            "approved_at": "2026-01-01T00:00:00Z",
        }
    )
    ledger = Ledger(folder / "ledger" / "ledger.jsonl", folder / "replies", key=key, durable=False)
    for number in range(past):
        ledger.reserve(_session(number), approval, policy)
    ledger.close()
    began = time.perf_counter()
    ledger = Ledger(folder / "ledger" / "ledger.jsonl", folder / "replies", key=key)
    opening = time.perf_counter() - began
    timings = []
    for number in range(past, past + MEASURED):
        began = time.perf_counter()
        ledger.reserve(_session(number), approval, policy)
        seconds = time.perf_counter() - began
        timings.append(Timing(seconds, seconds, 1))
    ledger.close()
    return Result(f"{past} sessions before", tuple(timings), {"seconds to open": opening})


def _session(number: int) -> Reservation:
    """The first round of a session with a noise of its own, so that nothing is cached."""
    noise = 20.0 + 0.01 * number
    step = StepPlan(0.1, 1.0, noise, 10.0, 1, average_records=True)
    histogram = HistogramPlan(1.0, 10 * noise)
    plan = StudyPlan(step, 10, 20, 1, histogram, histogram, 1e-6)
    first = Reservation(
        session=f"session-{number}",
        round=1,
        study=STUDY,
        request=f"{number:064x}",
        public_size=100,
        plan=plan,
        training=SubsampledGaussian(noise_multiplier=noise, sample_rate=0.1, steps=10),
        epsilon=1e-3,
        delta=1e-6,
    )
    return replace(first, policy="p", withdrawn="w")
