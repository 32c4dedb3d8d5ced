"""The forking executor with a stand-in for Flower's procedure."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client.warm import ForkingExecutor
from common.errors import DeploymentError


def executor(answer: Any) -> ForkingExecutor:
    return ForkingExecutor(SimpleNamespace(run_clientapp=answer), "clientapp", lambda: "accepted", at_exit=[])


def task(kind: str = "clientapp") -> Any:
    return SimpleNamespace(task_type=kind, runtime_api_address="127.0.0.1:1", token="t")


def wait_for_children(forking: ForkingExecutor) -> dict[int, int]:
    """Child → exit status."""
    return {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in forking._children}


def test_no_other_kind_of_task_is_asked_for() -> None:
    forking = executor(None)
    assert forking.get_eligible_capacity({"clientapp", "agentapp", "serverapp"}) == ({"clientapp"}, set())
    with pytest.raises(DeploymentError):
        forking.launch(task("agentapp"))


def test_a_task_runs_in_a_child_that_ends_by_itself(tmp_path: Path) -> None:
    def answer(**given: Any) -> None:
        (tmp_path / str(os.getpid())).write_text(f"{given['token']} {given['parent_pid']}")
        raise SystemExit(0)

    forking = executor(answer)
    assert forking.launch(task()) == "accepted"
    ((child, status),) = wait_for_children(forking).items()
    assert status == 0
    assert (tmp_path / str(child)).read_text() == f"t {os.getpid()}"


@pytest.mark.parametrize(("end", "status"), [(SystemExit(3), 3), (KeyError("Jane Roe"), 1), (None, 1)])
def test_a_child_never_returns_to_the_loop(
    end: BaseException | None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def answer(**given: Any) -> None:
        if end is not None:
            raise end

    forking = executor(answer)
    forking.launch(task())
    assert list(wait_for_children(forking).values()) == [status]
    assert "Jane Roe" not in capfd.readouterr().err


def test_children_that_have_ended_are_forgotten() -> None:
    forking = executor(lambda **given: None)
    forking.launch(task())
    wait_for_children(forking)
    forking.reconcile()
    assert forking._children == set()
    forking.close()
