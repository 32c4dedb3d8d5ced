"""The store: a round counts after its checkpoint is whole, and only then."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import study

from common.errors import StudyFailed
from server import store as module
from server.store import FINISHED, RUNNING, Settings, SiteAnswer, Store

WANTED = study()
SETTINGS = Settings(
    sites=4, quorum=3, deadline=1.5, exact_metrics=True, describe=True, seed=7, nodes={"7": "ash"}
)
ARRAYS = {"parameters/w": np.arange(6, dtype=np.float32).reshape(2, 3), "state/n": np.array([3])}
EVENT = {"mechanism": "subsampled-gaussian", "steps": 2}
ANSWERS = (
    SiteAnswer("ash", "reply", weight=40, training=EVENT, statistics=EVENT, released="1" * 64, head="2" * 64),
    SiteAnswer("node 7", "silence", "no answer"),
)


@pytest.fixture(params=[True, False], ids=["durable", "volatile"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made = Store(tmp_path / "store", durable=request.param)
    made.create("one", WANTED, SETTINGS)
    return made


def test_a_session_comes_back(store: Store) -> None:
    again = Store(store.root).session("one")
    assert (again.id, again.study, again.settings, again.status) == ("one", WANTED, SETTINGS, RUNNING)
    assert again.study.digest == WANTED.digest
    store.mark("one", FINISHED, "well")
    store.attach("one", "42")
    again = store.session("one")
    assert (again.status, again.detail, again.run) == (FINISHED, "well", "42")


def test_ids_are_taken_once(store: Store) -> None:
    with pytest.raises(StudyFailed, match="exists already"):
        store.create("one", WANTED, SETTINGS)
    with pytest.raises(StudyFailed, match="no session 'two'"):
        store.session("two")
    store.create("two", WANTED, SETTINGS)
    assert [s.id for s in store.sessions()] == ["one", "two"]


def test_the_weights_that_it_begins_with_come_back(store: Store) -> None:
    assert store.initial("one") is None
    store.keep_initial("one", b"weights")
    assert Store(store.root).initial("one") == b"weights"


def test_a_round_comes_back(store: Store) -> None:
    store.record("one", 1, ARRAYS, ANSWERS)
    found = Store(store.root).rounds("one")
    assert [(r.number, r.answers) for r in found] == [(1, ANSWERS)]
    arrays = store.checkpoint("one", 1)
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert (arrays[name] == array).all()
    assert store.rounds_done("one") == 1
    assert store.rounds_done("two") == 0


def test_a_checkpoint_without_its_row_does_not_count(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(module.json, "dumps", die)
        with pytest.raises(Crash):
            store.record("one", 1, ARRAYS, ANSWERS)
    assert store.checkpoint_path("one", 1).exists()
    assert store.rounds_done("one") == 0
    store.record("one", 1, ARRAYS, ANSWERS)  # the same round again
    assert store.rounds_done("one") == 1


def test_no_row_without_its_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomic", full)
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            store.record("one", 1, ARRAYS, ANSWERS)
    assert store.rounds_done("one") == 0


@pytest.mark.parametrize("damage", ["gone", "cut", "noise"])
def test_a_damaged_checkpoint_is_named(store: Store, damage: str) -> None:
    store.record("one", 1, ARRAYS, ANSWERS)
    path = store.checkpoint_path("one", 1)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else b"\xff" * 50)
    with pytest.raises(StudyFailed, match=path.name):
        store.checkpoint("one", 1)


def test_a_reader_beside_a_writer_sees_whole_rounds(store: Store) -> None:
    reader = Store(store.root)
    for number in range(1, 6):
        store.record("one", number, ARRAYS, ANSWERS)
        assert [r.number for r in reader.rounds("one")] == list(range(1, number + 1))
        reader.checkpoint("one", number)


def test_it_is_for_the_coordinator_only(store: Store) -> None:
    assert store.root.stat().st_mode & 0o077 == 0


def test_statistics_are_round_0_and_no_round_of_training(store: Store) -> None:
    store.record("one", 0, ARRAYS, ANSWERS)
    assert store.rounds_done("one") == 0
    store.record("one", 1, ARRAYS, ANSWERS)
    assert store.rounds_done("one") == 1
    assert [r.number for r in store.rounds("one")] == [0, 1]
    assert set(store.checkpoint("one", 0)) == set(ARRAYS)


def test_the_last_head_of_each_site_is_remembered_over_all_sessions(store: Store) -> None:
    assert store.heads() == {}
    store.remember({"ash": (1, "1" * 64), "birch": (9, "2" * 64)})
    store.remember({"ash": (2, "3" * 64)})
    store.remember({})
    assert Store(store.root).heads() == {"ash": "3" * 64, "birch": "2" * 64}


def test_a_head_that_is_told_again_is_no_later_one(store: Store) -> None:
    """A stored reply tells the head of its day, which another session may have passed since."""
    for head in ("1", "2", "3", "1", "2"):
        store.remember({"ash": (int(head), head * 64)})
        assert store.heads() == {"ash": max(head, store.heads()["ash"][0]) * 64}
    store.remember({"birch": (1, "1" * 64)})  # two sites' heads have nothing to do with each other
    assert store.heads() == {"ash": "3" * 64, "birch": "1" * 64}


def test_a_late_reply_with_an_earlier_head_does_not_put_the_memory_back(store: Store) -> None:
    """It was lost on the way, and another session went on meanwhile."""
    store.remember({"ash": (7, "7" * 64)})
    store.remember({"ash": (5, "5" * 64)})
    assert store.heads() == {"ash": "7" * 64}


def test_certificates_are_kept_by_session_and_site(store: Store) -> None:
    assert store.certificates("one") == {}
    store.keep_certificate("one", "ash", "a.b.c")
    store.keep_certificate("one", "birch", "d.e.f")
    store.keep_certificate("one", "ash", "g.h.i")
    store.keep_certificate("two", "ash", "j.k.l")
    assert Store(store.root).certificates("one") == {"ash": "g.h.i", "birch": "d.e.f"}
    assert store.certificates("two") == {"ash": "j.k.l"}


def test_a_held_connection_serves_its_thread_and_other_threads_have_their_own(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = sqlite3.connect

    def counted(*arguments: Any, **named: Any) -> sqlite3.Connection:
        opened.append(threading.get_ident())
        return real(*arguments, **named)

    monkeypatch.setattr("server.store.sqlite3.connect", counted)
    with store.held():
        for number in (1, 2):
            store.record("one", number, {}, ())
        seen: list[int] = []
        reader = threading.Thread(target=lambda: seen.append(store.rounds_done("one")))
        reader.start()
        reader.join()
        assert seen == [2]
        with pytest.raises(sqlite3.IntegrityError):
            store.record("one", 2, {}, ())
        assert store.rounds_done("one") == 2
    assert opened.count(threading.get_ident()) == 1
    assert len(opened) == 2
    assert store.rounds_done("one") == 2
    assert len(opened) == 3
