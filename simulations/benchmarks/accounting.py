"""What accounting costs: one reserve after many, ε of many kinds of events, and calibration."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.privacy import accounting, filter
from common.privacy.accounting import calibrate, epsilon
from common.privacy.filter import privacy_filter, rdp
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from simulations.benchmarks.measure import Comparison, Timing, interleaved

PAST = 1000
KINDS = (1, 10, 50)
CALLS = 5  # of a run, of which the median counts
TARGETS = ((1.0, 1e-5, 1.0, 10), (1.0, 1e-5, 0.1, 200), (4.0, 1e-5, 0.01, 5000))
_DELTA = 1e-5

Events = list[SubsampledGaussian | GaussianRelease]


def compare_accounting(work: Path, *, repeats: int = 5, past: int = PAST) -> tuple[Comparison, ...]:
    """Seconds of processor time of one call each, with nothing remembered unless it says so."""
    return (_reserve(work, past, repeats), _kinds(work, repeats), _calibration(work, repeats))


def different_events(count: int) -> Events:
    """Events of which no two have the same noise; each third is a release without sampling."""
    return [
        GaussianRelease(noise_multiplier=20 + 0.01 * k)
        if k % 3 == 2
        else SubsampledGaussian(noise_multiplier=2 + 0.01 * k, sample_rate=0.01 + 0.0001 * (k % 500), steps=5)
        for k in range(count)
    ]


def forget() -> None:
    """Let the next call work everything out, as the first of a process."""
    calibrate.cache_clear()
    accounting._epsilon.cache_clear()
    filter.step_rdp.cache_clear()


def _reserve(work: Path, past: int, repeats: int) -> Comparison:
    budget = privacy_filter(10.0, _DELTA)
    events = different_events(past)
    new = SubsampledGaussian(noise_multiplier=3.777, sample_rate=0.0777, steps=20)
    spent = sum(rdp(e, budget.order) for e in events)

    def carried_on() -> None:
        filter.step_rdp.cache_clear()
        budget.admits(spent, rdp(new, budget.order))

    def started_anew() -> None:
        filter.step_rdp.cache_clear()
        budget.admits(sum(rdp(e, budget.order) for e in events), rdp(new, budget.order))

    def added_again() -> None:
        budget.admits(sum(rdp(e, budget.order) for e in events), rdp(new, budget.order))

    ways: list[tuple[str, Callable[[], None]]] = [
        ("cost of a new kind of event, and admission", carried_on),
        ("with all past costs added up again, remembered", added_again),
        ("with all past costs worked out again", started_anew),
    ]
    title = f"one reserve after {past:,} events of different noise; a round is one call"
    return _comparison("accounting-reserve", title, ways, work, repeats)


def _kinds(work: Path, repeats: int) -> Comparison:
    def way(count: int) -> tuple[str, Callable[[], None]]:
        events = different_events(count)

        def call() -> None:
            forget()
            epsilon(events, _DELTA)

        return f"{count} different events", call

    title = "ε of a fixed schedule; a round is one call"
    return _comparison("accounting-epsilon", title, [way(count) for count in KINDS], work, repeats)


def _calibration(work: Path, repeats: int) -> Comparison:
    def way(target: float, delta: float, rate: float, steps: int) -> tuple[str, Callable[[], None]]:
        def call() -> None:
            forget()
            calibrate(target, delta, rate, steps)

        return f"ε {target:g}, δ {delta:g}, sample rate {rate:g}, {steps:,} steps", call

    title = "noise from a target; a round is one call"
    return _comparison("accounting-calibrate", title, [way(*each) for each in TARGETS], work, repeats)


def _comparison(
    name: str, title: str, ways: Sequence[tuple[str, Callable[[], None]]], work: Path, repeats: int
) -> Comparison:
    timed = [(way, _repeated(call)) for way, call in ways]
    interleaved(timed, 1, work / "warm-up")
    return Comparison(name, title, interleaved(timed, repeats, work))


def _repeated(call: Callable[[], None]) -> Callable[[Path], Timing]:
    def run(_: Path) -> Timing:
        found = []
        for _call in range(CALLS):
            began = time.thread_time()
            call()
            found.append(time.thread_time() - began)
        middle = sorted(found)[CALLS // 2]
        return Timing(total=middle * CALLS, per_round=middle, rounds=CALLS)

    return run
