"""The sites of this process asked without Flower's messages, of which there would be two a site and round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from time import monotonic

from flwr.clientapp import ClientApp

from common.errors import FedwardError
from server.coordinator import Delivery
from simulations.engine.inprocess import InProcessGrid
from simulations.engine.sites import site_index
from simulations.engine.together import Outcome

Answers = Callable[[Mapping[int, bytes]], Mapping[int, Outcome]]


class DirectGrid(InProcessGrid):
    """An `InProcessGrid` for those who know it; any other asks it by messages, as before.

    Args:
        answers: site → request becomes site → answer, side by side.
        together: sites that are asked at a time, by all threads.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: int,
        workers: int,
        answers: Answers,
        *,
        together: int = 1,
        threads: Callable[[], int] | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(client_app, sites, workers, threads=threads, pulse=pulse)
        self._answers, self._together = answers, max(1, together)

    def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterator[Delivery]:
        """See `server.coordinator.Port`; where one thread does it all, nobody looks at the deadline."""
        self._pulse()
        nodes = list(requests)
        threads = max(1, min(self._threads(), len(nodes)))
        if threads == 1:
            yield from self._share(nodes, requests, threads)
            return
        shares = [nodes[first::threads] for first in range(threads)]
        waiting = {self._pool.submit(self._listed, share, requests, threads): share for share in shares}
        end = monotonic() + deadline
        while waiting and (left := end - monotonic()) > 0:
            done: set[Future[list[Delivery]]]
            done, _ = wait(waiting, timeout=left, return_when=FIRST_COMPLETED)
            for future in [each for each in waiting if each in done]:
                del waiting[future]
                yield from future.result()
        for share in waiting.values():
            for node in share:
                yield Delivery(node, None, f"no answer within {deadline:.0f} s")

    def _listed(self, nodes: Sequence[int], requests: Mapping[int, bytes], threads: int) -> list[Delivery]:
        return list(self._share(nodes, requests, threads))

    def _share(self, nodes: Sequence[int], requests: Mapping[int, bytes], threads: int) -> Iterator[Delivery]:
        size = max(1, self._together // threads)
        for first in range(0, len(nodes), size):
            yield from self._asked(nodes[first : first + size], requests)

    def _asked(self, nodes: Sequence[int], requests: Mapping[int, bytes]) -> list[Delivery]:
        sites = {node: site_index(self._contexts[node].node_config) for node in nodes}
        try:
            outcomes = self._answers({sites[node]: requests[node] for node in nodes})
        except Exception as error:  # then each is asked on its own, and what went wrong shows there
            if len(nodes) == 1:
                return [_delivery(nodes[0], error)]
            return [told for node in nodes for told in self._asked([node], requests)]
        return [_delivery(node, outcomes[sites[node]]) for node in nodes]


def _delivery(node: int, outcome: Outcome) -> Delivery:
    if isinstance(outcome, bytes):
        return Delivery(node, outcome)
    kind = outcome.code if isinstance(outcome, FedwardError) else type(outcome).__name__
    return Delivery(node, None, f"fedward: {kind}")
