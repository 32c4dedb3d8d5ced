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
from common.messages import (
    NO_HEAD,
    Arrays,
    Job,
    Refusal,
    RefusalHeader,
    Reply,
    ReplyHeader,
    asked,
    decode,
    encode,
    released,
)
from common.privacy.mechanism import GaussianRelease, SubsampledGaussian
from common.statistics import layout, moments, sensitivity
from common.study import Study
from server import coordinator
from server.coordinator import PARAMETERS, STATE, Delivery, part, run_session
from server.store import FAILED, FINISHED, RUNNING, Settings, Store

WANTED = study(evaluation={"every": 1})
SCALED = study(
    evaluation={"every": 1},
    statistics={"epsilon": 1.0, "delta": 1e-4, "bins": 4},
    data={**WANTED.data.model_dump(mode="json"), "scaling": "moments"},
)
NAMES = ("ash", "birch", "cedar", "dune")
Answering = Callable[["Site", Job], "bytes | None"]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "PAUSE", 0.0)


COST = SubsampledGaussian(noise_multiplier=2.0, sample_rate=0.5, steps=3)
SURVEY = GaussianRelease(noise_multiplier=3.0)


class Site:
    """A site that answers like a vault: asked the same again, it says the same. Its ledger is the list of
    heads that it has told; it refuses a coordinator that remembers another one.
    """

    def __init__(
        self, name: str, behaviour: Mapping[int, Answering] | None = None, wanted: Study = WANTED
    ) -> None:
        self.name, self.weight = name, 10 * (1 + NAMES.index(name)) if name in NAMES else 10
        self.behaviour = dict(behaviour or {})
        self.kept: dict[tuple[str, int], tuple[str, bytes]] = {}
        self.asked: list[int] = []
        self.anchors: list[str | None] = []
        self.heads = [NO_HEAD]
        self.spent = 0
        self.wanted = wanted

    def answer(self, request: bytes) -> bytes | None:
        job = decode(request)
        assert isinstance(job, Job)
        self.asked.append(job.header.round)
        self.anchors.append(job.header.anchors.get(self.name))
        if self.anchors[-1] not in (None, *self.heads):
            return encode(Refusal(RefusalHeader(site=self.name, code="ledger-rolled-back", message="older")))
        key = job.header.session, job.header.round
        known = self.kept.get(key)
        if known is not None:
            assert known[0] == asked(job), "the same round was asked with another content"
            return known[1]
        odd = self.behaviour.pop(job.header.round, None)
        if odd is not None:
            return odd(self, job)
        self.spent += 1
        self.heads.append(released({"spent": np.array([self.spent])}, {self.name: np.zeros(1)}))
        reply = encode(self.reply(job))
        self.kept[key] = (asked(job), reply)
        return reply

    def reply(self, job: Job, **changes: Any) -> Reply:
        random = np.random.default_rng(
            [job.header.round, NAMES.index(self.name) if self.name in NAMES else 9]
        )
        wanted, number = self.wanted, job.header.round
        trains, final = 1 <= number <= wanted.algorithm.rounds, number > wanted.algorithm.rounds
        evaluates = number > 0 and wanted.evaluates_in(number)
        update = {  # in the order of names: decoding keeps none
            n: (a * 0.1 + random.normal(size=a.shape)).astype(np.float32)
            for n, a in sorted(job.parameters.items())
        }
        metrics = {"scores": random.normal(size=(2, wanted.evaluation.bins))} if evaluates else {}
        if number == 0:
            metrics = {n: 50 + random.normal(size=s) for n, s in sorted(layout(wanted).items())}
        header: dict[str, Any] = {
            "session": job.header.session, "round": job.header.round, "study": job.header.study,
            "site": self.name, "weight": self.weight,
            "training": COST if trains else None,
            "evaluation": COST if evaluates else None,
            "statistics": SURVEY if number == 0 else None,
            "head": self.heads[-1],
            "sequence": len(self.heads) - 1,
            "certificate": f"certificate-of-{self.name}" if final else None,
        }  # fmt: skip
        given = {"update": update if trains else {}, "metrics": metrics}
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


