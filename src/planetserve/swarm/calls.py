"""hivemind's calls (one request, one answer), served by this process instead of the daemon.

The daemon would hold half-sent requests for ever, as many as there are streams, and for each at
once the 4 MiB that its first bytes may announce. Here a call is an incoming stream like any other:
few per peer and in all (`node.py`), ended if its request takes too long or is larger than any needs
to be, and memory grows with what arrives. What travels is what hivemind's daemons say to each
other: a length and a `PersistentConnectionRequest` in either direction.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hivemind.proto import p2pd_pb2

from planetserve.errors import PlanetServeError, RemoteProtocolError
from planetserve.swarm.delimited import check_shape, read_message, varint
from planetserve.swarm.sockets import send_all
from planetserve.types import PeerId

MAX_REQUEST_BYTES = 128 * 1024
"""Thirty records of 4 KB; nothing that is asked of the directory needs more."""
REQUEST_TIMEOUT_S = 5.0
"""For a whole request; hivemind's callers wait three seconds for the answer."""
_ANSWER_TIMEOUT_S = 10.0
_MAX_FIELDS = 8

Call = Callable[[bytes, PeerId], Awaitable[bytes]]
"""Takes a request and who sent it; of what it raises, the caller is told no more than a code."""


async def answer(sock: socket.socket, head: bytes, remote: PeerId, call: Call) -> None:
    """Read one request from the stream, answer it and close the stream.

    Args:
        sock: the stream; what is left of it is closed here.
        head: bytes of it that have been read.
        remote: who opened it.
        call: what to do.

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
        try:
            result = p2pd_pb2.CallUnaryResponse(response=await call(request.callUnary.data, remote))
        except Exception as error:  # noqa: BLE001  the caller is told, whatever it was
            code = error.code if isinstance(error, PlanetServeError) else "failed"
            result = p2pd_pb2.CallUnaryResponse(error=code.encode())
        message = p2pd_pb2.PersistentConnectionRequest(callId=request.callId, unaryResponse=result)
        data = message.SerializeToString()
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await send_all(sock, varint(len(data)) + data)


async def _read_request(sock: socket.socket, head: bytes) -> p2pd_pb2.PersistentConnectionRequest:
    data, _ = await read_message(sock, head, MAX_REQUEST_BYTES)
    check_shape(memoryview(data), most=_MAX_FIELDS)
    try:
        request = p2pd_pb2.PersistentConnectionRequest.FromString(data)
    except DecodeError:
        raise RemoteProtocolError("not a call") from None
    if not request.HasField("callUnary"):
        raise RemoteProtocolError("not a call")
    return request
