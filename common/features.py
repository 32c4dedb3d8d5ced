"""What a study's features are called, how many there are and in which order: from the study alone.

It loads neither pandas nor pandera: a coordinator needs no more than this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from common.columns import CategoricalColumn, Column, Tabular
from common.modalities import MoleculeColumn, TextColumn
from common.study import Study

WHOLE = r"^([+-]?[0-9]+)\.0$"  # RE2 and `re` read it alike


@dataclass(frozen=True)
class Block:
    """Features that belong together.

    Attributes:
        kind: `table`: neighbouring numbers and codes; else the column's kind.
        name: of the column; of a table its first column's.
        start: first feature.
        shape: that its features are put into, row by row.
        vocabulary: ids of tokens, if it holds such; 0 otherwise.
    """

    kind: Literal["table", "image", "series", "text", "molecule"]
    name: str
    start: int
    width: int
    shape: tuple[int, ...]
    vocabulary: int = 0


def blocks(study: Study) -> tuple[Block, ...]:
    """The features in their order, by what belongs together."""
    found: list[Block] = []
    start = 0
    for column in study.data.columns:
        if isinstance(column, Tabular):
            width = len(_tabular_names(column, study))
            last = found[-1] if found and found[-1].kind == "table" else None
            if last is not None:
                found.pop()
                found.append(Block("table", last.name, last.start, last.width + width, (last.width + width,)))
            else:
                found.append(Block("table", column.name, start, width, (width,)))
        else:
            width = column.width
            ids = column.vocabulary if isinstance(column, TextColumn | MoleculeColumn) else 0
            found.append(Block(column.kind, column.name, start, width, column.shape, ids))
        start += width
    return tuple(found)


def feature_count(study: Study) -> int:
    """How many features a record has."""
    return sum(block.width for block in blocks(study))


def feature_names(study: Study) -> tuple[str, ...]:
    """Names of the encoded features in their order, from the study alone.

    `age` is a number scaled to [-1, 1] over the dictionary's interval; `cp=4` is one code of a category;
    `age:missing` is 1 where the value is missing (rule `indicator`); `xray[7]` is a number of a block.
    """
    names: list[str] = []
    for column in study.data.columns:
        if isinstance(column, Tabular):
            names += _tabular_names(column, study)
        else:
            names += [f"{column.name}[{i}]" for i in range(column.width)]
    return tuple(names)


def _tabular_names(column: Tabular, study: Study) -> list[str]:
    names: list[str] = []
    if isinstance(column, CategoricalColumn):
        names += [f"{column.name}={code}" for code in ordered_codes(column) if code != column.baseline]
    else:
        names += column.sources
    if missing_rule(column, study) == "indicator":
        names += [f"{source}:missing" for source in column.sources]
    return names


def ordered_codes(column: CategoricalColumn) -> tuple[str, ...]:
    """A column's codes as they are one-hot encoded: whole numbers rising, then text.

    The order in the study's file must not count: its canonical form, which names it, forgets that order.
    """

    def key(code: str) -> tuple[int, int, str]:
        number = re.fullmatch(r"[+-]?[0-9]+", normal_code(code))
        return (0, int(number.group()), code) if number else (1, 0, code)

    return tuple(sorted(column.codes, key=key))


def normal_code(code: str) -> str:
    """A code's normal form: `1.0` reads as `1`; `01` stays."""
    return re.sub(WHOLE, r"\1", code.strip())


def missing_rule(column: Column, study: Study) -> str:
    """What becomes of a missing value: the column's own rule, else the study's."""
    return column.missing or study.data.missing
