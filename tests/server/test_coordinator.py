"""The coordinator over a port made up here: quorum, silence, bad answers, crashes and resuming."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import study

from common.errors import StudyFailed
from common.messages import Arrays, Job, Refusal, RefusalHeader, Reply, ReplyHeader, decode, encode
from common.privacy.mechanism import SubsampledGaussian
from common.study import Study
from server import coordinator
from server.coordinator import PARAMETERS, STATE, Delivery, part, run_session
from server.store import FAILED, FINISHED, RUNNING, Settings, Store

WANTED = study(evaluation={"every": 1})
NAMES = ("ash", "birch", "cedar", "dune")
Answering = Callable[["Site", Job], "bytes | None"]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "PAUSE", 0.0)


COST = SubsampledGaussian(noise_multiplier=2.0, sample_rate=0.5, steps=3)


class Site:
    """A site that answers like a vault: asked twice with the same bytes, it says the same."""

    def __init__(self, name: str, behaviour: Mapping[int, Answering] | None = None) -> None:
        self.name, self.weight = name, 10 * (1 + NAMES.index(name)) if name in NAMES else 10
        self.behaviour = dict(behaviour or {})
        self.kept: dict[int, tuple[bytes, bytes]] = {}
        self.asked: list[int] = []
        self.spent = 0

    def answer(self, request: bytes) -> bytes | None:
        job = decode(request)
        assert isinstance(job, Job)
        self.asked.append(job.header.round)
        known = self.kept.get(job.header.round)
        if known is not None:
            assert known[0] == request, "the same round was asked with another content"
            return known[1]
        odd = self.behaviour.pop(job.header.round, None)
        if odd is not None:
            return odd(self, job)
        reply = encode(self.reply(job))
        self.kept[job.header.round] = (request, reply)
        self.spent += 1
        return reply

    def reply(self, job: Job, **changes: Any) -> Reply:
        random = np.random.default_rng(
            [job.header.round, NAMES.index(self.name) if self.name in NAMES else 9]
        )
        trains = job.header.round <= WANTED.algorithm.rounds
        update = {  # in the order of names: decoding keeps none
            n: (a * 0.1 + random.normal(size=a.shape)).astype(np.float32)
            for n, a in sorted(job.parameters.items())
        }
        metrics = {"scores": random.normal(size=(2, WANTED.evaluation.bins))}
        header: dict[str, Any] = {
            "session": job.header.session, "round": job.header.round, "study": job.header.study,
            "site": self.name, "weight": self.weight,
            "training": COST if trains else None,
            "evaluation": COST if WANTED.evaluates_in(job.header.round) else None,
        }  # fmt: skip
        given = {
            "update": update if trains else {},
            "metrics": metrics if WANTED.evaluates_in(job.header.round) else {},
        }
        given |= {k: v for k, v in changes.items() if k in given}
        header |= {k: v for k, v in changes.items() if k not in given}
        return Reply(ReplyHeader(**header), **given)


class FakePort:
    """Args:
    order: rearranges the deliveries of one exchange.
    """

    def __init__(
        self, sites: Sequence[Site], order: Callable[[list[Delivery]], list[Delivery]] = lambda d: d
    ) -> None:
        self.sites, self.order = list(sites), order
        self.requests: list[bytes] = []
        self.exchanges = 0

    def nodes(self) -> Sequence[int]:
        return range(len(self.sites))

    def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterable[Delivery]:
        self.exchanges += 1
        self.requests += requests.values()
        found = []
        for node, request in requests.items():
            content = self.sites[node].answer(request)
            found.append(Delivery(node, content, "" if content is not None else "no answer in time"))
        yield from self.order(found)


def initial(wanted: Study, seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {"0.weight": random.normal(size=(1, 4)).astype(np.float32), "0.bias": np.zeros(1, np.float32)}


def begun(root: Path, **changes: Any) -> Store:
    store = Store(root, durable=False)
    settings = {"sites": 4, "quorum": 3, "patience": 0.0, "attempts": 3, **changes}
    store.create("one", WANTED, Settings(**settings))
    return store


def final(store: Store) -> dict[str, bytes]:
    done = store.rounds_done("one")
    assert done == WANTED.algorithm.rounds + 1
    return {n: a.tobytes() for n, a in part(store.checkpoint("one", done), PARAMETERS).items()}


def outcomes(store: Store, number: int) -> dict[str, str]:
    return {a.site: a.outcome for a in store.rounds("one")[number - 1].answers}


def undisturbed(tmp_path: Path, without: Sequence[str] = (), number: int = 0) -> dict[str, bytes]:
    store = begun(tmp_path / "undisturbed")
    silent: dict[int, Answering] = {number: lambda site, job: None}
    run_session(store, "one", FakePort([Site(n, silent if n in without else {}) for n in NAMES]), initial)
    return final(store)


def test_a_session_is_the_weighted_mean_by_public_sizes(tmp_path: Path) -> None:
    store = begun(tmp_path)
    sites = [Site(n) for n in NAMES]
    run_session(store, "one", FakePort(sites), initial)
    assert store.session("one").status == FINISHED
    value = initial(WANTED, 0)
    for number in range(1, WANTED.algorithm.rounds + 1):
        replies = [decode(s.kept[number][1]) for s in sites]
        for name in value:
            mean = sum(
                s.weight * r.update[name].astype(np.float64) for s, r in zip(sites, replies, strict=True)
            )
            value[name] = (value[name] + mean / 100).astype(np.float32)
    for name, found in part(store.checkpoint("one", 4), PARAMETERS).items():
        assert np.allclose(found, value[name], rtol=1e-6)
    assert [s.asked for s in sites] == [[1, 2, 3, 4]] * 4


def test_the_order_of_answers_changes_no_bit(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    for i, order in enumerate(itertools.islice(itertools.permutations(range(4)), 0, 24, 5)):
        store = begun(tmp_path / str(i))
        port = FakePort([Site(n) for n in NAMES], lambda d, order=order: [d[k] for k in order])
        run_session(store, "one", port, initial)
        assert final(store) == expected


def silence(site: Site, job: Job) -> None:
    return None


def refusing(site: Site, job: Job) -> bytes:
    return encode(Refusal(RefusalHeader(site=site.name, code="not-approved", message="no")))


def odd(**changes: Any) -> Answering:
    return lambda site, job: encode(site.reply(job, **changes))


def spoilt(change: Callable[[np.ndarray], np.ndarray]) -> Answering:
    def answer(site: Site, job: Job) -> bytes:
        reply = site.reply(job)
        return encode(Reply(reply.header, {n: change(a) for n, a in reply.update.items()}, reply.metrics))

    return answer


BAD: dict[str, tuple[Answering, str]] = {
    "silent": (silence, "silence"),
    "refusing": (refusing, "refusal"),
    "noise": (lambda s, j: b"\x00" * 99, "malformed"),
    "nothing": (lambda s, j: b"", "malformed"),
    "cut": (lambda s, j: encode(s.reply(j))[:-1], "malformed"),
    "a job": (lambda s, j: encode(j), "malformed"),
    "NaN": (spoilt(lambda a: a * np.float32("nan")), "malformed"),
    "infinity": (spoilt(lambda a: a + np.float32("inf")), "malformed"),
    "doubles": (spoilt(lambda a: a.astype(np.float64)), "malformed"),
    "flat": (spoilt(lambda a: a.ravel()), "malformed"),
    "no update": (odd(update={}), "malformed"),
    "one array": (odd(update={"0.bias": np.zeros(1, np.float32)}), "malformed"),
    "extra array": (
        lambda s, j: encode(s.reply(j, update={**s.reply(j).update, "x": np.zeros(1, np.float32)})),
        "malformed",
    ),
    "another round": (odd(round=3), "malformed"),
    "another session": (odd(session="two"), "malformed"),
    "another study": (odd(study="0" * 64), "malformed"),
    "enormous weight": (odd(weight=10**12), "malformed"),
    "no metrics": (odd(metrics={}), "malformed"),
    "odd metrics": (odd(metrics={"scores": np.zeros((2, 3))}), "malformed"),
    "NaN metrics": (odd(metrics={"scores": np.full((2, 20), np.nan)}), "malformed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_answer_is_set_aside(tmp_path: Path, kind: str) -> None:
    bad, outcome = BAD[kind]
    store = begun(tmp_path)
    port = FakePort([Site("ash"), Site("birch", {2: bad}), Site("cedar"), Site("dune")])
    run_session(store, "one", port, initial)
    found = outcomes(store, 2)
    assert sorted(found.values()) == sorted([outcome, "reply", "reply", "reply"])
    assert final(store) == undisturbed(tmp_path, without=["birch"], number=2)


def test_an_overflowing_update_does_not_enter_the_model(tmp_path: Path) -> None:
    """Finite numbers, whose sum with the model isn't: every later round would be refused."""
    store = begun(tmp_path)
    bad = spoilt(lambda a: np.full_like(a, 3.4e38))
    start = {n: np.full_like(a, 3.0e38) for n, a in initial(WANTED, 0).items()}
    sites = [Site(n, {1: bad}) for n in NAMES]
    with pytest.raises(StudyFailed):
        run_session(store, "one", FakePort(sites), lambda wanted, seed: start)
    assert store.rounds_done("one") == 0
    assert store.session("one").status == FAILED


