"""Attacks on real cohorts for a report: who was a member, and what can be rebuilt of a record.

They need site folders whose patients the auditor may see: public data, or an audit inside a hospital.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch

from client.cohort import Patients, load_cohort
from client.settings import SiteFolder
from common.errors import StudyError
from common.study import Study
from simulations.audit.inversion import Picture, invert, picture_shape
from simulations.audit.membership import Membership, membership
from simulations.audit.plots import log_log, pictures
from simulations.audit.reconstruction import Imprint, imprint
from simulations.audit.shadows import NO_SECRET, pool_of

MODELS = 128  # shadow models
_PICTURE_PIXELS = 184  # of a picture's shorter side on the page, or so


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
    try:
        picture_shape(study)
        found = invert(study, [_one_record(each) for each in training])
    except StudyError as error:
        skipped.append(f"gradient inversion: {error.message}")
    return Attacks(members, unprotected, imprints, found, tuple(skipped))


def without_privacy(study: Study) -> Study:
    """The same study, unprotected."""
    none = type(study.privacy)(mode="none")
    return study.model_copy(update={"privacy": none, "statistics": None})


def _one_record(patients: Patients) -> Patients:
    """The first patient who has one record only, else the first record of the first patient: the attacker's
    best case."""
    single = torch.nonzero(patients.offsets.diff() == 1).flatten().tolist()
    row = int(patients.offsets[single[0]]) if single else 0
    return Patients(
        patients.features[row : row + 1], patients.labels[row : row + 1], torch.arange(2, dtype=torch.int64)
    )


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
        yield "<h2>Gradient inversion</h2>" + _pictures(found.pictures)


def _pictures(found: Sequence[Picture]) -> str:
    """Table, and pictures side by side."""
    original = found[0].original
    rows = "".join(
        f"<tr><td>{escape(each.protection)}</td>"
        f"<td class=n>{'' if each.epsilon is None else format(each.epsilon, 'g')}</td>"
        f"<td class=n>{each.records}</td><td class=n>{each.correlation:.2f}</td>"
        f"<td class=n>{each.psnr:.1f} dB</td></tr>"
        for each in found
    )
    guessed = found[0].guessed
    if guessed is not None:
        rows += (
            "<tr><td>guessing: the mean of other sites' pictures</td><td></td><td></td>"
            f"<td class=n>{guessed:.2f}</td><td></td></tr>"
        )
    drawn = pictures(
        {"": np.stack([original, *(each.found for each in found)])},
        columns=["original", *(each.protection for each in found)],
        title="An original, and what was rebuilt of it",
        scale=max(1, round(_PICTURE_PIXELS / min(original.shape))),
    )
    return (
        "<p>One record of a site, looked for in the gradient of one step; the attacker knows the labels.</p>"
        "<table><thead><tr><th>Protection</th><th class=n>ε</th><th class=n>records in the update</th>"
        "<th class=n>correlation with the original</th><th class=n>peak signal to noise</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>{drawn}"
    )


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
