"""What the tests of the swarm share: where nodes listen, and something to announce."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from planetserve.crypto.identity import Identity
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.types import BlockSpan, ServerInfo, ServerState

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)

StartNode = Callable[..., Awaitable[SwarmNode]]
"""The fixture `start_node`: `await start_node(join=other_node, ...)`."""


def make_info(identity: Identity, **fields: Any) -> ServerInfo:
    """A plausible announcement of the identity's owner."""
    values: dict[str, Any] = {
        "peer_id": identity.peer_id,
        "model": "tiny",
        "fingerprint": "f" * 64,
        "span": BlockSpan(0, 4),
        "num_blocks": 8,
        "state": ServerState.ONLINE,
        "dtype": "float32",
        "addresses": (f"/ip4/127.0.0.1/tcp/31337/p2p/{identity.peer_id}",),
        "decode_ms_per_block": 1.5,
        "tokens_per_s_per_block": 900.0,
        "network_bytes_per_s": 1e8,
        "free_cache_tokens": 4096,
        "max_session_tokens": 2048,
    }
    return ServerInfo(**{**values, **fields})


async def exchange(
    client: SwarmNode, server: SwarmNode, protocol: str, pieces: tuple[bytes, ...]
) -> bytes:
    """Send these bytes on a stream; what comes back until its end."""
    loop = asyncio.get_running_loop()
    with await client.open_socket(server.peer_id, protocol) as sock:
        for piece in pieces:
            await loop.sock_sendall(sock, piece)
            await asyncio.sleep(0.01)
        answer = bytearray()
        async with asyncio.timeout(5):
            while part := await loop.sock_recv(sock, 4096):
                answer += part
        return bytes(answer)


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that nobody signals."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def varint(number: int) -> bytes:
    """A length as protobuf streams have it in front of a message."""
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*data, number])
