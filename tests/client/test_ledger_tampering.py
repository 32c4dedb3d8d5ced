"""The ledger under somebody's hands: what is changed, dropped, moved, signed anew or put back is found."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from small import grant, policy_of, reservation

from client import ledger as module
from client.account import read_account
from client.ledger import Ledger, check_certificates, check_head, head_path, read_head
from client.reservation import Reservation
from common import journal
from common.errors import CertificateError, LedgerError
from common.journal import Entry, read_journal
from common.keys import SigningKey

OTHER = "b" * 64
KEY, STRANGER = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))
POLICY = policy_of()


def opened(root: Path, durable: bool = False) -> Ledger:
    return Ledger(path_of(root), root / "ledger" / "replies", key=KEY, durable=durable)


def path_of(root: Path) -> Path:
    return root / "ledger" / "ledger.jsonl"


def answer(book: Ledger, wanted: Reservation) -> None:
    book.reserve(wanted, grant(9.0, 9e-3, wanted.study), POLICY)
    book.commit(wanted, b"reply", released="1" * 64)


# --- an older copy


def aged(root: Path) -> Path:
    """A ledger with a round answered, a copy of all of it, and another round answered since."""
    book = opened(root, durable=True)
    answer(book, reservation("old"))
    book.close()
    shutil.copytree(root / "ledger", root / "copy")
    book = opened(root, durable=True)
    answer(book, reservation("new", 1))
    book.close()
    return root / "copy"


def put_back(root: Path, names: Sequence[str]) -> None:
    for name in names:
        target = root / "ledger" / name
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(root / "copy" / name, target)
        else:
            shutil.copyfile(root / "copy" / name, target)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["ledger.jsonl"], "older than its replies"),
        (["ledger.jsonl", "head"], "older than its replies"),
        (["ledger.jsonl", "replies"], "its end was cut, or an older copy"),
    ],
    ids=str,
)
def test_a_part_put_back_from_an_older_copy_is_found(tmp_path: Path, names: list[str], reason: str) -> None:
    aged(tmp_path)
    put_back(tmp_path, names)
    before = {p: p.read_bytes() for p in (tmp_path / "ledger").rglob("*") if p.is_file()}
    for _ in range(2):
        with pytest.raises(LedgerError, match=reason) as error:
            opened(tmp_path, durable=True)
        assert error.value.remedy
        with pytest.raises(LedgerError, match=reason):
            opened(tmp_path, durable=False)
    assert {p: p.read_bytes() for p in (tmp_path / "ledger").rglob("*") if p.is_file()} == before


def test_all_of_it_put_back_lacks_what_others_have_seen(tmp_path: Path) -> None:
    """Sound by itself: only who remembers a later head can tell. A vault asks the coordinator's anchor."""
    aged(tmp_path)
    seen = read_journal(path_of(tmp_path))
    put_back(tmp_path, ["ledger.jsonl", "head", "replies"])
    book = opened(tmp_path, durable=True)
    assert [book.knows(e.hash) for e in seen] == [True] * 3 + [False] * 2
    assert book.knows("0" * 64)  # of a ledger that nobody saw before its first entry
    assert not book.knows("f" * 64)
    book.close()


def test_a_certified_head_that_is_missing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aged(tmp_path)
    entries = read_journal(path_of(tmp_path))
    certificates = tmp_path / "certificates"
    certificates.mkdir()

    def certifying(content: bytes) -> Any:
        if content == b"forged":
            raise CertificateError("forged")
        head = content.decode()

        class Read:
            class claims:
                class ledger:
                    pass

        Read.claims.ledger.head = head  # type: ignore[attr-defined]
        return Read

    monkeypatch.setattr(module, "read_certificate", certifying)
    for i, each in enumerate((entries[1], entries[-1])):
        (certificates / f"{i}.jws").write_text(each.hash)
    assert check_certificates(certificates, read_account(path_of(tmp_path))) == 2
    put_back(tmp_path, ["ledger.jsonl", "head", "replies"])
    with pytest.raises(LedgerError, match=r"1\.jws: certifies a head"):
        check_certificates(certificates, read_account(path_of(tmp_path)))
    (certificates / "1.jws").write_text("forged")
    with pytest.raises(CertificateError):
        check_certificates(certificates, read_account(path_of(tmp_path)))
    assert check_certificates(tmp_path / "nowhere", read_account(path_of(tmp_path))) == 0


