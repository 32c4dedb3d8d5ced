"""Text as token ids: the same everywhere, bounded, and of its own record alone."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.sources import text
from common.modalities import TextColumn


def column(**changes: object) -> TextColumn:
    return TextColumn.model_validate({"kind": "text", "name": "note", **changes})


def slowly(content: str, of: TextColumn) -> list[float]:
    """Ids letter by letter, straight from the description."""
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", content).casefold())
    runs: list[str] = []
    previous = ""
    for c in letters:
        if unicodedata.combining(c):
            continue
        kind = "digit" if re.match(r"\d", c) else "letter" if re.match(r"[^\W_]", c) else ""
        if kind and kind == previous:
            runs[-1] += c
        elif kind:
            runs.append(c)
        previous = kind
    tokens: list[tuple[str, bytes]] = []
    for run in runs:
        digits = re.match(r"\d", run) is not None
        tokens.append(("#" if digits and len(run) > 4 else run, b"word"))
        if of.unit == "pieces" and not digits:
            padded = "<" + run + ">"
            tokens += [(padded[i : i + 3], b"piece") for i in range(len(padded) - 2)]
    ids = [
        float(int(hashlib.blake2b(t.encode(), digest_size=8, person=p).hexdigest(), 16) % of.vocabulary + 1)
        for t, p in tokens
    ]
    return (ids + [0.0] * of.tokens)[: of.tokens]


def read(cells: Sequence[str | None], **changes: object) -> np.ndarray:
    found = text.read(column(**changes), cells, None)
    assert not found.problems
    assert found.values.dtype == np.float32
    return found.values


def test_ids_that_never_change() -> None:
    """Golden numbers: a network that was trained on them needs them for ever."""
    assert text.token_ids("Aspirin 100 mg", column()) == [1942, 1898, 825]
    assert text.token_ids("ab", column(unit="pieces", vocabulary=1 << 20)) == [841526, 395325, 418927]


@pytest.mark.parametrize(
    "same",
    ["ASPIRIN  100mg!", "aspirin/100-mg", "Áspirîn 100 mg.", "ａｓｐｉｒｉｎ １００㎎", "\taspirin\n100\nmg"],
)
def test_spellings_that_are_the_same(same: str) -> None:
    np.testing.assert_array_equal(read([same]), read(["aspirin 100 mg"]))


@pytest.mark.parametrize("other", ["mg 100 aspirin", "aspirin 200 mg", "aspirine 100 mg", "aspirin"])
def test_texts_that_are_not(other: str) -> None:
    assert (read([other]) != read(["aspirin 100 mg"])).any()


def test_long_numbers_are_one_token() -> None:
    np.testing.assert_array_equal(read(["tel. 0301234567"]), read(["tel. 99999"]))
    assert (read(["icd 4280"]) != read(["icd 4281"])).any()


@settings(max_examples=200, deadline=None)
@given(
    content=st.text(max_size=80),
    unit=st.sampled_from(["words", "pieces"]),
    tokens=st.integers(1, 40),
    vocabulary=st.sampled_from([2, 100, 1 << 20]),
)
def test_any_text_is_the_slow_loops(content: str, unit: str, tokens: int, vocabulary: int) -> None:
    of = column(unit=unit, tokens=tokens, vocabulary=vocabulary)
    found = text.read(of, [content], None).values[0]
    assert found.tolist() == slowly(content, of)
    assert found.max() <= vocabulary


def test_words_that_are_alike_share_pieces() -> None:
    one, other = (set(text.token_ids(w, column(unit="pieces"))) for w in ("warfarin", "warfarine"))
    assert len(one & other) >= 7
    assert text.token_ids("warfarin", column())[0] in one


def test_no_text() -> None:
    cells = ["something", None, "?!"]
    assert (read(cells)[1:] == 0).all()
    for rule in ("refuse", "exclude"):
        found = read(cells, missing=rule)
        assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
    assert read([]).shape == (0, 64)


def test_no_records_numbers_depend_on_another_record() -> None:
    draw = random.Random(3)
    words = ["aspirin", "warfarin", "heart", "failure", "J44.1", "éclampsie", "10mg", "…"]
    cells = [" ".join(draw.choices(words, k=draw.randrange(90))) or None for _ in range(30)]
    together = read(cells)
    assert all((read([cell])[0] == together[i]).all() for i, cell in enumerate(cells))
    np.testing.assert_array_equal(read(cells[::-1])[::-1], together)


def test_another_process_with_another_hash_seed_says_the_same() -> None:
    code = (
        "from client.sources.text import token_ids; from common.modalities import TextColumn\n"
        "print(token_ids('Chest pain, 3 days', TextColumn(kind='text', name='n', unit='pieces')))"
    )
    here = text.token_ids("Chest pain, 3 days", column(unit="pieces"))
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == str(here)


def test_a_very_long_text_is_cut() -> None:
    assert (read(["word " * 200_000])[0] > 0).all()
    assert (read(["x" * 1_000_000], unit="pieces")[0] > 0).all()
