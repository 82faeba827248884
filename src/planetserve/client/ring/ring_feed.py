"""What goes into a ring: steps in chunks, behind what a first hop lacks that is new.

One chunk of one step is for `ring_ends.py` to seal; here is which of them go when. What takes long
is sent by a task of its own, since its answers come meanwhile.
"""

from __future__ import annotations

import asyncio

import torch

from planetserve.client.ring.hop_connection import Inbox, chunk_tokens
from planetserve.client.ring.hop_setup import HopSetup
from planetserve.client.ring.ring_ends import RingEnds, RingStep
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.errors import PlanetServeError
from planetserve.wire.frame import FLAG_KEEP_LAST, FLAG_REPLAY
from planetserve.wire.step import MAX_CHUNKS_IN_FLIGHT, StepTable, max_frame_tokens

_SMALL_FRAME_BYTES = 64 * 1024
"""The daemon takes a frame below this at once, so sending it needs no task."""


class RingFeed:
    """Sends to whoever is the first of `hops`; failures of its task go to the inbox."""

    def __init__(self, spec: RingSpec, hops: HopSetup, ends: RingEnds, inbox: Inbox):
        self._spec = spec
        self._hops = hops
        self._ends = ends
        self._inbox = inbox
        self._sending: asyncio.Task[None] | None = None

    def cut(self, table: StepTable) -> tuple[StepTable, ...]:
        """The chunks of a step, none of them longer than every hop takes."""
        return table.split(self._max_chunk_tokens())

    async def send(self, step: RingStep) -> None:
        """Send a step if it is small, or else begin to, behind what is under way.

        Raises:
            StreamClosed: the first hop has gone without saying why; `peer_id` names it.
        """
        is_small = len(step.tables) == 1 and step.hidden_TD.nbytes < _SMALL_FRAME_BYTES
        if is_small and (self._sending is None or self._sending.done()):
            await self._send_chunk(step, 0)
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

    def _max_chunk_tokens(self) -> int:
        by_bytes = max_frame_tokens(self._spec.hidden_size * self._spec.dtype.itemsize)
        return max(1, min(by_bytes, chunk_tokens(self._hops.links)))

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
                await self._send_replay(*replay, replayed_step)
            if step is not None:
                for chunk in range(len(step.tables)):
                    while chunk - step.num_answered >= MAX_CHUNKS_IN_FLIGHT:
                        step.room.clear()
                        await step.room.wait()
                    await self._send_chunk(step, chunk)
        except PlanetServeError as error:
            self._inbox.put_nowait((first, error))

    async def _send_replay(self, table: StepTable, hidden_TD: torch.Tensor, step: int) -> None:
        hidden_TD = hidden_TD.to(self._spec.dtype)
        tables = self.cut(table)
        offset = 0
        for chunk, piece in enumerate(tables):
            part_TD = hidden_TD[offset : offset + piece.num_tokens]
            await self._ends.send(
                self._hops.links[0],
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
            self._hops.links[0],
            table,
            step.hidden_TD[offset : offset + table.num_tokens],
            step=step.number,
            chunk=chunk,
            num_chunks=len(step.tables),
            flags=FLAG_KEEP_LAST if step.keep_last else 0,
        )
