"""The way from the Flower side of a hospital to its vault; loads neither torch nor opacus.

A deployed SuperNode is told the vault's socket on its own command line. A simulation puts its vaults
in place of the socket with `install`, so that the ClientApp stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import grpc

from client import wire_pb2
from common.errors import MessageError, SiteError

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 2 << 30
ANSWER_METHOD = "/fedward.Vault/Answer"
SOCKET_KEY = "vault-socket"

Answer = Callable[[bytes], bytes]
_resolve: Callable[[Mapping[str, object]], Answer] | None = None


def install(resolve: Callable[[Mapping[str, object]], Answer] | None) -> None:
    """Let a simulation decide which vault answers for a node configuration (`None`: the socket again)."""
    global _resolve
    _resolve = resolve


def vault_for(node_config: Mapping[str, object]) -> Answer:
    """The function that answers requests on this node.

    Raises:
        SiteError: if the node's own configuration names no socket.
    """
    if _resolve is not None:
        return _resolve(node_config)
    socket = node_config.get(SOCKET_KEY)
    if not isinstance(socket, str) or not socket:
        raise SiteError(
            f"the SuperNode's configuration has no {SOCKET_KEY}", remedy="use `fedward-site connect`"
        )
    return lambda request: ask(socket, request)


def ask(socket: str, request: bytes, timeout: float | None = None) -> bytes:
    """Send one message to the vault behind a Unix socket and return its answer.

    Raises:
        SiteError: if no vault listens there.
        MessageError: if the answer grows beyond 2 GiB.
    """
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        call = channel.stream_stream(
            ANSWER_METHOD,
            request_serializer=wire_pb2.Chunk.SerializeToString,
            response_deserializer=wire_pb2.Chunk.FromString,
        )
        try:
            return gather(call(chunks(request), timeout=timeout, wait_for_ready=False))
        except grpc.RpcError as error:
            raise SiteError(
                f"the vault at {socket} does not answer ({error.code().name})",
                remedy="start it with `fedward-site serve` and check the socket's permissions",
            ) from None


def chunks(message: bytes) -> Iterator[wire_pb2.Chunk]:
    """Cut a message into pieces of at most 1 MiB (one empty piece for an empty message)."""
    view = memoryview(message)
    for start in range(0, max(1, len(view)), CHUNK_BYTES):
        yield wire_pb2.Chunk(data=bytes(view[start : start + CHUNK_BYTES]))


def gather(pieces: Iterable[wire_pb2.Chunk], limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """Put a message together again.

    Raises:
        MessageError: as soon as it is larger than `limit` bytes.
    """
    message = bytearray()
    for piece in pieces:
        if len(message) + len(piece.data) > limit:
            raise MessageError(f"a message of more than {limit} bytes", remedy="raise the vault's limit")
        message += piece.data
    return bytes(message)
