"""Randomness: its law, its independence, the grid it leaves on, and that nobody sees its keys. Seeds are
fixed, so that nothing here fails by chance; when they were chosen, each statistical test would have raised
a false alarm once in a million times."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from every_model import EVERY_MODEL, patients_of, study_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small import patients, step_plan, study, without

from client import ahead, dpsgd
from client.ahead import Cores, drawn_ahead
from client.batches import Batch
from client.cohort import Cohort
from client.dense import DenseGradients
from client.dpsgd import ClippedGradients, Engine, noised_mean
from client.linear import LinearGradients
from client.release import noised_histograms
from client.rowwise import CLIPPING_MARGIN
from client.training import Trainer
from common.models import parameter_arrays, study_model
from common.objectives import record_losses
from common.privacy import noise as module
from common.privacy.noise import GRID_BITS, OperatingSystem, Seeded, Stream, grid_step, noised
from common.privacy.plan import HistogramPlan, plan_study

FALSE_ALARM = 1e-6
COUNT = 2_000_000


def stream(*context: str | int) -> Stream:
    return Seeded(11).stream("test", *context)


# --- the law


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return stream("normals").normal(COUNT).numpy()


@pytest.fixture(scope="module")
def released() -> np.ndarray:
    """Noise as it leaves, over its standard deviation."""
    return noised(torch.zeros(COUNT), 1.7, stream("released"), divisor=8.0).double().numpy() * 8.0 / 1.7


@pytest.fixture(params=["normals", "released"])
def drawn(request: pytest.FixtureRequest) -> np.ndarray:
    found: np.ndarray = request.getfixturevalue(request.param)
    return found


def test_noise_has_the_moments_of_the_normal(drawn: np.ndarray) -> None:
    # E x, x², x³, x⁴ and x⁶ with the variances of their means
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        z = ((drawn**power).mean() - mean) / np.sqrt(variance / COUNT)
        assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM, power


def anderson_darling(sample: np.ndarray) -> float:
    """p-value of the test of Anderson & Darling (1952) for the standard normal, fully specified.

    A² is in the limit a sum of χ²₁ / (j (j + 1)), j = 1, 2, …; beyond a, its tail is that of the first
    term times Π over j > 1 of (1 - 2 / (j (j + 1)))^-½ = √3 (Zolotarev 1961).
    """
    ordered, n = np.sort(sample), len(sample)
    weights = 2 * np.arange(1, n + 1) - 1
    square = -n - (weights * (stats.norm.logcdf(ordered) + stats.norm.logsf(ordered[::-1]))).mean()
    return float(np.sqrt(3) * stats.chi2.sf(2 * square, 1))


def test_noise_follows_the_normal_law(drawn: np.ndarray) -> None:
    for sample in (drawn, drawn[: COUNT // 2], drawn[COUNT // 2 :]):
        assert stats.kstest(sample, "norm").pvalue > FALSE_ALARM
    assert anderson_darling(drawn[: COUNT // 2]) > FALSE_ALARM


def test_the_test_of_anderson_and_darling_sees_small_faults(normals: np.ndarray) -> None:
    half = normals[: COUNT // 2]
    assert anderson_darling(half * 1.01) < FALSE_ALARM
    assert anderson_darling(half + 0.008) < FALSE_ALARM
    assert anderson_darling(np.clip(half, -2.5, 2.5)) < FALSE_ALARM


@pytest.mark.parametrize("border", [2.0, 3.0, 4.0, 5.0])
def test_tails_are_neither_cut_nor_fat(drawn: np.ndarray, border: float) -> None:
    law = stats.binom(COUNT, 2 * stats.norm.sf(border))
    beyond = int((np.abs(drawn) > border).sum())
    assert law.sf(beyond - 1) > FALSE_ALARM
    assert law.cdf(beyond) > FALSE_ALARM


def correlated(a: np.ndarray, b: np.ndarray, tests: int = 1) -> bool:
    """Whether two samples are: with independent normals, r √((n - 2) / (1 - r²)) follows Student's law."""
    r, n = np.corrcoef(a, b)[0, 1], len(a)
    t = abs(r) * np.sqrt((n - 2) / (1 - r * r))
    return bool(2 * tests * stats.t.sf(t, n - 2) <= FALSE_ALARM)