def test_two_nodes_cannot_both_be_one_site(tmp_path: Path) -> None:
    for i, order in enumerate((lambda d: d, lambda d: d[::-1])):
        store = begun(tmp_path / str(i), sites=5)
        run_session(store, "one", FakePort([Site(n) for n in (*NAMES, "ash")], order), initial)
        assert sorted(a.outcome for a in store.rounds("one")[0].answers) == ["malformed"] + ["reply"] * 4
        assert final(store) == undisturbed(tmp_path / f"u{i}")


def test_below_the_quorum_nothing_counts(tmp_path: Path) -> None:
    store = begun(tmp_path, quorum=4)
    port = FakePort([Site("ash"), Site("birch", {2: refusing}), Site("cedar"), Site("dune")])
    with pytest.raises(StudyFailed, match="fewer than 4 sites") as failure:
        run_session(store, "one", port, initial)
    assert "birch: not-approved: no" in failure.value.message
    assert "resume FOLDER one" in failure.value.remedy
    assert store.session("one").status == FAILED
    assert store.rounds_done("one") == 1
    assert port.exchanges == 2  # who refuses, refuses again: not asked a second time


def test_silence_is_asked_again_with_the_same_bytes(tmp_path: Path) -> None:
    store = begun(tmp_path, quorum=4)
    sites = [Site("ash"), Site("birch", {2: silence}), Site("cedar"), Site("dune")]
    port = FakePort(sites)
    run_session(store, "one", port, initial)
    assert [s.asked for s in sites] == [[1, 2, 2, 3, 4]] * 4
    assert len(set(port.requests[4:12])) == 1
    assert [s.spent for s in sites] == [4] * 4  # an answer kept is not paid for twice
    assert final(store) == undisturbed(tmp_path)


