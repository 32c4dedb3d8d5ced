"""Runs a session's rounds over a small port; knows no transport and no torch.

A round: one message to every site → answers until the deadline → screening → the algorithm → the
checkpoint → the next round. Without a quorum the same round is asked again: sites that answered return
the reply that they stored, and spend nothing. A coordinator that died resumes after its last checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.cells import dense
from common.errors import MessageError, StudyFailed
from common.histograms import merged
from common.messages import STATISTICS_ROUND, Arrays, Job, JobHeader, Refusal, Reply, sealed
from common.privacy.mechanism import EVENT
from common.statistics import moments, sensitivity
from common.study import Study
from server.algorithms import FederatedAlgorithm, Update, algorithm_of
from server.screening import screened
from server.store import FAILED, FINISHED, RUNNING, Round, Session, SiteAnswer, Store

log = logging.getLogger("fedward.coordinator")

PARAMETERS, STATE, METRICS = "parameters/", "state/", "metrics/"
PAUSE = 1.0  # seconds between looks at who is online


@dataclass(frozen=True)
class Delivery:
    """What came back from a node: an answer, or why there is none."""

    node: int
    content: bytes | None
    reason: str = ""


class Port(Protocol):
    """The way to the sites."""

    def nodes(self) -> Sequence[int]:
        """Who is online."""

    def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterable[Delivery]:
        """Send each node its request; yield what comes back within `deadline` seconds."""


InitialParameters = Callable[[Study, int], Arrays]


def run_session(store: Store, session_id: str, port: Port, initial: InitialParameters) -> None:
    """Begin or resume a session and bring it to its end.

    Args:
        initial: study, seed → the model's initial parameters.

    Raises:
        StudyFailed: if sites, quorum or checkpoints are missing; the session is marked as failed and
            can be resumed.
    """
    session = store.session(session_id)
    store.mark(session.id, RUNNING)
    try:
        with store.held():
            _Rounds(store, session, port, algorithm_of(session.study.algorithm)).run(initial)
    except StudyFailed as error:
        store.mark(session.id, FAILED, error.message)
        raise
    except BaseException as error:
        store.mark(session.id, FAILED, f"unforeseen {type(error).__name__}")
        raise
    store.mark(session.id, FINISHED)


class _Rounds:
    """One session's rounds, from where its checkpoints end."""

    def __init__(self, store: Store, session: Session, port: Port, algorithm: FederatedAlgorithm) -> None:
        self._store, self._session, self._port, self._algorithm = store, session, port, algorithm
        self._study, self._settings = session.study, session.settings
        self._scaling: Arrays = {}

    def run(self, initial: InitialParameters) -> None:
        if self._settings.describe:
            self._wait_for_sites(self._settings.sites)
            self._statistics()
            return
        done = self._store.rounds_done(self._session.id)
        if done:
            checkpoint = self._store.checkpoint(self._session.id, done)
            parameters, state = part(checkpoint, PARAMETERS), part(checkpoint, STATE)
        else:
            parameters = initial(self._study, self._settings.seed)
            state = self._algorithm.init(parameters)
        self._wait_for_sites(self._settings.sites)
        if self._study.data.scaling == "moments":
            self._scaling = self._moments()
        for number in range(done + 1, self._study.algorithm.rounds + 2):
            parameters, state = self._round(number, parameters, state)

    def _statistics(self) -> Round:
        """The sites' statistics, asked once in a session."""
        if not any(r.number == STATISTICS_ROUND for r in self._store.rounds(self._session.id)):
            replies, answers = self._ask(Job(self._header(STATISTICS_ROUND), {}))
            sums = {f"{METRICS}{r.header.site}/": r.metrics for r in replies}
            self._store.record(self._session.id, STATISTICS_ROUND, joined(sums), answers)
        return next(r for r in self._store.rounds(self._session.id) if r.number == STATISTICS_ROUND)

    def _moments(self) -> Arrays:
        """What all sites scale their numbers by."""
        asked = self._statistics()
        checkpoint = self._store.checkpoint(self._session.id, STATISTICS_ROUND)
        found = moments(self._study, *noised_sums(self._study, asked, checkpoint))
        return {"mean": found.mean, "deviation": found.deviation}

    def _header(self, number: int) -> JobHeader:
        return JobHeader(
            session=self._session.id,
            round=number,
            study=self._study.digest,
            metrics="exact" if self._settings.exact_metrics else "private",
        )

    def _round(self, number: int, parameters: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        replies, answers = self._ask(Job(self._header(number), parameters, self._scaling))
        if number <= self._study.algorithm.rounds:
            updates = [Update(r.header.site, r.header.weight, r.update) for r in replies]
            with np.errstate(over="ignore", invalid="ignore"):  # looked for below
                state, parameters = self._algorithm.apply(state, parameters, updates)
            if not all(np.isfinite(a).all() for a in (*state.values(), *parameters.values())):
                raise StudyFailed(
                    f"round {number}: the sites' updates add up to infinity",
                    remedy="lower the study's learning rates, or leave out the site that sends them",
                )
        arrays = {PARAMETERS: parameters, STATE: state}
        arrays |= {f"{METRICS}{r.header.site}/": r.metrics for r in replies}
        for reply in replies:
            if reply.header.certificate is not None:
                self._store.keep_certificate(self._session.id, reply.header.site, reply.header.certificate)
        self._store.record(self._session.id, number, joined(arrays), answers)
        return parameters, state

    def _ask(self, job: Job) -> tuple[list[Reply], tuple[SiteAnswer, ...]]:
        # One message for all: each site finds its own anchor in it.
        anchored = job.header.model_copy(update={"anchors": self._store.heads()})
        content = sealed(Job(anchored, job.parameters, job.scaling))
        answers: list[SiteAnswer] = []
        for attempt in range(self._settings.attempts):
            if attempt:
                self._wait_for_sites(self._settings.quorum)
            replies, answers = self._collect(job, content)
            if len(replies) >= self._settings.quorum:
                return replies, tuple(answers)
            log.warning("round %d: %d replies, no quorum", job.header.round, len(replies))
            if not any(a.outcome == "silence" for a in answers):
                break  # a site that refused refuses again
        reasons = "; ".join(f"{a.site}: {a.detail}" for a in answers if a.outcome != "reply")
        raise StudyFailed(
            f"round {job.header.round}: fewer than {self._settings.quorum} sites answered ({reasons[:1500]})",
            remedy=f"mend that, then: fedward-server resume FOLDER {self._session.id}, or simulate again",
        )

    def _collect(self, job: Job, content: bytes) -> tuple[list[Reply], list[SiteAnswer]]:
        replies: dict[str, Reply] = {}
        answers: list[SiteAnswer] = []
        requests = dict.fromkeys(self._nodes(), content)
        for delivery in self._port.exchange(requests, self._settings.deadline):
            reply, answer = self._read(delivery, job)
            if reply is not None and answer.site in replies:
                answer = SiteAnswer(answer.site, "malformed", "two nodes answer for this site")
            elif reply is not None:
                replies[answer.site] = reply
            answers.append(answer)
        answers.sort(key=lambda a: a.site)
        heads = {a.site: (a.sequence, a.head) for a in answers if a.outcome == "reply"}
        self._store.remember(heads)
        return list(replies.values()), answers

    def _read(self, delivery: Delivery, job: Job) -> tuple[Reply | None, SiteAnswer]:
        enrolled = self._settings.nodes.get(str(delivery.node))
        node = enrolled or f"node {delivery.node}"
        if delivery.content is None:
            return None, SiteAnswer(node, "silence", delivery.reason)
        try:
            message = screened(delivery.content, job, self._study)
        except MessageError as error:
            return None, SiteAnswer(node, "malformed", error.message)
        if self._settings.nodes and message.header.site != enrolled:
            return None, SiteAnswer(node, "malformed", "the node answers for another site")
        if isinstance(message, Refusal):
            header = message.header
            return None, SiteAnswer(header.site, "refusal", _printable(f"{header.code}: {header.message}"))
        told = message.header
        return message, SiteAnswer(
            site=told.site,
            outcome="reply",
            weight=told.weight,
            training=told.training.model_dump(mode="json") if told.training else None,
            evaluation=told.evaluation.model_dump(mode="json") if told.evaluation else None,
            statistics=told.statistics.model_dump(mode="json") if told.statistics else None,
            exact=told.exact,
            released=message.released,
            head=told.head,
            sequence=told.sequence,
        )

    def _nodes(self) -> list[int]:
        """Who is online of those that belong to the session; others would spend budget for nothing."""
        enrolled = self._settings.nodes
        return [node for node in self._port.nodes() if not enrolled or str(node) in enrolled]

    def _wait_for_sites(self, wanted: int) -> None:
        """Until `wanted` sites are online; once patience is over, a quorum will do."""
        end = time.monotonic() + self._settings.patience
        while (online := len(self._nodes())) < wanted:
            if time.monotonic() > end:
                if online >= self._settings.quorum:
                    return
                raise StudyFailed(
                    f"{online} of {wanted} sites online after {self._settings.patience:.0f} s",
                    remedy="see who is missing: fedward-server sites FOLDER",
                )
            time.sleep(PAUSE)


def noised_sums(study: Study, asked: Round, checkpoint: Arrays) -> tuple[Arrays, list[float]]:
    """All sites' statistics together, and the standard deviation of each site's noise.

    Args:
        asked: round 0 of a session.
        checkpoint: its arrays.
    """
    answers = [a for a in asked.answers if a.outcome == "reply"]
    sums = merged([part(checkpoint, f"{METRICS}{a.site}/") for a in answers])
    noise = [EVENT.validate_python(a.statistics).noise_multiplier * sensitivity(study) for a in answers]
    return sums, noise


def _printable(text: str) -> str:
    """A site's words without control characters, which could play tricks on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def joined(groups: Mapping[str, Arrays]) -> Arrays:
    """Groups of arrays under one roof: prefix → arrays becomes prefixed name → array."""
    return {prefix + name: array for prefix, arrays in groups.items() for name, array in arrays.items()}


def part(arrays: Arrays, prefix: str) -> Arrays:
    """One group of `joined` arrays; packed sums are whole again."""
    return dense({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)})
