"""Waiting for a ring that has gone quiet: which hop is silent, which edge stands still.

A hop that does not answer pings is gone. When all answer, each says how far it has come: if nothing
moves for a while, the last edge on which more was sent than received is where it stops. Frames on
their way over a slow link count as movement, and a hop that computes is not at fault before the
step timeout; if nobody computes then, the edge with most frames on it is too slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from planetserve.client.ring.hop_connection import HopConnection
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.errors import EdgeStalled, HopTimeout, PlanetServeError
from planetserve.swarm.network import Network
from planetserve.swarm.ping import ping
from planetserve.types import CLIENT
from planetserve.wire.messages import Progress

T = TypeVar("T")
MyFrames = Callable[[], tuple[int, int]]
"""Frames that the client has sent into its ring and received from it, in the current epochs."""

_PINGS_UNTIL_SILENT = 2
_GRACE_S = 0.3


class StallDetector:
    """Watches over the hops of one ring."""

    def __init__(self, node: Network, spec: RingSpec):
        self._node = node
        self._spec = spec

    async def watch(
        self, work: Coroutine[Any, Any, T], links: Sequence[HopConnection], my_frames: MyFrames
    ) -> T:
        """Wait for `work`, which has been waited for during `probe_after_s` already.

        Raises:
            HopTimeout: a hop is silent (`peer_id` names it); or nothing has moved for
                `stall_timeout_s` though nothing is under way and nobody computes; or the step
                timeout is over, and `peer_id` is the only hop that still computes, if there is
                just one.
            EdgeStalled: all hops answer, but nothing has moved for `stall_timeout_s`, and `edge` is
                the last with frames on it; or the step timeout is over, nobody computes, and
                `edge` has most of them.
        """
        loop = asyncio.get_running_loop()
        spec = self._spec
        deadline_s = loop.time() + spec.step_timeout_s - spec.probe_after_s
        task = asyncio.ensure_future(work)
        before: list[Progress] | None = None
        moved_s = loop.time() - spec.probe_after_s
        try:
            while True:
                now = await self._unless_done(task, self._ask(links))
                if task.done():
                    return task.result()
                if now != before:
                    before, moved_s = now, loop.time()
                elif now is not None and loop.time() - moved_s >= spec.stall_timeout_s:
                    piles = _piles(links, now, my_frames())
                    if piles:
                        # The last one holds up those before it, however much is on them.
                        raise _stalled("nothing passes between two servers", piles[-1].edge)
                    if not any(item.steps_running for item in now):
                        raise HopTimeout("the chain lost a step: it is nowhere, and not answered")
                left_s = deadline_s - loop.time()
                if left_s <= 0:
                    raise self._too_slow(links, now, my_frames())
                await asyncio.wait([task], timeout=min(spec.probe_after_s, left_s))
                if task.done():
                    return task.result()
        except PlanetServeError:
            if task.done() and not task.cancelled():
                return task.result()  # it came while the verdict was being reached
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def judge_edge(self, error: EdgeStalled, accused: HopConnection) -> PlanetServeError:
        """What a hop that cannot reach the next one has noticed: a lost hop or a broken edge."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await accused.ended.wait()
        if accused.lost is not None:
            return accused.lost
        if await self._is_alive(accused):
            return error
        silent = HopTimeout("a server has stopped answering")
        silent.peer_id = accused.peer_id
        return silent

    async def _unless_done(
        self, task: asyncio.Future[Any], question: Coroutine[Any, Any, T]
    ) -> T | None:
        """The answer to `question`, unless `task` is done first."""
        asking = asyncio.ensure_future(question)
        either: tuple[asyncio.Future[Any], ...] = (task, asking)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return None if task.done() else asking.result()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask(self, links: Sequence[HopConnection]) -> list[Progress] | None:
        """How far each hop has come; None if one does not say, though it answers pings."""
        suspects = list(links)
        for _ in range(_PINGS_UNTIL_SILENT):
            alive = await asyncio.gather(*(self._is_alive(link) for link in suspects))
            suspects = [
                link for link, is_alive in zip(suspects, alive, strict=True) if not is_alive
            ]
        if suspects:
            error = HopTimeout("a server has stopped answering")
            error.peer_id = suspects[0].peer_id
            raise error
        timeout_s = self._spec.ping_timeout_s
        try:
            return list(await asyncio.gather(*(link.progress(timeout_s) for link in links)))
        except PlanetServeError:
            return None

    async def _is_alive(self, link: HopConnection) -> bool:
        with contextlib.suppress(PlanetServeError):
            await ping(
                self._node,
                link.peer_id,
                link.info.addresses,
                timeout_s=self._spec.ping_timeout_s,
            )
            return True
        return False

    def _too_slow(
        self,
        links: Sequence[HopConnection],
        progress: Sequence[Progress] | None,
        mine: tuple[int, int],
    ) -> HopTimeout:
        message = f"no answer from the chain within {self._spec.step_timeout_s:g} s"
        busy = [
            link for link, item in zip(links, progress or (), strict=False) if item.steps_running
        ]
        if progress is not None and not busy:
            # What is under way is on some link: one that moves too little to be of use.
            piles = _piles(links, progress, mine)
            if piles:
                return _stalled(message, max(piles, key=lambda pile: pile.num_frames).edge)
        error = HopTimeout(message)
        if len(busy) == 1:
            error.peer_id = busy[0].peer_id
        return error


class _Pile(NamedTuple):
    """Frames that have been sent on an edge and have not come out of it."""

    num_frames: int
    edge: tuple[str, str]


def _piles(
    links: Sequence[HopConnection], progress: Sequence[Progress], mine: tuple[int, int]
) -> list[_Pile]:
    """Where frames are under way, the edge after the client first."""
    names = [CLIENT, *(link.peer_id for link in links), CLIENT]
    sent = [mine[0], *(item.frames_sent for item in progress)]
    received = [*(item.frames_received for item in progress), mine[1]]
    missing = [entered - left for entered, left in zip(sent, received, strict=True)]
    edges = zip(missing, pairwise(names), strict=True)
    return [_Pile(num_frames, edge) for num_frames, edge in edges if num_frames > 0]


def _stalled(message: str, edge: tuple[str, str]) -> EdgeStalled:
    error = EdgeStalled(message)
    error.edge = edge
    return error