def test_it_does_not_ask_forever(tmp_path: Path) -> None:
    class Mute(Site):
        def answer(self, request: bytes) -> None:
            self.asked.append(0)

    store = begun(tmp_path, quorum=4, attempts=3)
    mute = Mute("birch")
    with pytest.raises(StudyFailed):
        run_session(store, "one", FakePort([Site("ash"), mute, Site("cedar"), Site("dune")]), initial)
    assert len(mute.asked) == 3


def test_too_few_sites_online(tmp_path: Path) -> None:
    store = begun(tmp_path)
    with pytest.raises(StudyFailed, match="1 of 4 sites online"):
        run_session(store, "one", FakePort([Site("ash")]), initial)
    assert store.session("one").status == FAILED


def test_an_unforeseen_failure_is_written_down_without_its_text(tmp_path: Path) -> None:
    class Broken(FakePort):
        def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterator[Delivery]:
            raise RuntimeError("secret")

    store = begun(tmp_path)
    with pytest.raises(RuntimeError):
        run_session(store, "one", Broken([Site(n) for n in NAMES]), initial)
    session = store.session("one")
    assert (session.status, session.detail) == (FAILED, "unforeseen RuntimeError")


def test_a_finished_session_does_nothing_more(tmp_path: Path) -> None:
    store = begun(tmp_path)
    port = FakePort([Site(n) for n in NAMES])
    run_session(store, "one", port, initial)
    before, exchanges = final(store), port.exchanges
    run_session(store, "one", port, initial)
    assert (final(store), port.exchanges) == (before, exchanges)


