"""`fedward-server`: the coordinator's command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.console import JsonOption, speaking
from server import flower, superlink
from server.provisioning import CoordinatorFolder, provision

main = typer.Typer(
    name="fedward-server",
    help="Run a consortium's coordinator: its servers, its sites and its studies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]


@main.command()
def init(
    folder: Folder,
    host: Annotated[list[str], typer.Option(help="Name or IP address that sites use; may be repeated.")],
    port: Annotated[int, typer.Option(help="Public port, the only one that sites reach.")] = 8443,
    loopback_port: Annotated[int, typer.Option(help="SuperLink's port on 127.0.0.1.")] = 9443,
    listen: Annotated[str, typer.Option(help="Address on which the public port listens.")] = "0.0.0.0",  # noqa: S104
    json: JsonOption = False,
) -> None:
    """Create the coordinator's folder: authority, certificate, secret and configuration."""
    with speaking(json) as speaker:
        created = provision(folder, host, port, loopback_port, listen)
        speaker.say(f"created {created.root}")
        speaker.say(f"sites need: address {host[0]}:{port} and the file {created.authority}")
        speaker.answer(
            {
                "folder": str(created.root),
                "certificate": str(created.authority),
                "hosts": list(created.file.hosts),
                "port": port,
            }
        )


@main.command()
def start(folder: Folder, json: JsonOption = False) -> None:
    """Run the coordinator's servers in the foreground until Ctrl-C or SIGTERM."""
    with speaking(json) as speaker:
        opened = CoordinatorFolder(folder)

        def announce() -> None:
            speaker.say(f"ready: sites connect to {opened.file.listen}:{opened.file.port}")
            speaker.answer({"ready": True, "listen": opened.file.listen, "port": opened.file.port})
            sys.stdout.flush()  # whoever waits for this line may read a pipe

        superlink.start(opened, announce)


@main.command()
def enrol(
    folder: Folder,
    public_key: Annotated[Path, typer.Argument(metavar="PUBLIC_KEY", help="The site's keys/node.pub.")],
    name: Annotated[str, typer.Option(help="The site's name, as in its site.toml.")],
    json: JsonOption = False,
) -> None:
    """Let a site connect; the coordinator's servers must be running."""
    with speaking(json) as speaker:
        node_id = flower.register_node(CoordinatorFolder(folder), public_key, name)
        speaker.say(f"enrolled {name} (node {node_id})")
        speaker.answer({"name": name, "node_id": str(node_id)})


@main.command()
def sites(folder: Folder, json: JsonOption = False) -> None:
    """Show the enrolled sites and which of them are connected."""
    with speaking(json) as speaker:
        found = flower.nodes(CoordinatorFolder(folder))
        speaker.table(
            "Sites", ["site", "status", "node"], [[n.name, n.status, str(n.node_id)] for n in found]
        )
        speaker.answer(
            {"sites": [{"name": n.name, "status": n.status, "node_id": str(n.node_id)} for n in found]}
        )


if __name__ == "__main__":
    main()
