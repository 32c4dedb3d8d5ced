"""How a measurement is told: seconds per round with and without start-up, medians, ratios in one run."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DeploymentError

if TYPE_CHECKING:
    from server.store import Store


def in_a_process(command: Sequence[str], seconds: float) -> str:
    """What a command says, which may take so many seconds.

    Raises:
        DeploymentError: if it fails.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise DeploymentError(
            f"{command[1:4]} ended with {done.returncode}: {done.stderr[-500:]}",
            remedy="see what it says, and that there is memory enough",
        )
    return done.stdout


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        total: seconds from the call to the result.
        per_round: seconds per round, the first and the final evaluation left out.
        rounds: of training.
    """

    total: float
    per_round: float
    rounds: int

    @property
    def start_up(self) -> float:
        """Seconds that don't repeat with the rounds: data, store, processes."""
        return self.total - self.per_round * self.rounds

    @property
    def with_start_up(self) -> float:
        """Seconds per round when start-up is shared out."""
        return self.total / self.rounds


@dataclass(frozen=True)
class Result:
    """The runs of one way of doing the work.

    Attributes:
        more: other numbers, e.g. bytes of memory.
    """

    name: str
    timings: tuple[Timing, ...]
    more: dict[str, float] = field(default_factory=dict)

    @property
    def per_round(self) -> float:
        return statistics.median(t.per_round for t in self.timings)

    @property
    def with_start_up(self) -> float:
        return statistics.median(t.with_start_up for t in self.timings)

    @property
    def start_up(self) -> float:
        return statistics.median(t.start_up for t in self.timings)


@dataclass(frozen=True)
class Comparison:
    """Results on one machine, one after the other; the first is what the others are measured against."""

    name: str
    title: str
    results: tuple[Result, ...]

    def as_json(self) -> dict[str, Any]:
        """Seconds, ratios to the first result, and how many runs each number is the median of."""
        return {
            "name": self.name,
            "title": self.title,
            "results": [
                {
                    "name": r.name,
                    "runs": len(r.timings),
                    "seconds_per_round": r.per_round,
                    "seconds_per_round_with_start_up": r.with_start_up,
                    "start_up_seconds": r.start_up,
                    **self.ratios(r),
                    **r.more,
                }
                for r in self.results
            ],
        }

    def ratios(self, result: Result) -> dict[str, float]:
        first = self.results[0]
        return {
            "ratio": result.per_round / first.per_round,
            "ratio_with_start_up": result.with_start_up / first.with_start_up,
        }

    def rows(self) -> list[list[str]]:
        """The table's cells; see `HEADER`."""
        rows = []
        for r in self.results:
            ratios = self.ratios(r)
            cells = [f"{1000 * r.per_round:.2f}", f"{ratios['ratio']:.2f}", f"{r.start_up:.2f}"]
            cells += [f"{1000 * r.with_start_up:.2f}", f"{ratios['ratio_with_start_up']:.2f}"]
            cells += [f"{name}: {value:,.4g}" for name, value in r.more.items()] or [""]
            rows.append([r.name, *cells[:5], ", ".join(cells[5:])])
        return rows


HEADER = ("", "ms/round", "ratio", "start-up s", "ms/round with start-up", "ratio", "more")


def rounds_timing(total: float, store: Store, session: str) -> Timing:
    """The timing of a finished session of at least two training rounds."""
    ends = [r.finished for r in store.rounds(session)][:-1]
    return Timing(total, (ends[-1] - ends[0]) / (len(ends) - 1), len(ends))


@contextmanager
def each_round(told: Callable[[int], None]) -> Iterator[None]:
    """Within the context, `told` hears of every round that a session of this process has recorded.

    The store's own times are by the clock alone, and a simulation tells of its progress only now and then.
    """
    from server.store import Store

    record = Store.record

    def recorded(store: Store, session: str, number: int, *rest: Any, **named: Any) -> None:
        record(store, session, number, *rest, **named)
        told(number)

    Store.record = recorded  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Store.record = record  # type: ignore[method-assign]


def interleaved(
    ways: Sequence[tuple[str, Callable[[Path], Timing]]], repeats: int, work: Path
) -> tuple[Result, ...]:
    """Run every way in turn, `repeats` times over, so that a busy spell of the machine hits them all.

    Args:
        ways: name → one run in a fresh folder.
    """
    timings: dict[str, list[Timing]] = {name: [] for name, _ in ways}
    for repeat in range(repeats):
        for number, (name, run) in enumerate(ways):
            timings[name].append(run(work / f"run-{repeat}-{number}"))
    return tuple(Result(name, tuple(found)) for name, found in timings.items())
