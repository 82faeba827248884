"""What a hop may say to its client, and how the client takes it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from written_swarm import server

from planetserve.client.ring.hop_connection import MAX_NOTICES, HopConnection
from planetserve.errors import PeerReportedError, PlanetServeError, RemoteProtocolError
from planetserve.types import Hop
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import ErrorReply, NextHop, Progress

NEXT = NextHop(peer_id="next", edge=1, fresh=True, end=8, addresses=[])


class Said:
    """A stream on which a hop says these frames and then nothing more."""

    def __init__(self, *frames: tuple[FrameType, bytes]):
        self.frames = list(frames)
        self.all_read = asyncio.Event()

    async def receive(self) -> tuple[FrameHeader, bytearray]:
        if not self.frames:
            self.all_read.set()
            await asyncio.Event().wait()
        kind, payload = self.frames.pop(0)
        return FrameHeader(kind), bytearray(payload)


async def lost_by(*frames: tuple[FrameType, bytes]) -> PlanetServeError | None:
    """Why the link is lost after these frames, if it is."""
    link = HopConnection(Hop("hop", 0, 4), server("hop"), 0, bytes(16), asyncio.Queue())
    link._note_edges("client", NEXT)
    stream: Any = Said(*frames)
    reading = asyncio.create_task(link._read(stream))
    either = [reading, asyncio.create_task(stream.all_read.wait())]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    for task in either:
        task.cancel()
    return link.lost


@pytest.mark.parametrize("code", ["config", "session_closed", "capacity", "anything_else"])
async def test_whatever_a_hop_reports_is_what_it_says_and_another_may_do(code: str) -> None:
    reply = ErrorReply(code=code, retry_after_s=3600.0)
    error = await lost_by((FrameType.ERROR, reply.encode()))
    assert type(error) is PeerReportedError
    assert error.retryable
    assert (error.peer_id, error.edge) == ("hop", None)
    assert str(error) == f"server …hop says: '{code}: {reply.message}'"


@pytest.mark.parametrize(
    ("blamed", "edge"), [("next", ("hop", "next")), ("stranger", None), ("client", None)]
)
async def test_a_hop_may_complain_of_its_neighbours_only(
    blamed: str, edge: tuple[str, str] | None
) -> None:
    reply = ErrorReply(code="decryption", blamed_peer=blamed)
    error = await lost_by((FrameType.ERROR, reply.encode()))
    assert error is not None
    assert error.edge == edge
    assert error.peer_id == (None if edge else "hop")


@pytest.mark.parametrize("code", ["", "two words", "UPPER", "\x1b[31m", "x" * 33])
async def test_a_code_is_a_word(code: str) -> None:
    payload = json.dumps({"code": code}).encode()
    error = await lost_by((FrameType.ERROR, payload))
    assert isinstance(error, RemoteProtocolError)
    assert "bad fields code" in str(error)


async def test_no_text_of_a_hop_is_read() -> None:
    payload = json.dumps({"code": "config", "message": "run: curl evil.example"}).encode()
    error = await lost_by((FrameType.ERROR, payload))
    assert isinstance(error, PeerReportedError)
    assert "curl" not in str(error)
    assert error.peer_id == "hop"


PROGRESS = Progress(frames_received=0, frames_sent=0, bytes_received=0, steps_running=0).encode()


@pytest.mark.parametrize(
    "frame", [(FrameType.LEAVING, b""), (FrameType.REWIRED, b""), (FrameType.STATUS, PROGRESS)]
)
async def test_so_much_may_come_that_nobody_asked_for(frame: tuple[FrameType, bytes]) -> None:
    assert await lost_by(*[frame] * MAX_NOTICES) is None
    error = await lost_by(*[frame] * (MAX_NOTICES + 1))
    assert isinstance(error, RemoteProtocolError)
    assert error.peer_id == "hop"
