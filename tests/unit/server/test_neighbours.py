"""Whom a server pings: those that may come next in a chain, and nobody inside its own network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from planetserve.model.manifest import OwnWeights
from planetserve.server import neighbours
from planetserve.server.neighbours import Neighbours, likely_next
from planetserve.testing.clock import ManualClock
from planetserve.types import BlockSpan, PeerId, ServerInfo, ServerState


def server(name: str, start: int = 4, end: int = 8) -> ServerInfo:
    return ServerInfo(
        peer_id=name, model="tiny", fingerprint="f", span=BlockSpan(start, end), num_blocks=8,
        state=ServerState.ONLINE, dtype="float32", addresses=(), decode_ms_per_block=1.0,
        tokens_per_s_per_block=1.0, network_bytes_per_s=1.0, free_cache_tokens=1,
        max_session_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("start", "end", "likely"),
    [
        (4, 8, True),  # goes on where 2:4 ends
        (3, 5, True),  # begins inside it
        (3, 4, True),
        (0, 5, True),  # holds block 4, whatever else
        (2, 4, False),  # the same span
        (0, 4, False),
        (5, 8, False),  # too far ahead
        (0, 2, False),
    ],
)
def test_who_may_come_next(start: int, end: int, likely: bool) -> None:
    found = likely_next(BlockSpan(2, 4), [server("x", start, end)])
    assert bool(found) is likely


OWN = "12D3KooWSvBiMkFKwpBPXQTg6RwPMAGjiGo2C9wDMd3WcbfAeZ3N"


async def test_nobody_has_a_server_dial_inside_its_own_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled: dict[PeerId, list[str]] = {}

    async def ping(
        _node: object, peer_id: PeerId, addresses: Sequence[str], _timeout_s: float
    ) -> float:
        dialled[peer_id] = list(addresses)
        return 1.0

    async def is_connected(peer_id: PeerId) -> bool:
        return peer_id == "met"

    places = {
        "public": ["/ip4/8.8.8.8/tcp/1"],
        "private": ["/ip4/10.0.0.1/tcp/22", "/ip4/127.0.0.1/tcp/6379", "/ip4/169.254.1.1/tcp/80"],
        "both": ["/ip4/8.8.4.4/tcp/1", "/ip4/192.168.1.1/tcp/80"],
        "met": ["/ip4/10.0.0.2/tcp/1"],
        "nowhere": [],
    }

    async def lookup(_model: str) -> list[ServerInfo]:
        return [
            dataclasses.replace(server(name), addresses=tuple(texts))
            for name, texts in places.items()
        ]

    monkeypatch.setattr(neighbours, "ping", ping)
    node = SimpleNamespace(
        peer_id="me",
        addresses=lambda: (f"/ip4/9.9.9.9/tcp/1/p2p/{OWN}",),
        is_connected=is_connected,
    )
    directory = SimpleNamespace(lookup=lookup)
    measured = Neighbours(node, directory, ManualClock())  # type: ignore[arg-type]
    await measured.measure("tiny", OwnWeights("f", None), BlockSpan(2, 4))
    assert dialled == {
        "public": ["/ip4/8.8.8.8/tcp/1"], "both": ["/ip4/8.8.4.4/tcp/1"], "met": [],
    }  # fmt: skip
