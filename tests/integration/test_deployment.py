"""The way of a message through real servers, and who is kept out of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from cluster import Cluster, environments, pids

from client.launcher import COMMAND, REFUSED
from client.settings import SiteFolder
from client.supernode import create_node_key
from client.supernode import programs as site_programs
from common.processes import free_port
from server.flower import nodes, run_log, submit
from server.provisioning import provision

pytestmark = pytest.mark.deployment
REFUSAL_SECONDS = 90

# Sends one request to every node and writes down what came back.
PROBE = """
import json, time
from pathlib import Path
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

def ask(grid, node, text):
    data = text.encode()
    array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
    record = ArrayRecord({"message": array})
    return Message(RecordDict({"fedward": record}), dst_node_id=node, message_type="train")

@app.main()
def main(grid, context):
    rounds = []
    for number in range(int(context.run_config["rounds"])):
        started = time.monotonic()
        expected = {i: ask(grid, i, f"hello {number}") for i in grid.get_node_ids()}
        waiting = set(grid.push_messages(list(expected.values())))
        answers = {}
        while waiting and time.monotonic() < started + 120:
            for reply in grid.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                answers[str(reply.metadata.src_node_id)] = (
                    {"error": reply.error.reason} if reply.has_error()
                    else {"text": reply.content["fedward"]["message"].data.decode()}
                )
            time.sleep(0.1)
        rounds.append({"seconds": time.monotonic() - started, "answers": answers})
    Path(context.run_config["out"]).write_text(json.dumps(rounds))
"""


def probe_app(folder: Path) -> Path:
    """A Flower app whose ServerApp is the probe; `client.app` is what is installed."""
    folder.mkdir()
    components = {"serverapp": "probe:app", "clientapp": "client.app:app"}
    config = {"out": "", "rounds": 1}
    content = {
        "project": {"name": folder.name, "version": "1.0.0", "description": "probe", "license": "Apache-2.0"},
        "tool": {"flwr": {"app": {"publisher": "probe", "components": components, "config": config}}},
    }
    (folder / "pyproject.toml").write_text(tomli_w.dumps(content))
    (folder / "probe.py").write_text(PROBE)
    return folder


def run_probe(cluster: Cluster, app: Path, out: Path, rounds: int = 1) -> list[dict[str, object]]:
    run_id = submit(cluster.coordinator, {"out": str(out), "rounds": rounds}, app)
    status = cluster.finish(run_id, seconds=60 + 120 * rounds)
    assert status.succeeded, f"{status}\n{run_log(cluster.coordinator, run_id)}"
    return json.loads(out.read_text())


def answers_of(cluster: Cluster, number: int = 0) -> dict[str, dict[str, str]]:
    """What the probe gets when every site's own vault has answered."""
    return {str(i): {"text": f"{name}:hello {number}"} for name, i in cluster.node_ids.items()}


