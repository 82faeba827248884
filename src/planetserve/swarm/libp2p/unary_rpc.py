"""hivemind's calls (one request, one answer), served by this process instead of the daemon.

The daemon would hold half-sent requests for ever, as many as there are streams, and for each at
once the 4 MiB that its first bytes may announce. Here a call is an incoming stream like any other:
few per peer and in all (`node.py`), ended if its request takes too long or is larger than any needs
to be, and memory grows with what arrives. What travels is what hivemind's daemons say to each
other: a length and a `PersistentConnectionRequest` in either direction.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Iterator

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hivemind.proto import p2pd_pb2

from planetserve.errors import PlanetServeError, QueueFull, RemoteProtocolError
from planetserve.swarm.libp2p.delimited import read_message, with_length
from planetserve.swarm.libp2p.sockets import send_all
from planetserve.swarm.network import Call
from planetserve.types import PeerId

MAX_REQUEST_BYTES = 128 * 1024
"""Maximum size of a request in bytes: thirty records of 4 KB, the most that any call needs."""
REQUEST_TIMEOUT_S = 5.0
"""Seconds to wait for a whole request; hivemind's callers wait three for the answer."""
_ANSWER_TIMEOUT_S = 10.0
MAX_UNSENT_BYTES = 256 << 20
"""Maximum bytes of answers being sent, of all peers."""
MAX_UNSENT_BYTES_PER_PEER = 16 << 20
"""Maximum bytes of answers being sent to one peer: a look-up may have four requests for two full
keys each under way."""


class Unsent:
    """Answers on their way, of all calls of a node."""

    def __init__(self) -> None:
        self._per_peer: Counter[PeerId] = Counter()

    @property
    def total(self) -> int:
        """Their bytes."""
        return self._per_peer.total()

    @contextlib.contextmanager
    def holding(self, peer: PeerId, num_bytes: int) -> Iterator[None]:
        """Count an answer while it is sent.

        Raises:
            QueueFull: there are too many already.
        """
        if (
            self._per_peer[peer] + num_bytes > MAX_UNSENT_BYTES_PER_PEER
            or self.total + num_bytes > MAX_UNSENT_BYTES
        ):
            raise QueueFull("answers wait to be taken")
        self._per_peer[peer] += num_bytes
        try:
            yield
        finally:
            self._per_peer[peer] -= num_bytes
            if not self._per_peer[peer]:
                del self._per_peer[peer]


class CallServer:
    """Answers the calls that others make to a node.

    Args:
        refused: `refused["call"]` is how many streams brought no request in time.
    """

    def __init__(self, refused: Counter[str]):
        self.calls: dict[str, Call] = {}
        """What may be called, by protocol name."""
        self.unsent = Unsent()
        self._refused = refused

    async def serve(self, protocol: str, sock: socket.socket, head: bytes, remote: PeerId) -> None:
        """Answer the request on a stream of `protocol`, as `answer` does, but raise nothing."""
        try:
            await answer(sock, head, remote, self.calls[protocol], self.unsent)
        except (OSError, EOFError, TimeoutError, RemoteProtocolError):
            self._refused["call"] += 1


async def answer(
    sock: socket.socket, head: bytes, remote: PeerId, call: Call, unsent: Unsent
) -> None:
    """Read one request from the stream, answer it and close the stream.

    Args:
        sock: the stream; what is left of it is closed here.
        head: bytes of it that have been read.
        remote: who opened it.
        call: what to do.
        unsent: where the answer is counted.

    Raises:
        TimeoutError: the request or the answer took too long.
        OSError: the stream broke.
        EOFError: it ended before the request did.
        RemoteProtocolError: not a request, or too long.
    """
    with sock:
        sock.setblocking(False)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            request = await _read_request(sock, head)
        with contextlib.ExitStack() as held:
            try:
                response = await call(request.callUnary.data, remote)
                held.enter_context(unsent.holding(remote, len(response)))
                result = p2pd_pb2.CallUnaryResponse(response=response)
            except Exception as error:  # noqa: BLE001  the caller is told, whatever it was
                code = error.code if isinstance(error, PlanetServeError) else "failed"
                result = p2pd_pb2.CallUnaryResponse(error=code.encode())
            message = p2pd_pb2.PersistentConnectionRequest(
                callId=request.callId, unaryResponse=result
            )
            data = with_length(message)
            response, result, message = b"", None, None  # one copy is enough to wait with
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                await send_all(sock, data)


async def _read_request(sock: socket.socket, head: bytes) -> p2pd_pb2.PersistentConnectionRequest:
    data, _ = await read_message(sock, head, MAX_REQUEST_BYTES)
    try:
        request = p2pd_pb2.PersistentConnectionRequest.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("not a call") from None
    if not request.IsInitialized() or not request.HasField("callUnary"):
        raise RemoteProtocolError("not a call")
    return request