def test_the_two_of_a_pair_know_nothing_of_each_other(normals: np.ndarray) -> None:
    first, second = normals[::2], normals[1::2]
    assert not correlated(first, second)
    assert not correlated(normals[1:], normals[:-1])
    assert not correlated(normals[2:], normals[:-2])
    for power in (2, 4):  # not normal, but in so large a sample r is; its spread is that of a product
        a, b = first**power, second**power
        z = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()) * np.sqrt(len(a))
        assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM
    # the angle is even, in quadrants and finely, whatever the radius
    angle = np.arctan2(second, first) / (2 * np.pi) % 1
    far = np.hypot(first, second) > 3
    for sample in (angle, angle[far], angle * 2**14 % 1, angle[far] * 2**14 % 1):
        assert stats.kstest(sample, "uniform").pvalue > FALSE_ALARM


def test_blocks_know_nothing_of_each_other() -> None:
    size, first = 2 * module._MOST_PAIRS, 2 * (module._MOST_PAIRS - module._FIRST_PAIRS)
    found = stream("blocks").normal(first + 12 * size)[first:].numpy().reshape(12, size)
    for i, j in itertools.combinations(range(12), 2):
        assert not correlated(found[i], found[j], tests=66)


# --- the sampler, bit by bit


class Given:
    """A key stream that was written by hand."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def update(self, data: bytes) -> bytes:
        taken, self.content = self.content[: len(data)], self.content[len(data) :]
        return taken

    def update_into(self, data: memoryview, into: bytearray) -> int:
        into[: len(data)] = self.update(bytes(data))
        return len(data)


def normals_of(content: bytes, more: bytes) -> module._Normals:
    """Of these key streams, the second of which refines tails."""
    return module._Normals(Given(content), lambda: Given(more))  # type: ignore[arg-type, return-value]


def exactly(radius: int, position: int, arc: int, tail: int = 0) -> tuple[Any, Any, Any]:
    """r, r cos θ and r sin θ of two signed words and an unsigned one, to 40 digits."""
    u = abs(mpmath.mpf(radius)) / 2**63
    if u < mpmath.mpf(2) ** -24:
        u = ((radius if radius >= 0 else -radius - 1) + (tail + mpmath.mpf("0.5")) / 2**64) / 2**63
    turn = 2 * mpmath.pi * (arc % 2**14 + mpmath.mpf(position) / 2**32) / 2**14
    r = mpmath.sqrt(-2 * mpmath.log(u))
    return r, r * mpmath.cos(turn), r * mpmath.sin(turn)


def off_by(found: np.ndarray, words: list[tuple[int, int, int]], tail: int = 0) -> Iterator[tuple[Any, Any]]:
    """Of each number, its distance from the exact one, and r."""
    with mpmath.workdps(40):
        for i, word in enumerate(words):
            r, x, y = exactly(*word, tail)
            for real, computed in ((x, found[2 * i]), (y, found[2 * i + 1])):
                yield abs(real - mpmath.mpf(float(computed))), r


def test_normals_are_box_and_mullers_of_the_key_stream() -> None:
    key, pairs = bytes(range(32)), module._FIRST_PAIRS
    raw = Cipher(algorithms.AES(key), modes.CTR(b"\x40" + bytes(15))).encryptor().update(bytes(14 * pairs))
    kinds = (("<i8", 0), ("<i4", 8 * pairs), ("<u2", 12 * pairs))
    words = list(
        zip(*(np.frombuffer(raw, kind, pairs, start).tolist() for kind, start in kinds), strict=True)
    )
    for distance, r in off_by(Stream(key).normal(2 * pairs).numpy(), words):
        assert distance <= 2.0**-50 * r + 2.0**-52 / r


RADII = [
    *(0, 1, -1, 2**20, 2**38 + 12345, -(2**38), 2**39 - 1, -(2**39), -(2**39) - 1, 2**39, 2**39 + 1),
    *(2**52 + 1, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 1 - 2**63),
]
POSITIONS = [0, 1, -1, 12345, 2**31 - 1, -(2**31)]
ARCS = [0, 1, 4095, 4096, 2**13, 12288, 2**14 - 1, 2**16 - 1]


@pytest.mark.parametrize("more", [0, 1, 2**63, 2**64 - 1])
def test_extreme_words(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corners of radius and angle, tails refined by their own key stream."""
    words = list(itertools.product(RADII, POSITIONS, ARCS))
    monkeypatch.setattr(module, "_FIRST_PAIRS", len(words))
    columns = zip(*words, strict=True)
    kinds = ("<i8", "<i4", "<u2")
    content = b"".join(np.array(c, dtype=k).tobytes() for c, k in zip(columns, kinds, strict=True))
    source = normals_of(content, more.to_bytes(8, "little") * len(words))
    found = next(source.take(2 * len(words)))
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 13.33
    for distance, r in off_by(found, words, more):
        assert distance <= 2.0**-50 * r + min(2.0**-26, 2.0**-52 / max(r, 1e-30))