@pytest.mark.parametrize("content", [b"", b"\n", b"5\n", b"5 " + b"f" * 64, b"\xff\xfe \x00", b"1 2 3\n"])
def test_a_head_file_of_something_else(tmp_path: Path, content: bytes) -> None:
    aged(tmp_path)
    head_path(path_of(tmp_path)).write_bytes(content)
    with pytest.raises(LedgerError, match="head"):
        opened(tmp_path, durable=True)


# --- tampering


def chained(entries: Sequence[Entry], key: SigningKey | None) -> list[Entry]:
    """Entries whose places and hashes are sound again, as someone without the site's key can make them."""
    linked: list[Entry] = []
    for number, entry in enumerate(entries, start=1):
        previous = linked[-1].hash if linked else journal.GENESIS
        made = journal._linked(number, entry.time, entry.kind, entry.body, previous)
        signature = entry.signature if key is None else key.sign(bytes.fromhex(made.hash)).hex()
        linked.append(dataclasses.replace(made, signature=signature))
    return linked


def cheaper(entry: Entry) -> Entry:
    return dataclasses.replace(entry, body={**entry.body, "epsilon": 0.001})


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies, two sessions with statistics, a round given back, a round paid and not answered."""
    root = tmp_path_factory.mktemp("filled")
    book = opened(root, durable=True)
    for number in (0, 1, 2):
        answer(book, reservation("one", number))
    book.note(policy_of(grant()))
    book.reserve(reservation("two"), grant(), policy_of(grant()))
    book.abandon(reservation("two"))
    answer(book, reservation("three", study=OTHER))
    book.reserve(reservation("three", 2, OTHER), grant(study=OTHER), POLICY)
    book.close()
    return root


ENTRIES = 14


def written(root: Path, target: Path, entries: Sequence[Entry]) -> Path:
    shutil.copytree(root / "ledger", target / "ledger")
    path_of(target).write_bytes(b"".join(e.line() for e in entries))
    return target


def assert_found(root: Path) -> None:
    """By who opens it, and by `fedward-site ledger verify`, which reads, then asks for the head."""
    before = path_of(root).read_bytes()
    for durable in (True, False):
        with pytest.raises(LedgerError):
            opened(root, durable)
    with pytest.raises(LedgerError):
        check_head(path_of(root), read_account(path_of(root), KEY.public), read_head(path_of(root)))
    assert path_of(root).read_bytes() == before  # evidence is left alone


def test_the_untouched_ledger_passes(filled: Path, tmp_path: Path) -> None:
    entries = read_journal(path_of(filled), KEY.public)
    assert len(entries) == ENTRIES
    root = written(filled, tmp_path, chained(entries, KEY))
    assert read_journal(path_of(root), KEY.public) == entries
    check_head(path_of(root), read_account(path_of(root), KEY.public), read_head(path_of(root)))
    opened(root, durable=True).close()


places = st.integers(0, ENTRIES - 1)
changes = st.one_of(
    st.builds(lambda i: ("drop", i, 0), places),
    st.builds(lambda i: ("cut", i, 0), places),
    st.builds(lambda i, j: ("swap", i, j), places, places).filter(lambda c: c[1] != c[2]),
    st.builds(lambda i, j: ("double", i, j), places, places),
    st.builds(lambda i: ("cheaper", i, 0), places),
    st.builds(lambda i: ("kind", i, 0), places),
    st.builds(lambda i: ("time", i, 0), places),
    st.builds(lambda i: ("signature", i, 0), places),
    st.builds(lambda i, j: ("signature of", i, j), places, places).filter(lambda c: c[1] != c[2]),
    st.builds(lambda i: ("empty signature", i, 0), places),
    st.builds(lambda i: ("stranger", i, 0), places),
)


def changed(entries: list[Entry], kind: str, i: int, j: int) -> list[Entry]:
    found = list(entries)
    if kind == "drop":
        del found[i]
    elif kind == "cut":
        del found[i:]
    elif kind == "swap":
        found[i], found[j] = found[j], found[i]
    elif kind == "double":
        found.insert(j, found[i])
    elif kind == "cheaper":
        found[i] = cheaper(found[i])
    elif kind == "kind":
        found[i] = dataclasses.replace(found[i], kind="abandon" if found[i].kind != "abandon" else "policy")
    elif kind == "time":
        found[i] = dataclasses.replace(found[i], time=found[i].time + 1)
    elif kind == "signature":
        found[i] = dataclasses.replace(found[i], signature=found[i].signature.upper())
    elif kind == "signature of":
        found[i] = dataclasses.replace(found[i], signature=found[j].signature)
    elif kind == "empty signature":
        found[i] = dataclasses.replace(found[i], signature="")
    else:
        signature = STRANGER.sign(bytes.fromhex(found[i].hash)).hex()
        found[i] = dataclasses.replace(found[i], signature=signature)
    return found


@settings(max_examples=80, deadline=None, derandomize=True)
@given(change=changes, links=st.sampled_from(["as they were", "made good", "made good by a stranger"]))
def test_any_tampering_is_found(
    filled: Path, tmp_path_factory: pytest.TempPathFactory, change: tuple[str, int, int], links: str
) -> None:
    """Whoever tampers may put every number, hash and link right again, but has not the site's key."""
    entries = changed(read_journal(path_of(filled)), *change)
    if links != "as they were":
        key = STRANGER if links.endswith("stranger") else None
        if change[0] in {"signature", "signature of", "empty signature", "stranger"} and key is None:
            entries = [*entries]  # nothing to put right: hashes don't cover signatures
        else:
            entries = chained(entries, key)
    assert_found(written(filled, tmp_path_factory.mktemp("tampered"), entries))


