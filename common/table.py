"""A table of records as text, and what is wrong with it: which file, column and lines, never which value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from common.errors import DataError

Place = Literal["line", "row"]
Positions = npt.NDArray[np.int64]
PLACES_SHOWN = 5
VIOLATIONS_SHOWN = 40


@dataclass(frozen=True, repr=False)
class Decoded:
    """One wide column (common/modalities) of every record.

    Attributes:
        values: float32 [records, width], scaled as the study says; NaN throughout where there is nothing.
        problems: what is wrong, in words that quote no value → positions of the records it is wrong with.
            Their values are NaN. A record that merely lacks the column has no problem.
    """

    values: npt.NDArray[np.float32]
    problems: Mapping[str, Positions] = field(default_factory=dict)

    def take(self, positions: Positions) -> Decoded:
        """The records at `positions` (int64)."""
        place = np.full(len(self.values), -1, dtype=np.int64)
        place[positions] = np.arange(len(positions))
        found = {problem: place[each] for problem, each in self.problems.items()}
        kept = {problem: each[each >= 0] for problem, each in found.items()}
        return Decoded(self.values[positions], {problem: each for problem, each in kept.items() if len(each)})


@dataclass(frozen=True, repr=False)
class Table:
    """Records under the names of a study's data dictionary.

    Attributes:
        decoded: dictionary name → what images, series, texts and molecules came to.
        origin: how messages name the file.
        columns: dictionary name → text of every record (pyarrow string array), null where absent.
        rows: the records as they stand in the file, all columns that hold single values.
        place: whether `locate` gives lines of a text file or rows of a table; both count from 1.
        locate: positions of records → their lines or rows.
    """

    origin: str
    columns: Mapping[str, Any]
    rows: Any
    place: Place
    locate: Callable[[Sequence[int]], Sequence[int]]
    decoded: Mapping[str, Decoded] = field(default_factory=dict)

    @property
    def records(self) -> int:
        return int(self.rows.num_rows)

    def __repr__(self) -> str:
        return f"Table({self.origin}, {len(self.columns)} columns)"

    def take(self, positions: Positions) -> Table:
        """The records at `positions` (int64), which keep their lines."""
        return Table(
            self.origin,
            {name: column.take(pa.array(positions)) for name, column in self.columns.items()},
            self.rows.take(pa.array(positions)),
            self.place,
            lambda chosen: self.locate([int(positions[i]) for i in chosen]),
            {name: each.take(positions) for name, each in self.decoded.items()},
        )

    def violation(self, column: str, problem: str, positions: Sequence[int] | Positions) -> Violation:
        """What is wrong with the records at `positions`, in words that quote no value."""
        chosen = sorted({int(p) for p in positions[:PLACES_SHOWN]})
        return Violation(column, problem, len(positions), self.place, tuple(self.locate(chosen)))

    @staticmethod
    def of(origin: str, columns: Mapping[str, Sequence[str | None]]) -> Table:
        """A table from lists of text, as tests and other readers make it; rows count from 1."""
        arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
        return Table(origin, arrays, pa.table(arrays), "row", lambda chosen: [p + 1 for p in chosen])


@dataclass(frozen=True)
class Violation:
    """One way in which records break the dictionary.

    Attributes:
        column: the dictionary's name.
        problem: in words, without any value.
        count: how many records (or cells of a repeated column) break it; private to the site.
        place: what `places` counts.
        places: the first lines or rows of the file.
    """

    column: str
    problem: str
    count: int
    place: Place
    places: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(str(p) for p in self.places)
        where = f"{self.place}{'s' if len(self.places) > 1 else ''} {shown}"
        more = ", …" if self.count > len(self.places) else ""
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"column {self.column}: {self.problem}, {times} ({where}{more})"


def refuse(origin: str, violations: Sequence[Violation]) -> None:
    """Raise what was found, if anything.

    Raises:
        DataError: one line per violation. It stays at the site.
    """
    if not violations:
        return
    lines = [f"{origin}: the data don't fit the study"]
    lines += [f"  {each}" for each in violations[:VIOLATIONS_SHOWN]]
    if len(violations) > VIOLATIONS_SHOWN:
        lines.append(f"  and {len(violations) - VIOLATIONS_SHOWN} more kinds of violation")
    raise DataError(
        "\n".join(lines),
        remedy="mend those records in the export, or the mapping of units and codes in site.toml",
    )
