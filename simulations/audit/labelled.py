"""Canaries for any network that ends in a linear layer: patient i has label i, and all have the same record.

The last layer's weights are zero, so nothing flows back into the layers before it: there, and in every
direction but the canaries' own, noise alone must be. Its biases make the last `SINKS` classes all but
certain, so the gradient of the cross-entropy is (p - e_i) ⊗ (f, 1): label i's row, along what the network
makes of the record, and what the sinks' rows share. Columns are thus orthogonal, as those of
simulations/audit/canaries are.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import nn

from client.cohort import load_cohort
from client.settings import SiteFolder
from client.site import make_site_keys, read_split_key
from common.columns import CategoricalColumn, NumericColumn
from common.errors import StudyError
from common.features import ordered_codes
from common.files import validated, write_atomic
from common.messages import Arrays
from common.modalities import ImageColumn, SeriesColumn
from common.models import parameter_arrays, study_model
from common.study import Study
from simulations.audit.canaries import CAP, WIDE, Canaries

SINKS = 100
_SURE = 40.0  # logits of the sinks above all others
_LEAST = 1.05  # of the clipping norm, that a canary's gradient must have
_ENLARGED = (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


def labelled_study(
    study: Study, who: Canaries, *, epsilon: float, rounds: int, sample_rate: float, most_records: int
) -> Study:
    """The audited study's columns and model, with a class for each canary.

    Raises:
        StudyError: if so many classes are too many.
    """
    data = study.data.model_dump(mode="json")
    classes = [{"name": f"c{i}", "codes": [str(i)]} for i in range(who.columns + SINKS)]
    data |= {
        "patient_key": "canary_patient",
        "scaling": "ranges",
        "label": {"column": "canary_label", "classes": classes},
        "split": {"by": "column", "column": "canary_part", "test_fraction": 0.1},
    }
    for column in data["columns"]:
        column.pop("augmentation", None)
    value: dict[str, Any] = {
        "name": f"audit-{study.model.name}",
        "title": f"Canaries for {study.model.name}",
        "data": data,
        "model": {"name": study.model.name, "parameters": study.model.parameters},
        "objective": {"task": "multi-class"},
        "algorithm": {"rounds": rounds},
        "training": {
            "optimizer": {"name": "sgd", "learning_rate": 1.0},
            "local_steps": 1,
            "sample_rate": sample_rate,
            "max_records_per_patient": most_records,
        },
        "privacy": {
            "mode": "patient-dp",
            "epsilon": epsilon,
            "delta": study.privacy.delta,
            "clipping_norm": study.privacy.clipping_norm,
        },
    }
    return validated(Study, value, "the audit's study", StudyError)


def make_labelled_site(root: Path, name: str, study: Study, who: Canaries) -> SiteFolder:
    """Write a site's folder with a canary for each present label, and its keys."""
    root.mkdir(parents=True, exist_ok=True)
    cells = _cells(study)
    places = {c.name: _placed(root, c) for c in study.data.wide if isinstance(c, ImageColumn | SeriesColumn)}
    data = {"file": "canaries.csv"} | ({"files": places} if places else {})
    site = {"site": {"name": name, "public_size": who.public_size}, "data": data}
    write_atomic(root / "site.toml", tomli_w.dumps(site).encode(), mode=0o644)
    narrow = len(who.present)
    with (root / "canaries.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        # The running number keeps a patient's rows apart: the same row twice would be a broken export.
        rows.writerow(["number", "canary_patient", "canary_label", "canary_part", *cells])
        written = 0

        def write(patient: str, label: int, part: str) -> None:
            nonlocal written
            rows.writerow([written, patient, label, part, *cells.values()])
            written += 1

        for i in np.flatnonzero(who.present).tolist():
            for _ in range(int(who.records[i])):
                write(f"c{i}", i, "train")
        for i in range(narrow, who.columns):
            write(f"w{(i - narrow) // WIDE}", i, "train")
        for i in range(who.tested):
            write(f"t{i}", i % 2, "test")
    folder = SiteFolder(root)
    make_site_keys(folder)
    return folder


def _cells(study: Study) -> dict[str, str]:
    """One record's cells: public values, well within every range."""
    found: dict[str, str] = {}
    for column in study.data.columns:
        for source in column.sources:
            if isinstance(column, NumericColumn):
                low, high = column.interval
                found[source] = repr(low + 0.75 * (high - low))
            elif isinstance(column, CategoricalColumn):
                found[source] = ordered_codes(column)[-1]
            else:
                found[source] = {
                    "image": "0",
                    "series": "canary",
                    "text": "one canary in a coal mine sings of many things",
                    "molecule": "CC(=O)Oc1ccccc1C(=O)O",  # aspirin
                }[column.kind]
    return found


def _placed(root: Path, column: ImageColumn | SeriesColumn) -> dict[str, str]:
    """Write the file that the column's one cell names; returns the site's setting for it."""
    random = np.random.default_rng(0)
    if isinstance(column, ImageColumn):
        low, high = column.range
        shape = column.size if column.channels == 1 else (*column.size, column.channels)
        content = io.BytesIO()
        image = random.uniform(low, high, (1, *shape)).astype(np.float32)
        np.savez(content, allow_pickle=False, images=image)
        write_atomic(root / f"{column.name}.npz", content.getvalue())
        return {"at": f"{column.name}.npz"}
    lines = ["key,time,parameter,value"]
    for step in range(column.steps):
        for variable in column.variables:
            low, high = variable.interval
            lines.append(
                f"canary,{(step + 0.5) * column.step_hours:g},{variable.name},{random.uniform(low, high)!r}"
            )
    write_atomic(root / f"{column.name}.csv", "\n".join([*lines, ""]).encode())
    return {"at": f"{column.name}.csv", "time_unit": "hours"}


@dataclass(frozen=True)
class LabelGauge:
    """Reads canaries off their label's row of the last layer.

    Attributes:
        head: name of the last layer.
        columns: labels that are canaries'.
        unit: float64 [inputs of the last layer, and 1 for its bias], what a record is there, of length 1.
        share: of a canary's gradient that lies in its own row; the rest is in the sinks'.
    """

    parameters: Arrays
    head: str
    columns: int
    unit: np.ndarray
    share: float

    def read(self, sums: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """See `simulations.audit.observe.Gauge`."""
        weight, bias = sums.pop(f"{self.head}.weight"), sums.pop(f"{self.head}.bias")
        rows = np.column_stack([weight, bias])
        along = rows @ self.unit
        across = np.linalg.qr(np.column_stack([self.unit, np.eye(len(self.unit))[:, 1:]]))[0][:, 1:]
        # What the sinks share is their mean along the unit; without it each number is noise, but for the
        # little of its variance that went with the mean.
        sinks = rows[self.columns :] - along[self.columns :].mean() * self.unit
        sinks /= np.sqrt(1 - self.unit**2 / SINKS)
        noise = {f"{self.head}, across": rows[: self.columns] @ across, f"{self.head}, sinks": sinks}
        return -along[: self.columns], sums | noise


def label_gauge(study: Study, folder: SiteFolder, who: Canaries) -> LabelGauge:
    """The gauge of a `labelled_study` at a site of its canaries.

    Raises:
        StudyError: if the network doesn't end in a linear layer with biases, or a canary's gradient is not
            longer than the clipping norm.
    """
    cohort = load_cohort(folder, study, read_split_key(folder))
    record, clipping_norm = cohort.train.features[:1], study.privacy.clipping_norm or 1.0
    for enlarged in _ENLARGED:
        network, head, inner = _crafted(study, record, enlarged)
        length = float(np.linalg.norm(inner))
        # So long that each of a patient's records would be clipped, were it clipped by itself.
        if length > 2 * CAP * clipping_norm:
            break
    if length < _LEAST * clipping_norm:
        raise StudyError(
            f"privacy.clipping_norm {clipping_norm:g} is above a canary's gradient here, {length:.3g}",
            remedy="audit it with a smaller clipping norm",
        )
    share = 1 / math.sqrt(1 + 1 / SINKS)
    return LabelGauge(parameter_arrays(network), head, who.columns, inner / length, share)


def _crafted(study: Study, record: torch.Tensor, enlarged: float) -> tuple[nn.Module, str, np.ndarray]:
    """The network, its last layer's name, and what that layer is given of a record, followed by 1.

    Args:
        record: float32 [1, features].
        enlarged: times so much, all parameters before the last layer.
    """
    network = study_model(study, seed=1)
    head, layer = _head(network, study)
    found: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    network.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(enlarged)
        layer.weight.zero_()
        layer.bias.zero_()
        layer.bias[-SINKS:] = _SURE
        network(record)
    handle.remove()
    return network, head, np.append(found[0].double().numpy().reshape(-1), 1.0)


def _head(network: nn.Module, study: Study) -> tuple[str, nn.Linear]:
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear or linear[-1][1].out_features != study.outputs or linear[-1][1].bias is None:
        raise StudyError(
            f"model {study.model.name} doesn't end in a linear layer with biases: it has no canaries",
            remedy="audit a study with another model",
        )
    return linear[-1]
