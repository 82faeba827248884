"""The hops of one ring in their order, and how new ones take the place of others.

`splice` opens the new hops, tells the two beside them whom they have to do with from now on, and
sends a fresh secret for every edge that changes. Which hops have to go and who comes instead is for
`ring.py` to say, and so is what the new ones lack.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from planetserve.client.ring.hop_connection import HopConnection, Inbox, chunk_tokens
from planetserve.client.ring.receipts import RingReceipts
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.crypto.secrets import new_edge_secret, wipe
from planetserve.edge.receiver import StepReceiver
from planetserve.edge.sender import StepSender
from planetserve.errors import NoChainAvailable, PlanetServeError, SessionClosed
from planetserve.swarm.network import Network
from planetserve.types import CLIENT, Hop, PeerId, ServerInfo
from planetserve.wire.frame import ANSWER_EDGE, MAX_EDGE
from planetserve.wire.messages import Rewire


class HopSetup:
    """The links to the hops, and the numbers of edges and epochs given out so far.

    Args:
        node: what streams are opened from.
        spec: what the session asks of every hop.
        session_id: names the session.
        inbox: where what the hops say goes.
        sender: the client's end of the edge to the first hop, which gets its secrets.
        receiver: the client's end of the edge from the last hop.
        receipts: what the hops' receipts are compared by, if they are asked for any.
    """

    def __init__(
        self,
        node: Network,
        spec: RingSpec,
        session_id: bytes,
        inbox: Inbox,
        sender: StepSender,
        receiver: StepReceiver,
        receipts: RingReceipts | None = None,
    ):
        self.links: list[HopConnection] = []
        """Hops that are in the ring now, the first one first."""
        self._node = node
        self._spec = spec
        self._session_id = session_id
        self._inbox = inbox
        self._sender = sender
        self._receiver = receiver
        self._receipts = receipts
        self._edge = -1
        self._epoch = -1
        self._retired: set[asyncio.Task[None]] = set()
        self._closed = False

    async def splice(
        self,
        first: int,
        stop: int,
        hops: Sequence[Hop],
        servers: Mapping[PeerId, ServerInfo],
        first_step: int,
    ) -> list[HopConnection]:
        """Put `hops` in the place of links `[first, stop)`, and return their links.

        Args:
            first: the first link to be replaced.
            stop: the link after the last of them.
            hops: who runs the blocks from now on.
            servers: what they announce.
            first_step: number of the first step that passes between them and their neighbours.

        Raises:
            NoChainAvailable: this ring has had as many hops as it may.
            SessionClosed: the ring was closed meanwhile.
            PlanetServeError: a hop refused or cannot be reached; `peer_id` names it.
        """
        if self._edge + len(hops) > MAX_EDGE:
            raise NoChainAvailable("this session has had too many hops; open another")
        for link in self.links[first:stop]:
            self._retire(link)
        self._epoch += 1
        links = [self._new_link(hop, servers[hop.peer_id]) for hop in hops]
        secrets = [new_edge_secret() for _ in range(len(hops) + 1)]
        before = self.links[first - 1] if first else None
        after = self.links[stop] if stop < len(self.links) else None
        try:
            await self._open_links(links, before, after, secrets, first_step)
            await self._send_edge_keys(links, before, secrets, first_step)
            if self._closed:
                raise SessionClosed("the session was closed while hops were put in")
        except BaseException:
            for link in links:
                self._retire(link)
            raise
        else:
            if before is None:
                self._start_sender(links[0], secrets[0], first_step)
            if after is None:
                self._start_receiver(secrets[-1], first_step)
        finally:
            wipe(*secrets)
        self.links[first:stop] = links
        return links

    def _new_link(self, hop: Hop, info: ServerInfo) -> HopConnection:
        self._edge += 1
        compare = None if self._receipts is None else self._receipts.add
        return HopConnection(hop, info, self._edge, self._session_id, self._inbox, compare)

    def _start_sender(self, first: HopConnection, secret: bytearray, first_step: int) -> None:
        hop, now_s = first.hop, asyncio.get_running_loop().time()
        self._sender.start(secret, first.edge, self._epoch, (hop.start, hop.end), now_s)
        if self._receipts is not None:
            self._receipts.sent.start(first.edge, self._epoch, first_step)

    def _start_receiver(self, secret: bytearray, first_step: int) -> None:
        self._receiver.start(secret, self._epoch)
        if self._receipts is not None:
            self._receipts.received.start(ANSWER_EDGE, self._epoch, first_step)

    async def close(self) -> None:
        """Tell every hop that the session is over and release the streams. Never raises.

        None can be put in afterwards.
        """
        self._closed = True
        await asyncio.gather(*self._retired, *(link.close() for link in self.links))
        self.links = []

    async def _open_links(
        self,
        links: Sequence[HopConnection],
        before: HopConnection | None,
        after: HopConnection | None,
        secrets: Sequence[bytearray],
        first_step: int,
    ) -> None:
        """Open the new hops, and tell the one after them to expect the last of them."""
        following = None if after is None else after.as_next(fresh=False)
        jobs = []
        for index in reversed(range(len(links))):
            if index:
                previous = links[index - 1].peer_id
            else:
                previous = CLIENT if before is None else before.peer_id
            jobs.append(
                links[index].open(
                    self._node,
                    self._spec,
                    epoch=self._epoch,
                    previous=previous,
                    following=following,
                    first_step=first_step,
                )
            )
            if index:
                following = links[index].as_next(fresh=True)
        if after is not None:
            message = self._rewiring(first_step, previous=links[-1].peer_id)
            jobs.append(self._rewire(after, message, secrets[-1], new_edge_secret()))
        await _all(jobs)

    async def _send_edge_keys(
        self,
        links: Sequence[HopConnection],
        before: HopConnection | None,
        secrets: Sequence[bytearray],
        first_step: int,
    ) -> None:
        """Give the new hops their keys, and the one before them its new neighbour."""
        jobs = [
            link.send_edge_keys(self._epoch, secrets[index], secrets[index + 1])
            for index, link in enumerate(links)
        ]
        if before is not None:
            message = self._rewiring(
                first_step, following=links[0], max_chunk_tokens=chunk_tokens([before, links[0]])
            )
            jobs.append(self._rewire(before, message, new_edge_secret(), secrets[0]))
        await _all(jobs)

    def _rewiring(
        self,
        first_step: int,
        previous: PeerId | None = None,
        following: HopConnection | None = None,
        max_chunk_tokens: int = 1,
    ) -> Rewire:
        return Rewire(
            epoch=self._epoch,
            previous=previous,
            next=None if following is None else following.as_next(fresh=True),
            first_step=first_step,
            max_chunk_tokens=max_chunk_tokens,
        )

    async def _rewire(
        self, link: HopConnection, message: Rewire, inbound: bytearray, outbound: bytearray
    ) -> None:
        await link.rewire(message, inbound, outbound, self._spec.connect_timeout_s)

    def _retire(self, link: HopConnection) -> None:
        """Let go of a hop without waiting for it."""
        task = asyncio.create_task(link.close())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)


async def _all(jobs: Sequence[Any]) -> None:
    """Run coroutines at the same time; when all have ended, raise the first failure if any, with
    the others as its `others`."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        first, *others = failures
        if isinstance(first, PlanetServeError):
            first.others = [error for error in others if isinstance(error, PlanetServeError)]
        raise first
