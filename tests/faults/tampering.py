"""A server that sends wrong frames: changes what one node puts on its streams, or computes.

Keys are right and frames are well sealed up to the moment of the change, so these are the faults
that only the rules of an edge can catch. A change is armed at one node and made once, to the next
STEP frame that the node sends.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from planetserve.engine.engine import Engine
from planetserve.errors import RemoteError
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.swarm.libp2p.streams import FrameStream, StreamTable
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.step import StepTable

Frame = tuple[FrameHeader, bytes]
Change = Callable[[list[Frame]], list[Frame] | None]
"""The frames of a stream since the change was armed, the earlier ones of the session first; the
frames to send instead of the last of them, or None to keep that one back and be asked again."""

Spoil = Callable[[torch.Tensor], torch.Tensor]
"""What a step's output `[tokens, hidden]` becomes."""


class Tampering:
    """Sits in `FrameStream.send` of this process while `installed`."""

    def __init__(self) -> None:
        self._armed: dict[StreamTable, Change] = {}
        self._sent: dict[FrameStream, list[Frame]] = {}

    def arm(self, node: SwarmNode, change: Change) -> None:
        """Make `change` to the next STEP frame that `node` sends."""
        self._armed[node._streams] = change

    def disarm(self) -> None:
        """Forget the changes that have not been made."""
        self._armed.clear()
        self._sent.clear()

    @contextmanager
    def installed(self) -> Iterator[Tampering]:
        """Put this between the nodes of the process and their streams."""
        honest = FrameStream.send
        tampering = self

        async def send(stream: FrameStream, header: FrameHeader, payload: Any = b"") -> None:
            await tampering._send(honest, stream, header, payload)

        FrameStream.send = send  # type: ignore[method-assign]
        try:
            yield self
        finally:
            FrameStream.send = honest  # type: ignore[method-assign]

    async def _send(
        self,
        honest: Callable[..., Awaitable[None]],
        stream: FrameStream,
        header: FrameHeader,
        payload: Any,
    ) -> None:
        if header.type is not FrameType.STEP:
            await honest(stream, header, payload)
            return
        sent = self._sent.setdefault(stream, [])
        is_one = isinstance(payload, bytes | bytearray | memoryview)
        sent.append((header, bytes(payload) if is_one else b"".join(payload)))
        del sent[:-4]
        change = self._armed.pop(stream._table, None)
        frames = [sent[-1]] if change is None else change(sent)
        if frames is None and change is not None:
            self._armed[stream._table] = change
        for frame in frames or ():
            await honest(stream, *frame)


def flipped(frames: list[Frame]) -> list[Frame]:
    """One bit of the sealed payload."""
    header, payload = frames[-1]
    return [(header, payload[:40] + bytes([payload[40] ^ 4]) + payload[41:])]


def repeated(frames: list[Frame]) -> list[Frame]:
    """The same frame twice."""
    return [frames[-1], frames[-1]]


def truncated(frames: list[Frame]) -> list[Frame]:
    """A frame that is shorter than what was sealed."""
    header, payload = frames[-1]
    return [(header, payload[:-24])]


def stale(frames: list[Frame]) -> list[Frame] | None:
    """An earlier frame of the stream instead of the right one."""
    return None if len(frames) < 2 else [frames[-2]]


def swapped(frames: list[Frame]) -> list[Frame] | None:
    """Two frames in the wrong order; the first is kept back until there is a second."""
    last, before = frames[-1], frames[-2] if len(frames) > 1 else None
    if before is None or before[0].step != last[0].step or last[0].chunk % 2 == 0:
        return None
    return [last, before]


def lost(frames: list[Frame]) -> list[Frame]:
    """Nothing at all."""
    return []


def of_a_later_epoch(frames: list[Frame]) -> list[Frame]:
    """A frame of an epoch for which no peer has keys."""
    header, payload = frames[-1]
    return [(dataclasses.replace(header, epoch=header.epoch + 1), payload)]


def compute_wrongly(engine: Engine, spoil: Spoil) -> None:
    """Have the next step of `engine` give something else than it computed."""
    honest = engine.submit

    def submit(
        session_id: bytes, table: StepTable, hidden_TD: torch.Tensor,
        wrong: asyncio.Future[torch.Tensor],
    ) -> asyncio.Future[torch.Tensor]:  # fmt: skip
        del engine.submit  # type: ignore[method-assign]
        right = honest(session_id, table, hidden_TD)

        def pass_on(done: asyncio.Future[torch.Tensor]) -> None:
            if wrong.done():
                return
            try:
                wrong.set_result(spoil(done.result().clone()))
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
                wrong.set_exception(error)
                wrong.exception()  # the session may have ended meanwhile

        right.add_done_callback(pass_on)
        return wrong

    engine.submit = submit  # type: ignore[method-assign]


def with_nan(output_TD: torch.Tensor) -> torch.Tensor:
    output_TD[-1, 1] = float("nan")
    return output_TD


def with_infinity(output_TD: torch.Tensor) -> torch.Tensor:
    output_TD[-1, 1] = float("-inf")
    return output_TD


def too_wide(output_TD: torch.Tensor) -> torch.Tensor:
    return torch.cat([output_TD, output_TD], dim=1)


def failing(output_TD: torch.Tensor) -> torch.Tensor:
    raise RemoteError("the pass failed")
