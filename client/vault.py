"""The vault: a hospital's data, policy, ledger and warm models, and the one way in.

Every request takes the same path: decode → policy → stored reply? → reserve (on disk) → data →
commit (on disk) → reply. Whatever goes wrong becomes a refusal that tells nothing about patients.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from client.cohort import Cohort
from client.ledger import Ledger, Reservation
from client.policy import Approval, Policy
from client.release import finite, noised_histograms, refusal
from client.training import Trainer, refuse_other_parameters
from common.errors import FedwardError, MessageError, Refused
from common.messages import Arrays, Job, JobHeader, Reply, ReplyHeader, decode, encode
from common.metrics import EXACT_BINS
from common.models import study_model
from common.privacy.noise import Randomness, Stream
from common.privacy.plan import StudyPlan, plan_study
from common.study import Study

log = logging.getLogger("fedward.vault")


@dataclass(frozen=True)
class Holdings:
    """What a vault stands on, each given as a function so that nothing is read before it may be.

    Attributes:
        policy: the policy as it stands on disk now.
        study: digest → the approved study.
        cohort: study → its data, grouped by patient.
        version: changes when the data behind `cohort` changes.
    """

    site: str
    public_size: int
    policy: Callable[[], Policy]
    study: Callable[[str], Study]
    cohort: Callable[[Study], Cohort]
    version: Callable[[], object] = lambda: None


class Vault:
    """Answers requests, one at a time.

    Args:
        randomness: where noise and sampling come from.
    """

    def __init__(self, holdings: Holdings, ledger: Ledger, randomness: Randomness) -> None:
        self._holdings, self._ledger, self.randomness = holdings, ledger, randomness
        self._trainers: dict[tuple[str, object], Trainer] = {}
        self._models: dict[str, dict[str, tuple[int, ...]]] = {}
        self._lock = threading.Lock()

    @property
    def site(self) -> str:
        return self._holdings.site

    def answer(self, request: bytes) -> bytes:
        """Answer one request; never raises."""
        with self._lock:
            try:
                return self._answer(request)
            except Refused as error:
                log.info("refused: %s", error.message)
                return encode(refusal(self.site, error))
            except FedwardError as error:
                log.error("%s: %s", error.code, error)
                return encode(refusal(self.site, error))
            except Exception as error:
                log.error("unforeseen %s", type(error).__name__)
                return encode(refusal(self.site, error))

    def _answer(self, request: bytes) -> bytes:
        job = decode(request)
        if not isinstance(job, Job):
            raise MessageError("a vault takes jobs only", remedy="the coordinator must send a job")
        header = job.header
        approval = self._holdings.policy().approval(header.study)
        study = self._holdings.study(header.study)
        self._check(job, study, approval)
        refuse_other_parameters(job.parameters, self._shapes(study))
        digest = hashlib.sha256(request).hexdigest()
        stored = self._ledger.stored_reply(header.session, header.round, digest)
        if stored is not None:
            return stored
        plan = plan_study(study, self._holdings.public_size)
        reservation = self._reservation(job, study, plan, digest)
        self._ledger.reserve(reservation, approval)
        reply = self._outcome(job, study, plan, reservation)
        self._ledger.commit(reservation, reply)
        return reply

    def _outcome(self, job: Job, study: Study, plan: StudyPlan, reservation: Reservation) -> bytes:
        """The reply, or a refusal that came of the work. Either is kept: a second run of a paid round
        would draw fresh noise, and its outcome would be a second release."""
        try:
            return encode(self._work(job, study, plan, reservation))
        except Refused as error:
            log.info("refused: %s", error.message)
            return encode(refusal(self.site, error))
        except BaseException:
            self._trainers.clear()  # it may hold gradients of the patients it was at
            raise

    def _check(self, job: Job, study: Study, approval: Approval) -> None:
        header = job.header
        if header.round > study.algorithm.rounds + 1:
            raise Refused(
                f"round {header.round} of a study with {study.algorithm.rounds} rounds",
                remedy="start a new session",
            )
        if header.metrics == "exact":
            approval.refuse_unprotected("an exact metric")
        if not study.private:
            approval.refuse_unprotected("a study without privacy")

    def _reservation(self, job: Job, study: Study, plan: StudyPlan, request: str) -> Reservation:
        header = job.header
        trains = header.round <= study.algorithm.rounds
        evaluates = study.evaluates_in(header.round) and header.metrics == "private"
        return Reservation(
            session=header.session,
            round=header.round,
            study=study.digest,
            request=request,
            training=plan.training_event() if plan.private and trains else None,
            evaluation=plan.evaluation_event() if plan.private and evaluates else None,
            session_epsilon=plan.epsilon if plan.private else None,
            session_delta=plan.delta if plan.private else None,
        )

    def _work(self, job: Job, study: Study, plan: StudyPlan, reservation: Reservation) -> Reply:
        header = job.header
        trainer = self._trainer(study, plan)
        update: Arrays = {}
        metrics: Arrays = {}
        exact = header.metrics == "exact" or not plan.private
        if study.evaluates_in(header.round):
            metrics = trainer.evaluate(job.parameters, EXACT_BINS if exact else study.evaluation.bins)
            if not exact:
                metrics = noised_histograms(metrics, plan.histogram, self._stream("evaluation", header))
        if header.round <= study.algorithm.rounds:
            sampling, noise = self._stream("sampling", header), self._stream("noise", header)
            update = finite(trainer.train(job.parameters, sampling, noise))
        return Reply(
            ReplyHeader(
                session=header.session,
                round=header.round,
                study=study.digest,
                site=self.site,
                weight=study.public_training_size(self._holdings.public_size),
                training=reservation.training,
                evaluation=reservation.evaluation,
                exact=exact and bool(metrics),
            ),
            update,
            metrics,
        )

    def _shapes(self, study: Study) -> dict[str, tuple[int, ...]]:
        if study.digest not in self._models:
            network = study_model(study)
            self._models = {study.digest: {n: tuple(p.shape) for n, p in network.named_parameters()}}
        return self._models[study.digest]

    def _stream(self, purpose: str, header: JobHeader) -> Stream:
        return self.randomness.stream(purpose, self.site, header.study, header.round)

    def _trainer(self, study: Study, plan: StudyPlan) -> Trainer:
        key = study.digest, self._holdings.version()
        trainer = self._trainers.get(key)
        if trainer is None:
            self._trainers.clear()  # one warm study at a time bounds memory
            trainer = self._trainers[key] = Trainer(study, self._holdings.cohort(study), plan)
        return trainer

    def close(self) -> None:
        """Let the ledger go."""
        self._ledger.close()
