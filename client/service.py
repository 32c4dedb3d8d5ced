"""The vault's Unix socket: gRPC, this machine only, in a folder that only its owner and group can enter."""

from __future__ import annotations

import os
import socket as socketlib
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from client import wire_pb2
from client.door import ANSWER_METHOD, MAX_MESSAGE_BYTES, chunks, gather
from client.release import refusal
from client.vault import Vault
from common.errors import FedwardError, SiteError
from common.messages import encode

LONGEST_SOCKET_PATH = 100  # bytes; Linux takes 107


def serve(vault: Vault, socket: Path, *, allow_seeded: bool = False) -> grpc.Server:
    """Listen on `socket` until the returned server is stopped.

    Args:
        allow_seeded: only tests, which must reproduce a simulation, say true; no command does.

    Raises:
        SiteError: if the socket's folder is open to everybody, its path is too long, another vault
            listens there, or the vault's noise comes from a seed.
    """
    if not vault.randomness.protective and not allow_seeded:
        raise SiteError("a deployed vault takes no seed", remedy="seeds are for simulations")
    secure_folder(socket)
    if _answers(socket):
        raise SiteError(f"{socket}: another vault listens there", remedy="stop it, or give another: --socket")
    server = grpc.server(ThreadPoolExecutor(max_workers=2), options=[("grpc.max_concurrent_streams", 8)])
    handler = grpc.stream_stream_rpc_method_handler(
        lambda pieces, _: _answer(vault, pieces),
        request_deserializer=wire_pb2.Chunk.FromString,
        response_serializer=wire_pb2.Chunk.SerializeToString,
    )
    service, method = ANSWER_METHOD.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    before = os.umask(0o117)  # the socket is made with mode 0660
    try:
        server.add_insecure_port(f"unix:{socket}")
        server.start()
    except RuntimeError:
        raise SiteError(f"{socket}: cannot listen there", remedy="stop the vault that does") from None
    finally:
        os.umask(before)
    return server


def secure_folder(socket: Path) -> None:
    """Make the socket's folder (mode 0700), or check that others can't enter it.

    Raises:
        SiteError: if they can, or the path is too long for a socket.
    """
    if len(os.fsencode(socket)) > LONGEST_SOCKET_PATH:
        raise SiteError(f"{socket}: too long for a socket", remedy="give a shorter path: --socket")
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = socket.parent.stat()
    if stat.S_IMODE(status.st_mode) & 0o007:
        raise SiteError(
            f"{socket.parent}: everybody on this machine can reach the socket in it",
            remedy=f"chmod o-rwx {socket.parent}",
        )
    if socket.exists() and not socket.is_socket():
        raise SiteError(f"{socket}: not a socket", remedy="give another path: --socket")


def _answers(path: Path) -> bool:
    """Whether somebody listens there. gRPC would take a living socket away without a word."""
    with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _answer(vault: Vault, pieces: Iterator[wire_pb2.Chunk]) -> Iterator[wire_pb2.Chunk]:
    try:
        request = gather(pieces, MAX_MESSAGE_BYTES)
    except FedwardError as error:
        yield from chunks(encode(refusal(vault.site, error)))
        return
    yield from chunks(vault.answer(request))
