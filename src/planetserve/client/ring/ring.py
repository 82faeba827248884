"""One session on a chain of hops: sends to the first, takes answers from the last, mends the rest.

Frames go client -> hop 1 -> ... -> hop n -> client; the streams to the hops in between carry only
edge keys and what opens, rewires and ends. When hops are lost, `mend` puts others in their place:
those that are left keep their KV cache, the hop before the gap (or the client) sends the new ones
what they lack, and the step under way goes on. The caller says which hops those are (`condemn`) and
which servers replace them. `hop_setup.py` connects a replacement, `ring_feed.py` decides what is
sent when. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import torch

from planetserve.client.ring.hop_connection import HopConnection, HopFailure, Inbox, StepFrame
from planetserve.client.ring.hop_setup import HopSetup
from planetserve.client.ring.receipts import RingReceipts
from planetserve.client.ring.ring_feed import RingFeed
from planetserve.client.ring.ring_spec import Gap, RingSpec
from planetserve.client.ring.ring_step import RingStep
from planetserve.client.ring.stall_detector import StallDetector
from planetserve.edge.receiver import StepReceiver
from planetserve.edge.sender import StepSender
from planetserve.errors import (
    EdgeStalled,
    HandshakeFailed,
    HopTimeout,
    PeerReportedError,
    PlanetServeError,
    RemoteProtocolError,
    TransportError,
)
from planetserve.history import History
from planetserve.routing.migration import new_hops
from planetserve.swarm.network import Network
from planetserve.types import CLIENT, Chain, Hop, PeerId, ServerInfo
from planetserve.wire.frame import ANSWER_EDGE
from planetserve.wire.step import HopLoad, StepTable

_MENDABLE = (TransportError, PeerReportedError, HandshakeFailed)
"""Failures that leave the other hops' KV caches as they should be."""

PlanGap = Callable[[Gap], Awaitable[tuple[Chain, Mapping[PeerId, ServerInfo]]]]


