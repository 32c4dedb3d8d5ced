"""A SuperExec that has loaded everything already and forks a child for every message.

Starting `flwr-clientapp` costs about 1.5 s of processor time for imports alone; a fork costs none. It asks
SuperNode for ClientApp tasks only, and starts no command at all. It leans on Flower's internals, so a
release that differs is refused, and `fedward-site connect --cold` goes without it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from client.launcher import pin
from common.errors import DeploymentError

MOST_CHILDREN = 4


class ForkingExecutor:
    """Flower's Executor protocol: every ClientApp task in a child of this process.

    Args:
        runtime: the module whose `run_clientapp` answers one message.
        task_type: the only kind of task to take.
        accepted: makes what Flower wants to hear after a start.
        at_exit: what Flower wants done at this process's own end, and not at a child's.
    """

    def __init__(self, runtime: Any, task_type: Any, accepted: Any, at_exit: list[Any]) -> None:
        self._runtime = runtime
        self._task_type = task_type
        self._accepted = accepted
        self._at_exit = at_exit
        self._children: set[int] = set()

    def get_eligible_capacity(self, supported: set[Any], **options: object) -> tuple[set[Any], set[str]]:
        """The only kind of task that this site accepts, and no bundles known in advance."""
        return {self._task_type} & supported, set()

    def wait_for_capacity(self, task_type: object = None, **options: object) -> None:
        """Wait until fewer than `MOST_CHILDREN` are at work: a coordinator may send as it likes."""
        self.reconcile()
        while len(self._children) >= MOST_CHILDREN:
            time.sleep(0.05)
            self.reconcile()

    def launch(self, spec: Any) -> Any:
        """Fork; the child answers one message and ends.

        Raises:
            DeploymentError: if the task is of another kind.
        """
        if spec.task_type != self._task_type:
            raise DeploymentError(
                f"a task of kind {spec.task_type}", remedy="report it: it was not asked for"
            )
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            self._children.add(child)
            return self._accepted()
        self._answer(spec, parent)
        raise SystemExit  # not reached: the child has ended

    def reconcile(self) -> None:
        """Take leave of children that have ended."""
        self._children = {child for child in self._children if _still_runs(child)}

    def close(self) -> None:
        """End what still runs."""
        self.reconcile()
        for child in self._children:
            os.kill(child, signal.SIGTERM)

    def _answer(self, spec: Any, parent: int) -> None:
        status = 1
        try:
            self._at_exit.clear()
            for number in (signal.SIGTERM, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._runtime.run_clientapp(
                runtime_api_address=spec.runtime_api_address,
                token=spec.token,
                insecure=True,  # SuperNode's own API, on this machine's loopback
                parent_pid=parent,
                runtime_dependency_install=False,
            )
        except SystemExit as end:  # how Flower ends every task
            status = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            sys.stderr.write(f"fedward: {type(error).__name__} in a task\n")
        finally:
            os._exit(status)  # never back into SuperExec's loop


def _still_runs(child: int) -> bool:
    try:
        return os.waitpid(child, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def main() -> None:
    """Flower's `flower-superexec`, with this executor.

    Raises:
        DeploymentError: if this release of Flower works otherwise than the one this was written for.
    """
    from flwr.supercore.cli.flower_superexec import flower_superexec
    from flwr.supercore.constant import TaskType
    from flwr.supercore.exit.exit_handler import registered_exit_handlers
    from flwr.supercore.superexec import run_superexec
    from flwr.supercore.superexec.executor.types import LaunchResult
    from flwr.supernode.runtime import run_clientapp

    import client.app  # noqa: F401 - loaded once, before the first fork

    pin(run_clientapp)
    if not callable(getattr(run_superexec, "get_executor", None)):
        raise DeploymentError(
            "this release of flwr chooses its executor otherwise", remedy="fedward-site connect --cold"
        )
    executor = ForkingExecutor(
        run_clientapp, TaskType.CLIENT_APP, LaunchResult.accepted, registered_exit_handlers
    )
    setattr(run_superexec, "get_executor", lambda *arguments, **options: executor)  # noqa: B010 - a module
    flower_superexec()


if __name__ == "__main__":
    main()