def test_refined_tails_are_uniform() -> None:
    source = normals_of(b"", stream("more").bytes(8 * 50_000))
    words = stream("words").words(50_000) >> np.uint64(24)
    small = np.array([source._tail(int(w) - 2**39) for w in words])
    assert ((small > 0) & (small <= 2.0**-24)).all()
    assert stats.kstest(small * 2.0**24, "uniform").pvalue > FALSE_ALARM
    # below the words' own resolution too, where the extra bits alone decide
    finest = np.array([source._tail(w) for w in (0, -1)])
    assert (finest < 2.0**-63).all()


def test_tails_beyond_what_chance_shows_are_drawn_as_often_as_they_should_be() -> None:
    """Given |x| > r₀ = √(48 ln 2), the radius has the law exp(-(r² - r₀²) / 2), and tails reach on."""
    pairs, blocks, radii = module._FIRST_PAIRS, 20, []
    for block in range(blocks):
        words = (stream("far", block).words(pairs) >> np.uint64(24)).astype(np.int64) - 2**39
        content = words.tobytes() + stream("far angles", block).bytes(6 * pairs)
        source = normals_of(content, stream("far tails", block).bytes(8 * pairs))
        found = next(source.take(2 * pairs))
        radii.append(np.hypot(found[::2], found[1::2]))
    square = np.concatenate(radii) ** 2 - 48 * np.log(2)
    assert stats.kstest(square / 2, "expon").pvalue > FALSE_ALARM


# --- the grid


@settings(deadline=None, derandomize=True)
@given(st.floats(1e-30, 1e30))
def test_the_step_is_a_power_of_two_finer_than_the_noise(deviation: float) -> None:
    step = grid_step(deviation)
    assert np.frexp(step)[0] == 0.5
    assert 2**GRID_BITS <= deviation / step < 2 ** (GRID_BITS + 1)


