"""`fedward-server`: the coordinator's command."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.console import JsonOption, Speaker, speaking
from common.errors import DeploymentError
from common.statistics import asked
from common.study import Study, load_study
from server import flower, sessions, superlink
from server.description import show_description
from server.display import RoundsProgress, show
from server.provisioning import CoordinatorFolder, provision
from server.report import report
from server.store import Settings

main = typer.Typer(
    name="fedward-server",
    help="Run a consortium's coordinator: its servers, its sites and its studies.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's folder.")]
Sites = Annotated[int | None, typer.Option(help="Wait for so many; all enrolled if absent.", min=1)]
Quorum = Annotated[int | None, typer.Option(help="So many make a round; SITES if absent.", min=1)]
Deadline = Annotated[float, typer.Option(help="Seconds that a site has for a round.", min=1)]
Patience = Annotated[float, typer.Option(help="Seconds to wait for sites.", min=1)]
MinimumPatients = Annotated[int, typer.Option(help="What is about fewer patients is left out.", min=1)]
Initial = Annotated[Path | None, typer.Option(help="The file of weights that the study names.")]
SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="As `run` and `status` show it.")]


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
def remove(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="SITE", help="The site's name, as `sites` shows it.")],
    json: JsonOption = False,
) -> None:
    """Let a site connect no more, whose key is lost, stolen or wrong; the servers must be running.

    Sessions that go on do so without it. It may be enrolled anew with another key.
    """
    with speaking(json) as speaker:
        node_id = flower.unregister_node(CoordinatorFolder(folder), name)
        speaker.say(f"removed {name} (node {node_id})")
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


@main.command()
def run(
    folder: Folder,
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's file.")],
    sites: Sites = None,
    quorum: Quorum = None,
    deadline: Deadline = 600.0,
    patience: Patience = 600.0,
    exact_metrics: Annotated[
        bool, typer.Option("--exact-metrics", help="Metrics without noise; sites refuse unless public.")
    ] = False,
    initial: Initial = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once; see `status`.")] = False,
    json: JsonOption = False,
) -> None:
    """Run a study at the enrolled sites and show what came of it."""
    with speaking(json) as speaker:
        opened, wanted = CoordinatorFolder(folder), load_study(study)
        weights = _initial(wanted, initial)
        settings = replace(
            _settings(opened, sites, quorum),
            deadline=deadline,
            patience=patience,
            exact_metrics=exact_metrics,
        )
        session = sessions.begin(opened, wanted, settings, weights)
        speaker.say(f"session {session}")
        _see_through(speaker, opened, session, detach)


@main.command()
def describe(
    folder: Folder,
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's file, with [statistics].")],
    sites: Sites = None,
    quorum: Quorum = None,
    deadline: Deadline = 600.0,
    patience: Patience = 600.0,
    minimum_patients: MinimumPatients = 10,
    json: JsonOption = False,
) -> None:
    """Ask the sites for the cohorts' noised statistics, and show them together. It is charged."""
    with speaking(json) as speaker:
        opened, wanted = CoordinatorFolder(folder), load_study(study)
        asked(wanted)
        settings = replace(
            _settings(opened, sites, quorum), deadline=deadline, patience=patience, describe=True
        )
        session = sessions.begin(opened, wanted, settings)
        speaker.say(f"session {session}")
        sessions.follow(opened, session, lambda done: None)
        show_description(speaker, sessions.store_of(opened), session, minimum_patients)


def _initial(wanted: Study, path: Path | None) -> bytes | None:
    if path is None and wanted.model.initial_weights is None:
        return None
    from common.models.initial import read_initial  # torch takes seconds

    return read_initial(wanted, path)


def _settings(opened: CoordinatorFolder, sites: int | None, quorum: int | None) -> Settings:
    enrolled = flower.enrolled_sites(opened)
    wait_for = sites or len(enrolled)
    if not 1 <= (quorum or wait_for) <= wait_for <= len(enrolled):
        raise DeploymentError(
            f"{len(enrolled)} sites are enrolled: --sites {wait_for} and --quorum {quorum or wait_for}",
            remedy="enrol sites first (fedward-server enrol); quorum ≤ sites ≤ enrolled sites",
        )
    nodes = {str(site.node_id): name for name, site in enrolled.items()}
    return Settings(sites=wait_for, quorum=quorum or wait_for, nodes=nodes)


@main.command()
def resume(
    folder: Folder,
    session: SessionId,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once; see `status`.")] = False,
    json: JsonOption = False,
) -> None:
    """Continue a session after its last checkpoint. Sites that answered a round spend nothing again."""
    with speaking(json) as speaker:
        opened = CoordinatorFolder(folder)
        sessions.resume(opened, session)
        _see_through(speaker, opened, session, detach)


@main.command()
def status(
    folder: Folder,
    session: Annotated[str | None, typer.Argument(help="One session; all if absent.")] = None,
    json: JsonOption = False,
) -> None:
    """Show sessions, or one session's rounds, metrics and spent budget."""
    with speaking(json) as speaker:
        store = sessions.store_of(CoordinatorFolder(folder))
        if session is not None:
            known = store.session(session)
            told = report(store, known)
            speaker.say(f"{told.session}: {told.status} {told.detail}".rstrip())
            speaker.say(f"{told.rounds} of {known.study.algorithm.rounds} rounds")
            show(speaker, known.study, [told])
            speaker.answer(told.as_json())
            return
        rows = [
            [s.id, s.study.name, s.status, f"{store.rounds_done(s.id)}/{s.study.algorithm.rounds + 1}"]
            for s in store.sessions()
        ]
        speaker.table("Sessions", ["session", "study", "status", "rounds"], rows)
        keys = ("session", "study", "status", "rounds")
        speaker.answer({"sessions": [dict(zip(keys, row, strict=True)) for row in rows]})


@main.command()
def stop(folder: Folder, session: SessionId, json: JsonOption = False) -> None:
    """End a running session; it can be resumed."""
    with speaking(json) as speaker:
        sessions.stop(CoordinatorFolder(folder), session)
        speaker.say(f"stopped {session}")
        speaker.answer({"session": session, "status": "stopped"})


def _see_through(speaker: Speaker, folder: CoordinatorFolder, session: str, detach: bool) -> None:
    """Follow a session to its end and show its table, unless detached."""
    store = sessions.store_of(folder)
    study = store.session(session).study
    if detach:
        speaker.answer({"session": session, "status": "running"})
        return
    with RoundsProgress(speaker, study, 1) as progress:
        ended = sessions.follow(folder, session, progress.rounds)
    told = report(store, ended)
    show(speaker, study, [told])
    speaker.say(f"model: {store.checkpoint_path(session, study.algorithm.rounds + 1)}")
    speaker.answer(told.as_json())


if __name__ == "__main__":
    main()
