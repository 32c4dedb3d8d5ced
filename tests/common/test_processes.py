"""The supervisor with real, tiny processes; and what it hands to them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DeploymentError
from common.processes import (
    Patience,
    Program,
    Supervisor,
    beside_python,
    free_port,
    offline_environment,
    port_is_free,
)

HASTY = Patience(restarts=2, first_delay=0.01, longest_delay=0.02, ready=20, stop=10)
WAIT = (
    "import pathlib, os, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
)
COUNT = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(3)"
FORK = (
    "import os, sys, time; pid = os.fork(); pid and open(sys.argv[1], 'w').write(str(pid)); time.sleep(600)"
)


def program(code: str, file: Path, ready: Callable[[], bool] | None = None) -> Program:
    return Program(file.name, (sys.executable, "-c", code, str(file)), dict(os.environ), ready)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def soon(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes to hold within about 20 s."""
    tick = threading.Event()
    for _ in range(400):
        if condition():
            return True
        tick.wait(0.05)
    return False


def stop_when(condition: Callable[[], bool], number: signal.Signals = signal.SIGTERM) -> threading.Thread:
    """Send this process a signal as soon as the condition holds (or after about 20 s)."""

    def watch() -> None:
        soon(condition)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_program_in_peace(tmp_path: Path, number: signal.Signals) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    before = signal.getsignal(number)
    thread = stop_when(lambda: all(f.exists() and f.read_text() for f in files), number)
    Supervisor([program(WAIT, f) for f in files], HASTY, tmp_path).run()
    thread.join()
    assert not any(is_running(int(f.read_text())) for f in files)
    assert signal.getsignal(number) is before


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "child"
    thread = stop_when(lambda: file.exists() and bool(file.read_text()))
    Supervisor([program(FORK, file)], HASTY, tmp_path).run()
    thread.join()
    assert soon(lambda: not is_running(int(file.read_text())))


def test_a_killed_program_is_started_again(tmp_path: Path) -> None:
    file, pids = tmp_path / "one", set[int]()

    def killed_once() -> bool:
        if file.exists() and (text := file.read_text()) and int(text) not in pids:
            pids.add(int(text))
            if len(pids) == 1:
                os.kill(int(text), signal.SIGKILL)
        return len(pids) == 2

    thread = stop_when(killed_once)
    Supervisor([program(WAIT, file)], HASTY, tmp_path).run()
    thread.join()
    assert len(pids) == 2


def test_a_program_that_keeps_failing_ends_all(tmp_path: Path) -> None:
    file, other = tmp_path / "count", tmp_path / "other"
    with pytest.raises(DeploymentError, match="count ended 3 times in a row, last with status 3"):
        Supervisor([program(WAIT, other), program(COUNT, file)], HASTY, tmp_path).run()
    assert file.read_text() == "xxx"
    assert not other.exists() or not is_running(int(other.read_text() or 0))


def test_a_program_that_ends_before_it_is_ready_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="ended while starting"):
        Supervisor([program(COUNT, tmp_path / "count", lambda: False)], HASTY, tmp_path).run()


def test_a_program_that_never_gets_ready_is_an_error(tmp_path: Path) -> None:
    impatient = Patience(ready=0.1)
    with pytest.raises(DeploymentError, match="does not answer"):
        Supervisor([program(WAIT, tmp_path / "one", lambda: False)], impatient, tmp_path).run()


def test_the_next_program_starts_once_the_first_is_ready(tmp_path: Path) -> None:
    first, second, announced = tmp_path / "first", tmp_path / "second", list[bool]()
    programs = [program(WAIT, first, first.exists), program(WAIT, second, second.exists)]
    thread = stop_when(lambda: bool(announced))
    Supervisor(programs, HASTY, tmp_path).run(lambda: announced.append(first.exists() and second.exists()))
    thread.join()
    assert announced == [True]


def test_a_missing_command_is_named(tmp_path: Path) -> None:
    nothing = Program("nothing", (str(tmp_path / "nothing"),), {})
    with pytest.raises(DeploymentError, match="nothing cannot be started"):
        Supervisor([nothing], HASTY, tmp_path).run()
    with pytest.raises(DeploymentError, match="no-such-command is missing"):
        beside_python("no-such-command")


def test_flower_keeps_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org,localhost")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    environment = offline_environment(tmp_path, PATH="/only")
    assert environment["NO_PROXY"] == "example.org,localhost,127.0.0.1"
    assert environment["PATH"] == "/only"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert "PYTHONPATH" not in environment


def test_a_program_keeps_its_environment_to_itself() -> None:
    assert "hidden" not in repr(Program("p", ("p",), {"TOKEN": "hidden"}))


def test_a_port_in_use_is_not_free() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free("127.0.0.1", port)
