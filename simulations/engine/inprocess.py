"""Flower's Grid without processes: messages go straight to the ClientApp, on this thread or on a few."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations.engine.sites import SITE_KEY

LONGEST_WAIT = 0.05  # seconds that a look for replies may block
RUN_ID = 1


class InProcessGrid(Grid):
    """Runs a ClientApp for `sites` nodes.

    Contents are handed over by reference: fedward's messages are immutable bytes.

    Args:
        workers: threads at most, each with its share of the sites.
        threads: how many threads the next messages deserve.
        pulse: called whenever messages are sent.
    """

    def __init__(
        self,
        client_app: ClientApp,
        sites: int,
        workers: int,
        *,
        threads: Callable[[], int] | None = None,
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        # Flower builds a message from the identity of the process that it believes to be in.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        self._app = client_app
        self._threads, self._pulse = threads or (lambda: workers), pulse
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="site")
        self._contexts = {
            1000 + i: Context(
                run_id=RUN_ID, node_id=1000 + i, node_config={SITE_KEY: i}, state=RecordDict(), run_config={}
            )
            for i in range(sites)
        }
        self._pending: dict[str, Future[list[Message]]] = {}
        self._place: dict[str, int] = {}
        self._sent = 0
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("no run is set")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._pulse()
        pushed = list(messages)
        ids = []
        for message in pushed:
            self._sent += 1
            message_id = f"message-{self._sent}"
            message.metadata.__dict__["_message_id"] = message_id
            ids.append(message_id)
        threads = max(1, min(self._threads(), len(pushed)))
        for first in range(threads):
            share = slice(first, None, threads)
            work = self._begun(pushed[share], here=threads == 1)
            for place, message_id in enumerate(ids[share]):
                self._pending[message_id], self._place[message_id] = work, place
        return ids

    def _begun(self, messages: list[Message], *, here: bool) -> Future[list[Message]]:
        """Work that is under way; that is over, if it is to be done here."""
        if not here:
            return self._pool.submit(self._deliver_all, messages)
        done: Future[list[Message]] = Future()
        done.set_result(self._deliver_all(messages))
        return done

    def _deliver_all(self, messages: list[Message]) -> list[Message]:
        return [self._deliver(message, self._contexts[message.metadata.dst_node_id]) for message in messages]

    def _deliver(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except Exception as error:
            failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=str(error))
            return Message(failure, reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [i for i in message_ids if i in self._pending]
        wait({self._pending[i] for i in asked}, timeout=LONGEST_WAIT, return_when=FIRST_COMPLETED)
        return [self._taken(i) for i in asked if self._pending[i].done()]

    def _taken(self, message_id: str) -> Message:
        return self._pending.pop(message_id).result()[self._place.pop(message_id)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        wait({self._pending[i] for i in ids}, timeout=timeout)
        return [self._taken(i) for i in ids if self._pending[i].done()]

    def close(self) -> None:
        """End the threads once their work is done."""
        self._pool.shutdown(wait=True, cancel_futures=True)
