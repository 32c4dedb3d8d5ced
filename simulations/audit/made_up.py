"""Patients that nobody has: random records of a study's shape, with random labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from client.cohort import Patients
from common.features import Block, blocks
from common.study import Study


def made_up(study: Study, records: Sequence[int], seed: int) -> Patients:
    """Patients with so many records each; the same ones every time.

    Numbers are uniform in [-1, 1], token ids in the vocabulary, labels whatever the study may learn.
    """
    random = np.random.default_rng(seed)
    count = int(sum(records))
    parts = [_block(block, count, random) for block in blocks(study)]
    offsets = np.concatenate([[0], np.cumsum(records)]).astype(np.int64)
    return Patients(
        torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32)),
        torch.from_numpy(_labels(study, count, random)),
        torch.from_numpy(offsets),
    )


def _block(block: Block, count: int, random: np.random.Generator) -> np.ndarray:
    if not block.vocabulary:
        return random.uniform(-1, 1, (count, block.width))
    ids = random.integers(1, block.vocabulary, (count, block.width))
    length = random.integers(1, block.width + 1, (count, 1))
    return np.where(np.arange(block.width) < length, ids, 0)


def _labels(study: Study, count: int, random: np.random.Generator) -> np.ndarray:
    label = study.data.label
    if label.kind == "class":
        return random.integers(0, len(label.classes), count)
    if label.kind == "several":
        return random.integers(0, 2, (count, len(label.columns))).astype(np.float32)
    if label.kind == "survival":
        intervals = len(label.edges) - 1
        return np.column_stack([random.uniform(0, intervals, count), random.integers(0, 2, count)]).astype(
            np.float32
        )
    return random.uniform(-1, 1, count).astype(np.float32)
