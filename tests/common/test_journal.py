"""The journal: whatever is torn, changed, dropped or moved is found, and nothing else is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common import journal as module
from common.errors import LedgerError
from common.journal import GENESIS, Entry, Journal, chain, read_journal
from common.keys import SigningKey

KEY, STRANGER = (SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))


def filled(path: Path, count: int = 5, key: SigningKey | None = None) -> list[bytes]:
    book = Journal(path, key=key)
    for i in range(count):
        book.append(
            "reserve" if i % 2 else "commit", {"round": i, "text": "é\u2028\x85\r\n\x0c", "ε": 0.1 * i}
        )
    book.close()
    return path.read_bytes().splitlines(keepends=True)


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "book"
    filled(path)
    first, second = read_journal(path), Journal(path)
    assert first == second.entries
    assert [e.sequence for e in first] == [1, 2, 3, 4, 5]
    assert first[0].previous == GENESIS
    assert second.head == first[-1].hash
    second.close()
    second.close()


def test_is_for_its_owner_only(tmp_path: Path) -> None:
    filled(tmp_path / "book")
    assert (tmp_path / "book").stat().st_mode & 0o777 == 0o600


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=9), st.text(max_size=30) | st.integers() | st.none(), max_size=4))
def test_any_text_stays_on_one_line(
    tmp_path_factory: pytest.TempPathFactory, body: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("journal") / "book"
    book = Journal(path, durable=False)
    book.append("note", body)
    book.append("note", {})
    book.close()
    assert [e.body for e in read_journal(path)] == [body, {}]


def test_every_torn_last_line_is_set_aside(tmp_path: Path) -> None:
    lines = filled(tmp_path / "whole")
    for length in range(len(lines[-1])):
        path = tmp_path / f"torn-{length}"
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:length])
        assert len(read_journal(path)) == 4
        book = Journal(path)
        assert len(book.entries) == 4
        book.append("note", {"after": "the crash"})
        book.close()
        assert len(read_journal(path)) == 5
        if length:
            assert path.with_suffix(".torn").read_bytes() == lines[-1][:length] + b"\n"


@pytest.mark.parametrize("key", [None, KEY], ids=["unsigned", "signed"])
def test_any_changed_bit_is_found(tmp_path: Path, key: SigningKey | None) -> None:
    """But in the last line's end: what a crash leaves looks the same, and is set aside."""
    lines = filled(tmp_path / "whole", 3, key)
    content = b"".join(lines)
    public = key.public if key else None
    path = tmp_path / "changed"
    assert len(chain(content, path, public)) == 3
    for position in range(len(content) - 1):
        for bit in (0, 1, 5) if key else range(8):  # 5: upper case becomes lower
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            with pytest.raises(LedgerError):
                chain(bytes(changed), path, public)


# --- signatures


def test_every_entry_is_signed(tmp_path: Path) -> None:
    path = tmp_path / "book"
    lines = filled(path, 4, KEY)
    entries = read_journal(path, KEY.public)
    assert len(entries) == 4
    for entry in entries:
        assert KEY.public.verifies(bytes.fromhex(entry.signature), bytes.fromhex(entry.hash))
        content = {n: v for n, v in vars(entry).items() if n not in {"hash", "signature"}}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert entry.hash == hashlib.sha256(text.encode()).hexdigest()
    assert [e.previous for e in entries] == [GENESIS, *(e.hash for e in entries[:-1])]
    book = Journal(path, key=KEY)
    book.append("note", {})
    book.close()
    assert path.read_bytes().startswith(b"".join(lines))
    assert len(read_journal(path, KEY.public)) == 5
    assert len(read_journal(path)) == 5  # whoever has no key still sees the chain


def test_another_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "book"
    filled(path, 2, STRANGER)
    with pytest.raises(LedgerError, match="line 1 "):
        read_journal(path, KEY.public)
    for _ in range(2):
        with pytest.raises(LedgerError, match="line 1 "):
            Journal(path, key=KEY)
    book = Journal(path, key=STRANGER)
    book.close()


