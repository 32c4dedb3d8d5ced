"""Sessions on a real coordinator: begun, resumed, stopped and followed through Flower runs.

Flower does not resume a run whose ServerApp died; a new run continues the same session instead, at the
round after its last checkpoint.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from common.errors import StudyFailed
from common.study import Study
from server import flower
from server.provisioning import CoordinatorFolder
from server.store import FAILED, FINISHED, RUNNING, STOPPED, Session, Settings, Store

POLL_SECONDS = 1.0
POLLS_PER_RUN_LOOK = 5  # the store is cheap to ask, Flower is not


def new_session_id(study: Study) -> str:
    """A session id that no other session has."""
    return f"{study.name[:40]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def store_of(folder: CoordinatorFolder) -> Store:
    """The coordinator's store."""
    return Store(folder.root / "store")


def begin(folder: CoordinatorFolder, study: Study, settings: Settings, initial: bytes | None = None) -> str:
    """Start a session of a study; returns its id.

    Args:
        initial: the file of weights that the study names (`common.models.initial.read_initial`).

    Raises:
        DeploymentError: if SuperLink doesn't answer; no session is left behind as running.
    """
    store, session = store_of(folder), new_session_id(study)
    if initial is not None:
        store.keep_initial(session, initial)
    store.create(session, study, settings)
    _submit(folder, store, session)
    return session


def resume(folder: CoordinatorFolder, session: str) -> None:
    """Continue a session that failed, was stopped or lost its coordinator.

    Raises:
        StudyFailed: if it has finished, or still runs.
        DeploymentError: if SuperLink doesn't answer.
    """
    store = store_of(folder)
    known = store.session(session)
    if known.status == FINISHED:
        raise StudyFailed(f"session {session} has finished", remedy="begin a new one: fedward-server run")
    if known.run and not flower.run_status(folder, int(known.run)).finished:
        raise StudyFailed(f"session {session} still runs", remedy="stop it first: fedward-server stop")
    _submit(folder, store, session)


def stop(folder: CoordinatorFolder, session: str) -> None:
    """End a session's run; what it reached stays, and it can be resumed.

    Raises:
        StudyFailed: if it doesn't run.
    """
    store = store_of(folder)
    known = store.session(session)
    if known.status != RUNNING or not known.run:
        raise StudyFailed(f"session {session} does not run ({known.status})", remedy="nothing to stop")
    if not flower.run_status(folder, int(known.run)).finished:
        flower.stop_run(folder, int(known.run))
    store.mark(session, STOPPED, "by the coordinator's operator")


def follow(folder: CoordinatorFolder, session: str, watch: Callable[[int], None]) -> Session:
    """Wait for a session's end; `watch` is told the number of finished rounds.

    Raises:
        StudyFailed: if it fails or is stopped, with the reason and how to go on.
    """
    store, polls = store_of(folder), 0
    while True:
        known = store.session(session)
        watch(store.rounds_done(session))
        if known.status == FINISHED:
            return known
        if known.status in (FAILED, STOPPED):
            raise StudyFailed(
                f"session {session} {known.status}: {known.detail}",
                remedy=f"mend the cause, then: fedward-server resume {folder.root} {session}",
            )
        polls += 1
        if polls % POLLS_PER_RUN_LOOK == 0 and known.run:
            _notice_death(folder, store, known)
        time.sleep(POLL_SECONDS)


def _notice_death(folder: CoordinatorFolder, store: Store, known: Session) -> None:
    """Flower knows when a ServerApp died without a word; the store then learns it."""
    state = flower.run_status(folder, int(known.run))
    if state.finished and store.session(known.id).status == RUNNING:
        store.mark(known.id, FAILED, "the ServerApp ended without finishing")


def _submit(folder: CoordinatorFolder, store: Store, session: str) -> None:
    store.mark(session, RUNNING)
    config = {"store": str(Path(store.root).resolve()), "session": session}
    try:
        run = flower.submit(folder, config)
    except BaseException:
        store.mark(session, FAILED, "its Flower run could not be started")
        raise
    store.attach(session, str(run))
