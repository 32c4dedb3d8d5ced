"""Long-running programs that one foreground process starts, watches and stops.

Both sides of the wall run Flower's programs this way, so that one service unit, one container or one
terminal is all that an operator sees. Programs are ended by the ids that were started here, never by name.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from common.errors import DeploymentError

_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Below Linux's range for outgoing connections, so that a port stays free between two starts.
_PORTS = range(20_000, 30_000)
_LOOPBACK_NAMES = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Program:
    """One program to keep running.

    Attributes:
        name: as an operator reads it.
        command: absolute path of the executable and its arguments.
        environment: the program's whole environment.
        ready: tells whether it serves; the next program starts only then. Absent: at once.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    ready: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Patience:
    """How long a supervisor puts up with trouble; all times in seconds.

    Attributes:
        restarts: failures of one program in a row, after which all is given up.
        first_delay: before the first restart; it doubles with every failure.
        longest_delay: where the doubling ends.
        steady: a program that ran this long is forgiven its earlier failures.
        ready: for a program to begin to serve.
        stop: between the polite and the forced end.
    """

    restarts: int = 10
    first_delay: float = 1.0
    longest_delay: float = 30.0
    steady: float = 120.0
    ready: float = 90.0
    stop: float = 10.0


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    due: float | None = None


class Supervisor:
    """Keeps programs running until SIGTERM or SIGINT; used from the main thread."""

    def __init__(self, programs: Sequence[Program], patience: Patience, folder: Path) -> None:
        self._programs = tuple(programs)
        self._patience = patience
        self._folder = folder
        self._children: list[_Child] = []
        self._stopping = False

    def run(self, announce: Callable[[], None] = lambda: None) -> None:
        """Start every program in order, call `announce`, and watch until a signal asks for the end.

        Raises:
            DeploymentError: if a program doesn't get ready, or fails more often than patience allows.
                All programs have been stopped by then.
        """
        with self._signals():
            try:
                for program in self._programs:
                    if self._stopping:
                        return
                    self._children.append(_Child(program, self._spawn(program), time.monotonic()))
                    self._await_ready(self._children[-1])
                if not self._stopping:
                    announce()
                while not self._stopping:
                    for child in self._children:
                        self._look_after(child)
                    time.sleep(_POLL_SECONDS)
            finally:
                self._stop_all()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _spawn(self, program: Program) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                program.command,
                env=dict(program.environment),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends them in order
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise DeploymentError(
                f"{program.name}: {program.command[0]} cannot be started ({error.strerror})",
                remedy="install it again and check its permissions",
            ) from None

    def _await_ready(self, child: _Child) -> None:
        ready = child.program.ready
        deadline = time.monotonic() + self._patience.ready
        while ready is not None and not self._stopping and not ready():
            if _has_ended(child.process):
                raise DeploymentError(
                    f"{child.program.name} ended while starting (status {_bury(child.process)})",
                    remedy="its reason stands above in its own output",
                )
            if time.monotonic() > deadline:
                raise DeploymentError(
                    f"{child.program.name} does not answer after {self._patience.ready:g} s",
                    remedy="look at its output above; check that nothing else holds its port",
                )
            time.sleep(_POLL_SECONDS)

    def _look_after(self, child: _Child) -> None:
        now = time.monotonic()
        if child.due is not None:
            if now >= child.due:
                child.process, child.started, child.due = self._spawn(child.program), now, None
            return
        if not _has_ended(child.process):
            return
        status = _bury(child.process)
        child.failures = 1 if now - child.started >= self._patience.steady else child.failures + 1
        if child.failures > self._patience.restarts:
            raise DeploymentError(
                f"{child.program.name} ended {child.failures} times in a row, last with status {status}",
                remedy="its reason stands above in its own output",
            )
        delay = min(self._patience.longest_delay, self._patience.first_delay * 2 ** (child.failures - 1))
        child.due = now + delay
        sys.stderr.write(f"{child.program.name} ended (status {status}); next start in {delay:g} s\n")

    def _stop_all(self) -> None:
        alive = [c.process for c in reversed(self._children) if c.process.returncode is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + self._patience.stop
        while not all(map(_has_ended, alive)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for process in alive:
            _bury(process)


def offline_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment for a Flower program that keeps to itself.

    No telemetry, no update check, no installation of what a bundle asks for, own state folder `home`,
    short polls, and calls on loopback past any proxy.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "PYTHON"))}
    for name in ("NO_PROXY", "no_proxy"):
        given = [entry for entry in environment.get(name, "").split(",") if entry]
        environment[name] = ",".join([*given, *(n for n in _LOOPBACK_NAMES if n not in given)])
    environment.update(
        FLWR_HOME=str(home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.2",
        PYTHONUNBUFFERED="1",
        **more,
    )
    return environment


def beside_python(name: str) -> str:
    """The path of a command installed in the same environment as this interpreter.

    Raises:
        DeploymentError: if it isn't there.
    """
    path = Path(sys.executable).parent / name
    if not os.access(path, os.X_OK):
        raise DeploymentError(f"{path} is missing", remedy="install fedward again in this environment")
    return str(path)


def port_is_free(address: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A loopback port on which nothing listens.

    Raises:
        DeploymentError: if a hundred tries find none.
    """
    for port in random.sample(_PORTS, 100):
        if port_is_free("127.0.0.1", port):
            return port
    raise DeploymentError("no free port on loopback", remedy="stop some of the servers on this machine")


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """In the child: have the kernel end it when this process is killed, so that nothing is orphaned."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a program has ended; its id stays taken until `_bury`."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return process.returncode is not None or os.waitid(os.P_PID, process.pid, options) is not None


def _bury(process: subprocess.Popen[bytes]) -> int:
    """End a program's whole group, which bears its id, and only then give the id back; its status."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
