"""Flower's Grid without processes: messages go straight to the ClientApp, on a few threads."""

from __future__ import annotations

from collections.abc import Iterable
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
        workers: sites that work at the same time.
    """

    def __init__(self, client_app: ClientApp, sites: int, workers: int) -> None:
        # Flower builds a message from the identity of the process that it believes to be in.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
        self._app = client_app
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="site")
        self._contexts = {
            1000 + i: Context(
                run_id=RUN_ID, node_id=1000 + i, node_config={SITE_KEY: i}, state=RecordDict(), run_config={}
            )
            for i in range(sites)
        }
        self._pending: dict[str, Future[Message]] = {}
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
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"message-{self._sent}"
            message.metadata.__dict__["_message_id"] = message_id
            self._pending[message_id] = self._pool.submit(self._deliver, message)
            ids.append(message_id)
        return ids

    def _deliver(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            failure = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=str(error))
            return Message(failure, reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = {i: self._pending[i] for i in message_ids if i in self._pending}
        done, _ = wait(asked.values(), timeout=LONGEST_WAIT, return_when=FIRST_COMPLETED)
        return [self._pending.pop(i).result() for i, future in asked.items() if future in done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        wait([self._pending[i] for i in ids], timeout=timeout)
        return [self._pending.pop(i).result() for i in ids if self._pending[i].done()]

    def close(self) -> None:
        """End the threads once their work is done."""
        self._pool.shutdown(wait=True, cancel_futures=True)
