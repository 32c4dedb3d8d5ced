"""The models of a table's rows: the federation's own, and those that it is measured against."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.cohort import Cohort
from client.device import DEFAULT, Computing
from client.training import Trainer
from common.encoding import Scaling
from common.errors import StudyFailed
from common.messages import STATISTICS_ROUND, Arrays
from common.models.initial import initial_parameters, read_initial
from common.privacy.noise import Seeded
from common.privacy.plan import StudyPlan
from common.statistics import moments
from common.study import Study
from server.algorithms import Update, algorithm_of
from server.coordinator import PARAMETERS, noised_sums, part
from server.report import report
from simulations.engine import Simulation, SimulationSettings, simulate
from simulations.engine.sites import find_sites


@dataclass(frozen=True)
class Trained:
    """Attributes:
    scaling: of the records that the model is for; None: by the public ranges.
    epsilon: the largest that a site spent per patient; None without privacy.
    """

    parameters: Arrays
    scaling: Scaling | None = None
    epsilon: float | None = None


def alone(
    study: Study,
    cohort: Cohort,
    plan: StudyPlan,
    name: str,
    seed: int,
    computing: Computing = DEFAULT,
    initial: Path | None = None,
) -> Arrays:
    """The model of one site by itself, as a federation of one: its rounds, and in each a new optimiser.

    So what sets the rows of a table apart is where the patients are, not how an optimiser goes on.

    Args:
        name: of the site; batches follow from it, the study and the seed, as they do in a simulation.
        initial: the file of weights that the study names, if it names one.

    Raises:
        StudyFailed: if the numbers grow beyond all bounds.
        StudyError: if the weights are absent or others.
    """
    randomness, algorithm = Seeded(seed), algorithm_of(study.algorithm)
    trainer = Trainer(study, cohort, plan, computing=computing)
    parameters: Arrays = initial_parameters(study, seed, read_initial(study, initial))
    state = algorithm.init(parameters)
    for number in range(1, study.algorithm.rounds + 1):
        streams = [randomness.stream(each, name, study.digest, number) for each in ("sampling", "noise")]
        update = trainer.train(parameters, *streams)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            state, parameters = algorithm.apply(state, parameters, [Update(name, 1, update)])
        if not all(np.isfinite(a).all() for a in parameters.values()):
            raise StudyFailed(
                f"{name}, round {number}: the model grows to infinity", remedy="lower the learning rate"
            )
    return parameters


def federated(
    study: Study, sites: Path, work: Path, settings: SimulationSettings, without: str | None = None
) -> Trained:
    """The model of a simulated session, with the vaults, ledgers and coordinator of `fedward-sim run`.

    Args:
        work: folder for what the session leaves; the caller removes it.
        settings: with exact metrics, because data that one may see twice is public.
        without: a site that takes no part.

    Raises:
        StudyFailed, SiteError, StudyError: as `simulate`.
    """
    with tempfile.TemporaryDirectory(dir=work, prefix="sites-") as some:
        chosen = sites if without is None else _links(sites, Path(some), without)
        done = simulate(study, chosen, work / "run", settings)
    session = done.store.session(done.session)
    spent = [site.epsilon for site in report(done.store, session).sites if site.epsilon is not None]
    final = part(done.store.checkpoint(done.session, study.algorithm.rounds + 1), PARAMETERS)
    return Trained(final, _scaling(study, done), max(spent, default=None))


def _links(sites: Path, folder: Path, without: str) -> Path:
    """A folder of links to all sites but one."""
    for place in find_sites(sites, sites):
        if place.folder().name != without:
            (folder / place.root.name).symlink_to(place.root.resolve(), target_is_directory=True)
    return folder


def _scaling(study: Study, done: Simulation) -> Scaling | None:
    """What a session's sites scaled by."""
    if study.data.scaling != "moments":
        return None
    asked = next(r for r in done.store.rounds(done.session) if r.number == STATISTICS_ROUND)
    checkpoint = done.store.checkpoint(done.session, STATISTICS_ROUND)
    return moments(study, *noised_sums(study, asked, checkpoint))