def test_entries_added_without_the_key_are_refused(tmp_path: Path) -> None:
    """Whoever may write to the file can link an entry rightly, and sign it with a key of their own."""
    for i, key in enumerate((None, STRANGER)):
        path = tmp_path / f"book-{i}"
        filled(path, 2, KEY)
        book = Journal(path)
        book._key = key
        book.append("note", {"spent": 0})
        book.close()
        assert len(read_journal(path)) == 3
        with pytest.raises(LedgerError, match="line 3 "):
            read_journal(path, KEY.public)
        with pytest.raises(LedgerError, match="line 3 "):
            Journal(path, key=KEY)


@pytest.mark.parametrize(
    "spelling",
    [str.upper, lambda s: s + " ", lambda s: s[:2] + " " + s[2:], lambda s: s + "00", lambda s: s[:-2],
     lambda s: "", lambda s: "xy" * 64, lambda s: "0" * 128, lambda s: 7, lambda s: None, lambda s: [s]],
)  # fmt: skip
def test_a_signature_has_one_spelling(tmp_path: Path, spelling: Callable[[str], Any]) -> None:
    path = tmp_path / "book"
    filled(path, 2, KEY)
    entries = read_journal(path)
    entries[0] = replace(entries[0], signature=spelling(entries[0].signature))
    path.write_bytes(b"".join(e.line() for e in entries))
    with pytest.raises(LedgerError, match="line 1 "):
        read_journal(path, KEY.public)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    field=st.sampled_from(["sequence", "time", "kind", "body", "previous", "hash", "extra"]),
    value=st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    number=st.integers(0, 2),
)
def test_a_field_of_any_other_value_is_found(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any, number: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "book"
    lines = filled(path, 3, KEY)
    told = json.loads(lines[number])
    if told.get(field) == value and type(told.get(field)) is type(value):
        return
    lines[number] = (
        json.dumps({**told, field: value}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        + b"\n"
    )
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"line {number + 1} "):
        read_journal(path, KEY.public)


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "book"
    filled(path, 1, KEY)
    assert bytes([1]) * 32 not in path.read_bytes()
    assert ("01" * 32).encode() not in path.read_bytes()
    assert isinstance(read_journal(path)[0], Entry)


# --- damage and crashes


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_dropped_moved_or_doubled_entry_is_found(tmp_path: Path, number: int) -> None:
    lines = filled(tmp_path / "whole")
    dropped = lines[:number] + lines[number + 1 :]
    moved = [*dropped[: number + 1], lines[number], *dropped[number + 1 :]]
    doubled = [*lines[: number + 1], *lines[number:]]
    for name, changed in (("dropped", dropped), ("moved", moved), ("doubled", doubled)):
        path = tmp_path / name
        path.write_bytes(b"".join(changed))
        for read in (read_journal, Journal):
            with pytest.raises(LedgerError, match=f"line {number + 1} |line {number + 2} "):
                read(path)
        assert path.read_bytes() == b"".join(changed)  # evidence is left alone


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"sequence": 1}', b"\xff\xfe", b'{"a": NaN}']
)
def test_a_strange_line_is_damage(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "book"
    path.write_bytes(b"".join(filled(tmp_path / "whole", 2)) + line + b"\n")
    with pytest.raises(LedgerError, match="line 3"):
        read_journal(path)


def test_there_is_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "book"
    book = Journal(path)
    with pytest.raises(LedgerError, match="another vault"):
        Journal(path)
    book.append("note", {})
    book.close()
    Journal(path).close()


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "book"
    hold = (
        "import sys, os, signal; from pathlib import Path; from common.journal import Journal\n"
        f"b = Journal(Path({str(path)!r})); b.append('note', {{}}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", hold], check=False).returncode == -9
    book = Journal(path)
    assert len(book.entries) == 1
    book.close()


def test_a_started_program_does_not_inherit_the_journal(tmp_path: Path) -> None:
    book = Journal(tmp_path / "book")
    listed = subprocess.run(
        [sys.executable, "-c", "import os; print([os.readlink(f'/proc/self/fd/{f}') for f in "
         "os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{f}')])"],
        capture_output=True, text=True, check=True, close_fds=False,
    ).stdout  # fmt: skip
    book.close()
    assert "book" not in listed


