"""The vault: a hospital's data, policy, ledger and warm models, and the one way in.

Every request takes the same path: decode → is the ledger the latest? → policy → stored reply? → reserve
(on disk) → data → commit (on disk) → reply. Whatever goes wrong becomes a refusal that tells nothing about
patients.

A request is a generator that stops where a model is to be trained or evaluated: so a simulation can do that
for many sites together. A deployed vault goes the same way by itself.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass

from client.account import Committed, Head
from client.certify import Issuer
from client.device import DEFAULT, Computing
from client.holdings import Holdings, Warm
from client.ledger import Ledger
from client.policy import Approval, Policy
from client.release import finite, noised_histograms, refusal
from client.reservation import Reservation
from client.statistics import patient_sums
from client.tasks import Evaluation, Task, Training, Working, finished
from client.training import Trainer, refuse_other_parameters
from common.encoding import Scaling, refuse_other_scaling
from common.errors import FedwardError, MessageError, PolicyForbids, Refused, RolledBack
from common.histograms import EXACT_BINS, Packed
from common.messages import (
    STATISTICS_ROUND,
    Arrays,
    Job,
    JobHeader,
    Reply,
    ReplyHeader,
    Sealed,
    asked,
    decode,
    released,
    sealed,
)
from common.privacy.certificate import LedgerClaims
from common.privacy.noise import Randomness, Stream
from common.privacy.plan import StudyPlan, plan_study
from common.statistics import describe
from common.study import Study

log = logging.getLogger("fedward.vault")


@dataclass(frozen=True)
class _Work:
    """One request that may be answered, with all that answering it needs.

    Attributes:
        version: of the data, as it was when the split was reserved.
        resumed: it was reserved by an attempt that failed, perhaps after rows were read.
    """

    job: Job
    study: Study
    plan: StudyPlan
    reservation: Reservation
    version: object
    head: Head
    tells_metrics: bool
    resumed: bool


class Vault:
    """Answers requests, one at a time.

    Args:
        randomness: where noise and sampling come from.
        issuer: signs certificates.
        padded: make every answer of a study take a multiple of the time that it declares.
        computing: where to train and evaluate, and in how much memory.
    """

    def __init__(
        self,
        holdings: Holdings,
        ledger: Ledger,
        randomness: Randomness,
        issuer: Issuer,
        *,
        padded: bool = True,
        computing: Computing = DEFAULT,
    ) -> None:
        self._warm = Warm(holdings, computing)
        self._ledger, self.randomness = ledger, randomness
        self._issuer, self._padded = issuer, padded
        self._policy: tuple[Policy, str] | None = None
        self._now = 0.0  # the latest time that was seen
        self._lock = threading.Lock()

    @property
    def site(self) -> str:
        return self._warm.holdings.site

    def answer(self, request: bytes) -> bytes:
        """Answer one request; never raises. Takes a multiple of the study's `reply_seconds`."""
        return finished(self.working(request))

    def working(self, request: bytes) -> Working:
        """As `answer`, but whoever drives it trains and evaluates, alone or together with other sites.

        The vault takes no other request until this one has ended. An error that is thrown in becomes a
        refusal, as if the task had raised it here.
        """
        with self._lock:  # until the answer leaves: who asks meanwhile must not learn when the work ended
            began = time.monotonic()
            step, reply = yield from self._guarded(request)
            if step > 0 and self._padded:
                late = time.monotonic() - began
                time.sleep(math.ceil(late / step) * step - late)
        return reply

    def _guarded(self, request: bytes) -> Generator[Task, Arrays, tuple[float, bytes]]:
        """Seconds of which the answer shall take a multiple, and the answer."""
        step = 0.0
        try:
            job = decode(request)
            if not isinstance(job, Job):
                raise MessageError("a vault takes jobs only", remedy="the coordinator must send a job")
            self._refuse_rolled_back(job.header)
            policy = self._warm.holdings.policy()
            self._ledger.note(policy)
            now = time.time()  # a clock that is put back revives nothing
            self._now = max(self._now, now, self._ledger.account.last_time)
            approval = policy.approval(job.header.study, now, self._now)
            study = self._warm.holdings.study(job.header.study)
            step = study.privacy.reply_seconds
            return step, (yield from self._answer(job, study, policy, approval))
        except Refused as error:
            log.info("refused: %s", error.message)
            return step, sealed(refusal(self.site, error))
        except FedwardError as error:
            log.error("%s: %s", error.code, error)
            return step, sealed(refusal(self.site, error))
        except Exception as error:
            log.error("unforeseen %s", type(error).__name__)
            return step, sealed(refusal(self.site, error))

    def _answer(self, job: Job, study: Study, policy: Policy, approval: Approval) -> Working:
        header, size = job.header, self._warm.holdings.public_size
        self._check(header, study, approval)
        self._check_arrays(job, study)
        plan = plan_study(study, size, policy.limits(approval))
        policy.refuse_below_floors(study, plan, size)
        request = asked(job)
        stored = self._ledger.stored_reply(header.session, header.round, request)
        if stored is not None:
            return stored
        work = self._reserved(job, study, plan, policy, approval, request)
        reply, numbers, certificate = yield from self._outcome(work)
        self._ledger.commit(work.reservation, reply, numbers, self._warm.holdings.withdrawn().digest)
        if certificate is not None:
            self._issuer.keep(header.session, certificate)
        return reply

    def _refuse_rolled_back(self, header: JobHeader) -> None:
        anchor = header.anchors.get(self.site)
        if anchor is not None and not self._ledger.knows(anchor):
            raise RolledBack(
                "this site's ledger lacks an entry that the coordinator has seen",
                remedy="the site's operator must restore the latest ledger before it can take part",
            )

    def _check(self, header: JobHeader, study: Study, approval: Approval) -> None:
        if header.round > study.algorithm.rounds + 1:
            raise Refused(
                f"round {header.round} of a study with {study.algorithm.rounds} rounds",
                remedy="start a new session",
            )
        if header.round == STATISTICS_ROUND and study.statistics is None:
            raise Refused("statistics that the study doesn't ask for", remedy="add [statistics] to the study")
        if header.metrics == "exact":
            approval.refuse_unprotected("an exact metric")
        if not study.private:
            approval.refuse_unprotected("a study without privacy")

    def _check_arrays(self, job: Job, study: Study) -> None:
        """What the coordinator sent must fit the study, before anything is spent."""
        if study.digest in job.fitting:
            return
        statistics = job.header.round == STATISTICS_ROUND
        refuse_other_parameters(job.parameters, {} if statistics else self._warm.shapes(study))
        _scaling(job, study)
        job.fitting.add(study.digest)

    def _reserved(
        self, job: Job, study: Study, plan: StudyPlan, policy: Policy, approval: Approval, request: str
    ) -> _Work:
        header = job.header
        statistics = header.round == STATISTICS_ROUND
        trains = not statistics and header.round <= study.algorithm.rounds
        evaluates = not statistics and study.evaluates_in(header.round) and "evaluation" in policy.releases
        if statistics:
            policy.refuse_release("statistics")
        if trains:
            policy.refuse_release("training")
        exact = header.metrics == "exact" or not plan.private
        epsilon, delta = (plan.epsilon, plan.delta) if plan.private else (None, None)
        if statistics:
            epsilon, delta = plan.statistics_epsilon, plan.statistics_delta
        version = self._warm.holdings.version()
        reservation = Reservation(
            session=header.session,
            round=header.round,
            study=study.digest,
            request=request,
            public_size=self._warm.holdings.public_size,
            plan=plan,
            split=self._warm.holdings.split(study, version),
            training=plan.training_event() if plan.private and trains else None,
            evaluation=plan.evaluation_event(header.round) if evaluates and not exact else None,
            statistics=plan.statistics_event() if statistics else None,
            epsilon=epsilon,
            delta=delta,
            exact=exact and evaluates,
            protective=self.randomness.protective,
            policy=self._digest_of(policy),
            withdrawn=self._warm.holdings.withdrawn().digest,
        )
        resumed = self._ledger.has_reserved(reservation)
        head = self._ledger.reserve(reservation, approval, policy)
        return _Work(job, study, plan, reservation, version, head, evaluates, resumed)

    def _outcome(self, work: _Work) -> Generator[Task, Arrays, tuple[Sealed, str, str | None]]:
        """The reply, the digest of what it tells, and its certificate; or a refusal that came of the work.

        Either is kept: a second run of a paid round would draw fresh noise, and its outcome would be a
        second release. A refusal that came of noised numbers tells something of them, and counts as
        released. What failed before any row was read is given back.
        """
        self._warm.touched = work.resumed
        try:
            reply = yield from self._work(work)
            return sealed(reply), reply.released, reply.header.certificate
        except Refused as error:
            log.info("refused: %s", error.message)
            answer = sealed(refusal(self.site, error))
            return answer, hashlib.sha256(answer).hexdigest() if self._warm.touched else "", None
        except BaseException:
            self._warm.forget()
            if not self._warm.touched:
                self._ledger.abandon(work.reservation)
            raise

    def _work(self, work: _Work) -> Generator[Task, Arrays, Reply]:
        update: Arrays = {}
        metrics: Arrays = {}
        told = work.reservation
        if told.round == STATISTICS_ROUND:
            metrics = self._statistics(work)
        else:
            scaling = _scaling(work.job, work.study)
            trainer = self._warm.trainer(work.study, work.plan, scaling, work.version)
            if work.tells_metrics:
                metrics = yield from self._metrics(work, trainer)
            if told.round <= work.plan.rounds:
                update = finite((yield self._training(work, trainer)))
        return Reply(
            ReplyHeader(
                session=told.session,
                round=told.round,
                study=told.study,
                site=self.site,
                weight=work.study.public_training_size(told.public_size),
                training=told.training,
                evaluation=told.evaluation,
                statistics=told.statistics,
                exact=told.exact,
                head=work.head.hash,
                sequence=work.head.sequence,
                certificate=self._certificate(work, update, metrics),
            ),
            update,
            metrics,
        )

    def _training(self, work: _Work, trainer: Trainer) -> Training:
        told = work.reservation

        def streams() -> tuple[Stream, Stream]:
            sampling = self._stream("sampling", told)  # where there is no privacy, no noise is drawn
            return sampling, self._stream("noise", told) if work.plan.private else sampling

        return Training(trainer, work.job.parameters, streams)

    def _metrics(self, work: _Work, trainer: Trainer) -> Generator[Task, Arrays, Arrays]:
        told, parameters = work.reservation, work.job.parameters
        if told.exact:
            return (yield Evaluation(trainer, parameters, Packed(EXACT_BINS)))
        metrics = yield Evaluation(trainer, parameters, work.study.evaluation.bins)
        return noised_histograms(
            metrics, work.plan.histogram_of(told.round), self._stream("evaluation", told)
        )

    def _statistics(self, work: _Work) -> Arrays:
        """Noised sums over all patients, unless they seem to be of too few.

        Raises:
            PolicyForbids: if the noised number of patients is below the policy's minimum.
        """
        if work.plan.statistics is None:
            raise Refused("statistics that the study doesn't ask for", remedy="add [statistics] to the study")
        records = self._warm.records(work.study, work.version).without(
            self._warm.holdings.withdrawn().patients
        )
        sums = patient_sums(work.study, records.coded, records.patients)
        noised = noised_histograms(sums, work.plan.statistics, self._stream("statistics", work.reservation))
        least = self._warm.holdings.policy().floors.minimum_patients
        deviation = work.plan.statistics.noise_multiplier * work.plan.statistics.sensitivity
        if describe(work.study, noised, [deviation], least).patients is None:
            raise PolicyForbids(
                f"statistics of what may be fewer than {least} patients, by their noised count",
                remedy="ask the site's privacy officer",
            )
        return noised

    def _certificate(self, work: _Work, update: Arrays, metrics: Arrays) -> str | None:
        """With the session's end: what left in it, this reply included."""
        told = work.reservation
        if told.round != work.plan.rounds + 1:
            return None
        before = [c for c in self._ledger.account.answered(told.session) if c.reservation.key != told.key]
        numbers = released(update, metrics)
        now = Committed(told, "", numbers, self._warm.holdings.withdrawn().digest, work.head.hash)
        ledger = LedgerClaims(sequence=self._ledger.sequence, head=self._ledger.head)
        return self._issuer.issue(work.study, [*before, now], ledger)

    def _digest_of(self, policy: Policy) -> str:
        if self._policy is None or self._policy[0] is not policy:
            self._policy = policy, policy.digest
        return self._policy[1]

    def _stream(self, purpose: str, told: Reservation) -> Stream:
        return self.randomness.stream(purpose, self.site, told.study, told.round)

    def close(self) -> None:
        """Let the ledger go."""
        self._ledger.close()


def _scaling(job: Job, study: Study) -> Scaling | None:
    """What the coordinator made of all sites' statistics, if the study scales by moments.

    Raises:
        Refused: if it is absent, not asked for, or of another form.
    """
    wanted = study.data.scaling == "moments" and job.header.round != STATISTICS_ROUND
    if set(job.scaling) != ({"mean", "deviation"} if wanted else set()):
        raise Refused("a scaling that the study doesn't ask for, or none", remedy="update the coordinator")
    if not wanted:
        return None
    scaling = Scaling(job.scaling["mean"], job.scaling["deviation"])
    refuse_other_scaling(scaling, study)
    return scaling