SCALES = [(1.0, 1.0), (1.7, 40.0), (0.3, 7.0), (2.0**-20, 1.0), (1e5, 3.0), (65535.0, 1e4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("deviation", "divisor"), SCALES)
def test_it_is_a_function_of_an_integer(deviation: float, divisor: float, dtype: torch.dtype) -> None:
    exact = torch.from_numpy(np.random.default_rng(3).normal(size=100_000)) * 30 * deviation
    n = noised(exact, deviation, stream("grid"), dtype=torch.float64).numpy() / grid_step(deviation)
    assert (n % 1 == 0).all()
    assert len(np.unique(n)) > 99_000
    found = noised(exact, deviation, stream("grid"), divisor=divisor, dtype=dtype).numpy()
    of_integers = (n * grid_step(deviation)).astype(found.dtype) * found.dtype.type(1.0 / divisor)
    same = found.view(f"i{found.itemsize}") == of_integers.view(f"i{found.itemsize}")
    assert same.all()


@pytest.mark.parametrize(("deviation", "divisor"), SCALES)
def test_it_is_the_sum_rounded(deviation: float, divisor: float) -> None:
    """In exact arithmetic, except for the rounding of noise times its standard deviation."""
    exact = np.random.default_rng(4).normal(size=2000) * 5 * deviation
    source = torch.from_numpy(exact)
    found = noised(source, deviation, stream("sum"), divisor=divisor, dtype=torch.float64)
    assert (source.numpy() == exact).all()
    step = Fraction(grid_step(deviation))
    for leaves, value, z in zip(found.tolist(), exact, stream("sum").normal(2000).tolist(), strict=True):
        n = round(Fraction(leaves) * Fraction(divisor) / step)
        real = Fraction(value) + Fraction(z) * Fraction(deviation)
        assert abs(n - real / step) <= Fraction(1, 2) + Fraction(1, 2**28)


def test_low_bits_tell_nothing_of_the_sum() -> None:
    """Of each integer, the low bits are even and the same, whatever low bits the sum has."""
    count, cells = 400_000, 64
    tables = []
    for index, value in enumerate((0.0, 0.1, 0.1 + 2.0**-40, 1 / 3, 2.0**-18, 123.4567)):
        found = noised(torch.full((count,), value, dtype=torch.float64), 1.0, stream("low", index))
        n = (found.double().numpy() / grid_step(1.0)).astype(np.int64)
        tables.append(np.bincount(n % cells, minlength=cells))
        assert stats.chisquare(tables[-1]).pvalue > FALSE_ALARM
    assert stats.chi2_contingency(np.stack(tables)).pvalue > FALSE_ALARM


def test_the_attack_on_floating_point_finds_nothing() -> None:
    """Mironov's: what could have come of one sum, by its bits, could not have come of another.

    On sum + noise in floating point it decides nearly each number; on the grid it has nothing to go by.
    """
    sums, count = (0.1, 0.7), 20_000
    noise = stream("attack").normal(count).float().double().numpy()

    def possible(seen: np.ndarray, value: float) -> np.ndarray:
        """Whether seen - value is a float32, as all noise was."""
        left = seen - value
        return np.abs(left.astype(np.float32).astype(np.float64) - left) <= 2.0**-51 * np.abs(left)

    naive = sums[0] + noise
    assert possible(naive, sums[0]).mean() > 0.4
    assert possible(naive, sums[1]).mean() < 0.01
    grid = grid_step(1.0)
    for value in sums:
        seen = noised(torch.full((count,), value), 1.0, stream("attacked"), dtype=torch.float64).numpy()
        assert (seen / grid % 1 == 0).all()
        # each number could have come of either sum: both lie where noise has every integer
        assert all((np.abs(seen - other) < 8).all() for other in sums)


def test_zero_has_no_sign() -> None:
    found = noised(torch.zeros(COUNT), 1.0, stream("zeros")).numpy()
    zeros = found[found == 0]
    law = stats.binom(COUNT, 2 * stats.norm.cdf(grid_step(1.0) / 2) - 1)
    assert law.ppf(FALSE_ALARM) <= len(zeros) <= law.isf(FALSE_ALARM)
    assert len(zeros) > 2
    assert not np.signbit(zeros).any()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 5)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    for given_type, wanted in itertools.product((torch.float32, torch.float64), repeat=2):
        found = noised(torch.ones(shape, dtype=given_type), 1.0, stream("shape"), dtype=wanted)
        assert found.shape == shape
        assert found.dtype == wanted
    turned = torch.arange(6.0).reshape(2, 3).T
    found = noised(turned, 1e-9, stream("shape"))
    assert torch.allclose(found, turned, atol=1e-7)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_noise_must_be_some(wrong: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        noised(torch.zeros(3), wrong, stream())
    with pytest.raises(ValueError, match="positive"):
        noised(torch.zeros(3), 1.0, stream(), divisor=wrong)


def test_training_and_sums_leave_by_the_grid() -> None:
    plan = step_plan(noise_multiplier=1.3, clipping_norm=0.7, divisor=16.0)
    total = torch.from_numpy(np.random.default_rng(0).normal(size=5000))
    found = noised_mean(total, plan, stream("mean")).double().numpy() * 16 / grid_step(1.3 * 0.7)
    assert (found % 1 == 0).all()
    table = np.random.default_rng(0).uniform(size=(7, 2, 9))
    sums = noised_histograms({"a": table, "b": table[0]}, HistogramPlan(1.4, 2.5), stream("sums"))
    for name, released in sums.items():
        assert released.dtype == np.float64
        assert released.shape == (table if name == "a" else table[0]).shape
        assert (released / grid_step(1.4 * 2.5) % 1 == 0).all()
    assert len(np.unique(np.concatenate([s.ravel() for s in sums.values()]))) == 7 * 18 + 18
    with pytest.raises(ValueError, match="positive"):
        noised_histograms({"a": table}, HistogramPlan(1.0, 0.0), stream())


# --- independence, and that no parameter goes without


def test_rounds_steps_tensors_and_sites_are_independent() -> None:
    """Of an MLP's tensors, 2 sites x 3 rounds x 4 steps x 4 tensors, each against each."""
    source, plan = Seeded(17), step_plan()
    sizes = [600, 400, 300, 500]
    drawn = {}
    for site, round_ in itertools.product(("north", "south"), (1, 2, 3)):
        noise = source.stream("noise", site, "d" * 64, round_)
        for step in range(4):
            mean = noised_mean(torch.zeros(sum(sizes), dtype=torch.float64), plan, noise)
            for tensor, piece in enumerate(mean.split(sizes)):
                drawn[site, round_, step, tensor] = piece.double().numpy()
    pairs = list(itertools.combinations(drawn, 2))
    for one, two in pairs:
        n = min(len(drawn[one]), len(drawn[two]))
        assert not correlated(drawn[one][:n], drawn[two][:n], tests=len(pairs)), (one, two)
    assert len({tuple(piece[:3]) for piece in drawn.values()}) == len(drawn)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_every_scalar_of_every_model_gets_noise(name: str) -> None:
    wanted = study_of(
        name,
        training={"sample_rate": 1e-9, "local_steps": 1, "optimizer": {"name": "sgd", "learning_rate": 1.0}},
    )
    cohort = patients_of(wanted, [1] * 20)
    trainer = Trainer(wanted, Cohort(cohort, cohort), plan_study(wanted, 50))
    start = parameter_arrays(study_model(wanted))
    zeros = {n: np.zeros_like(a) for n, a in start.items()}
    update = trainer.train(zeros, stream("nobody"), stream("noise", name))
    assert {n: a.shape for n, a in update.items()} == {n: a.shape for n, a in start.items()}
    step = trainer.plan.step
    scale = step.noise_multiplier * (step.clipping_norm or 0.0) / step.divisor
    trained = {n for n, p in study_model(wanted).named_parameters() if p.requires_grad}
    assert not any(a.any() for n, a in update.items() if n not in trained)
    values = np.concatenate([update[n].ravel() for n in sorted(trained)]).astype(np.float64) / scale
    assert (values != 0).all()
    assert len(np.unique(values)) > 0.95 * len(values)  # on a grid, where some of thousands meet
    tails = stats.chi2.sf((values**2).sum(), len(values)), stats.chi2.cdf((values**2).sum(), len(values))
    assert min(tails) > FALSE_ALARM


# --- the sum that noise is added to


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 7), (2, 70_000), (33, 9_001), (700, 300)])
def test_norms_and_sums_are_those_of_float64(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    parts = [random.normal(size=(shape[0], n)).astype(np.float32) for n in (shape[1], 1, 11)]
    tensors = [torch.from_numpy(p) for p in parts]
    whole = np.concatenate(parts, axis=1).astype(np.float64)
    weights = random.uniform(size=shape[0])
    assert np.allclose(dpsgd._norms(tensors).numpy(), np.linalg.norm(whole, axis=1), rtol=1e-14)
    found = dpsgd._weighted_sums(tensors, torch.from_numpy(weights)).numpy()
    assert np.allclose(found, weights @ whole, rtol=1e-12, atol=1e-12)
    assert all((t.numpy() == p).all() for t, p in zip(tensors, parts, strict=True))


@pytest.mark.parametrize("engine", [ClippedGradients, DenseGradients, LinearGradients])
@pytest.mark.parametrize("alike", [True, False])
def test_rounding_leaves_one_patients_share_at_c(alike: bool, engine: type[Engine]) -> None:
    """Thousands of gradients that add up, where float32 would lose a ten-thousandth of C."""
    wanted = study()
    cohort = patients([1] * 3000, seed=2)
    if alike:
        cohort.features[:] = cohort.features[0]
        cohort.labels[:] = 1
    C = 0.01
    network = study_model(wanted)
    gradients = engine(network, wanted.objective)

    def total(of: Any) -> torch.Tensor:
        count = len(of)
        return gradients.sum(of, Batch(torch.arange(count), torch.arange(count), torch.ones(count), count), C)

    whole = total(cohort)
    assert whole.dtype == torch.float64
    for index in (0, 17, 2999):
        share = float((whole - total(without(cohort, index))).norm())
        assert C * (1 - 1.01 * CLIPPING_MARGIN) < share <= C


def test_losses_are_there_to_be_clipped() -> None:
    """The test above would pass on zeros."""
    wanted, cohort = study(), patients([1] * 10)
    losses = record_losses(wanted.objective, study_model(wanted)(cohort.features), cohort.labels)
    assert (losses > 0).all()


# --- streams


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(0, 3000), max_size=12), st.integers(0, 3), st.booleans())
def test_the_sizes_of_takings_make_no_difference(sizes: list[int], seed: int, bytes_too: bool) -> None:
    whole = Seeded(seed).stream("cut").normal(sum(sizes))
    source = Seeded(seed).stream("cut")
    pieces = []
    for size in sizes:
        pieces.append(source.normal(size))
        if bytes_too:
            source.bytes(size + 1)
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.float64), *pieces]), whole)