@pytest.mark.parametrize("number", range(ENTRIES))
def test_every_single_entry_that_is_dropped_is_found(filled: Path, tmp_path: Path, number: int) -> None:
    entries = read_journal(path_of(filled))
    del entries[number]
    assert_found(written(filled, tmp_path, entries))


def test_a_ledger_resigned_as_a_whole_is_found(filled: Path, tmp_path: Path) -> None:
    entries = chained(read_journal(path_of(filled)), STRANGER)
    assert entries[-1].hash == read_journal(path_of(filled))[-1].hash  # heads alone would not tell
    assert_found(written(filled, tmp_path, entries))


def test_an_unsigned_ledger_is_found(tmp_path: Path) -> None:
    book = Ledger(path_of(tmp_path), tmp_path / "ledger" / "replies", durable=True)
    answer(book, reservation())
    book.close()
    assert_found(tmp_path)


@pytest.mark.parametrize("line", [1, 5, ENTRIES - 1])
def test_the_line_is_named(filled: Path, tmp_path: Path, line: int) -> None:
    entries = read_journal(path_of(filled))
    entries[line - 1] = cheaper(entries[line - 1])
    root = written(filled, tmp_path, entries)
    with pytest.raises(LedgerError, match=rf"line {line} is not what was written"):
        opened(root)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("gift", {}),
        ("reserve", {}),
        ("reserve", {"session": "x"}),
        ("commit", {"session": "nobody", "round": 1, "reply": "", "released": "", "withdrawn": ""}),
        ("commit", {"session": "one"}),
        ("abandon", {"session": "nobody", "round": 1}),
        ("policy", {}),
    ],
)
def test_an_entry_of_no_known_form_is_found(tmp_path: Path, kind: str, body: dict[str, Any]) -> None:
    """Signed and in its place: of another version, not forged."""
    book = opened(tmp_path)
    book.reserve(reservation(), grant(), POLICY)
    book._journal.append(kind, body)
    book.close()
    for _ in range(2):  # the lock is let go of
        with pytest.raises(LedgerError, match="line 3 is of no known form"):
            opened(tmp_path)
    with pytest.raises(LedgerError, match="line 3"):
        read_account(path_of(tmp_path))
