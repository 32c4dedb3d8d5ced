"""What a study's features are called, how many there are and in which order: from the study alone.

It loads neither pandas nor pandera: a coordinator needs no more than this.
"""

from __future__ import annotations

import re

from common.dictionary import CategoricalColumn, NumericColumn
from common.study import Study

WHOLE = r"^([+-]?[0-9]+)\.0$"  # RE2 and `re` read it alike


def feature_names(study: Study) -> tuple[str, ...]:
    """Names of the encoded features in their order, from the study alone.

    `age` is a number scaled to [-1, 1] over the dictionary's interval; `cp=4` is one code of a category;
    `age:missing` is 1 where the value is missing (rule `indicator`).
    """
    names: list[str] = []
    for column in study.data.columns:
        if isinstance(column, CategoricalColumn):
            names += [f"{column.name}={code}" for code in ordered_codes(column) if code != column.baseline]
        else:
            names += column.sources
        if missing_rule(column, study) == "indicator":
            names += [f"{source}:missing" for source in column.sources]
    return tuple(names)


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


def missing_rule(column: NumericColumn | CategoricalColumn, study: Study) -> str:
    """What becomes of a missing value: the column's own rule, else the study's."""
    return column.missing or study.data.missing