def post(address: str, path: str, authority: Path) -> int:
    """The status of an empty protobuf call."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=20)
    try:
        connection.request("POST", path, b"", {"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def attempt(site: SiteFolder, *changed: str) -> subprocess.CompletedProcess[str]:
    """Start a SuperNode once, as `connect` would, and wait for its end."""
    work = site.socket_path.parent
    work.mkdir(exist_ok=True)
    (work / "superexec.secret").write_bytes(b"x" * 32)
    supernode, _ = site_programs(site, work.resolve(), free_port())
    return subprocess.run(
        changed or supernode.command,
        env=dict(supernode.environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=REFUSAL_SECONDS,
        check=False,
    )


def test_a_message_reaches_every_vault_and_its_answer_comes_back(
    cluster: Cluster, tmp_path: Path, asking: dict[str, set[str]]
) -> None:
    rounds = run_probe(cluster, probe_app(tmp_path / "probe"), tmp_path / "out.json", rounds=3)
    print("\nseconds per round trip:", [round(r["seconds"], 1) for r in rounds])
    assert [r["answers"] for r in rounds] == [answers_of(cluster, n) for n in range(3)]
    for name in cluster.names:
        assert any("cygrpc" in library for library in asking[name])  # we did look at the right process
        assert not [lib for lib in asking[name] if "torch" in lib or "pandas" in lib or "_arrow" in lib]


def test_the_launcher_imports_neither_torch_nor_opacus() -> None:
    code = (
        "import sys; import client.launcher, client.app, flwr.supernode.runtime.run_clientapp as r;"
        "client.launcher.pin(r); print(sorted({'torch', 'opacus', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_site_can_start_nothing_but_its_launcher(cluster: Cluster) -> None:
    """A coordinator may submit other kinds of app; Flower runs those by other commands."""
    code = "from flwr.supercore.constant import TASK_TYPE_TO_COMMAND as t; print(*t.values())"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {COMMAND, *REFUSED} == set(known.stdout.split())
    for site in cluster.sites.values():
        commands = site.socket_path.parent / "bin"
        assert {path.name for path in commands.iterdir()} == {COMMAND, *REFUSED}
        assert [e["PATH"] for e in environments("--runtime-api-address", site.root)] == [str(commands)]
    refusal = subprocess.run([commands / "flwr-agentapp"], capture_output=True, check=False)
    assert refusal.returncode == 1


def test_sites_are_seen_online(cluster: Cluster) -> None:
    assert {n.name for n in nodes(cluster.coordinator) if n.online} == set(cluster.names)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-task-input",
        "/v1/control/../fleet/../control/list-runs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet/%252e%252e/control/list-runs",
        "/v1//control/list-runs",
        "/health",
        "/docs",
        "/",
    ],
)
def test_only_the_fleet_passes_nginx(cluster: Cluster, path: str) -> None:
    assert post(cluster.address, path, cluster.coordinator.authority) == 404


def test_what_nginx_keeps_back_does_exist_behind_it(cluster: Cluster) -> None:
    inside, authority = cluster.coordinator.loopback, cluster.coordinator.authority
    assert post(inside, "/v1/control/list-runs", authority) == 200  # open to whoever reaches it
    assert post(inside, "/v1/runtime/acquire-task", authority) == 401  # only with the secret
    assert post(cluster.address, "/v1/fleet/pull-messages", authority) == 401  # reached; not our key


def test_superlink_listens_on_loopback_only(cluster: Cluster) -> None:
    listening = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout.split("\n")
    port = cluster.coordinator.file.loopback_port
    assert [line.split()[3] for line in listening if f":{port} " in line] == [f"127.0.0.1:{port}"]


def test_a_wrong_authority_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    site = cluster.folder_for("deceived")
    stranger = provision(tmp_path / "stranger", ["127.0.0.1"], free_port(), free_port(), listen="127.0.0.1")
    (site.root / "ca.crt").write_bytes(stranger.authority.read_bytes())
    done = attempt(site)
    assert done.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in done.stdout + done.stderr


def test_an_unregistered_key_is_refused(cluster: Cluster) -> None:
    done = attempt(cluster.folder_for("stranger"))
    assert done.returncode != 0
    assert "Failed to activate SuperNode" in done.stdout + done.stderr
    assert "SuperNode ID" not in done.stdout + done.stderr
    assert {n.name for n in nodes(cluster.coordinator)} == set(cluster.names)


def test_a_removed_site_is_refused_and_may_come_back_with_another_key(cluster: Cluster) -> None:
    def told(*arguments: str | Path) -> dict[str, str]:
        command = [sys.executable, "-m", "server.cli", *map(str, arguments), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return json.loads(done.stdout)

    site, root = cluster.folder_for("guest"), cluster.coordinator.root
    enrol = ("enrol", root, site.node_key_path.with_suffix(".pub"), "--name", "guest")
    node = told(*enrol)["node_id"]
    assert told("remove", root, "guest") == {"name": "guest", "node_id": node}
    done = attempt(site)
    assert "Failed to activate SuperNode" in done.stdout + done.stderr
    assert {n.name for n in nodes(cluster.coordinator)} == set(cluster.names)
    assert told("remove", root, "guest")["message"] == "no site guest is enrolled"
    assert told(*enrol)["message"].endswith("this key was enrolled before, and was removed")
    for file in (site.node_key_path, site.node_key_path.with_suffix(".pub")):
        file.unlink()
    create_node_key(site)
    assert told(*enrol)["node_id"] != node
    assert "node_id" in told("remove", root, "guest")


def test_a_client_without_encryption_is_refused(cluster: Cluster) -> None:
    site = cluster.folder_for("careless")
    flower = str(Path(sys.executable).parent / "flower-supernode")
    runtime = ("--isolation", "process", "--host", "127.0.0.1", "--port", str(free_port()))
    done = attempt(site, flower, "--insecure", "--superlink", cluster.address, *runtime)
    assert done.returncode != 0
    assert "400 Bad Request" in done.stdout + done.stderr
    assert "SuperNode ID" not in done.stdout + done.stderr


SABOTAGE = """
import os, pathlib
(pathlib.Path(os.environ["FLWR_HOME"]) / "marker").write_text("the bundle ran")
"""
HOSTILE = f"""{SABOTAGE}
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def steal(message, context):
    data = pathlib.Path(SECRET).read_bytes()
    array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
    return Message(RecordDict({{"fedward": ArrayRecord({{"message": array}})}}), reply_to=message)
