"""What a vault stands on, and what of it stays warm between requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from client.cohort import Records, cohort_of
from client.device import DEFAULT, Computing
from client.policy import Policy
from client.training import Trainer
from client.withdrawal import NOBODY, Withdrawn
from common.encoding import Scaling
from common.errors import SiteError
from common.models import study_model
from common.privacy.plan import StudyPlan
from common.study import Study


@dataclass(frozen=True)
class Holdings:
    """What a vault stands on, each given as a function so that nothing is read before it may be.

    Attributes:
        policy: the policy as it stands on disk now.
        study: digest → the approved study.
        records: study → its records, checked.
        version: changes when the data behind `records` change.
        split: study, version → what decides who trains and who tests; it must not change within a session.
        withdrawn: whose consent is withdrawn by now.
    """

    site: str
    public_size: int
    policy: Callable[[], Policy]
    study: Callable[[str], Study]
    records: Callable[[Study], Records]
    version: Callable[[], object] = lambda: None
    split: Callable[[Study, object], str] = lambda study, version: ""
    withdrawn: Callable[[], Withdrawn] = lambda: NOBODY


class Warm:
    """Records, trainer and model of one study at a time, which bounds memory.

    Attributes:
        touched: whether anything came near a row since this was last set to False.
    """

    def __init__(self, holdings: Holdings, computing: Computing = DEFAULT) -> None:
        self.holdings, self._computing = holdings, computing
        self._records: dict[tuple[str, object], Records] = {}
        self._trainers: dict[tuple[str, object, bytes], Trainer] = {}
        self._models: dict[str, dict[str, tuple[int, ...]]] = {}
        self.touched = False

    def shapes(self, study: Study) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the study's parameters."""
        if study.digest not in self._models:
            network = study_model(study)
            self._models = {study.digest: {n: tuple(p.shape) for n, p in network.named_parameters()}}
        return self._models[study.digest]

    def records(self, study: Study, version: object) -> Records:
        """The study's records, read anew when the data have changed.

        Args:
            version: of the data, as this request found them.

        Raises:
            SiteError, DataError: if they can't be read, or don't fit.
        """
        key = study.digest, version
        records = self._records.get(key)
        if records is None:
            self._records.clear()
            try:
                records = self._records[key] = self.holdings.records(study)
            except SiteError:  # the site's files are wrong, which shows before any row is read
                raise
            except BaseException:
                self.touched = True
                raise
        self.touched = True
        return records

    def trainer(self, study: Study, plan: StudyPlan, scaling: Scaling | None, version: object) -> Trainer:
        """The study's trainer; a new one if plan, scaling or data are others.

        Args:
            version: as for `records`.

        Raises:
            SiteError, DataError: as `records`.
        """
        scaled = scaling.mean.tobytes() + scaling.deviation.tobytes() if scaling else b""
        key = study.digest, version, scaled
        trainer = self._trainers.get(key)
        self.touched |= trainer is not None
        if trainer is None or trainer.plan != plan:
            self._trainers.clear()
            cohort = cohort_of(self.records(study, version), study, scaling)
            if study.statistics is None:
                self._records.clear()  # the tensors suffice from here on
            trainer = self._trainers[key] = Trainer(
                study, cohort, plan, self.holdings.withdrawn, self._computing
            )
        return trainer

    def forget(self) -> None:
        """Let the trainer go: after a failure it may hold gradients of the patients it was at."""
        self._trainers.clear()

    def clear(self) -> None:
        """Let trainer and records go."""
        self.forget()
        self._records.clear()
