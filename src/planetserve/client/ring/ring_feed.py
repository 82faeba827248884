"""What goes into a ring: steps in chunks, behind what a first hop lacks that is new.

`edge/sender.py` seals each chunk; here is which of them go when. What takes long is sent by a task
of its own, since its answers come meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib

import torch

from planetserve.client.ring.hop_connection import HopFailure, Inbox, chunk_tokens
from planetserve.client.ring.hop_setup import HopSetup
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.client.ring.ring_step import RingStep
from planetserve.edge.chunk import StepChunk, split_step
from planetserve.edge.sender import StepSender
from planetserve.errors import PlanetServeError, StreamClosed
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY
from planetserve.wire.step import MAX_CHUNKS_IN_FLIGHT, StepTable

_SMALL_FRAME_BYTES = 64 * 1024
"""The daemon takes a frame below this at once, so sending it needs no task."""
_LAST_WORDS_TIMEOUT_S = 0.2


class RingFeed:
    """Sends to whoever is the first of `hops`; failures of its task go to the inbox."""

    def __init__(self, spec: RingSpec, hops: HopSetup, sender: StepSender, inbox: Inbox):
        self._spec = spec
        self._hops = hops
        self._sender = sender
        self._inbox = inbox
        self._sending: asyncio.Task[None] | None = None

    def new_step(
        self, number: int, table: StepTable, hidden_TD: torch.Tensor, *, keep_last: bool
    ) -> RingStep:
        """A step in chunks none of which is longer than every hop takes."""
        hidden_TD = hidden_TD.to(self._spec.dtype)
        flags = FLAG_KEEP_LAST if keep_last else 0
        chunks = split_step(
            table, hidden_TD, chunk_tokens(self._hops.links), step=number, flags=flags
        )
        return RingStep(number, chunks, hidden_TD, keep_last)

    async def send(self, step: RingStep) -> None:
        """Send a step if it is small, or else begin to, behind what is under way.

        Raises:
            StreamClosed: the first hop has gone without saying why; `peer_id` names it.
        """
        is_small = len(step.chunks) == 1 and step.hidden_TD.nbytes < _SMALL_FRAME_BYTES
        if is_small and (self._sending is None or self._sending.done()):
            await self._send_chunk(step.chunks[0])
        else:
            self._sending = asyncio.create_task(self._send_after(self._sending, step))

    def send_again(
        self,
        replay: tuple[StepTable, torch.Tensor] | None,
        step: RingStep | None,
        replayed_step: int,
    ) -> None:
        """Begin to fill a new first hop with `replay`, and to send a step from its beginning.

        Nothing else may be under way.
        """
        work = self._send_again(replay, step, replayed_step)
        self._sending = asyncio.create_task(work)

    async def stop(self) -> None:
        """Send nothing more of what is under way."""
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

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
        first = self._hops.links[0]
        try:
            if replay is not None:
                table, hidden_TD = replay
                max_tokens = chunk_tokens(self._hops.links)
                for chunk in split_step(
                    table,
                    hidden_TD.to(self._spec.dtype),
                    max_tokens,
                    step=replayed_step,
                    flags=FLAG_REPLAY,
                ):
                    await self._send_chunk(chunk)
            if step is not None:
                for chunk in step.chunks:
                    while chunk.chunk - step.num_answered >= MAX_CHUNKS_IN_FLIGHT:
                        step.room.clear()
                        await step.room.wait()
                    await self._send_chunk(chunk)
        except PlanetServeError as error:
            self._inbox.put_nowait(HopFailure(first, error))

    async def _send_chunk(self, chunk: StepChunk) -> None:
        first = self._hops.links[0]
        frame = self._sender.seal(chunk, asyncio.get_running_loop().time())
        try:
            await first.stream.send(*frame)
        except StreamClosed as error:
            # What the hop said before it closed the stream tells more: it goes to the inbox.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                    await first.ended.wait()
                    return
            error.peer_id = first.peer_id
            raise
