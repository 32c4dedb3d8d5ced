"""Randomness: its law, its independence, and that nobody sees its keys. Seeds are fixed; each
statistical test would raise a false alarm once in a million times."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.privacy import noise as module
from common.privacy.noise import OperatingSystem, Seeded, Stream

FALSE_ALARM = 1e-6
COUNT = 2_000_000


def stream(*context: str | int) -> Stream:
    return Seeded(11).stream("test", *context)


@pytest.fixture(scope="module")
def normals() -> np.ndarray:
    return stream("normals").normal(COUNT).double().numpy()


def test_normals_have_the_moments_of_the_normal(normals: np.ndarray) -> None:
    # E x, x², x³, x⁴ and x⁶ with the variances of their means
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        z = ((normals**power).mean() - mean) / np.sqrt(variance / COUNT)
        assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM, power


def test_normals_follow_the_normal_law(normals: np.ndarray) -> None:
    assert stats.kstest(normals, "norm").pvalue > FALSE_ALARM
    halves = normals[: COUNT // 2], normals[COUNT // 2 :]
    for half in halves:
        assert stats.kstest(half, "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("border", [2.0, 3.0, 4.0, 5.0])
def test_tails_are_neither_cut_nor_fat(normals: np.ndarray, border: float) -> None:
    law = stats.binom(COUNT, 2 * stats.norm.sf(border))
    beyond = int((np.abs(normals) > border).sum())
    assert law.sf(beyond - 1) > FALSE_ALARM
    assert law.cdf(beyond) > FALSE_ALARM


def test_the_halves_of_box_and_muller_know_nothing_of_each_other(normals: np.ndarray) -> None:
    count = 1_000_000  # drawn in one piece: cosines, then sines of the same radii
    drawn = stream("pairs").normal(count).double().numpy()
    first, second = drawn[: count // 2], drawn[count // 2 :]
    for a, b in (
        (first, second),
        (first**2, second**2),
        (drawn[1:], drawn[:-1]),
        (normals[2:], normals[:-2]),
    ):
        z = np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))
        assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100, 1001])
def test_any_number_of_normals(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for piece in (8, 24, 8 << 20):
        monkeypatch.setattr(module, "_PIECE_BYTES", piece)
        drawn = stream(count).normal(count)
        assert drawn.shape == (count,)
        assert drawn.dtype == torch.float32
        assert drawn.isfinite().all()
        assert len(set(drawn.tolist())) == count


def test_across_pieces_the_law_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 8 * 1000)
    drawn = stream("pieces").normal(100_000).double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM
    by_piece = drawn.reshape(100, 1000)
    assert np.abs(np.corrcoef(by_piece) - np.eye(100)).max() < stats.norm.isf(FALSE_ALARM / 1e4) / np.sqrt(
        1000
    )


def test_the_largest_radius_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    for byte in (b"\x00", b"\xff"):
        extreme = stream()
        monkeypatch.setattr(extreme, "bytes", lambda count, byte=byte: byte * count)
        drawn = extreme.normal(8)
        assert drawn.isfinite().all()
        assert drawn.abs().max() < 8.6


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
    a, b = (source.stream(str(c[0]), *c[1:]).normal(20_000).double().numpy() for c in (one, two))
    z = np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))
    assert 2 * stats.norm.sf(abs(z)) > FALSE_ALARM
    assert not set(a) & set(b) or len(set(a) & set(b)) < 50  # float32 values may meet by chance


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
