"""What a client can make a server dial, and what it learns from that: as little as can be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from planetserve.crypto.identity import Identity
from planetserve.errors import PeerUnreachable, TransportError
from planetserve.server import next_hop_dials as dials_module
from planetserve.server.limits import ServerLimits
from planetserve.server.next_hop_dials import Dials
from planetserve.testing.clock import ManualClock
from planetserve.wire.messages import NextHop

PEER = Identity.generate().peer_id
PUBLIC = "/ip4/8.8.8.8/tcp/31337"
PRIVATE = "/ip4/192.168.1.5/tcp/31337"


class Node:
    """Dials nothing, and notes what it should."""

    def __init__(self, own: Sequence[str] = (PUBLIC,), *, connected: bool = False):
        self.own = own
        self.connected = connected
        self.dialled: list[list[str]] = []
        self.failure: Exception = PeerUnreachable("10.0.0.7:22 says SSH-2.0")
        self.held: asyncio.Event | None = None

    def addresses(self) -> Sequence[str]:
        return self.own

    async def is_connected(self, peer_id: str) -> bool:
        return self.connected

    async def open_stream(
        self, peer_id: str, addresses: list[str], protocol: str, timeout_s: float
    ) -> None:
        self.dialled.append(addresses)
        if self.held is not None:
            await self.held.wait()
        raise self.failure


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the dials would have slept; they do not."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(delay_s: float) -> None:
        slept.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(dials_module.asyncio, "sleep", note)
    return slept


def new_dials(node: Node, **limits: float) -> Dials:
    return Dials(node, ServerLimits(**limits), ManualClock())  # type: ignore[arg-type]


async def failure_of(dials: Dials, *addresses: str, client: str = "client") -> PeerUnreachable:
    hop = NextHop(peer_id=PEER, edge=1, fresh=True, end=9, addresses=list(addresses))
    with pytest.raises(PeerUnreachable) as caught:
        await dials.open(client, hop, "push")
    return caught.value


async def test_every_failure_looks_the_same_and_takes_as_long(waits: list[float]) -> None:
    node = Node()
    dials = new_dials(node)
    texts = set()
    for failure in (PeerUnreachable("closed port"), TransportError("the daemon is busy")):
        node.failure = failure
        texts.add(str(await failure_of(dials, PUBLIC)))
    texts.add(str(await failure_of(dials, PRIVATE)))
    texts.add(str(await failure_of(dials, "/dns4/router.lan/tcp/80")))
    assert len(texts) == 1
    assert min(waits) > dials_module.CONNECT_TIMEOUT_S - 1
    assert node.dialled == [[PUBLIC], [PUBLIC]], "nothing private, no names"


async def test_a_private_peer_that_has_connected_itself_is_reached(waits: list[float]) -> None:
    node = Node(connected=True)
    await failure_of(new_dials(node), PRIVATE)
    assert node.dialled == [[]]


async def test_a_client_causes_so_many_dials_a_minute(waits: list[float]) -> None:
    node = Node()
    dials = new_dials(node, max_peer_opens=60.0, peer_open_burst=5)
    for _ in range(20):
        await failure_of(dials, PUBLIC)
    assert len(node.dialled) == 5
    await failure_of(dials, PUBLIC, client="another")
    assert len(node.dialled) == 6


async def test_a_client_causes_so_many_dials_at_once(waits: list[float]) -> None:
    node = Node()
    node.held = asyncio.Event()
    dials = new_dials(node)
    most = dials_module.MAX_DIALS_PER_PEER
    tasks = [asyncio.create_task(failure_of(dials, PUBLIC)) for _ in range(most + 10)]
    other = asyncio.create_task(failure_of(dials, PUBLIC, client="another"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(node.dialled) == most + 1
    node.held.set()
    await asyncio.gather(*tasks, other)
    assert len(node.dialled) == most + 11
