"""A small study that asks for statistics, and random cohorts for it: what the tests of statistics share."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.errors import StudyError
from common.files import validated
from common.schema import Coded
from common.study import Study

RANGES = {"age": (0.0, 120.0), "wave": (-3.0, 5.0)}
SPANS = {"age": (23.0, 83.0), "wave": (-3.0, 5.0)}  # of means and deviations
COLUMNS: list[dict[str, Any]] = [
    {"kind": "numeric", "name": "age", "unit": "a", "range": [0, 120], "reference": [38, 68]},
    {"kind": "categorical", "name": "pain", "codes": {"1": "none", "2": "some", "10": "much"}},
    {"kind": "numeric", "name": "wave", "unit": "mV", "range": [-3, 5], "repeat": 6},
    {"kind": "categorical", "name": "sex", "codes": {"0": "female", "1": "male"}},
]


def statistics_study(columns: list[dict[str, Any]] | None = None, bins: int = 20, **changes: Any) -> Study:
    """Three classes `class 0` … `class 2` of column `y`; `changes` replace whole sections."""
    label = {"column": "y", "classes": [{"name": f"class {i}", "codes": [str(i)]} for i in range(3)]}
    value = {
        "name": "described",
        "title": "A study that asks for statistics",
        "data": {"columns": columns or COLUMNS, "label": label, "missing": "indicator"},
        "model": {"name": "logistic-regression"},
        "objective": {"task": "multi-class"},
        "algorithm": {"rounds": 1},
        "training": {
            "optimizer": {"name": "sgd", "learning_rate": 0.5},
            "local_steps": 1,
            "sample_rate": 1.0,
        },
        "privacy": {"mode": "patient-dp", "epsilon": 2.0, "delta": 1e-5, "clipping_norm": 1.0},
        "statistics": {"epsilon": 1.0, "delta": 1e-5, "bins": bins},
    }
    return validated(Study, {**value, **changes}, "described", StudyError)


def random_cohort(seed: int, patients: int = 120) -> tuple[Coded, np.ndarray]:
    """Records with 1 to 40 a patient, in a random order, and each record's patient (int64).

    Of every column three tenths of the values are missing, and all of a tenth of the patients.
    """
    random = np.random.default_rng(seed)
    who = np.repeat(np.arange(patients), random.integers(1, 41, patients))
    random.shuffle(who)
    records = len(who)
    columns = {
        "age": random.normal(55, 15, patients)[who] + random.normal(0, 4, records),
        "wave": random.normal(0.5, 0.5, patients)[who, None] + random.normal(0, 1.5, (records, 6)),
        "pain": random.integers(0, 3, records).astype(float),
        "sex": random.integers(0, 2, patients)[who].astype(float),
    }
    for values in columns.values():
        values[random.uniform(size=values.shape) < 0.3] = np.nan
        values[np.isin(who, random.choice(patients, patients // 10, replace=False))] = np.nan
    return Coded(columns, random.integers(0, 3, patients)[who].astype(float)), who


def taken(coded: Coded, chosen: np.ndarray) -> Coded:
    """Some of the records."""
    return Coded({n: v[chosen] for n, v in coded.columns.items()}, coded.labels[chosen])
