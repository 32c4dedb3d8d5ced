"""Other frameworks on the same rounds, each in an environment of its own; see `run`, which goes there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.models import parameter_arrays, study_model
from simulations.benchmarks.peers.run import PEERS, PRIVATE

if TYPE_CHECKING:
    from simulations.benchmarks.federations import Federation
    from simulations.benchmarks.floors import Floor

SCRIPT = Path(__file__).with_name("run.py")

__all__ = ["PEERS", "SCRIPT", "takes", "write_work"]


def takes(name: str, federation: Federation) -> bool:
    """Whether `run.py` has this federation for that framework: MLPs, and privacy as an example shows it."""
    return not federation.images and (not federation.private or name in PRIVATE)


def write_work(floor: Floor, path: Path) -> None:
    """What `run.py` reads: an MLP's federation, with its batches in fedward's order."""
    counts = [len(each) for each in floor.sites]
    arrays = {
        "features": np.concatenate([each.features.numpy() for each in floor.sites]),
        "labels": np.concatenate([each.labels.numpy() for each in floor.sites]),
        "offsets": np.cumsum([0, *counts]),
        "orders": np.stack([np.concatenate([one.numpy() for one in orders]) for orders in floor.orders]),
        "test_features": floor.test.features.numpy(),
        "test_labels": floor.test.labels.numpy(),
        "batch": np.array(floor.batch),
        "rate": np.array(floor.rate),
        "noise": np.array([plan.step.noise_multiplier for plan in floor.plans if plan.private]),
        "clipping_norm": np.array(floor.plans[0].step.clipping_norm or 0.0),
    }
    initial = parameter_arrays(study_model(floor.study, floor.seed))
    arrays |= {f"parameter:{name}": value for name, value in initial.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
