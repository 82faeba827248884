"""One session on a chain of hops: sends to the first, takes answers from the last, mends the rest.

Frames go client -> hop 1 -> ... -> hop n -> client; the streams to the hops in between carry only
what opens, deals, rewires and ends. When hops are lost, `mend` puts others in their place: those
that are left keep their KV cache, the hop before the gap (or the client) sends the new ones what
they lack, and the step under way goes on. Which hops those are is the caller's to say (`condemn`),
and so is who takes their place. Runs on the portal's loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from planetserve.client.hop_link import HopLink, Inbox
from planetserve.client.ring_ends import RingEnds, RingStep
from planetserve.client.ring_spec import Gap, RingSpec
from planetserve.client.vigil import Vigil
from planetserve.crypto.secrets import new_edge_secret, wipe
from planetserve.errors import (
    CapacityError,
    EdgeStalled,
    HandshakeFailed,
    NoChainAvailable,
    PlanetServeError,
    RemoteError,
    RemoteProtocolError,
    TransportError,
)
from planetserve.history import History
from planetserve.routing.moving import new_hops
from planetserve.swarm.node import SwarmNode
from planetserve.types import CLIENT, Chain, Hop, PeerId, ServerInfo
from planetserve.wire.frame import (
    FLAG_KEEP_LAST,
    FLAG_REPLAY,
    HEADER_BYTES,
    MAX_EDGE,
    MAX_STEP_BYTES,
    FrameHeader,
)
from planetserve.wire.messages import Rewire
from planetserve.wire.step import HopLoad, StepTable

MAX_CHUNKS_IN_FLIGHT = 8
"""Chunks sent and not answered. As many as a hop takes in (docs/protocol.md, 12), so that a first
hop whose next one is lost still reads what its client says of it."""

_TABLE_ROOM_BYTES = 64 * 1024
_POSITION_BYTES = 4
_SMALL_FRAME_BYTES = 64 * 1024
"""The daemon takes a frame below this at once, so sending it needs no task."""
_MENDABLE = (TransportError, CapacityError, RemoteError, HandshakeFailed)
"""Failures that leave the other hops' KV caches as they should be."""

PlanGap = Callable[[Gap], Awaitable[tuple[Chain, Mapping[PeerId, ServerInfo]]]]


