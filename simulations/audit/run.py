"""An audit of one study: the site's own software trains on canaries as the study would, and is watched.

The canaries' study takes from the audited one what its privacy rests on: model family, loss, sampling rate,
clipping norm, noise multiplier, δ and number of steps. Its data are made up, so no patient is near.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from client.account import Spending, spending
from client.augment import augmenter_of
from client.door import Answer, ask
from client.settings import SiteFolder
from client.site import open_vault
from common.errors import DeploymentError, StudyError
from common.features import feature_names
from common.privacy.noise import OperatingSystem, Randomness
from common.privacy.plan import StudyPlan, plan_study
from common.processes import beside_python
from common.study import Study
from simulations.audit.attacks import MODELS, Attacks, attack, without_privacy
from simulations.audit.attempts import Case, Target
from simulations.audit.canaries import (
    CAP,
    FAMILIES,
    HUGE,
    WIDE,
    WIDE_PATIENTS,
    Canaries,
    Family,
    admit,
    canaries,
    canary_study,
    column_gauge,
    make_site,
)
from simulations.audit.conformance import Conformance, conformance
from simulations.audit.differences import Difference, differences
from simulations.audit.final_model import FinalModel, final_model
from simulations.audit.labelled import label_gauge, labelled_study, make_labelled_site
from simulations.audit.lower_bound import LowerBound, lower_bound
from simulations.audit.observe import Gauge, Observed, observe
from simulations.audit.reconstruction import undeclared_models
from simulations.audit.server_side import against

SITES = ("north", "south")
ATTACKED = "east"
STOOD_FOR = ("logistic-hazard",)  # its last layer is frozen, so no class of a canary can be learnt in it
STAND_IN: Family = "logistic-regression"  # for what a vault answers whatever the model is
QUIET = "-quiet"  # sites with so little noise that contributions show by themselves
MOST_EPSILON = 100.0  # the noise comes from the audited plan, by the policy's floor
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Size:
    """How much is asked.

    Attributes:
        columns: half of them get a canary.
        rounds: at most; a study with more steps is audited over its first ones.
        asked: canaries about which the final model is asked.
        shadows: models of the attack on members.
    """

    columns: int
    rounds: int
    asked: int = 200
    shadows: int = MODELS


SHORT, FULL = Size(300, 40), Size(2000, 200, 1000)


@dataclass(frozen=True)
class Audit:
    """What was claimed, and what was found.

    Attributes:
        plan: of the audited study at the given public size.
        steps: that were watched, of `plan`'s.
        deployed: through the sockets of served vaults, with the operating system's randomness.
        differences: what one patient changes in a sum without noise.
        bounds: from what is seen of each round; `final_model` from the released model alone.
        cases: what a malicious coordinator tried.
        attacks: on real cohorts; None if none was given.
        seconds: it took.
        untested: what this audit says nothing about.
    """

    study: Study
    plan: StudyPlan
    steps: int
    deployed: bool
    conformance: Conformance
    differences: tuple[Difference, ...]
    bounds: tuple[LowerBound, ...]
    final_model: FinalModel
    cases: tuple[Case, ...]
    attacks: Attacks | None
    seconds: float
    untested: tuple[str, ...]

    @property
    def sound(self) -> bool:
        attacked = self.attacks is None or self.attacks.sound
        refuted = any(b.refuted for b in self.bounds) or not self.final_model.sound
        exact = all(d.sound for d in self.differences) and all(c.sound for c in self.cases)
        return self.conformance.sound and attacked and exact and not refuted


def audit(
    study: Study,
    public_size: int,
    *,
    size: Size = SHORT,
    deployed: bool = False,
    cohorts: Sequence[SiteFolder] = (),
    randomness: Randomness | None = None,
    seed: int = 0,
) -> Audit:
    """Audit a study's training at sites of canaries, and the vault's answers to a malicious coordinator.

    Args:
        public_size: patients that a site would declare; the plan follows from it.
        deployed: start `fedward-site serve` for each site, and ask through its socket.
        cohorts: site folders whose records the auditor may read, for attacks on members and records.
        randomness: of the vaults in this process; the operating system's by default.
        seed: who is in the cohort.

    Raises:
        StudyError: if the study promises no privacy, or its model has no canaries (it doesn't end in a
            linear layer).
        DeploymentError: if a vault doesn't start.
    """
    began = time.monotonic()
    asking = _asking(study, public_size, size, deployed, randomness)
    plan, steps = asking.plan, asking.steps
    few = _Columns(study, plan, canaries(size.columns, seed), steps)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as folder, ExitStack() as open_ones:
        seen = asking.watched(open_ones, Path(folder), seed)
        cases = asking.coordinated(open_ones, Path(folder) / ATTACKED, few.asked)
    attacks = attack(study, cohorts, size.shadows) if cohorts else None
    bare = without_privacy(study)
    return Audit(
        study=study,
        plan=plan,
        steps=steps,
        deployed=deployed,
        conformance=conformance(seen),
        differences=differences(study, plan),
        final_model=final_model(study, bare, plan, plan_study(bare, public_size), size.asked, randomness),
        bounds=tuple(lower_bound(each) for each in seen if not each.site.endswith(QUIET)),
        cases=cases,
        attacks=attacks,
        seconds=time.monotonic() - began,
        untested=tuple(_untested(study, plan, steps, attacks)),
    )


def sent(
    study: Study,
    public_size: int,
    *,
    size: Size = SHORT,
    randomness: Randomness | None = None,
    seed: int = 0,
) -> Conformance:
    """The tests of what sites send, and no more of an audit; see `audit`."""
    asking = _asking(study, public_size, size, False, randomness)
    with tempfile.TemporaryDirectory(prefix="fedward-audit-") as folder, ExitStack() as open_ones:
        return conformance(asking.watched(open_ones, Path(folder), seed))


class _Columns:
    """Canaries in a column of the first layer each (simulations/audit/canaries).

    Attributes:
        asked: the study that trains on them.
    """

    def __init__(self, study: Study, plan: StudyPlan, who: Canaries, steps: int) -> None:
        family: Family = next((f for f in get_args(Family) if f == study.model.name), STAND_IN)
        self.asked = canary_study(
            family,
            who.columns,
            epsilon=MOST_EPSILON,
            delta=plan.delta,
            rounds=steps,
            sample_rate=plan.step.sample_rate,
            clipping_norm=plan.step.clipping_norm or 1.0,
            most_records=min(plan.step.max_records, CAP),
        )

    def site(self, root: Path, who: Canaries) -> tuple[SiteFolder, Gauge]:
        """Make a site of these canaries."""
        return make_site(root, root.name, who), column_gauge(self.asked)


class _Labels:
    """Canaries with a label each (simulations/audit/labelled), for all other models; see `_Columns`."""

    def __init__(self, study: Study, plan: StudyPlan, who: Canaries, steps: int) -> None:
        self.asked = labelled_study(
            study,
            who,
            epsilon=MOST_EPSILON,
            rounds=steps,
            sample_rate=plan.step.sample_rate,
            most_records=min(plan.step.max_records, CAP),
        )

    def site(self, root: Path, who: Canaries) -> tuple[SiteFolder, Gauge]:
        """Make a site of these canaries."""
        folder = make_labelled_site(root, root.name, self.asked, who)
        return folder, label_gauge(self.asked, folder, who)


@dataclass(frozen=True)
class _Asking:
    """What is asked of sites of canaries, and how; see `audit`."""

    study: Study
    plan: StudyPlan
    size: Size
    deployed: bool
    randomness: Randomness | None

    @property
    def steps(self) -> int:
        return min(self.plan.steps_per_round * self.plan.rounds, self.size.rounds)

    def watched(self, open_ones: ExitStack, folder: Path, seed: int) -> list[Observed]:
        """What sites with the claimed noise send, and sites with next to none."""
        by_columns = self.study.model.name in (*FAMILIES, *STOOD_FOR) and not self.study.data.wide
        kind = _Columns if by_columns else _Labels
        made = kind(self.study, self.plan, canaries(self.size.columns, seed), self.steps)
        found = []
        places = [(name, quiet) for quiet in (False, True) for name in SITES]
        for number, (name, quiet) in enumerate(places, len(places) * seed):
            who = canaries(self.size.columns, number, many=40)
            site, gauge = made.site(folder / (name + QUIET * quiet), who)
            promised = admit(site, made.asked, 0.0 if quiet else self.plan.step.noise_multiplier)
            answer = self.opened(open_ones, site)
            found.append(observe(answer, made.asked, promised, who, gauge, "audit"))
        return found

    def coordinated(self, open_ones: ExitStack, root: Path, asked: Study) -> tuple[Case, ...]:
        """What a malicious coordinator gets out of a site of its own, with few canaries."""
        who = canaries(_columns_of(asked), 0, many=40)
        site = make_site(root, root.name, who)
        promised = admit(site, asked, self.plan.step.noise_multiplier)
        answer = self.opened(open_ones, site)
        nothing = Spending(0, 0.0, 0.0, 0)
        target = Target(
            answer, asked, promised, "attack", lambda: spending(site.ledger_path).get(asked.digest, nothing)
        )
        return (*undeclared_models(target), *against(target, who))

    def opened(self, open_ones: ExitStack, site: SiteFolder) -> Answer:
        if self.deployed:
            return open_ones.enter_context(serving(site))
        vault = open_vault(site, randomness=self.randomness or OperatingSystem(), durable=False)
        open_ones.callback(vault.close)
        return vault.answer


def _asking(
    study: Study, public_size: int, size: Size, deployed: bool, randomness: Randomness | None
) -> _Asking:
    if not study.private:
        raise StudyError(f"study {study.name} promises no privacy", remedy="nothing to audit")
    plan = plan_study(study, public_size)
    if (plan.step.clipping_norm or 0.0) > HUGE / 1000:
        raise StudyError(
            f"privacy.clipping_norm {plan.step.clipping_norm:g} is above any canary's gradient",
            remedy=f"clip to {HUGE / 1000:g} at most",
        )
    return _Asking(study, plan, size, deployed, randomness)


def _columns_of(asked: Study) -> int:
    """Of the canaries, the wide ones apart."""
    return len(feature_names(asked)) - WIDE * WIDE_PATIENTS


@contextmanager
def serving(site: SiteFolder) -> Iterator[Answer]:
    """A vault as a hospital runs it, in a process of its own; requests go through its socket.

    Raises:
        DeploymentError: if it doesn't start.
    """
    with tempfile.TemporaryDirectory(prefix="fedward-") as folder:
        socket = Path(folder) / "vault.sock"
        log = (site.root / "vault.log").open("wb")
        command = [beside_python("fedward-site"), "serve", str(site.root), "--socket", str(socket)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + _START_SECONDS
            while not socket.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise DeploymentError(
                        f"the vault in {site.root} doesn't start", remedy="see vault.log there"
                    )
                time.sleep(0.05)
            yield lambda request: ask(str(socket), request, timeout=600.0)
        finally:
            process.terminate()
            process.wait(timeout=60)
            log.close()


def _untested(study: Study, plan: StudyPlan, steps: int, attacks: Attacks | None) -> Iterator[str]:
    total = plan.steps_per_round * plan.rounds
    yield "that a hospital runs this software, and nothing beside it"
    if steps < total:
        yield f"steps {steps + 1} to {total}: they are the same code with fresh noise"
    if plan.steps_per_round > 1:
        yield "several local steps between two messages: one step a round shows more"
    if study.model.name not in FAMILIES:
        yield f"a malicious coordinator of {study.model.name}: it was a {STAND_IN}'s"
    if study.model.name in STOOD_FOR:
        yield f"{study.model.name} itself: canaries trained a {STAND_IN}, whose weights are like its score's"
    if study.objective.task != "binary" or study.model.name not in FAMILIES:
        yield "this study's loss: canaries have the cross-entropy of their classes"
    if augmenter_of(study) is not None:
        yield "augmentation of images: canaries are not varied"
    if study.training.optimizer.name != "sgd" or study.training.optimizer.momentum:
        yield "the optimiser: it sees noised gradients only, so that it may do anything"
    if study.statistics is not None:
        yield "the statistics' noise"
    if attacks is None:
        yield "membership and reconstruction: they take cohorts that the auditor may read (--sites)"
    else:
        yield from attacks.skipped