def test_large_takings_are_the_same_in_pieces() -> None:
    whole = stream("large").normal(200_001)
    source = stream("large")
    assert torch.equal(torch.cat([source.normal(n) for n in (1, 70_000, 99_999, 30_001)]), whole)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100, 1001])
def test_any_number_of_normals(count: int) -> None:
    found = stream(count).normal(count)
    assert found.shape == (count,)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert len(set(found.tolist())) == count


def test_streams_on_several_threads_and_in_turn_keep_apart() -> None:
    names = [f"s{i}" for i in range(6)]
    alone = {name: stream(name).normal(60_000) for name in names}
    sources = {name: stream(name) for name in names}
    in_turn: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for _ in range(6):
        for name in names:
            in_turn[name].append(sources[name].normal(10_000))
    found: dict[str, torch.Tensor] = {}

    def draw(name: str) -> None:
        found[name] = stream(name).normal(60_000)

    threads = [threading.Thread(target=draw, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert torch.equal(torch.cat(in_turn[name]), alone[name])
        assert torch.equal(found[name], alone[name])


# --- drawing ahead


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So few normals that are drawn ahead in this test; afterwards no thread is left."""
    monkeypatch.setattr(ahead, "DRAWN_AHEAD", 1000)
    yield 70_001
    assert not [t for t in threading.enumerate() if t.name.startswith("noise")]


AHEAD = step_plan(noise_multiplier=1.3, clipping_norm=0.7)


def released_in(steps: int, size: int, cores: Cores, begin: bool = True, scale: float = 1.0) -> torch.Tensor:
    means = []
    with drawn_ahead(stream("ahead"), size, cores, scale=scale) as source:
        for step in range(steps):
            if begin:
                source.begin()
                source.begin()  # twice is once
            means.append(noised_mean(torch.full((size,), float(step)), AHEAD, source))
    return torch.stack(means)


def test_what_is_drawn_ahead_is_the_same(few: int) -> None:
    alone = released_in(3, few, Cores(1))
    for count in (2, 8):
        assert torch.equal(released_in(3, few, Cores(count)), alone)
    assert torch.equal(released_in(3, few, Cores(2), begin=False), alone)
    scale = AHEAD.noise_multiplier * (AHEAD.clipping_norm or 0.0)
    assert scale != 1.0
    for begin in (True, False):
        assert torch.equal(released_in(3, few, Cores(2), begin, scale), alone)
    source = stream("ahead")
    assert torch.equal(
        alone, torch.stack([noised_mean(torch.full((few,), float(s)), AHEAD, source) for s in range(3)])
    )


def test_a_thread_draws_if_it_pays_and_a_core_is_free(few: int) -> None:
    cores = Cores(2)

    def threads_of(size: int) -> int:
        with drawn_ahead(stream(), size, cores) as source:
            source.begin()
            return sum(t.name.startswith("noise") for t in threading.enumerate())

    assert threads_of(few) == 1
    assert threads_of(999) == 0
    with cores.working():
        assert threads_of(few) == 0  # another training is on the other core
    assert threads_of(few) == 1
    assert cores._busy == 0


def test_threads_that_draw_count_too(few: int) -> None:
    cores = Cores(3)
    with cores.working(), cores.working():
        assert cores.borrow()
        assert not cores.borrow()
        cores.give_back()
        assert cores.borrow()
        cores.give_back()
    assert cores._busy == 0


def test_cores_are_what_the_system_and_the_environment_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for told, count in (("1", 1), ("3", 3), ("64", 4), ("0", 4), ("none", 4), ("", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        assert Cores().count == count
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert Cores().count == 4


def test_what_else_runs_on_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cores, "count", 2)
    cores = Cores()
    for load, free in ((0.0, True), (1.9, True), (2.0, False), (40.0, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        with cores.working():
            assert cores.borrow() == free
        if free:
            cores.give_back()
    assert cores._busy == 0


def test_errors_on_the_thread_surface(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = Cores(2)
    with drawn_ahead(stream(), few, cores) as source:
        monkeypatch.setattr(module._Normals, "_next", lambda self: (_ for _ in ()).throw(MemoryError("none")))
        source.begin()
        with pytest.raises(MemoryError, match="none"):
            noised_mean(torch.zeros(few), step_plan(), source)
    assert cores._busy == 0


def test_a_thread_that_cannot_start_is_an_error(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = Cores(2)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    with drawn_ahead(stream(), few, cores) as source:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                source.begin()
        assert cores._busy == 1
        alone = noised_mean(torch.zeros(few), step_plan(), stream())
        assert torch.equal(noised_mean(torch.zeros(few), step_plan(), source), alone)
    assert cores._busy == 0


def test_training_that_breaks_off_leaves_no_thread(few: int) -> None:
    cores = Cores(2)

    def breaks_off() -> None:
        with drawn_ahead(stream(), 3_000_000, cores) as source:
            source.begin()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks_off()
    assert cores._busy == 0


def test_no_other_number_is_taken_than_was_begun(few: int) -> None:
    with drawn_ahead(stream(), few, Cores(2)) as source:
        source.begin()
        with pytest.raises(ValueError, match="were begun"):
            noised_mean(torch.zeros(few - 1), step_plan(), source)


def test_no_other_scale_is_taken_than_was_begun(few: int) -> None:
    with drawn_ahead(stream(), few, Cores(2), scale=1.25) as source:
        source.begin()
        with pytest.raises(ValueError, match=r"at scale 1\.25"):
            noised(torch.zeros(few), 2.5, source)
        assert len(noised(torch.zeros(few), 2.5, source)) == few  # nothing was begun, so nothing was scaled


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-20, 1e5])
def test_scaled_normals_are_the_normals_times_the_scale(scale: float) -> None:
    """Each rounded once, whoever does it."""
    expected = stream("scaled").normal(150_001).numpy() * scale
    filled = np.empty(150_001)
    stream("scaled").fill(filled, scale)
    assert (filled == expected).all()
    pieces = [piece.copy() for piece in stream("scaled").normals(150_001, scale)]
    assert (np.concatenate(pieces) == expected).all()


def test_a_trainer_draws_ahead_and_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = study(model={"name": "mlp", "parameters": {"hidden": [40, 30]}}, training={"local_steps": 4})
    cohort = patients([2] * 12)
    updates, began = [], []
    for least, count in ((10**9, 8), (1, 1), (1, 8)):
        monkeypatch.setattr(ahead, "DRAWN_AHEAD", least)
        monkeypatch.setattr(ahead.CORES, "_count", count)
        threads: list[str] = []
        start = threading.Thread.start
        monkeypatch.setattr(
            threading.Thread, "start", lambda self, t=threads, s=start: (t.append(self.name), s(self))[1]
        )
        trainer = Trainer(wanted, Cohort(cohort, cohort), plan_study(wanted, 50))
        updates.append(trainer.train(parameter_arrays(study_model(wanted)), stream("s"), stream("n")))
        began.append(sum(name.startswith("noise") for name in threads))
        monkeypatch.setattr(threading.Thread, "start", start)
    assert began == [0, 0, 1]
    for update in updates[1:]:
        assert all((update[name] == updates[0][name]).all() for name in update)
    assert ahead.CORES._busy == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("noise")]


# --- keys and the other uses of a stream


CONTEXTS = [
    ("sampling", "north", "d" * 64, 1),
    ("noise", "north", "d" * 64, 1),
    ("noise", "south", "d" * 64, 1),
    ("noise", "north", "e" * 64, 1),
    ("noise", "north", "d" * 64, 2),
    ("evaluation", "north", "d" * 64, 1),
]


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(CONTEXTS, 2)))
def test_streams_of_other_purposes_sites_studies_and_rounds_differ(
    one: tuple[str | int, ...], two: tuple[str | int, ...]
) -> None:
    source = Seeded(3)
    a, b = (source.stream(str(c[0]), *c[1:]).normal(20_000).numpy() for c in (one, two))
    assert not correlated(a, b)
    assert not set(a) & set(b)


def test_contexts_are_not_glued_together() -> None:
    source = Seeded(3)
    keys = [
        source.key("a", "b", 1), source.key("a", "b1"), source.key("ab", 1), source.key("a", "b", "1"),
        source.key("a", "b", 11), source.key('a", "b', 1), source.key("a"), Seeded(31).key("a", "b", 1),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_the_same_seed_gives_the_same_stream() -> None:
    for draw in (lambda s: s.bytes(40), lambda s: s.normal(9).tolist(), lambda s: s.words(5).tolist()):
        assert draw(Seeded(5).stream("x", 1)) == draw(Seeded(5).stream("x", 1))
        assert draw(Seeded(5).stream("x", 1)) != draw(Seeded(6).stream("x", 1))


def test_torch_and_numpy_seeds_have_no_say() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = OperatingSystem().stream("noise", "north", 1).normal(16)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, OperatingSystem().stream("noise", "north", 1).normal(16))


def test_the_operating_systems_streams_never_repeat() -> None:
    source = OperatingSystem()
    seen = {source.stream("noise", "north", 1).bytes(16) for _ in range(5000)}
    assert len(seen) == 5000
    assert source.protective
    assert not Seeded(1).protective


def test_the_key_stream_is_aes_256_in_counter_mode() -> None:
    key = bytes(range(32))
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(1000))
    found = Stream(key)
    assert found.bytes(7) + found.bytes(0) + found.bytes(993) == expected
    # NIST SP 800-38A, F.5.5: the same cipher on the standard's own key and counter
    nist = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    start = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    block = Cipher(algorithms.AES(nist), modes.CTR(start)).encryptor().update(bytes(16))
    assert block.hex() == "0bdf7df1591716335e9a8b15c860c502"


def test_keys_are_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    key = b"0123456789abcdef0123456789ABCDEF"
    found = Stream(key)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("any").warning("%s %r %s", found, found, [found])
    assert "0123" not in caplog.text
    found.normal(3)
    assert "0123" not in repr(vars(found))
    assert repr(found) == "Stream(key=…)"


def test_uniforms() -> None:
    drawn = stream("uniform").uniform(500_000)
    assert drawn.dtype == np.float64
    assert (drawn >= 0).all()
    assert (drawn < 1).all()
    assert stats.kstest(drawn, "uniform").pvalue > FALSE_ALARM
    assert (drawn * 2**53 % 1 == 0).all()
    assert (drawn * 2**52 % 1 != 0).any()  # all 53 bits are in use


@pytest.mark.parametrize("probability", [1e-4, 0.03, 0.5, 0.97])
def test_coins(probability: float) -> None:
    heads = int(stream("coins").bernoulli(300_000, probability).sum())
    assert stats.binomtest(heads, 300_000, probability).pvalue > FALSE_ALARM


def test_coins_that_are_certain() -> None:
    assert stream().bernoulli(1000, 1.0).all()
    assert not stream().bernoulli(1000, 0.0).any()
    assert len(stream().bernoulli(0, 0.5)) == 0


def test_each_permutation_is_as_likely() -> None:
    source, counts = stream("order"), dict.fromkeys(itertools.permutations(range(4)), 0)
    for _ in range(12_000):
        counts[tuple(source.permutation(4).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 500), st.integers(0, 100))
def test_a_permutation_has_everybody_once(count: int, seed: int) -> None:
    assert sorted(Seeded(seed).stream("p").permutation(count).tolist()) == list(range(count))


@pytest.mark.parametrize("probability", [0.0, 2.0**-60, 2.0**-53, 0.1, 1 / 3, 0.5, 1 - 2.0**-53, 1.0, 7.0])
def test_coins_are_uniform_numbers_below_the_probability(probability: float) -> None:
    assert (
        stream("coins").bernoulli(3000, probability) == (stream("coins").uniform(3000) < probability)
    ).all()


def test_coins_at_the_border() -> None:
    class Fixed(Stream):
        def bytes(self, count: int) -> bytes:
            words = [0, (1 << 11) - 1, 1 << 11, (1 << 62) - 1, 1 << 62, 2**64 - 1]
            return b"".join(word.to_bytes(8, "little") for word in words)[:count]

    for probability, expected in ((2.0**-53, "110000"), (0.25, "111100"), (1 - 2.0**-53, "111110")):
        found = Fixed(bytes(32)).bernoulli(6, probability)
        assert "".join("01"[int(coin)] for coin in found) == expected
