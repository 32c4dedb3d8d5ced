"""A run folder and what a person reads of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from common.files import write_atomic
from common.study import Study
from server.coordinator import PARAMETERS, part
from server.report import SessionReport, report
from simulations.engine import Simulation


@dataclass(frozen=True)
class Run:
    """Attributes:
    folder: result.json, study.json, model.safetensors, store/, sites/.
    """

    folder: Path
    report: SessionReport


def new_run_folder(out: Path, study: Study) -> Path:
    """Where runs of a study go that begin now; it is made once sites and study are known to be sound."""
    return out / f"{study.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def keep(simulation: Simulation) -> Run:
    """Write result, study and final model beside the run's store."""
    session = simulation.store.session(simulation.session)
    told = report(simulation.store, session)
    final = simulation.store.rounds(session.id)[-1].number
    model = part(simulation.store.checkpoint(session.id, final), PARAMETERS)
    write_atomic(simulation.folder / "model.safetensors", save(dict(model)), mode=0o644)
    write_atomic(simulation.folder / "study.json", session.study.canonical, mode=0o644)
    result = json.dumps(told.as_json(), indent=1).encode()
    write_atomic(simulation.folder / "result.json", result, mode=0o644)
    return Run(simulation.folder, told)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What programs read: every run's report, and its folder."""
    return {"runs": [{"folder": str(run.folder), **run.report.as_json()} for run in runs]}
