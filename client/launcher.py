"""fedward's own `flwr-clientapp`: runs the installed ClientApp, whatever bundle a coordinator sends.

SuperExec starts `flwr-clientapp` from its PATH for every message. Flower's own would unpack the
coordinator's bundle and import it ahead of everything installed; a bundle could even name another kind
of app, for which SuperExec starts another command. So a site's SuperExec has a PATH with nothing on it
but the commands written here: this launcher, and refusals. Loads neither torch nor opacus nor pandas.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import DeploymentError
from common.files import write_atomic

COMMAND = "flwr-clientapp"
# What SuperExec might start for other kinds of task, all of which execute the coordinator's bundle.
REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
# What is replaced in Flower's module; a release without them must not run unguarded.
_SEAMS = ("install_from_fab", "install_app_dependencies", "get_load_client_app_fn", "Error")
_OUR_WORDS = re.compile(r"fedward: [A-Za-z-]{1,64}")


def main() -> None:
    """Answer one message: Flower's own procedure, with the installed app and silent errors.

    Raises:
        DeploymentError: if this release of Flower works otherwise than the one this was written for.
    """
    arguments = _arguments(sys.argv[1:])
    from flwr.supernode.runtime import run_clientapp

    pin(run_clientapp)
    run_clientapp.run_clientapp(
        runtime_api_address=arguments.runtime_api_address,
        token=arguments.token,
        insecure=True,  # SuperNode's own API, on this machine's loopback
        parent_pid=arguments.parent_pid,
        runtime_dependency_install=False,
    )


def _arguments(given: list[str]) -> argparse.Namespace:
    """What SuperExec says. Flower's own parser would load its whole server: a second more per message."""
    parser = argparse.ArgumentParser(prog=COMMAND, allow_abbrev=False)
    parser.add_argument("--runtime-api-address", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--insecure", action="store_true", required=True)
    parser.add_argument("--parent-pid", type=int, default=None)
    return parser.parse_args(given)


def pin(runtime: ModuleType) -> None:
    """Make Flower's procedure load the installed `client.app` and leave the bundle alone.

    Raises:
        DeploymentError: if `runtime` lacks one of the functions to replace.
    """
    missing = [name for name in _SEAMS if not callable(getattr(runtime, name, None))]
    if missing:
        raise DeploymentError(
            f"this release of flwr has no {', '.join(missing)} to guard",
            remedy="install the flwr release that fedward's pyproject names",
        )
    replaced: dict[str, Callable[..., Any]] = {
        "install_from_fab": _leave_bundle,
        "install_app_dependencies": _leave_bundle,
        "get_load_client_app_fn": _installed_app,
        "Error": _silenced(runtime.Error),
    }
    for name, function in replaced.items():
        setattr(runtime, name, function)


def write_commands(folder: Path) -> None:
    """Write the commands of a site's SuperExec: the only folder on its PATH.

    `-I` keeps environment variables, the current folder and the user's own packages out of the import path.

    Raises:
        OSError: if the folder can't be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    run = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -m client.launcher "$@"\n'
    write_atomic(folder / COMMAND, run.encode(), mode=0o700)
    for name in REFUSED:
        refuse = f"#!/bin/sh\necho 'fedward: {name} is refused at this site' >&2\nexit 1\n"
        write_atomic(folder / name, refuse.encode(), mode=0o700)


def _leave_bundle(*arguments: object, **options: object) -> None:
    """Stands where Flower unpacks a bundle, or installs what it asks for."""


def _installed_app(**options: object) -> Callable[..., Any]:
    def load(*bundle: object) -> Any:
        from client.app import app

        return app

    return load


def _silenced(error: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's error message to the coordinator, without an exception's text unless it is a code of ours."""

    def make(code: int, reason: str | None = None) -> Any:
        ours = _OUR_WORDS.search(reason or "")
        return error(code=code, reason=ours.group() if ours else "fedward: internal")

    return make


if __name__ == "__main__":
    main()
