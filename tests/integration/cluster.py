"""A whole consortium on loopback: coordinator, sites and vaults, each a process of its own.

    with Cluster(root, ("north", "east"), vault=my_vault) as cluster:
        run_id = submit(cluster.coordinator, {"key": "value"})
        status = cluster.finish(run_id)

`prepare` writes what a site needs beside its site.toml's [coordinator]; `vault` starts what answers at
the site's socket and returns a function that ends it; sites in `cold` start a new process for every
message. Everything is ended by the ids that were started.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from client.door import ANSWER_METHOD, chunks, gather
from client.settings import SiteFolder
from client.supernode import create_node_key
from client.wire_pb2 import Chunk
from common.processes import free_port
from server import flower
from server.provisioning import CoordinatorFolder, provision

START_SECONDS = 120
STOP_SECONDS = 30
POLL_SECONDS = 0.3

Stop = Callable[[], None]
Answer = Callable[[str, bytes], bytes]

_CONNECT = """
import sys
from pathlib import Path
from client.settings import SiteFolder
from client.supernode import connect
connect(SiteFolder(Path(sys.argv[1])), warm=sys.argv[2] == "warm")
"""


def fake_vault(answer: Answer) -> Callable[[SiteFolder], Stop]:
    """A vault without data: `answer(site name, request)` gives the reply."""

    def start(site: SiteFolder) -> Stop:
        def handle(pieces: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            yield from chunks(answer(site.name, gather(pieces)))

        service, method = ANSWER_METHOD.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(
            handle, request_deserializer=Chunk.FromString, response_serializer=Chunk.SerializeToString
        )
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        site.socket_path.parent.mkdir(mode=0o700, exist_ok=True)
        server.add_insecure_port(f"unix:{site.socket_path}")
        server.start()
        return lambda: server.stop(grace=1).wait()

    return start


def vault_process(command: Callable[[SiteFolder], Sequence[str]]) -> Callable[[SiteFolder], Stop]:
    """A real vault: the command that serves a site's socket in the foreground. Output: vault.log."""

    def start(site: SiteFolder) -> Stop:
        with (site.root / "vault.log").open("ab") as log:
            process = subprocess.Popen(command(site), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        def stop() -> None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        deadline = time.monotonic() + START_SECONDS
        while not site.socket_path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                stop()
                raise AssertionError(
                    f"{site.name}: no vault\n{(site.root / 'vault.log').read_text()[-2000:]}"
                )
            time.sleep(POLL_SECONDS)
        return stop

    return start


def echo(site: str, request: bytes) -> bytes:
    return site.encode() + b":" + request


def running(word: str, site: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """This site's processes whose command line has that word: /proc folder, environment. Linux only."""
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or word not in (entry / "cmdline").read_text(errors="replace"):
                continue
            pairs = (entry / "environ").read_text(errors="replace").split("\0")
        except OSError:  # it has ended, or is another user's
            continue
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if Path(environment.get("FLWR_HOME", "/")).is_relative_to(site):
            yield entry, environment


def environments(word: str, site: Path) -> list[dict[str, str]]:
    return [environment for _, environment in running(word, site)]


def pids(word: str, site: Path) -> list[int]:
    return [int(entry.name) for entry, _ in running(word, site)]


def loaded_libraries(word: str, site: Path) -> set[str]:
    """Names of the shared libraries that these processes have loaded."""
    maps = [(entry / "maps").read_text().splitlines() for entry, _ in running(word, site)]
    return {Path(line.split()[-1]).name for lines in maps for line in lines if ".so" in line}


def bare_site(folder: Path) -> None:
    """The least that a site.toml says; there is no data behind it."""
    text = f'[site]\nname = "{folder.name}"\npublic_size = 10\n\n[data]\nfile = "none.csv"\n'
    (folder / "site.toml").write_text(text)


class Cluster:
    """Starts everything on entering, ends everything on leaving."""

    def __init__(
        self,
        root: Path,
        names: Sequence[str] = ("north", "east", "south", "west"),
        *,
        prepare: Callable[[Path], None] = bare_site,
        vault: Callable[[SiteFolder], Stop] | None = None,
        cold: Collection[str] = (),
    ) -> None:
        self.root = root
        self.names = tuple(names)
        self.prepare = prepare
        self.cold = cold
        self._vault = vault or fake_vault(echo)
        self.coordinator: CoordinatorFolder
        self.sites: dict[str, SiteFolder] = {}
        self.node_ids: dict[str, int] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stops: dict[str, Stop] = {}

    def __enter__(self) -> Cluster:
        try:
            self.coordinator = provision(
                self.root / "coordinator", ["127.0.0.1"], free_port(), free_port(), listen="127.0.0.1"
            )
            self._start_coordinator()
            for name in self.names:
                self.add_site(name)
            self.await_online(self.names)
        except BaseException:
            self._stop_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_all()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.coordinator.file.port}"

    def folder_for(self, name: str, address: str | None = None) -> SiteFolder:
        """A site's folder with the coordinator's address and certificate and a new key; not yet enrolled."""
        folder = self.root / "sites" / name
        folder.mkdir(parents=True)
        self.prepare(folder)
        with (folder / "site.toml").open("a") as file:
            file.write(f'\n[coordinator]\naddress = "{address or self.address}"\ncertificate = "ca.crt"\n')
        shutil.copy(self.coordinator.authority, folder / "ca.crt")
        site = SiteFolder(folder)
        create_node_key(site)
        return site

    def add_site(self, name: str) -> None:
        """Make a site, start its vault, enrol it and connect it."""
        site = self.sites[name] = self.folder_for(name)
        self.start_vault(name)
        key = site.node_key_path.with_suffix(".pub")
        self.node_ids[name] = flower.register_node(self.coordinator, key, name)
        self.connect(name)

    def start_vault(self, name: str) -> None:
        self._stops[name] = self._vault(self.sites[name])

    def stop_vault(self, name: str) -> None:
        """End a site's vault; its SuperNode stays."""
        self._stops.pop(name)()
        self.sites[name].socket_path.unlink(missing_ok=True)

    def connect(self, name: str) -> None:
        start = "cold" if name in self.cold else "warm"
        self.spawn(name, [sys.executable, "-c", _CONNECT, str(self.sites[name].root), start])

    def spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a process that is ended with the cluster; its output goes to NAME.log."""
        with self.log_path(name).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment()
            )
        self.processes[name] = process
        return process

    def end(self, name: str) -> int:
        """End one process by SIGTERM; its exit status."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(STOP_SECONDS)

    def log_path(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def await_online(self, names: Sequence[str]) -> None:
        def all_online() -> bool:
            online = {node.name for node in flower.nodes(self.coordinator) if node.online}
            return set(names) <= online

        self.wait_for(all_online, START_SECONDS, f"{', '.join(names)} online")

    def finish(self, run_id: int, seconds: float = START_SECONDS) -> flower.RunStatus:
        """Wait until a run has finished; how it did."""

        def finished() -> bool:
            return flower.run_status(self.coordinator, run_id).finished

        self.wait_for(finished, seconds, f"run {run_id} finished")
        return flower.run_status(self.coordinator, run_id)

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll, with an upper bound; on failure show the ends of all logs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise AssertionError(f"{name} ended with {process.returncode}\n{self._logs()}")
            time.sleep(POLL_SECONDS)
        raise AssertionError(f"not within {seconds} s: {what}\n{self._logs()}")

    def _start_coordinator(self) -> None:
        command = [sys.executable, "-m", "server.cli", "start", str(self.coordinator.root), "--json"]
        self.spawn("coordinator", command)

        def ready() -> bool:
            lines = self.log_path("coordinator").read_text(errors="replace").splitlines()
            return any(line.startswith("{") and json.loads(line).get("ready") for line in lines)

        self.wait_for(ready, START_SECONDS, "coordinator ready")

    def _logs(self) -> str:
        ends = {log.name: log.read_text(errors="replace")[-2000:] for log in sorted(self.root.glob("*.log"))}
        return "\n".join(f"--- {name}\n{end}" for name, end in ends.items())

    def _stop_all(self) -> None:
        names = list(reversed(self.processes))  # sites first: they say goodbye to the coordinator
        for name in [n for n in names if n != "coordinator"]:
            self.processes[name].terminate()
        for name in names:
            process = self.processes[name]
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()
        for name in list(self._stops):
            self.stop_vault(name)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "PYTEST_", "COV_"))}