def begun(root: Path, wanted: Study = WANTED, session: str = "one", **changes: Any) -> Store:
    store = Store(root, durable=False)
    settings = {"sites": 4, "quorum": 3, "patience": 0.0, "attempts": 3, **changes}
    store.create(session, wanted, Settings(**settings))
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
        replies = [decode(s.kept["one", number][1]) for s in sites]
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
    "no metrics, charged": (odd(metrics={}), "malformed"),
    "no metrics, exact": (odd(metrics={}, evaluation=None, exact=True), "malformed"),
    "statistics": (odd(statistics=SURVEY), "malformed"),
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


MORTAL = {"session", "mark", "rounds", "rounds_done", "checkpoint", "record", "checkpoint_path"} | {
    "heads", "remember", "keep_certificate"
}  # fmt: skip


class MortalStore(Store):
    """Dies at its n-th call: before it does anything, or just after."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, durable=False)
        self.calls, self.fatal, self.after = 0, 0, False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in MORTAL:
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


@pytest.mark.parametrize("wanted", [WANTED, SCALED], ids=["ranges", "moments"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_and_resumed_ends_in_the_same_model(
    tmp_path: Path, after: bool, wanted: Study
) -> None:
    whole = begun(tmp_path / "undisturbed", wanted)
    run_session(whole, "one", FakePort([Site(n, wanted=wanted) for n in NAMES]), initial)
    expected, rounds = final(whole), 4 + (wanted is SCALED)
    for fatal in range(1, 100):
        begun(tmp_path / str(fatal), wanted)
        store = MortalStore(tmp_path / str(fatal))
        store.fatal, store.after = fatal, after
        sites = [Site(n, wanted=wanted) for n in NAMES]
        try:
            run_session(store, "one", FakePort(sites), initial)
        except Crash:
            resumed = Store(tmp_path / str(fatal), durable=False)
            assert resumed.session("one").status in {RUNNING, FINISHED}
            run_session(resumed, "one", FakePort(sites), initial)
            assert final(resumed) == expected
            assert [s.spent for s in sites] == [rounds] * 4
            assert resumed.certificates("one") == {n: f"certificate-of-{n}" for n in NAMES}
            assert resumed.heads() == {s.name: s.heads[-1] for s in sites}
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


# --- what others remember of a site's ledger


def test_each_message_tells_the_sites_what_was_last_seen_of_their_ledgers(tmp_path: Path) -> None:
    store, sites = begun(tmp_path), [Site(n) for n in NAMES]
    run_session(store, "one", FakePort(sites), initial)
    for site in sites:
        assert site.anchors == [None, *site.heads[1:4]]
        assert store.heads()[site.name] == site.heads[-1]
    for number, each in enumerate(store.rounds("one"), start=1):
        assert {a.site: a.head for a in each.answers} == {s.name: s.heads[number] for s in sites}
    begun(tmp_path, session="two")
    run_session(store, "two", FakePort(sites), initial)  # of another session, for the same ledger
    for site in sites:
        assert site.anchors[4:] == site.heads[4:8]
        assert store.heads()[site.name] == site.heads[-1]


def test_a_stored_reply_does_not_put_the_memory_back(tmp_path: Path) -> None:
    """Between two attempts at a round the site's ledger grew, in another session."""
    store = begun(tmp_path, quorum=4)
    sites = [Site("ash"), Site("birch", {2: silence}), Site("cedar"), Site("dune")]

    class Busy(FakePort):
        def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterable[Delivery]:
            if self.exchanges == 2:  # before the second attempt
                sites[0].heads.append("e" * 64)
                store.remember({"ash": (len(sites[0].heads) - 1, "e" * 64)})
            return super().exchange(requests, deadline)

    run_session(store, "one", Busy(sites), initial)
    ash = sites[0]
    assert ash.asked == [1, 2, 2, 3, 4]
    assert ash.anchors == [None, ash.heads[1], ash.heads[1], "e" * 64, ash.heads[4]]


