"""One session's steps on their way through a server: upstream, engine, downstream, in order.

The number of steps in the engine is bounded, so a slow consumer stops the reading of its own
producer and nobody else's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import torch

from planetserve.engine.engine import Engine
from planetserve.errors import (
    DecryptionFailed,
    PlanetServeError,
    RemoteProtocolError,
    SessionError,
)
from planetserve.server.downstream import Downstream
from planetserve.server.upstream import Arrived, Upstream
from planetserve.swarm.network import Stream
from planetserve.tensors import is_finite
from planetserve.types import CLIENT
from planetserve.wire.frame import FrameHeader
from planetserve.wire.step import MAX_CHUNKS_IN_FLIGHT


@dataclass(slots=True)
class _Pending:
    """One engine step and the frames that its output becomes."""

    arrived: Arrived
    output: asyncio.Future[torch.Tensor]
    entering_s: float
    """From the arrival of the last of these frames to the engine."""


class StepPipeline:
    """Takes steps in with `take`; `run` hands the engine's answers on in the same order.

    Args:
        key: the session's name in the engine.
        engine: runs the steps.
        upstream: where they come from.
        downstream: where what they become goes.
    """

    def __init__(self, key: bytes, engine: Engine, upstream: Upstream, downstream: Downstream):
        self._key = key
        self._engine = engine
        self._upstream = upstream
        self._downstream = downstream
        self._slots = asyncio.Semaphore(MAX_CHUNKS_IN_FLIGHT)
        self._running: deque[_Pending] = deque()
        self._awaited: asyncio.Future[torch.Tensor] | None = None
        """What the next step's output will be put into, while no step is running."""

    @property
    def num_running(self) -> int:
        """Steps that the engine has and whose outputs have not been sent on."""
        return len(self._running)

    async def take(self, stream: Stream, header: FrameHeader) -> None:
        """Take the STEP frame whose header has come on `stream`.

        Raises:
            PlanetServeError: a frame that does not belong here, or a step that the engine refuses.
        """
        arrived = await self._upstream.take(stream, header)
        if arrived is None:
            return
        await self._slots.acquire()
        awaited, self._awaited = self._awaited, None
        output = self._engine.submit(self._key, arrived.table, arrived.hidden_TD, awaited)
        entering_s = asyncio.get_running_loop().time() - arrived.arrived_s
        self._running.append(_Pending(arrived, output, entering_s))

    async def run(self) -> None:
        """Send on what becomes of the steps, until this is cancelled.

        Raises:
            PlanetServeError: the engine failed a step, or the client has gone.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                # Where no step is running, its future is made before it comes: one wake-up a step.
                if not self._running:
                    self._awaited = loop.create_future()
                output_TD = await (self._awaited or self._running[0].output)
                pending = self._running.popleft()
                arrived = pending.arrived
                done_s = loop.time()
                if not is_finite(output_TD):
                    # The next one would take it for this hop's fault.
                    raise RemoteProtocolError("what came in makes numbers that are not finite")
                if len(arrived.chunks) == 1:
                    await self._downstream.push(arrived.chunks[0], output_TD)
                else:
                    offset = 0
                    for chunk in arrived.chunks:
                        end = offset + chunk.table.num_tokens
                        await self._downstream.push(chunk, output_TD[offset:end])
                        offset = end
                if arrived.table.is_decode:
                    handling_s = pending.entering_s + loop.time() - done_s
                    self._engine.count_handling(1000 * handling_s)
                self._upstream.leave(arrived)
                self._slots.release()
        except PlanetServeError as error:
            # The engine refused what the upstream hop computed, or was handed.
            blame_upstream(error, self._upstream.previous)
            raise


def blame_upstream(error: Exception, previous: str) -> None:
    """Name the hop before, if `error` is about what it sent: that a server is full, or that a
    pass fails, is not."""
    is_about_a_frame = isinstance(error, RemoteProtocolError | DecryptionFailed)
    # The client's own mistakes end at the first hop.
    is_about_a_frame = is_about_a_frame or type(error) is SessionError
    if previous != CLIENT and isinstance(error, PlanetServeError) and is_about_a_frame:
        error.peer_id = error.peer_id or previous
