"""A lower bound on ε from the released model alone: no update is seen, the model is asked and no more.

Made-up patients with random labels are the canaries; a fair coin says who trains. Nothing but memory tells
their labels, so the loss that a model has saved on them is the score. The guesses are judged as in
`lower_bound.one_run`, which supposes nothing of the mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from client.cohort import Cohort
from client.training import Trainer
from common.models import parameter_arrays, study_model
from common.privacy.noise import OperatingSystem, Randomness
from common.privacy.plan import StudyPlan
from common.study import Study
from simulations.audit.lower_bound import one_run
from simulations.audit.made_up import made_up
from simulations.audit.second import second_epsilon
from simulations.audit.shadows import chosen_of, confidences, released_model


@dataclass(frozen=True)
class FinalModel:
    """Attributes:
    claimed: ε of the whole training, by the second accountant.
    at_least: at 95 % confidence, by the final model alone.
    unprotected: likewise for the same training without clipping and noise: what the test would see.
    canaries: trials.
    """

    delta: float
    claimed: float
    at_least: float
    unprotected: float
    canaries: int

    @property
    def sound(self) -> bool:
        return self.at_least <= self.claimed


def final_model(
    study: Study,
    bare: Study,
    plan: StudyPlan,
    bare_plan: StudyPlan,
    canaries: int,
    randomness: Randomness | None = None,
) -> FinalModel:
    """Train the study on canaries, all its rounds, and ask the model who was there.

    Args:
        bare: the same study without privacy, and `bare_plan` its plan.

    Raises:
        FedwardError: if dp-accounting isn't installed.
    """
    drawn = randomness or OperatingSystem()
    pool = made_up(study, [1] * canaries, seed=1)
    present = np.random.default_rng(2).random(canaries) < 0.5
    train, nobody = chosen_of(pool, present), chosen_of(pool, np.zeros(canaries, dtype=np.bool_))
    torch.set_num_threads(1)  # as a vault does
    before, _ = confidences(study, parameter_arrays(study_model(study)), pool)
    bounds = []
    for asked, its_plan in ((study, plan), (bare, bare_plan)):
        trainer = Trainer(asked, Cohort(train, nobody), its_plan)
        after, _ = confidences(asked, released_model(trainer, drawn), pool)
        bounds.append(one_run(after - before, present, plan.delta))
    claimed = second_epsilon([plan.training_event(plan.rounds)], plan.delta)
    return FinalModel(plan.delta, claimed, bounds[0], bounds[1], canaries)
