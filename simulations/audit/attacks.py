"""Attacks on real cohorts for a report: who was a member, and what can be rebuilt of a record.

They need site folders whose patients the auditor may see: public data, or an audit inside a hospital.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from client.cohort import Patients, load_cohort
from client.settings import SiteFolder
from common.errors import StudyError
from common.study import Study
from simulations.audit.inversion import Picture, invert
from simulations.audit.membership import Membership, membership
from simulations.audit.plots import log_log, pictures
from simulations.audit.reconstruction import Imprint, imprint
from simulations.audit.shadows import NO_SECRET, pool_of

MODELS = 128  # shadow models
PICTURES = 1  # records of a site in the inversion


@dataclass(frozen=True)
class Attacks:
    """What was tried, and what came of it.

    Attributes:
        members: of the study as it is; `unprotected` of the same study without privacy.
        skipped: attacks that this study doesn't allow, each with the reason.
    """

    members: Membership
    unprotected: Membership
    imprints: tuple[Imprint, ...]
    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether membership stays below what ε allows."""
        return self.members.sound

    def as_json(self) -> dict[str, Any]:
        return {
            "membership": self.members.as_json(),
            "membership_without_privacy": self.unprotected.as_json(),
            "imprints": [each.as_json() for each in self.imprints],
            "pictures": [each.as_json() for each in self.pictures],
        }


def attack(study: Study, sites: Sequence[SiteFolder], models: int = MODELS) -> Attacks:
    """Attack a study on real cohorts.

    Args:
        sites: folders of which the auditor may read the records.

    Raises:
        FedwardError: if their data don't fit the study, or are too few.
    """
    pool, skipped = pool_of(study, sites), list[str]()
    members = membership(study, pool, models=models)
    unprotected = membership(without_privacy(study), pool, models=models)
    training = [load_cohort(folder, study, NO_SECRET).train for folder in sites]
    imprints: tuple[Imprint, ...] = ()
    try:
        imprints = imprint(study, training, pool.features.numpy())
    except StudyError as error:
        skipped.append(f"reconstruction by a planted first layer: {error.message}")
    found: tuple[Picture, ...] = ()
    if math.isqrt(pool.features.shape[1]) ** 2 == pool.features.shape[1] and study.model.name == "mlp":
        found = invert(study, [_first(each, PICTURES) for each in training])
    else:
        skipped.append("gradient inversion: it takes an mlp on square pictures")
    return Attacks(members, unprotected, imprints, found, tuple(skipped))


def without_privacy(study: Study) -> Study:
    """The same study, unprotected."""
    none = type(study.privacy)(mode="none")
    return study.model_copy(update={"privacy": none, "statistics": None})


def _first(patients: Patients, count: int) -> Patients:
    kept = patients.offsets[: count + 1]
    rows = int(kept[-1])
    return Patients(patients.features[:rows], patients.labels[:rows], torch.clone(kept))


def sections(found: Attacks) -> Iterator[str]:
    """As HTML, for the report."""
    yield "<h2>Membership</h2>" + _members(found)
    if found.imprints:
        rows = "".join(
            f"<tr><td>{escape(each.protection)}</td><td class=n>{each.recovered} of {each.records}</td>"
            f"<td class=n>{each.guessed}</td><td>{'yes' if each.attributed else 'no'}</td></tr>"
            for each in found.imprints
        )
        yield (
            "<h2>Reconstruction by a planted first layer</h2><table><thead><tr><th>Protection</th>"
            "<th class=n>records rebuilt</th><th class=n>by guessing</th><th>from a known site</th></tr>"
            f"</thead><tbody>{rows}</tbody></table>"
        )
    if found.pictures:
        shown = {"original": found.pictures[0].original[None]}
        shown |= {each.protection: each.found[None] for each in found.pictures}
        yield "<h2>Gradient inversion</h2>" + pictures(shown, title="An original, and what was rebuilt of it")


def _members(found: Attacks) -> str:
    """Table and plot: rates of true positives at low rates of false ones."""
    rows, curves = "", {}
    for name, told in (("as the study is", found.members), ("without privacy", found.unprotected)):
        for each in told.attacks:
            points = [each.curve.at(rate) for rate in (0.01, 0.001)]
            cells = "".join(f"<td class=n>{100 * p.tpr:.2f} %</td>" for p in points)
            rows += (
                f"<tr><td>{escape(each.name)}, {name}</td>{cells}<td class=n>{each.curve.auc:.3f}</td></tr>"
            )
            curves[f"{each.name}, {name}"] = each.curve.as_json()["curve"]
    ceiling = found.members.ceiling
    if ceiling is not None:
        cells = "".join(f"<td class=n>{100 * ceiling.at(rate):.2f} %</td>" for rate in (0.01, 0.001))
        rows += f"<tr><td>any attack at most, by the claim</td>{cells}<td></td></tr>"
    plot = log_log(
        curves,
        {"the claim's bound": ceiling.as_json()["curve"]} if ceiling else {},
        title="True-positive rate against false-positive rate, both logarithmic",
    )
    return (
        f"<p>{found.members.models} models, each trained on a random half of {found.members.patients} "
        "patients.</p><table><thead><tr><th>Attack</th><th class=n>TPR at 1 % FPR</th>"
        f"<th class=n>at 0.1 %</th><th class=n>AUC</th></tr></thead><tbody>{rows}</tbody></table>{plot}"
    )
