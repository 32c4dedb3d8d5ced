"""Data sets that scikit-learn ships, dealt out to invented hospitals, always in the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from simulations.datasets.sites import Hospital
from simulations.partition import by_sizes, iid

_SEED = 2024
_SITES = ("ashford", "birchwood", "cedar-hill", "dunmore")
_SIDE, _PADDING = 28, 10


def breast_cancer(_: Path) -> list[Hospital]:
    """569 patients, one record each, 30 features; 40, 30, 20 and 10 % of the patients per hospital."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer(as_frame=True)
    table = bunch.data.rename(columns=lambda name: name.replace(" ", "_"))
    table.insert(0, "patient_id", [f"wdbc-{i:04d}" for i in range(1, len(table) + 1)])
    table["diagnosis"] = np.where(bunch.target == 0, "M", "B")
    parts = by_sizes(len(table), (40, 30, 20, 10), np.random.default_rng(_SEED))
    return [Hospital(name, table.iloc[part], len(part)) for name, part in zip(_SITES, parts, strict=True)]


def digits(_: Path) -> list[Hospital]:
    """1,797 images of 8x8 pixels (0 to 16), set in the middle of 28x28: pixel_0 … pixel_783 row by row."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.pad(bunch.images.astype(np.int64), ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
    table = pd.DataFrame(
        images.reshape(len(images), _SIDE * _SIDE), columns=[f"pixel_{i}" for i in range(_SIDE * _SIDE)]
    )
    table = pd.concat(
        [
            pd.DataFrame({"patient_id": [f"digits-{i:04d}" for i in range(1, len(table) + 1)]}),
            table,
            pd.DataFrame({"digit": bunch.target}),
        ],
        axis=1,
    )
    parts = iid(len(table), len(_SITES), np.random.default_rng(_SEED))
    return [Hospital(name, table.iloc[part], len(part)) for name, part in zip(_SITES, parts, strict=True)]
