"""Packed sums: the same numbers bit for bit, and nothing that is not of the asked shape passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import classes, study

from common.cells import CELLS, PACKED_FROM, VALUES, Cells, dense, packed, sound, stacked
from common.histograms import EXACT_BINS, Packed, histogram_shapes, histograms, histograms_apart

SHAPES = [(3,), (2, 10), (PACKED_FROM,), (2, 600), (3, 2, 400)]
WANTED = {
    "binary": study(),
    "multi": study(data={"label": classes(3)}, objective={"task": "multi-class"}),
    "grouped": study(
        data={
            "columns": [
                {"kind": "numeric", "name": "x", "unit": "1", "range": [-1, 1], "repeat": 4},
                {"kind": "categorical", "name": "sex", "codes": {"1": "male", "0": "female"}},
            ]
        },
        evaluation={"subgroups": ["sex"]},
    ),
}

LABEL = {"column": "y", "range": [80, 200], "unit": "mm[Hg]"}
APART = WANTED | {"regression": study(data={"label": LABEL}, objective={"task": "regression"})}


@given(shape=st.sampled_from(SHAPES), count=st.integers(0, 40), seed=st.integers(0, 1000))
def test_packed_sums_are_the_dense_ones(shape: tuple[int, ...], count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = Cells(shape, random.integers(0, int(np.prod(shape)), count), random.random(count))
    whole = np.zeros(shape)
    np.add.at(whole.reshape(-1), cells.index, cells.weights)
    assert cells.dense().tobytes() == whole.tobytes()
    for form in (cells.packed("x"), packed({"x": whole})):
        assert dense(form)["x"].tobytes() == whole.tobytes()
        assert dense(form)["x"].shape == shape
        assert sound(form, {"x": shape})


def test_stacking_adds_an_axis() -> None:
    parts = [Cells((4,), np.array([i, 3]), np.array([1.0, 2.0])) for i in range(3)]
    assert (stacked(parts).dense() == np.stack([p.dense() for p in parts])).all()


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("count", [0, 1, 50])
def test_exact_histograms_are_packed_without_being_whole_first(name: str, count: int) -> None:
    wanted, random = WANTED[name], np.random.default_rng(count)
    several = wanted.outputs > 1
    scores = torch.from_numpy(random.random((count, 3) if several else count).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, 3 if several else 2, count))
    weights = torch.from_numpy(random.random(count))
    codes = len(wanted.subgroup_columns)
    groups = torch.from_numpy(random.integers(0, 3, (count, codes))) if codes else None
    whole = histograms(wanted, scores, labels, weights, EXACT_BINS, groups)
    form = histograms(wanted, scores, labels, weights, Packed(EXACT_BINS), groups)
    assert {n: a.tobytes() for n, a in dense(form).items()} == {n: a.tobytes() for n, a in whole.items()}
    assert sound(form, histogram_shapes(wanted, EXACT_BINS))
    assert sum(a.nbytes for a in form.values()) < 16 * 1024 + 64 * count


def form() -> dict[str, np.ndarray]:
    return Cells((2, 600), np.array([5, 700, 5]), np.ones(3)).packed("x") | {"m": np.zeros(3)}


FORMS = {"x": (2, 600), "m": (3,)}


def changed(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {**form(), name: array}


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {n: a for n, a in form().items() if n != "x" + VALUES},
        {**form(), "y": np.zeros(1)},
        {**form(), "x": np.zeros((2, 600))},
        {"x": np.zeros((2, 600)), "m": np.zeros(3)},
        changed("m", np.zeros(4)),
        changed("m", np.zeros(3, dtype=np.float32)),
        changed("x" + VALUES, np.zeros(3)),
        changed("x" + VALUES, np.zeros((2, 1))),
        changed("x" + VALUES, np.zeros(2, dtype=np.float32)),
        changed("x" + CELLS, np.array([2, 2, 600, 5, 1200])),
        changed("x" + CELLS, np.array([2, 2, 600, -1, 7])),
        changed("x" + CELLS, np.array([2, 2, 600, 7, 7])),
        changed("x" + CELLS, np.array([2, 2, 600, 8, 7])),
        changed("x" + CELLS, np.array([2, 2, 601, 5, 7])),
        changed("x" + CELLS, np.array([1, 1200, 5, 7])),
        changed("x" + CELLS, np.array([2.0, 2, 600, 5, 7])),
        changed("x" + CELLS, np.array([[2, 2, 600, 5, 7]])),
        changed("x" + CELLS, np.array([], dtype=np.int64)),
    ],
)
def test_anything_else_is_not_sound(arrays: dict[str, np.ndarray]) -> None:
    assert sound(form(), FORMS)
    assert not sound(arrays, FORMS)


@pytest.mark.parametrize("name", ["binary", "multi", "regression"])
@pytest.mark.parametrize("bins", [10, 600, Packed(10), Packed(EXACT_BINS)])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0], [40]])
def test_sites_in_one_go_are_bit_for_bit_as_alone(name: str, bins: int, counts: list[int]) -> None:
    wanted, random, whole = APART[name], np.random.default_rng(sum(counts)), sum(counts)
    several = wanted.outputs > 1
    scores = torch.from_numpy(random.random((whole, 3) if several else whole).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, 3 if several else 2, whole))
    weights = torch.from_numpy(random.random(whole))
    together = histograms_apart(wanted, *(t.numpy() for t in (scores, labels, weights)), bins, counts)
    parts = [each.split(counts) for each in (scores, labels, weights)]
    assert len(together) == len(counts)
    for found, *own in zip(together, *parts, strict=True):
        alone = histograms(wanted, *own, bins)
        assert {n: (a.shape, a.tobytes()) for n, a in found.items()} == {
            n: (a.shape, a.tobytes()) for n, a in alone.items()
        }
