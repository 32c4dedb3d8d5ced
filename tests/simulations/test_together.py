"""Requests side by side: each site's answer is what it would have been alone, and who fails fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from small import allow, job, make_site, study

from client.site import open_vault
from client.tasks import Evaluation, Task, Training, Working, finished
from client.vault import Vault
from common.messages import Refusal, Reply, decode
from common.privacy.noise import Seeded
from simulations.engine.inprocess import InProcessGrid
from simulations.engine.together import Found, Pace, answered, evaluated, one_by_one

WANTED = study(evaluation={"every": 1})
OPEN = study(evaluation={"every": 1}, privacy={"mode": "none"})


def opened(root: Path, count: int = 3, wanted: object = WANTED) -> list[Vault]:
    vaults = []
    for i in range(count):
        folder = make_site(root / f"site-{i}", name=f"site-{i}", count=40 + 7 * i)
        allow(folder, wanted, public=wanted is OPEN)  # type: ignore[arg-type]
        vaults.append(
            open_vault(folder, randomness=Seeded(1), split_key=b"s" * 32, durable=False, prompt=False)
        )
    return vaults


@pytest.fixture
def vaults(tmp_path: Path) -> Iterator[list[Vault]]:
    made = opened(tmp_path)
    yield made
    for vault in made:
        vault.close()


def replies(answers: dict[int, bytes]) -> dict[int, Reply | Refusal]:
    found = {site: decode(bytes(content)) for site, content in answers.items()}
    assert all(isinstance(message, Reply | Refusal) for message in found.values())
    return found  # type: ignore[return-value]


def begun(vaults: list[Vault], number: int = 2, wanted: object = WANTED) -> dict[int, Working]:
    request = job(wanted, number)  # type: ignore[arg-type]
    return {i: vault.working(request) for i, vault in enumerate(vaults)}


@pytest.mark.parametrize("wanted", [WANTED, OPEN], ids=["private", "open"])
def test_together_is_as_alone(tmp_path: Path, wanted: object) -> None:
    """Bit for bit: metrics, update and what the ledger tells of them."""
    side_by_side, apart = opened(tmp_path / "a", wanted=wanted), opened(tmp_path / "b", wanted=wanted)
    found = replies(answered(begun(side_by_side, wanted=wanted), Pace(one_by_one, 1)))
    for i, vault in enumerate(apart):
        told, alone = found[i], decode(bytes(vault.answer(job(wanted, 2))))  # type: ignore[arg-type]
        assert isinstance(told, Reply)
        assert isinstance(alone, Reply)
        assert told.released == alone.released
        assert (told.header.site, told.header.training) == (alone.header.site, alone.header.training)
    for vault in (*side_by_side, *apart):
        vault.close()


@pytest.mark.parametrize("kind", [Training, Evaluation])
def test_a_site_whose_task_fails_fails_alone(vaults: list[Vault], kind: type[Task]) -> None:
    seen: list[int] = []

    def do(tasks: Sequence[Task]) -> Found:
        found = one_by_one(tasks)
        if isinstance(tasks[0], kind):
            seen.append(len(tasks))
            found[1] = MemoryError("a patient's value")
        return found

    found = replies(answered(begun(vaults), do))
    assert seen == [3]
    assert [isinstance(found[i], Reply) for i in range(3)] == [True, False, True]
    refusal = found[1]
    assert isinstance(refusal, Refusal)
    assert refusal.header.code == "unavailable"
    assert "patient" not in refusal.header.message
    # rows were read, so it stays paid for, and the same request may run again
    assert ("first", 2) in vaults[1]._ledger.account.reserved
    assert isinstance(decode(vaults[1].answer(job(WANTED, 2))), Reply)
    assert len(vaults[1]._ledger.account.reserved) == 1


def test_a_site_that_refuses_at_once_holds_up_nobody(vaults: list[Vault]) -> None:
    requests = begun(vaults)
    requests[1] = vaults[1].working(b"nonsense")
    found = replies(answered(requests, Pace(one_by_one, 1)))
    assert [isinstance(found[i], Reply) for i in range(3)] == [True, False, True]


def test_a_repeated_request_trains_nothing(vaults: list[Vault]) -> None:
    first = answered(begun(vaults), one_by_one)

    def nothing(tasks: Sequence[Task]) -> Found:
        raise AssertionError("nothing is to be done")

    assert {i: bytes(c) for i, c in answered(begun(vaults), nothing).items()} == {
        i: bytes(c) for i, c in first.items()
    }
    assert all(len(vault._ledger.account.reserved) == 1 for vault in vaults)


def test_the_lock_is_held_until_the_answer(vaults: list[Vault]) -> None:
    vault, locked = vaults[0], []

    def do(tasks: Sequence[Task]) -> Found:
        locked.append(vault._lock.locked())
        return one_by_one(tasks)

    answered({0: vault.working(job(WANTED, 2))}, do)
    assert locked == [True, True]  # evaluation, training
    assert not vault._lock.locked()


def test_a_driver_that_breaks_off_lets_every_vault_go(vaults: list[Vault]) -> None:
    def broken(tasks: Sequence[Task]) -> Found:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answered(begun(vaults), broken)
    assert not any(vault._lock.locked() for vault in vaults)
    assert all(isinstance(decode(vault.answer(job(WANTED, 2))), Reply) for vault in vaults)


def test_a_failed_attempt_uses_up_no_randomness(vaults: list[Vault]) -> None:
    working = vaults[0].working(job(WANTED, 4 - 1))
    task = next(working)
    while not isinstance(task, Training):
        task = working.send(task.alone())
    once, twice = task.alone(), task.alone()
    assert all((once[n] == twice[n]).all() for n in once)
    working.close()


def test_evaluated_in_one_pass_is_bit_for_bit_alone(vaults: list[Vault]) -> None:
    tasks = []
    for working in begun(vaults).values():
        task = next(working)
        assert isinstance(task, Evaluation)
        tasks.append(task)
        working.close()
    for together, alone in zip(evaluated(tasks), one_by_one(tasks), strict=True):
        assert not isinstance(together, Exception)
        assert not isinstance(alone, Exception)
        assert {n: a.tobytes() for n, a in together.items()} == {n: a.tobytes() for n, a in alone.items()}


def test_who_cannot_be_evaluated_fails_alone(vaults: list[Vault], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    for working in begun(vaults).values():
        task = next(working)
        assert isinstance(task, Evaluation)
        tasks.append(task)
        working.close()

    def broken(patients: object) -> object:
        raise MemoryError

    monkeypatch.setattr(tasks[2].trainer, "consenting", broken)
    found = evaluated(tasks)
    assert [isinstance(each, Exception) for each in found] == [False, False, True]


def test_one_thread_until_steps_are_long(vaults: list[Vault], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 1.0 + 1e-4])
    monkeypatch.setattr("simulations.engine.together.time.perf_counter", lambda: next(clock))
    pace = Pace(lambda tasks: [{} for _ in tasks], 2)
    working = vaults[0].working(job(WANTED, 1))
    task = next(working)
    assert pace.threads() == 1
    assert pace([]) == []
    pace([task])
    assert pace.threads() == 2
    pace([task])
    assert pace.threads() == 1
    working.close()


def test_finished_is_one_request_alone(vaults: list[Vault]) -> None:
    content = finished(vaults[0].working(job(WANTED, 1)))
    assert isinstance(decode(bytes(content)), Reply)
    assert np.isfinite(decode(content).update["0.bias"]).all()  # type: ignore[union-attr]


def test_messages_for_one_node_twice_are_both_answered(tmp_path: Path) -> None:
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def answer(message: Message, context: object) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 2, 2)
    nodes = list(grid.get_node_ids())
    sent = [grid.create_message(RecordDict(), "train", node, group_id="") for node in (*nodes, nodes[0])]
    back = list(grid.send_and_receive(sent))
    assert [m.metadata.src_node_id for m in back] == [*nodes, nodes[0]]
    grid.close()