class Crash(BaseException):
    """The coordinator's end, in the middle of something."""


class MortalStore(Store):
    """Dies at its n-th call: before it does anything, or just after."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, durable=False)
        self.calls, self.fatal, self.after = 0, 0, False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in {"session", "mark", "rounds_done", "checkpoint", "record", "checkpoint_path"}:
            return value

        def mortal(*arguments: Any, **named: Any) -> Any:
            if self.fatal and self.calls >= self.fatal:
                raise Crash  # dead is dead: nothing more is written
            self.calls += 1
            if self.calls == self.fatal and not self.after:
                raise Crash
            result = value(*arguments, **named)
            if self.calls == self.fatal:
                raise Crash
            return result

        return mortal


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_and_resumed_ends_in_the_same_model(tmp_path: Path, after: bool) -> None:
    expected = undisturbed(tmp_path)
    for fatal in range(1, 100):
        begun(tmp_path / str(fatal))
        store = MortalStore(tmp_path / str(fatal))
        store.fatal, store.after = fatal, after
        sites = [Site(n) for n in NAMES]
        try:
            run_session(store, "one", FakePort(sites), initial)
        except Crash:
            resumed = Store(tmp_path / str(fatal), durable=False)
            assert resumed.session("one").status in {RUNNING, FINISHED}
            run_session(resumed, "one", FakePort(sites), initial)
            assert final(resumed) == expected
            assert [s.spent for s in sites] == [4] * 4
        else:
            assert fatal > 10
            return


def test_killed_in_the_middle_of_an_exchange(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    for number, delivered in itertools.product((1, 3, 4), range(4)):
        root = tmp_path / f"{number}-{delivered}"
        store, sites = begun(root), [Site(n) for n in NAMES]

        class Dying(FakePort):
            def exchange(self, requests: Mapping[int, bytes], deadline: float, number: int = number,
                         delivered: int = delivered) -> Iterator[Delivery]:  # fmt: skip
                found = list(super().exchange(requests, deadline))
                if self.exchanges == number:
                    yield from found[:delivered]
                    raise Crash
                yield from found

        with pytest.raises(Crash):
            run_session(store, "one", Dying(sites), initial)
        run_session(Store(root, durable=False), "one", FakePort(sites), initial)
        assert final(store) == expected
        assert [s.spent for s in sites] == [4] * 4


def test_the_checkpoint_holds_the_algorithms_state(tmp_path: Path) -> None:
    store = begun(tmp_path)
    run_session(store, "one", FakePort([Site(n) for n in NAMES]), initial)
    assert set(store.checkpoint("one", 2)) == {f"{PARAMETERS}0.weight", f"{PARAMETERS}0.bias"} | {
        f"metrics/{n}/scores" for n in NAMES
    } | {n for n in store.checkpoint("one", 2) if n.startswith(STATE)}