def test_a_site_that_was_put_back_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    store, sites = begun(tmp_path), [Site(n) for n in NAMES]

    class PutBack(FakePort):
        def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterable[Delivery]:
            if self.exchanges == 1:
                del sites[1].heads[1:]
            return super().exchange(requests, deadline)

    run_session(store, "one", PutBack(sites), initial)
    seen = store.heads()["birch"]
    for number in (2, 3, 4):
        assert outcomes(store, number) == {n: "refusal" if n == "birch" else "reply" for n in NAMES}
        (detail,) = (a.detail for a in store.rounds("one")[number - 1].answers if a.outcome == "refusal")
        assert detail == "ledger-rolled-back: older"
    assert sites[1].spent == 1
    assert seen not in sites[1].heads  # a refusal doesn't make it forget
    begun(tmp_path, session="two")
    sites[1].heads.append(seen)  # its operator restored the latest ledger
    run_session(store, "two", FakePort(sites), initial)
    assert all(a.outcome == "reply" for r in store.rounds("two") for a in r.answers)


def test_a_malformed_answer_moves_no_anchor(tmp_path: Path) -> None:
    store = begun(tmp_path)
    lying = spoilt(lambda a: a * np.float32("nan"))
    sites = [Site("ash"), Site("birch", {1: lying}), Site("cedar"), Site("dune")]
    run_session(store, "one", FakePort(sites), initial)
    assert sites[1].anchors[:2] == [None, None]


def test_a_node_cannot_move_another_sites_anchor(tmp_path: Path) -> None:
    nodes = {str(i): n for i, n in enumerate(NAMES)}
    store = begun(tmp_path, nodes=nodes)
    forged = odd(site="ash", head="f" * 64)
    sites = [Site("ash"), Site("birch", {1: forged}), Site("cedar"), Site("dune")]
    run_session(store, "one", FakePort(sites), initial)
    assert outcomes(store, 1) == {"ash": "reply", "birch": "malformed", "cedar": "reply", "dune": "reply"}
    assert sites[0].anchors == [None, *sites[0].heads[1:4]]


def test_a_silent_node_is_named_as_it_was_enrolled(tmp_path: Path) -> None:
    store = begun(tmp_path, nodes={str(i): n for i, n in enumerate(NAMES)})
    sites = [Site("ash"), Site("birch", {1: silence}), Site("cedar"), Site("dune")]
    run_session(store, "one", FakePort(sites), initial)
    assert outcomes(store, 1)["birch"] == "silence"


# --- budgets that end, metrics that stay


def exhausted(site: Site, job: Job) -> bytes:
    header = RefusalHeader(site=site.name, code="budget-exhausted", message="the lifetime budget is spent")
    return encode(Refusal(header))


def test_a_site_whose_budget_ended_refuses_cleanly_and_the_others_go_on(tmp_path: Path) -> None:
    store = begun(tmp_path)
    spent = Site("birch", dict.fromkeys((1, 2, 3, 4), exhausted))
    run_session(store, "one", FakePort([Site("ash"), spent, Site("cedar"), Site("dune")]), initial)
    assert store.session("one").status == FINISHED
    for each in store.rounds("one"):
        (refusal,) = (a for a in each.answers if a.outcome == "refusal")
        assert (refusal.site, refusal.detail) == ("birch", "budget-exhausted: the lifetime budget is spent")
        assert (refusal.weight, refusal.training, refusal.head, refusal.released) == (0, None, "", "")
    assert "birch" not in store.heads()
    assert set(store.certificates("one")) == {"ash", "cedar", "dune"}


def test_a_site_that_keeps_its_metrics_still_trains(tmp_path: Path) -> None:
    quiet = odd(metrics={}, evaluation=None)
    store = begun(tmp_path)
    sites = [Site("ash"), Site("birch", dict.fromkeys((2, 3, 4), quiet)), Site("cedar"), Site("dune")]
    run_session(store, "one", FakePort(sites), initial)
    assert store.session("one").status == FINISHED
    expected = undisturbed(tmp_path)
    for name, found in final(store).items():  # the same updates; only metrics are absent
        assert np.allclose(np.frombuffer(found, np.float32), np.frombuffer(expected[name], np.float32))
    for number in (2, 3, 4):
        assert set(outcomes(store, number).values()) == {"reply"}
        told = store.checkpoint("one", number)
        assert {n.split("/")[1] for n in told if n.startswith("metrics/")} == {*NAMES} - {"birch"}
        (birch,) = (a for a in store.rounds("one")[number - 1].answers if a.site == "birch")
        assert (birch.evaluation, birch.exact) == (None, False)
        assert (birch.training is not None) == (number < 4)