"""


def test_a_hostile_bundle_neither_runs_nor_reads(cluster: Cluster, tmp_path: Path) -> None:
    secret = cluster.root / "patients.csv"
    secret.write_text("Jane Roe, 1954-03-01")
    app = probe_app(tmp_path / "hostile")
    for package in ("client", "common", "safetensors"):  # names that are installed, too
        (app / package).mkdir()
        (app / package / "__init__.py").write_text("" if package == "client" else SABOTAGE)
    (app / "client" / "app.py").write_text(HOSTILE.replace("SECRET", repr(str(secret))))
    rounds = run_probe(cluster, app, tmp_path / "out.json")
    assert rounds[0]["answers"] == answers_of(cluster)
    sites = cluster.root / "sites"
    assert not [*sites.rglob("marker"), *sites.rglob("*.fab"), *sites.rglob("probe.py")]
    control = [sys.executable, "-c", "import client.app"]  # the bundle would have run where it is imported
    subprocess.run(control, cwd=app, env={**os.environ, "FLWR_HOME": str(tmp_path)}, check=True, timeout=60)
    assert (tmp_path / "marker").exists()


def test_the_command_tells_who_is_there(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "server.cli", "sites", str(cluster.coordinator.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {site["name"]: site["status"] for site in json.loads(done.stdout)["sites"]}
    assert found == dict.fromkeys(cluster.names, "online")


def test_a_second_start_names_the_port_that_is_taken(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "server.cli", "start", str(cluster.coordinator.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 10
    assert str(cluster.coordinator.file.loopback_port) in json.loads(done.stdout)["message"]


def test_a_site_leaves_in_peace_and_comes_back(cluster: Cluster) -> None:
    def status() -> str:
        return next(n.status for n in nodes(cluster.coordinator) if n.name == "west")

    assert cluster.end("west") == 0
    assert environments("", cluster.sites["west"].root) == []
    cluster.wait_for(lambda: status() == "offline", 60, "west offline")
    cluster.connect("west")
    cluster.await_online(["west"])


def test_a_killed_supernode_is_started_again(cluster: Cluster) -> None:
    """SuperLink locks it out for about a minute; the supervisor outlasts that."""
    site = cluster.sites["north"].root

    def admissions() -> int:
        return cluster.log_path("north").read_text().count("SuperNode ID:")

    before = admissions()
    (supernode,) = pids("flower-supernode", site)
    os.kill(supernode, signal.SIGKILL)
    cluster.wait_for(lambda: admissions() > before, 180, "north admitted again")
    assert pids("flower-supernode", site) != [supernode]
