"""The sites of this process asked without messages: each answer is its site's, and who fails fails alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from small import job, make_site, study

from common.errors import LedgerError, SiteError
from common.messages import Reply, ReplyHeader, decode
from server.app import Direct, FlowerPort
from simulations.engine.direct import DirectGrid
from simulations.engine.inprocess import InProcessGrid
from simulations.engine.sites import VaultPool, admit, find_sites
from simulations.engine.together import Outcome

SITES = 5


def unasked() -> ClientApp:
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        raise AssertionError("asked by a message")

    return app


def echoed(requests: Mapping[int, bytes]) -> dict[int, Outcome]:
    return {site: b"%d answers %b" % (site, request) for site, request in requests.items()}


def grid_of(answers: Callable[[Mapping[int, bytes]], Mapping[int, Outcome]], **more: int) -> DirectGrid:
    threads = more.get("threads", 1)
    return DirectGrid(
        unasked(), SITES, threads, answers, together=more.get("together", 2), threads=lambda: threads
    )


@pytest.mark.parametrize("threads", [1, 2, 9])
@pytest.mark.parametrize("together", [0, 1, 2, 9])
def test_each_node_gets_its_own_answer(threads: int, together: int) -> None:
    groups: list[int] = []

    def answers(requests: Mapping[int, bytes]) -> Mapping[int, Outcome]:
        groups.append(len(requests))
        return echoed(requests)

    with closing(grid_of(answers, threads=threads, together=together)) as grid:
        port = FlowerPort(grid)
        requests = {node: b"%d" % node for node in port.nodes()}
        told = {d.node: d.content for d in port.exchange(requests, 60.0)}
    assert told == {1000 + i: b"%d answers %d" % (i, 1000 + i) for i in range(SITES)}
    assert sum(groups) == SITES
    assert max(groups) <= max(1, together // min(threads, SITES))


def test_a_request_is_handed_over_as_it_is() -> None:
    content = b"a round's job"
    seen: list[bytes] = []

    def answers(requests: Mapping[int, bytes]) -> Mapping[int, Outcome]:
        seen.extend(requests.values())
        return echoed(requests)

    with closing(grid_of(answers)) as grid:
        list(grid.exchange(dict.fromkeys(grid.get_node_ids(), content), 60.0))
    assert all(each is content for each in seen)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_goes_wrong_at_a_site_stays_there(threads: int) -> None:
    """Be it told as the site's outcome, or thrown for all that were asked with it; the text stays here."""

    def answers(requests: Mapping[int, bytes]) -> Mapping[int, Outcome]:
        if 2 in requests:
            raise ValueError("patient 17")
        wrong = LedgerError("patient 18", remedy="restore it")
        return {site: wrong if site == 4 else told for site, told in echoed(requests).items()}

    with closing(grid_of(answers, threads=threads, together=SITES)) as grid:
        told = {d.node: d for d in grid.exchange(dict.fromkeys(grid.get_node_ids(), b"x"), 60.0)}
    assert [told[1000 + i].content is None for i in range(SITES)] == [False, False, True, False, True]
    assert told[1002].reason == "fedward: ValueError"
    assert told[1004].reason == f"fedward: {LedgerError.code}"


def test_who_is_late_is_silent() -> None:
    late = threading.Event()

    def answers(requests: Mapping[int, bytes]) -> Mapping[int, Outcome]:
        if 1 in requests:
            late.wait(30)
        return echoed(requests)

    with closing(grid_of(answers, threads=2)) as grid:
        told = {d.node: d for d in grid.exchange(dict.fromkeys(grid.get_node_ids(), b"x"), 0.2)}
        late.set()
    assert [told[1000 + i].content is None for i in range(SITES)] == [False, True, False, True, False]
    assert told[1001].reason == "no answer within 0 s"


def test_other_grids_are_asked_by_messages() -> None:
    with closing(InProcessGrid(unasked(), 2, 1)) as grid:
        assert not isinstance(grid, Direct)
        told = list(FlowerPort(grid).exchange({1000: b"x"}, 60.0))
    assert [d.content for d in told] == [None]
    assert told[0].reason.startswith("Flower error")


def test_a_vault_that_does_not_open_is_its_sites_outcome(tmp_path: Path) -> None:
    wanted = study()
    for i in range(3):
        make_site(tmp_path / "sites" / f"site-{i}", name=f"site-{i}")
    places = find_sites(tmp_path / "sites", tmp_path / "state")
    admit(places[0], wanted, public=False)
    admit(places[2], wanted, public=False)
    with closing(VaultPool(places, 1, 3)) as pool:
        told = pool.outcomes(dict.fromkeys(range(3), job(wanted, 1)))
        assert isinstance(told[1], SiteError)  # it has no keys yet
        assert [header_of(told[i]).site for i in (0, 2)] == ["site-0", "site-2"]
        admit(places[1], wanted, public=False)
        again = pool.outcomes(dict.fromkeys(range(3), job(wanted, 1)))
    assert header_of(again[1]).site == "site-1"
    assert [again[0], again[2]] == [told[0], told[2]]  # the stored replies


def header_of(told: Outcome) -> ReplyHeader:
    assert isinstance(told, bytes)
    message = decode(bytes(told))
    assert isinstance(message, Reply)
    return message.header
