"""The way of a message through real servers, and who is kept out of it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from cluster import Cluster

from client.launcher import COMMAND, REFUSED
from client.settings import SiteFolder
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
    record = ArrayRecord({"message": Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)})
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


def test_a_message_reaches_every_vault_and_its_answer_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    rounds = run_probe(cluster, probe_app(tmp_path / "probe"), tmp_path / "out.json", rounds=3)
    print("seconds per round trip:", [round(r["seconds"], 1) for r in rounds])
    for number, found in enumerate(rounds):
        expected = {str(i): {"text": f"{name}:hello {number}"} for name, i in cluster.node_ids.items()}
        assert found["answers"] == expected


def test_sites_are_seen_online(cluster: Cluster) -> None:
    assert {n.name for n in nodes(cluster.coordinator) if n.online} >= set(cluster.names)
