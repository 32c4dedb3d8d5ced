"""What the README says is run: its blocks as a new user would, its commands by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import client.cli
import server.cli
import simulations.audit.cli
import simulations.cli

README = Path(__file__).resolve().parents[1] / "README.md"
MARK = "<!-- executed by tests/test_readme.py -->\n```bash\n"
BLOCKS = [part.split("```")[0] for part in README.read_text().split(MARK)[1:]]
APPS = {
    "fedward-sim": simulations.cli.app,
    "fedward-site": client.cli.app,
    "fedward-server": server.cli.main,
    "fedward-audit": simulations.audit.cli.app,
}


def run(block: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_all_blocks_are_there() -> None:
    assert len(BLOCKS) == 3


def test_the_simulation_block(tmp_path: Path) -> None:
    done = run(BLOCKS[0], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " NO " not in done.stdout
    assert len(list(tmp_path.glob("runs/*/model.safetensors"))) == 2


def test_the_newcomers_block(tmp_path: Path) -> None:
    done = run(BLOCKS[1], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "tables" / "mine" / "table.md").is_file()


@pytest.mark.deployment
def test_the_deployment_block(tmp_path: Path) -> None:
    done = run(BLOCKS[2], tmp_path)
    logs = "".join(path.read_text(errors="replace")[-1500:] for path in tmp_path.rglob("*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs
    assert "finished" in done.stdout
    assert done.stdout.count("ashford") >= 3


def names(app: typer.Typer) -> list[str]:
    own = [c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands if c.callback]
    groups = [(g.name, g.typer_instance) for g in app.registered_groups]
    return own + [f"{name} {verb}" for name, group in groups if group for verb in names(group)]


@pytest.mark.parametrize("program", APPS)
def test_every_command_is_in_the_readme_and_explains_itself(program: str) -> None:
    row = re.search(rf"^\| `{program}` \| (`.*) \|$", README.read_text(), re.MULTILINE)
    assert row is not None
    documented = re.findall(r"`([^`]+)`", row.group(1))
    assert sorted(documented) == sorted(names(APPS[program]))
    for verb in documented:
        line = [str(Path(sys.executable).with_name(program)), *verb.split(), "--help"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0
        assert "Usage:" in done.stdout


def test_the_model_of_the_readme_registers_and_trains() -> None:
    from common.models import Shape, build_model
    from common.study import Model

    code = README.read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    network = build_model(Model(name="two-layer", parameters={"width": 8}), Shape(3, 1))
    assert sum(p.numel() for p in network.parameters()) == 3 * 8 + 8 + 8 + 1
