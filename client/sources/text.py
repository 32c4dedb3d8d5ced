"""Free text as token ids: normalised, cut into words, hashed. Nothing is learnt from anybody's text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Literal

import numpy as np

from client.settings import Where
from common.modalities import TextColumn
from common.table import Decoded

# Longer digits tell who rather than what (case numbers, telephones); all of them are one token.
_LONGEST_NUMBER = 4
_LONG_NUMBER = "#"
_TOKEN = re.compile(r"\d+|[^\W\d_]+")
_PIECE = 3
_IOTA = "\N{COMBINING GREEK YPOGEGRAMMENI}"  # the only accent that lower case makes a letter of


def read(column: TextColumn, cells: Sequence[str | None], where: Where | None) -> Decoded:
    """Each record's text as ids, float32 [records, tokens]: 0 = no token.

    A record without text is NaN, but for the rule `empty`, where it has no token.
    """
    values = np.zeros((len(cells), column.tokens), dtype=np.float32)
    for i, cell in enumerate(cells):
        if cell is not None:
            ids = token_ids(cell, column)
            values[i, : len(ids)] = ids
        elif column.missing != "empty":
            values[i] = np.nan
    return Decoded(values)


def token_ids(text: str, column: TextColumn) -> list[int]:
    """Ids 1 … vocabulary of the text's first tokens, at most `column.tokens`: the same on every machine.

    Unit `words`: runs of letters and runs of digits, in order; a run of five digits or more counts as any
    other such. Unit `pieces`: each word of letters is followed by its overlapping pieces of three, with `<`
    and `>` for its ends (Bojanowski et al. 2017, "Enriching word vectors with subword information", with one
    length), so that words that are spelt or inflected differently share tokens, and a script that puts no
    spaces between words has some. A token's id is its BLAKE2b hash (8 bytes, big-endian, personalised by
    `word` or `piece`) modulo the vocabulary, plus 1 (feature hashing: Weinberger et al. 2009).
    """
    tokens = islice(_tokens(text, column.unit == "pieces"), column.tokens)
    return [_hash(token, kind) % column.vocabulary + 1 for token, kind in tokens]


def normalised(text: str) -> str:
    """Lower case, compatible forms made one (NFKD, Unicode Standard Annex 15), accents off."""
    if not text.isascii():  # accents first: to put a long row of them in order takes its square
        text = "".join(c for c in text if c == _IOTA or not unicodedata.combining(c))
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return plain if plain.isascii() else "".join(c for c in plain if not unicodedata.combining(c))


def _tokens(text: str, pieces: bool) -> Iterator[tuple[str, Literal["word", "piece"]]]:
    for match in _TOKEN.finditer(normalised(text)):
        word = match.group()
        number = word.isdecimal()  # as the pattern has it: ² is a digit, and none of those
        yield (_LONG_NUMBER if number and len(word) > _LONGEST_NUMBER else word), "word"
        if pieces and not number:
            framed = f"<{word}>"
            for start in range(len(framed) - _PIECE + 1):
                yield framed[start : start + _PIECE], "piece"


def _hash(token: str, kind: Literal["word", "piece"]) -> int:
    return int.from_bytes(
        blake2b(token.encode("utf-8", "replace"), digest_size=8, person=kind.encode()).digest()
    )