class RingSession:
    """An open session. Made by `open`; one step at a time."""

    def __init__(self, node: SwarmNode, spec: RingSpec):
        self.chain = Chain(())
        self.session_id = os.urandom(16)
        self.loads_ms: Mapping[PeerId, float] = {}
        """Time per block that each hop named with the latest answer."""
        self._node = node
        self._spec = spec
        self._links: list[HopLink] = []
        self._condemned: set[HopLink] = set()
        self._inbox: Inbox = asyncio.Queue()
        self._vigil = Vigil(node, spec)
        self._ends = RingEnds(self.session_id, spec)
        self._edge = -1
        self._epoch = -1
        self._number = 0
        self._step: RingStep | None = None
        self._sending: asyncio.Task[None] | None = None
        self._retired: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        node: SwarmNode,
        chain: Chain,
        servers: Mapping[PeerId, ServerInfo],
        spec: RingSpec,
        history: History | None = None,
    ) -> RingSession:
        """Open `chain`'s hops concurrently, and begin to fill them with `history`.

        Raises:
            PlanetServeError: a hop refused or cannot be reached; `peer_id` names it.
        """
        ring = cls(node, spec)
        ring.chain = chain
        try:
            await ring._splice(0, 0, chain.hops, servers, history)
        except BaseException:
            await ring.close()
            raise
        return ring

    @property
    def is_broken(self) -> bool:
        """Whether hops have been condemned and not replaced."""
        return bool(self._condemned)

    @property
    def is_waiting(self) -> bool:
        """Whether a step is under way; `resume` waits for it."""
        return self._step is not None

    @property
    def leaving(self) -> set[PeerId]:
        """Hops that have said they will leave soon; the session should do without them."""
        return {link.peer_id for link in self._links if link.is_leaving}

    async def step(
        self, table: StepTable, hidden_TD: torch.Tensor, *, keep_last: bool = False
    ) -> torch.Tensor:
        """Send one step around the ring and return its `[num_tokens, hidden]` outputs, in the
        ring's dtype.

        Chunks of a long step follow one another through the hops like a pipeline. With
        `keep_last`, only the outputs of each row's last token come back; the others are zeros.

        Raises:
            PlanetServeError: a hop failed. Either `condemn` takes the error, and after `mend` the
                step goes on with `resume`, or the ring must be closed.
        """
        tables = table.split(self._max_chunk_tokens())
        hidden_TD = hidden_TD.to(self._spec.dtype)
        self._step = step = RingStep(self._number, tables, hidden_TD, keep_last)
        is_small = len(tables) == 1 and hidden_TD.nbytes < _SMALL_FRAME_BYTES
        if is_small and (self._sending is None or self._sending.done()):
            await self._send_chunk(step, 0)
        else:
            self._sending = asyncio.create_task(self._send_after(self._sending, step))
        return await self.resume()

    async def resume(self) -> torch.Tensor:
        """Wait for the step under way.

        Raises:
            PlanetServeError: as `step`.
        """
        step = self._step
        if step is None:
            raise RuntimeError("no step is under way")
        while step.num_answered < len(step.tables):
            header, payload = await self._next_answer()
            try:
                answer = self._ends.open(step, header, payload)
            except PlanetServeError as error:
                error.peer_id = self._links[-1].peer_id
                raise
            if answer is not None:
                chunk_TD, loads = answer
                self._note_loads(loads)
                step.take(chunk_TD)
        self._step = None
        self._number += 1
        for link in self._links:
            link.is_filling = False
        if step.output_TD is None:
            raise RuntimeError("a step has a chunk at least")
        return step.output_TD

    def condemn(self, error: PlanetServeError, culprits: Collection[PeerId] = ()) -> bool:
        """Mark the hops that `error` takes out of the ring.

        Args:
            error: what `step`, `resume` or `mend` raised.
            culprits: peers found to be at fault that the error does not name.

        Returns:
            Whether the rest of the ring can be kept; if not, it must be closed.
        """
        if not isinstance(error, _MENDABLE):
            return False
        peers = {error.peer_id, *culprits}
        if isinstance(error, EdgeStalled):
            peers.update(error.edge)
        self._condemned |= {link for link in self._links if link.lost or link.peer_id in peers}
        return self.is_broken

    def condemn_leaving(self) -> None:
        """Mark the hops that will leave."""
        self._condemned |= {link for link in self._links if link.is_leaving}

    async def move(
        self, chain: Chain, servers: Mapping[PeerId, ServerInfo], history: History
    ) -> None:
        """Between two steps: put the hops of `chain` in the place of those that it does not share
        with this ring's.

        Raises:
            PlanetServeError: as `mend`; the ring is broken then.
        """
        first, last = new_hops(self.chain.hops, chain.hops)
        entering = chain.hops[first : len(chain.hops) - last]

        async def plan_gap(_: Gap) -> tuple[Chain, Mapping[PeerId, ServerInfo]]:
            return Chain(entering), servers

        self._condemned.update(self._links[first : len(self._links) - last])
        await self.mend(plan_gap, history)
        self.chain = chain

    async def mend(self, plan_gap: PlanGap, history: History) -> None:
        """Replace the condemned hops and fill their replacements.

        Args:
            plan_gap: who runs the blocks of a gap from now on.
            history: what the client has sent into the ring in steps that are answered.

        Raises:
            NoChainAvailable: nobody can run the blocks in the gap.
            PlanetServeError: a new hop refused, or one that was thought alive is lost too.
        """
        bad = [
            index
            for index, link in enumerate(self._links)
            if link in self._condemned or link.is_filling
        ]
        first, stop = bad[0], bad[-1] + 1
        for link in self._links[first:stop]:
            self._condemned.add(link)
        span = dataclasses.replace(self._links[first].hop.span, end=self._links[stop - 1].hop.end)
        before = self._links[first - 1].peer_id if first else CLIENT
        after = self._links[stop].peer_id if stop < len(self._links) else CLIENT
        chain, servers = await plan_gap(Gap(span, before, after))
        await self._splice(first, stop, chain.hops, servers, history)
        hops = tuple(link.hop for link in self._links)
        self.chain = dataclasses.replace(self.chain, hops=hops)

    async def close(self) -> None:
        """Tell every hop that the session is over and release the streams. Never raises."""
        await self._stop_sending()
        await asyncio.gather(*self._retired, *(link.close() for link in self._links))
        self._ends.erase()
        self._links = []

    async def _splice(
        self,
        first: int,
        stop: int,
        hops: Sequence[Hop],
        servers: Mapping[PeerId, ServerInfo],
        history: History | None,
    ) -> None:
        """Put `hops` in the place of links `[first, stop)`."""
        if self._edge + len(hops) > MAX_EDGE:
            raise NoChainAvailable("this session has had too many hops; open another")
        for link in self._links[first:stop]:
            self._retire(link)
        self._epoch += 1
        links = []
        for hop in hops:
            self._edge += 1
            links.append(
                HopLink(hop, servers[hop.peer_id], self._edge, self.session_id, self._inbox)
            )
        secrets = [new_edge_secret() for _ in range(len(hops) + 1)]
        before = self._links[first - 1] if first else None
        after = self._links[stop] if stop < len(self._links) else None
        try:
            await self._open_links(links, before, after, secrets)
            await self._deal(links, before, secrets)
        except BaseException:
            for link in links:
                self._retire(link)
            raise
        else:
            if before is None:
                self._ends.start_sending(secrets[0], links[0].edge, self._epoch)
            if after is None:
                self._ends.start_receiving(secrets[-1], self._epoch)
        finally:
            wipe(*secrets)
        for link in links:
            link.is_filling = bool(self._links) or (history is not None and any(history.lengths))
        self._condemned.difference_update(self._links[first:stop])
        self._links[first:stop] = links
        if before is None:
            await self._refill(history)

    async def _open_links(
        self,
        links: Sequence[HopLink],
        before: HopLink | None,
        after: HopLink | None,
        secrets: Sequence[bytearray],
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
                )
            )
            following = links[index].as_next(fresh=True)
        if after is not None:
            message = self._rewiring(previous=links[-1].peer_id)
            jobs.append(self._rewire(after, message, secrets[-1], new_edge_secret()))
        await _all(jobs)

    async def _deal(
        self, links: Sequence[HopLink], before: HopLink | None, secrets: Sequence[bytearray]
    ) -> None:
        """Give the new hops their keys, and the one before them its new neighbour."""
        jobs = [
            link.deal(self._epoch, secrets[index], secrets[index + 1])
            for index, link in enumerate(links)
        ]
        if before is not None:
            message = self._rewiring(following=links[0], max_chunk_tokens=links[0].max_chunk_tokens)
            jobs.append(self._rewire(before, message, new_edge_secret(), secrets[0]))
        await _all(jobs)

    def _rewiring(
        self,
        previous: PeerId | None = None,
        following: HopLink | None = None,
        max_chunk_tokens: int = 1,
    ) -> Rewire:
        return Rewire(
            epoch=self._epoch,
            previous=previous,
            next=None if following is None else following.as_next(fresh=True),
            first_step=self._number,
            max_chunk_tokens=max_chunk_tokens,
        )

    async def _rewire(
        self, link: HopLink, message: Rewire, inbound: bytearray, outbound: bytearray
    ) -> None:
        await link.rewire(message, inbound, outbound, self._spec.connect_timeout_s)

    async def _refill(self, history: History | None) -> None:
        """Send a new first hop what it lacks, and the step under way from its beginning."""
        await self._stop_sending()
        replay = None if history is None else history.replay()
        if replay is None and self._step is None:
            return
        if replay is not None:
            self._number = max(self._number, 1)
        # Numbered now: the answer may be here already, and the next step begin before this is sent.
        work = self._send_again(replay, self._step, replayed_step=self._number - 1)
        self._sending = asyncio.create_task(work)

    def _retire(self, link: HopLink) -> None:
        """Let go of a hop without waiting for it."""
        task = asyncio.create_task(link.close())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def _next_answer(self) -> tuple[FrameHeader, bytearray]:
        """The next STEP frame of the last hop.

        Raises:
            PlanetServeError: what a hop of the ring failed with.
        """
        while True:
            try:
                # Nearly every answer comes in time; only a late one is worth a task and a watch.
                async with asyncio.timeout(self._spec.probe_after_s):
                    item = await self._inbox.get()
            except TimeoutError:
                item = await self._vigil.watch(self._inbox.get(), self._links, self._ends.frames)
            link = item[0]
            link.took()
            if link not in self._links:
                continue  # late news of a hop that has been replaced
            if len(item) == 2:
                if isinstance(item[1], EdgeStalled) and item[1].epoch != link.epoch_out:
                    continue  # about a neighbour that it no longer has
                raise await self._judged(link, item[1])
            if link is not self._links[-1]:
                error = RemoteProtocolError("a hop in the middle of the ring sent a step frame")
                error.peer_id = link.peer_id
                raise error
            return item[1], item[2]

    async def _judged(self, link: HopLink, error: PlanetServeError) -> PlanetServeError:
        """What a hop reported, as far as it is to be believed."""
        index = self._links.index(link)
        neighbours = self._links[max(0, index - 1) : index + 2]
        if not isinstance(error, EdgeStalled):
            # A hop may blame those it exchanges frames with, and nobody else.
            if error.peer_id not in {item.peer_id for item in neighbours}:
                error.peer_id = link.peer_id
            return error
        following = self._links[index + 1] if index + 1 < len(self._links) else None
        if following is None or error.edge[1] != following.peer_id:
            wrong = RemoteProtocolError("a hop complained of one that is not its next")
            wrong.peer_id = link.peer_id
            return wrong
        return await self._vigil.judge_edge(error, following)

    def _max_chunk_tokens(self) -> int:
        token_bytes = self._spec.hidden_size * self._spec.dtype.itemsize + _POSITION_BYTES
        by_bytes = (MAX_STEP_BYTES - _TABLE_ROOM_BYTES - HEADER_BYTES) // token_bytes
        by_hops = min(link.max_chunk_tokens for link in self._links)
        return max(1, min(by_bytes, by_hops))

    async def _send_after(self, earlier: asyncio.Task[None] | None, step: RingStep) -> None:
        if earlier is not None:
            await asyncio.wait([earlier])
        await self._send_again(None, step)

    async def _send_again(
        self,
        replay: tuple[StepTable, torch.Tensor] | None,
        step: RingStep | None,
        replayed_step: int = 0,
    ) -> None:
        """Send what fills the first hop, then the chunks of a step. Failures go to the inbox."""
        first = self._links[0]
        try:
            if replay is not None:
                await self._send_replay(*replay, replayed_step)
            if step is not None:
                for chunk in range(len(step.tables)):
                    while chunk - step.num_answered >= MAX_CHUNKS_IN_FLIGHT:
                        step.room.clear()
                        await step.room.wait()
                    await self._send_chunk(step, chunk)
        except PlanetServeError as error:
            self._inbox.put_nowait((first, error))

    async def _stop_sending(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send_replay(self, table: StepTable, hidden_TD: torch.Tensor, step: int) -> None:
        hidden_TD = hidden_TD.to(self._spec.dtype)
        tables = table.split(self._max_chunk_tokens())
        offset = 0
        for chunk, piece in enumerate(tables):
            part_TD = hidden_TD[offset : offset + piece.num_tokens]
            await self._ends.send(
                self._links[0],
                piece,
                part_TD,
                step=step,
                chunk=chunk,
                num_chunks=len(tables),
                flags=FLAG_REPLAY,
            )
            offset += piece.num_tokens

    async def _send_chunk(self, step: RingStep, chunk: int) -> None:
        offset = sum(piece.num_tokens for piece in step.tables[:chunk])
        table = step.tables[chunk]
        await self._ends.send(
            self._links[0],
            table,
            step.hidden_TD[offset : offset + table.num_tokens],
            step=step.number,
            chunk=chunk,
            num_chunks=len(step.tables),
            flags=FLAG_KEEP_LAST if step.keep_last else 0,
        )

    def _note_loads(self, loads: Sequence[HopLoad]) -> None:
        """Take note of what every hop says of its load; of an answer that left one out, nothing."""
        if [load.edge for load in loads] != [link.edge for link in self._links]:
            return
        self.loads_ms = {
            link.peer_id: load.us_per_block / 1000
            for link, load in zip(self._links, loads, strict=True)
            if load.us_per_block
        }


async def _all(jobs: Sequence[Any]) -> None:
    """Run coroutines at the same time; when all have ended, raise the first failure if any."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
