"""The sites of a simulation as one who may see them all: their patients, apart and merged in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from client.cohort import Cohort, Patients, Records, cohort_of, load_records
from client.device import Computing
from client.statistics import patient_sums
from client.training import plain_batch
from common.encoding import Scaling
from common.histograms import merged
from common.privacy.noise import Seeded
from common.privacy.plan import StudyPlan, plan_study
from common.statistics import moments
from common.study import Study
from simulations.engine.sites import SitePlace, find_sites

POOLED = "pooled"  # the name of all sites' patients in one place


@dataclass(frozen=True)
class Federation:
    """The sites of a folder, read once, with the split into training and test that a seed makes of them.

    Attributes:
        study: says what is read and how it is scaled, trained and planned.
    """

    study: Study
    places: tuple[SitePlace, ...]
    seed: int

    @cached_property
    def records(self) -> dict[str, Records]:
        """Site → its records, in the order of the sites' names.

        Raises:
            SiteError, DataError: as a site itself would.
        """
        randomness = Seeded(self.seed)
        folders = [place.folder() for place in self.places]
        return {f.name: load_records(f, self.study, randomness.key("split", f.name)) for f in folders}

    def cohorts(self, scaling: Scaling | None = None) -> dict[str, Cohort]:
        """Site → its patients, scaled by the public ranges unless `scaling` says otherwise."""
        return self._usual if scaling is None else self._scaled(scaling)

    @cached_property
    def _usual(self) -> dict[str, Cohort]:
        return self._scaled(None)

    def _scaled(self, scaling: Scaling | None) -> dict[str, Cohort]:
        return {name: cohort_of(records, self.study, scaling) for name, records in self.records.items()}

    def only(self, site: str) -> Federation:
        """This one site, unread."""
        return replace(self, places=tuple(p for p in self.places if p.folder().name == site))

    def exact_scaling(self, sites: Sequence[str]) -> Scaling | None:
        """What these sites' patients together are scaled by if the study scales by moments: no noise here."""
        if self.study.data.scaling != "moments":
            return None
        chosen = [self.records[name] for name in sites]
        sums = merged([patient_sums(self.study, each.coded, each.patients) for each in chosen])
        return moments(self.study, sums, [0.0])

    @property
    def sizes(self) -> dict[str, int]:
        """Site → its declared size."""
        return {p.folder().name: p.folder().file.site.public_size for p in self.places}

    @property
    def computing(self) -> dict[str, Computing]:
        """Site → where it computes."""
        files = [place.folder().file for place in self.places]
        return {f.site.name: Computing(f.device, f.step_memory_mib << 20) for f in files}

    def plan(self, site: str) -> StudyPlan:
        """A site's plan, as its vault makes it."""
        return plan_study(self.study, self.sizes[site])

    def pooled_plan(self, cohorts: Mapping[str, Cohort]) -> StudyPlan:
        """The plan of all patients in one place, by which each is seen as often as at its own site.

        A step takes as many patients as the study says for a site of all sites' size together; there are as
        many steps in a round as make up the patients that all sites' steps of a round take.
        """
        whole = plan_study(self.study, sum(self.sizes.values()))
        plans = {name: self.plan(name) for name in cohorts}
        seen = sum(p.steps_per_round * plain_batch(len(cohorts[n].train), p) for n, p in plans.items())
        batch = plain_batch(sum(len(cohort.train) for cohort in cohorts.values()), whole)
        return replace(whole, steps_per_round=max(1, round(seen / batch)))


def federation_of(study: Study, sites: Path, seed: int) -> Federation:
    """The sites of a folder of site folders.

    Raises:
        SiteError: as `find_sites`.
    """
    return Federation(study, find_sites(sites, sites), seed)


def together(parts: Sequence[Patients]) -> Patients:
    """All the patients of several groups as one group, in their order."""
    ends = torch.tensor([0] + [len(part.labels) for part in parts]).cumsum(0)
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, ends, strict=False)]
    hashes = [part.hashes for part in parts]
    groups = [part.groups for part in parts]
    return Patients(
        features=torch.cat([part.features for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        offsets=torch.cat([*offsets, ends[-1:]]),
        hashes=None if None in hashes else tuple(h for each in hashes for h in each or ()),
        groups=None if any(g is None for g in groups) else torch.cat([g for g in groups if g is not None]),
    )


def pooled(cohorts: Mapping[str, Cohort]) -> Cohort:
    """All sites' patients in one place; who trains and who tests stays as it was."""
    train = together([cohort.train for cohort in cohorts.values()])
    return Cohort(train, together([cohort.test for cohort in cohorts.values()]))
