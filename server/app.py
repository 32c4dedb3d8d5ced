"""The coordinator's Flower ServerApp: gives the coordinator Flower's grid as its port."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.messages import Arrays
from common.models.initial import initial_parameters
from common.study import Study
from server.coordinator import Delivery, run_session
from server.store import Store

RECORD, FIELD, STYPE = "fedward", "message", "safetensors"
SHORTEST_POLL, LONGEST_POLL = 0.001, 0.25  # seconds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the session that the run's configuration names (`store`, `session`)."""
    config = context.run_config
    store = Store(Path(str(config["store"])), durable=not config.get("volatile", False))
    session = str(config["session"])

    def initial(study: Study, seed: int) -> Arrays:
        return initial_parameters(study, seed, store.initial(session))

    run_session(store, session, FlowerPort(grid), initial)


@runtime_checkable
class Direct(Protocol):
    """A grid whose nodes are in this very process: they can be asked without Flower's messages."""

    def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterable[Delivery]:
        """See `server.coordinator.Port`."""


class FlowerPort:
    """Flower's grid, polled often instead of every three seconds."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Sequence[int]:
        return sorted(self._grid.get_node_ids())

    def exchange(self, requests: Mapping[int, bytes], deadline: float) -> Iterable[Delivery]:
        if isinstance(self._grid, Direct):
            return self._grid.exchange(requests, deadline)
        return self._by_messages(requests, deadline)

    def _by_messages(self, requests: Mapping[int, bytes], deadline: float) -> Iterator[Delivery]:
        waiting = {}
        records = {id(content): _record(content) for content in requests.values()}
        messages = [
            self._grid.create_message(records[id(c)], "train", node, group_id="", ttl=deadline + 60)
            for node, c in requests.items()
        ]
        for message_id, message in zip(self._grid.push_messages(messages), messages, strict=True):
            if message_id:
                waiting[message_id] = message.metadata.dst_node_id
            else:
                yield Delivery(message.metadata.dst_node_id, None, "the node is not online")
        end, pause = time.monotonic() + deadline, SHORTEST_POLL
        while waiting and time.monotonic() < end:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield self._delivery(node, reply)
            pause = SHORTEST_POLL if replies else min(2 * pause, LONGEST_POLL)
            if waiting and not replies:
                time.sleep(pause)
        for node in waiting.values():
            yield Delivery(node, None, f"no answer within {deadline:.0f} s")

    def _delivery(self, node: int, reply: Message) -> Delivery:
        if reply.has_error():
            return Delivery(node, None, f"Flower error {reply.error.code}: {reply.error.reason}"[:300])
        try:
            return Delivery(node, reply.content[RECORD][FIELD].data)
        except (KeyError, AttributeError, TypeError):
            return Delivery(node, None, "an answer that is not fedward's")


def _record(content: bytes) -> RecordDict:
    record = ArrayRecord()  # given to its constructor, Flower would copy the array
    record[FIELD] = Array("uint8", (len(content),), STYPE, content)
    return RecordDict({RECORD: record})