@pytest.mark.parametrize("room", [0, 1, 50, 10_000])
def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, room: int) -> None:
    """In a child, whose files may not grow: a write ends short, or fails."""
    path = tmp_path / "book"
    before = b"".join(filled(path, 2))
    work = f"""
import resource
from pathlib import Path
from common.errors import LedgerError
from common.journal import Journal
book = Journal(Path({str(path)!r}))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + room}, hard))
try:
    for i in range(100):
        book.append("note", {{"text": "x" * 100}})
except LedgerError as error:
    assert "cannot be written" in str(error)
    written = i
else:
    raise SystemExit("the disk was not full")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
book.append("note", {{"after": "the disk was full"}})
print(written)
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_journal(path)) == 2 + int(done.stdout) + 1
    assert path.read_bytes().startswith(before)


def test_an_append_that_cannot_be_synced_did_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "book"
    book = Journal(path)
    book.append("note", {"n": 1})

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", broken)
        with pytest.raises(LedgerError, match="Input/output"):
            book.append("note", {"n": 2})
    book.append("note", {"n": 3})
    book.close()
    assert [e.body["n"] for e in read_journal(path)] == [1, 3]


def test_a_journal_that_cannot_be_put_right_takes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither written nor restored: a later entry would chain to one that nobody knows of."""
    path = tmp_path / "book"
    book = Journal(path)
    book.append("note", {"n": 1})

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", broken)
        patched.setattr(module.os, "ftruncate", broken)
        with pytest.raises(LedgerError):
            book.append("note", {"n": 2})
    with pytest.raises(LedgerError):
        book.append("note", {"n": 3})
    book.close()
    assert [e.body["n"] for e in read_journal(path)] in ([1], [1, 2])


def test_an_interrupted_append_is_not_followed_by_a_broken_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "book"
    book = Journal(path)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            book.append("note", {"n": 1})
    book.append("note", {"n": 2})
    book.close()
    assert [e.body["n"] for e in read_journal(path)] == [2]


def test_each_entry_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Journal(tmp_path / "book")
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (synced.append(len(book.entries)), real(fd)))
    for _ in range(3):
        book.append("note", {})
    assert synced == [0, 1, 2]
    book.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="No such file"):
        Journal(tmp_path / "nowhere" / "book")
    assert read_journal(tmp_path / "nowhere" / "book") == []
    with pytest.raises(LedgerError):
        read_journal(tmp_path)


@pytest.mark.parametrize("key", [None, KEY])
def test_entries_that_wait_are_written_in_the_end(tmp_path: Path, key: SigningKey | None) -> None:
    path = tmp_path / "book"
    book = Journal(path, durable=False, key=key, prompt=False)
    heads = [book.append("note", {"number": i, "text": "ä\n"}).hash for i in range(3)]
    assert book.head == heads[-1]
    assert path.read_bytes() == b""
    book.close()
    assert [e.hash for e in read_journal(path, key and key.public)] == heads
    again = Journal(path, durable=False, key=key, prompt=False)
    for i in range(module.MOST_WAITING):
        again.append("note", {"number": i})
    assert len(read_journal(path, key and key.public)) == 3 + module.MOST_WAITING
    again.close()


def test_a_durable_journal_lets_nothing_wait(tmp_path: Path) -> None:
    book = Journal(tmp_path / "book", prompt=False)
    book.append("note", {})
    assert len(read_journal(tmp_path / "book")) == 1
    book.close()


def test_a_journal_that_could_not_write_takes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Journal(tmp_path / "book", durable=False, prompt=False)
    book.append("note", {})
    with monkeypatch.context() as patched:
        patched.setattr(module.os, "write", lambda descriptor, content: 0)
        with pytest.raises(LedgerError, match="cannot be written"):
            book.close()
    with pytest.raises(LedgerError, match="closed"):
        book.append("note", {})
    assert read_journal(tmp_path / "book") == []