class RingSession:
    """An open session. Made by `open`; one step at a time."""

    def __init__(self, node: Network, spec: RingSpec):
        self.chain = Chain(())
        self.session_id = spec.session_id
        self.loads_ms: Mapping[PeerId, float] = {}
        """Time per block that each hop named with the latest answer."""
        self.receipt_errors: Sequence[PlanetServeError] = ()
        """What was wrong with the last receipts of the hops, once the ring is closed."""
        self._spec = spec
        self._inbox: Inbox = asyncio.Queue()
        self._stall_detector = StallDetector(node, spec)
        self._receipts = receipts = (
            RingReceipts(self.session_id, spec.num_rows) if spec.receipts else None
        )
        self._sender = StepSender(
            self.session_id, spec.dtype, observer=None if receipts is None else receipts.sent
        )
        self._receiver = StepReceiver(
            self.session_id,
            ANSWER_EDGE,
            spec.hidden_size,
            spec.dtype,
            num_rows=spec.num_rows,
            observer=None if receipts is None else receipts.received,
        )
        self._hops = HopSetup(
            node, spec, self.session_id, self._inbox, self._sender, self._receiver, self._receipts
        )
        self._feed = RingFeed(spec, self._hops, self._sender, self._inbox)
        self._condemned: set[HopConnection] = set()
        self._number = 0
        self._step: RingStep | None = None

    @classmethod
    async def open(
        cls,
        node: Network,
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
    def max_row_tokens(self) -> int:
        """Tokens per row that every hop takes, by their records."""
        return min(link.info.max_session_tokens for link in self._hops.links)

    @property
    def leaving(self) -> set[PeerId]:
        """Hops that have said they will leave soon; the session should do without them.

        One that has gone may be back: a new plan decides.
        """
        return {link.peer_id for link in self._hops.links if link.is_leaving and not link.lost}

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
        if self._receipts is not None:
            self._receipts.check_due(self._hops.links, self._number)
        self._step = step = self._feed.new_step(self._number, table, hidden_TD, keep_last=keep_last)
        await self._feed.send(step)
        return await self.resume()

    async def resume(self) -> torch.Tensor:
        """Wait for the step under way.

        Raises:
            PlanetServeError: as `step`.
        """
        step = self._step
        if step is None:
            raise RuntimeError("no step is under way")
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._spec.step_timeout_s
        while step.num_answered < len(step.chunks):
            frame = await self._next_answer(deadline_s)
            last = self._hops.links[-1].peer_id
            # Which step an answer belongs to and how many tokens it has is what came to the last
            # hop, and that is any hop's fault.
            chunk = self._receiver.open(frame.header, frame.payload, step, last)
            if chunk is not None:
                step.take(chunk.hidden_TD)
                self._note_loads(chunk.loads)
                deadline_s = loop.time() + self._spec.step_timeout_s
        self._step = None
        self._number += 1
        for link in self._hops.links:
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
        peers = {error.peer_id, *culprits, *(error.edge or ())}
        self._condemned |= {link for link in self._hops.links if link.lost or link.peer_id in peers}
        return self.is_broken

    def condemn_leaving(self) -> None:
        """Mark the hops that will leave."""
        self._condemned |= {link for link in self._hops.links if link.is_leaving}

    def condemn_lost(self, before_s: float) -> None:
        """Mark the hops that were lost before then, by the event loop's time."""
        lost = [link for link in self._hops.links if link.lost]
        self._condemned.update(link for link in lost if link.lost_s < before_s)

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

        self._condemned.update(self._hops.links[first : len(self._hops.links) - last])
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
        links = self._hops.links
        bad = [
            index for index, link in enumerate(links) if link in self._condemned or link.is_filling
        ]
        first, stop = bad[0], bad[-1] + 1
        for link in links[first:stop]:
            self._condemned.add(link)
        span = dataclasses.replace(links[first].hop.span, end=links[stop - 1].hop.end)
        before = links[first - 1].peer_id if first else CLIENT
        after = links[stop].peer_id if stop < len(links) else CLIENT
        chain, servers = await plan_gap(Gap(span, before, after))
        await self._splice(first, stop, chain.hops, servers, history)
        hops = tuple(link.hop for link in self._hops.links)
        self.chain = dataclasses.replace(self.chain, hops=hops)

    async def close(self) -> None:
        """Tell every hop that the session is over and release the streams. Never raises.

        Hops that sign receipts are waited for: theirs must agree on all that has passed.
        """
        await self._feed.stop()
        if self._receipts is not None and self._is_at_rest():
            self.receipt_errors = await self._receipts.settle(self._hops.links)
        await self._hops.close()
        self._sender.erase()
        self._receiver.erase()

    def _is_at_rest(self) -> bool:
        """Whether all that was sent has arrived at every hop and back."""
        is_whole = self._step is None and not self.is_broken
        return is_whole and not any(link.is_filling for link in self._hops.links)

    async def _splice(
        self,
        first: int,
        stop: int,
        hops: Sequence[Hop],
        servers: Mapping[PeerId, ServerInfo],
        history: History | None,
    ) -> None:
        """Put `hops` in the place of links `[first, stop)`, and fill them."""
        replaced = self._hops.links[first:stop]
        is_filling = bool(self._hops.links) or (history is not None and any(history.lengths))
        for link in await self._hops.splice(first, stop, hops, servers, self._number):
            link.is_filling = is_filling
        self._condemned.difference_update(replaced)
        if first == 0:
            await self._refill(history)

    async def _refill(self, history: History | None) -> None:
        """Send a new first hop what it lacks, and the step under way from its beginning."""
        await self._feed.stop()
        replay = None if history is None else history.replay()
        if replay is None and self._step is None:
            return
        if replay is not None:
            self._number = max(self._number, 1)
        # Numbered now: the answer may be here already, and the next step begin before this is sent.
        self._feed.send_again(replay, self._step, replayed_step=self._number - 1)

    async def _next_answer(self, deadline_s: float) -> StepFrame:
        """The next STEP frame of the last hop.

        Raises:
            PlanetServeError: what a hop of the ring failed with.
            HopTimeout: only what is of no use has come until `deadline_s`.
        """
        while True:
            if asyncio.get_running_loop().time() > deadline_s:
                raise HopTimeout("the chain sends much, and no answer")
            try:
                # Nearly every answer comes in time; only a late one is worth a task and a watch.
                async with asyncio.timeout(self._spec.probe_after_s):
                    item = await self._inbox.get()
            except TimeoutError:
                item = await self._stall_detector.watch(
                    self._inbox.get(), self._hops.links, self._my_frames
                )
            link = item.link
            link.took()
            if link not in self._hops.links:
                continue  # late news of a hop that has been replaced
            if isinstance(item, HopFailure):
                error = item.error
                if isinstance(error, EdgeStalled) and error.epoch not in (None, link.epoch_out):
                    continue  # about a neighbour that it no longer has
                raise await self._judged(link, error)
            if link is not self._hops.links[-1]:
                wrong = RemoteProtocolError("a hop in the middle of the ring sent a step frame")
                wrong.peer_id = link.peer_id
                raise wrong
            return item

    def _my_frames(self) -> tuple[int, int]:
        """Frames sent and received, each since its edge has its present keys."""
        return self._sender.frames_sent, self._receiver.frames_received

    async def _judged(self, link: HopConnection, error: PlanetServeError) -> PlanetServeError:
        """What a hop reported, as far as it is to be believed."""
        if not isinstance(error, EdgeStalled):
            return error  # `hop_connection.py` has seen to whom it may blame
        links = self._hops.links
        index = links.index(link)
        following = links[index + 1] if index + 1 < len(links) else None
        if following is None or error.edge != (link.peer_id, following.peer_id):
            wrong = RemoteProtocolError("a hop complained of one that is not its next")
            wrong.peer_id = link.peer_id
            return wrong
        return await self._stall_detector.judge_edge(error, following)

    def _note_loads(self, loads: Sequence[HopLoad]) -> None:
        """Take note of what every hop says of its load; of an answer that left one out, nothing."""
        if [load.edge for load in loads] != [link.edge for link in self._hops.links]:
            return
        self.loads_ms = {
            link.peer_id: load.us_per_block / 1000
            for link, load in zip(self._hops.links, loads, strict=True)
            if load.us_per_block
        }