def test_what_came_is_written_down_as_it_came(tmp_path: Path) -> None:
    """The transcript that certificates are held against."""
    store, sites = begun(tmp_path), [Site(n) for n in NAMES]
    run_session(store, "one", FakePort(sites), initial)
    for each in store.rounds("one"):
        for answer in each.answers:
            (site,) = (s for s in sites if s.name == answer.site)
            reply = decode(site.kept["one", each.number][1])
            assert isinstance(reply, Reply)
            assert answer.released == released(reply.update, reply.metrics)
            assert answer.weight == reply.header.weight
            for name in ("training", "evaluation", "statistics"):
                event = getattr(reply.header, name)
                assert getattr(answer, name) == (event.model_dump(mode="json") if event else None)
    assert store.certificates("one") == {n: f"certificate-of-{n}" for n in NAMES}


# --- statistics


def test_moments_are_asked_once_and_go_to_every_site(tmp_path: Path) -> None:
    store, sites = begun(tmp_path, SCALED), [Site(n, wanted=SCALED) for n in NAMES]
    port = FakePort(sites)
    run_session(store, "one", port, initial)
    assert [s.asked for s in sites] == [[0, 1, 2, 3, 4]] * 4
    sums = [decode(s.kept["one", 0][1]).metrics for s in sites]  # type: ignore[union-attr]
    together = {n: sum(s[n] for s in sums) for n in sums[0]}
    deviation = SURVEY.noise_multiplier * sensitivity(SCALED)
    expected = moments(SCALED, together, [deviation] * 4)
    jobs = [decode(request) for request in port.requests]
    for job in jobs:
        assert isinstance(job, Job)
        if job.header.round == 0:
            assert (job.parameters, job.scaling) == ({}, {})
        else:
            assert np.allclose(job.scaling["mean"], expected.mean)
            assert np.allclose(job.scaling["deviation"], expected.deviation)
    assert all("statistics" not in n for n in store.checkpoint("one", 1))
    assert store.rounds_done("one") == 4


def test_who_has_no_statistics_may_still_train(tmp_path: Path) -> None:
    store = begun(tmp_path, SCALED)
    sites = [Site(n, {0: refusing} if n == "dune" else {}, SCALED) for n in NAMES]
    run_session(store, "one", FakePort(sites), initial)
    answers = {r.number: {a.site: a.outcome for a in r.answers} for r in store.rounds("one")}
    assert answers[0] == {"ash": "reply", "birch": "reply", "cedar": "reply", "dune": "refusal"}
    assert set(answers[1].values()) == {"reply"}


def test_a_description_asks_for_statistics_and_nothing_else(tmp_path: Path) -> None:
    store, sites = begun(tmp_path, SCALED, describe=True), [Site(n, wanted=SCALED) for n in NAMES]
    for _ in range(2):  # again costs nothing
        run_session(store, "one", FakePort(sites), initial)
        assert [s.asked for s in sites] == [[0]] * 4
    assert store.session("one").status == FINISHED
    (asked_once,) = store.rounds("one")
    assert asked_once.number == 0
    assert all(a.statistics == SURVEY.model_dump(mode="json") for a in asked_once.answers)


def test_statistics_below_the_quorum_fail_the_session(tmp_path: Path) -> None:
    store = begun(tmp_path, SCALED)
    sites = [Site(n, {0: refusing} if n in ("cedar", "dune") else {}, SCALED) for n in NAMES]
    with pytest.raises(StudyFailed, match="round 0: fewer than 3 sites"):
        run_session(store, "one", FakePort(sites), initial)
    assert [s.asked for s in sites] == [[0]] * 4
    run_session(store, "one", FakePort(sites), initial)  # they were allowed since
    assert [s.spent for s in sites] == [5] * 4
