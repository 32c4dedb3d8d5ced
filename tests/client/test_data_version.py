"""A request sees the data of one version, however the file changes while it is answered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from small import allow, answered, job, make_site, study, write_rows

from client.cohort import Records
from client.settings import SiteFolder
from client.site import open_vault
from client.tasks import Evaluation, Task, Training
from client.vault import Vault
from common.messages import Reply, decode
from common.privacy.noise import Seeded
from common.study import Study

WANTED = study(evaluation={"every": 1}, algorithm={"rounds": 5})


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    made = make_site(tmp_path / "site")
    allow(made, WANTED)
    return made


def opened(folder: SiteFolder) -> Vault:
    return open_vault(folder, randomness=Seeded(1), split_key=b"s" * 32, durable=False)


@pytest.fixture
def vault(folder: SiteFolder) -> Iterator[Vault]:
    made = opened(folder)
    yield made
    made.close()


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Vault]:
    """A site with the same data and the same randomness, whose file nobody changes."""
    made = make_site(tmp_path / "untouched")
    allow(made, WANTED)
    vault = opened(made)
    yield vault
    vault.close()


def released(vault: Vault, number: int) -> str:
    return answered(vault, job(WANTED, number)).released


def test_the_file_is_looked_at_once_a_request(vault: Vault) -> None:
    looked = 0
    holdings = vault._warm.holdings

    def version() -> object:
        nonlocal looked
        looked += 1
        return holdings.version()

    vault._warm.holdings = replace(holdings, version=version)
    for number in (1, 2):
        answered(vault, job(WANTED, number))
        assert looked == number


@pytest.mark.parametrize("warm", [False, True])
def test_a_file_that_changes_midway_changes_the_next_request_only(
    vault: Vault, untouched: Vault, folder: SiteFolder, warm: bool
) -> None:
    """Between evaluation and training: both see the rows that the request began with."""
    if warm:
        assert released(vault, 1) == released(untouched, 1)
    trainers = []
    working = vault.working(job(WANTED, 2))
    task: Task = next(working)
    assert isinstance(task, Evaluation)
    trainers.append(task.trainer)
    write_rows(folder.root, 60, seed=1)
    task = working.send(task.alone())
    assert isinstance(task, Training)
    trainers.append(task.trainer)
    with pytest.raises(StopIteration) as end:
        working.send(task.alone())
    reply = decode(bytes(end.value.value))
    assert isinstance(reply, Reply)
    assert trainers[0] is trainers[1]
    assert reply.released == released(untouched, 2)
    assert released(vault, 3) != released(untouched, 3)
    assert not any(each is trainers[0] for each in vault._warm._trainers.values())


def test_rows_that_changed_before_they_were_read_are_read_again(vault: Vault, folder: SiteFolder) -> None:
    """They are newer than the version under which they were read, so the next request doesn't trust them."""
    read = 0
    holdings = vault._warm.holdings

    def records(wanted: Study) -> Records:
        nonlocal read
        read += 1
        if read == 1:
            write_rows(folder.root, 60, seed=1)
        return holdings.records(wanted)

    vault._warm.holdings = replace(holdings, records=records)
    for number, times in ((1, 1), (2, 2), (3, 2)):
        answered(vault, job(WANTED, number))
        assert read == times
