"""A whole session as bytes: how one is recorded, and how nodes of today are put into it.

`python tests/e2e/recorded_session.py FILE` writes the session below as the code of the day speaks
it. `replay` runs it again with some nodes real and the others read from the file: those send what
was sent then, where and in the order in which it was, and compare all that they get.

Keys, session id and times are the same in every run, so the same code says the same bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from planetserve.client.ring import hop_connection, hop_setup
from planetserve.client.ring.ring import RingSession
from planetserve.client.ring.ring_spec import RingSpec
from planetserve.crypto import handshake
from planetserve.crypto.identity import Identity
from planetserve.history import History
from planetserve.server import handler
from planetserve.testing import virtual_time
from planetserve.testing.integer_model import WIDTH, PlainModel, embed
from planetserve.testing.memory_network import MemoryNetwork, MemoryNode
from planetserve.testing.memory_streams import MemoryStream
from planetserve.testing.simulated_roles import ServerPlan, SimulatedServer
from planetserve.testing.virtual_time import ClockError, VirtualTimeLoop
from planetserve.types import BlockSpan, Chain, Hop, ServerInfo
from planetserve.wire.frame import HEADER_BYTES, FrameHeader, FrameType
from planetserve.wire.protocols import PUSH_PROTOCOL, SESSION_PROTOCOL
from planetserve.wire.step import HopLoad, RowSlice, StepTable

NUM_BLOCKS = 8
SPANS = {"first": BlockSpan(0, 4), "last": BlockSpan(4, 8), "other last": BlockSpan(4, 8)}
NAMES = ("client", *SPANS)
CHUNK_TOKENS = 16
PROTOCOLS = (SESSION_PROTOCOL, PUSH_PROTOCOL)
SESSION_ID = bytes(range(16))
_WAIT_S = 30.0

Recording = dict[str, Any]


def identity(name: str) -> Identity:
    """The node's key."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


PEERS = {name: identity(name).peer_id for name in NAMES}
NAME_OF = {peer_id: name for name, peer_id in PEERS.items()}


def _fix_what_is_drawn(patch: pytest.MonkeyPatch) -> None:
    """Ephemeral keys by role and edge, secrets of edges by number, one load for every hop."""

    class Drawn:
        def __init__(self, role: str, edge: int):
            self._seed = hashlib.sha256(f"{role} {edge}".encode()).digest()

        def generate(self) -> X25519PrivateKey:
            return X25519PrivateKey.from_private_bytes(self._seed)

    make_offer, answer_open = hop_connection.ClientHandshake, handler.answer_open

    def offer(session_id: bytes, edge: int, *args: Any) -> Any:
        patch.setattr(handshake, "X25519PrivateKey", Drawn("offer", edge))
        return make_offer(session_id, edge, *args)

    def answer(own: Identity, session_id: bytes, edge: int, *args: Any) -> Any:
        patch.setattr(handshake, "X25519PrivateKey", Drawn("answer", edge))
        return answer_open(own, session_id, edge, *args)

    numbers = itertools.count()
    patch.setattr(hop_connection, "ClientHandshake", offer)
    patch.setattr(handler, "answer_open", answer)
    patch.setattr(
        hop_setup,
        "new_edge_secret",
        lambda: bytearray(hashlib.sha256(f"secret {next(numbers)}".encode()).digest()),
    )
    patch.setattr(HopLoad, "of", classmethod(lambda cls, edge, _: cls(edge, 1000)))


async def _launch(network: MemoryNetwork, name: str) -> SimulatedServer:
    plan = ServerPlan(
        identity=identity(name), span=SPANS[name], num_pages=64, page_size=16, block_s=0.001,
        clock=ClockError(), max_chunk_tokens=CHUNK_TOKENS, overcommit=1.0, update_period_s=300.0,
    )  # fmt: skip
    return await SimulatedServer.launch(network, plan, NUM_BLOCKS, random.Random(1))


async def _converse(node: MemoryNode, servers: dict[str, ServerInfo]) -> None:
    """What the client does: a prompt in two chunks, a second row, another last hop, the end."""
    spec = RingSpec(
        num_rows=2, max_length=64, hidden_size=WIDTH, dtype=torch.float32, connect_timeout_s=5.0,
        step_timeout_s=20.0, stall_timeout_s=20.0, probe_after_s=20.0, ping_timeout_s=5.0,
        session_id=SESSION_ID,
    )  # fmt: skip
    first = Hop(PEERS["first"], 0, 4)
    chain = Chain((first, Hop(PEERS["last"], 4, 8)))
    history, rows = History(2), [PlainModel(NUM_BLOCKS) for _ in range(2)]

    async def step(table: StepTable, tokens: list[list[int]], *, keep_last: bool = False) -> None:
        hidden_TD = embed([token for new in tokens for token in new])
        output_TD = await ring.step(table, hidden_TD, keep_last=keep_last)
        history.append(table, hidden_TD)
        expected = torch.tensor(
            [
                list(map(float, line))
                for row, new in zip(rows, tokens, strict=True)
                for line in row.extend(new)
            ]
        )
        kept = table.last_tokens() if keep_last else list(range(table.num_tokens))
        assert torch.equal(output_TD[kept], expected[kept])

    ring = await RingSession.open(node, chain, servers, spec)
    prompt = [list(range(1, 12)), list(range(40, 49))]
    await step(StepTable((RowSlice(0, 0, 11), RowSlice(1, 0, 9))), prompt, keep_last=True)
    rows[1] = rows[0].copy()
    await step(StepTable((RowSlice(0, 11, 1), RowSlice(1, 11, 1)), (11, 11), (0, 0)), [[7], [8]])
    for link in ring._hops.links:
        assert (await link.progress(5.0)).frames_received == 3
    await ring.move(Chain((first, Hop(PEERS["other last"], 4, 8))), servers, history)
    for row in rows:
        row.truncate(10)
    await step(StepTable((RowSlice(0, 10, 1), RowSlice(1, 10, 1))), [[3], [4]])
    await ring.close()
    await asyncio.sleep(5.0)


class _Recorder:
    """Notes what passes through streams of sessions, and in which order nodes see it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.streams: list[dict[str, Any]] = []
        self.events: list[list[Any]] = []
        self._numbers: dict[frozenset[int], int] = {}
        self._kept: list[Any] = []
        self._num_read: dict[tuple[int, str], int] = {}
        send, receive, abort = MemoryStream.send, MemoryStream.receive, MemoryStream.abort

        async def note_sent(stream: MemoryStream, header: FrameHeader, payload: Any = b"") -> None:
            await send(stream, header, payload)
            data = (
                payload
                if isinstance(payload, bytes | bytearray | memoryview)
                else b"".join(payload)
            )
            packed = header.numbered(header.sequence, len(bytes(data))).pack() + bytes(data)
            self._note(stream, "sent", packed)

        async def note_received(stream: MemoryStream, timeout_s: float | None = None) -> Any:
            found = await receive(stream, timeout_s)
            self._note(stream, "received")
            return found

        def note_closed(stream: MemoryStream) -> None:
            if not stream.closed:
                self._note(stream, "closed")
            abort(stream)

        patch.setattr(MemoryStream, "send", note_sent)
        patch.setattr(MemoryStream, "receive", note_received)
        patch.setattr(MemoryStream, "abort", note_closed)

    def _note(self, stream: MemoryStream, what: str, packed: bytes = b"") -> None:
        if stream.protocol not in PROTOCOLS:
            return
        own, remote = NAME_OF[stream._node.peer_id], NAME_OF[stream.remote]
        pair = frozenset((id(stream.inward), id(stream.outward)))
        if pair not in self._numbers:
            self._kept.append((stream.inward, stream.outward))
            self._numbers[pair] = len(self.streams)
            self.streams.append({"protocol": stream.protocol, "from": own, "to": remote})
        self.events.append([self._numbers[pair], own, what, *([packed.hex()] if packed else [])])


def record() -> Recording:
    """The session as today's code speaks it."""
    with pytest.MonkeyPatch.context() as patch:
        _fix_what_is_drawn(patch)
        recorder = _Recorder(patch)

        async def main(loop: VirtualTimeLoop) -> list[dict[str, Any]]:
            network = MemoryNetwork(loop, random.Random(1))
            running = [await _launch(network, name) for name in SPANS]
            await asyncio.sleep(30.0)
            records = [
                {
                    "key": key.decode(), "owner": owner, "envelope": envelope.decode(),
                    "expires_at_s": ends_s, "stored_at_s": network.checker._clock.unix(),
                }
                for key, owners in network._records.items()
                for owner, versions in owners.items()
                for _, envelope, ends_s in versions[-1:]
            ]  # fmt: skip
            await _converse(
                network.join(identity("client"), ClockError()),
                {server.node.peer_id: server.info() for server in running},
            )
            await asyncio.gather(*(server.close() for server in running))
            return records

        records = virtual_time.run(main)
    return {"streams": recorder.streams, "events": recorder.events, "records": records}


def _comparable(header: FrameHeader, payload: bytes) -> tuple[FrameHeader, bytes]:
    """The frame without what its stream has counted, which is not the protocol's affair."""
    if header.type is not FrameType.STATUS or not payload:
        return header, payload
    progress = json.loads(payload)
    progress["bytes_received"] = 0
    return dataclasses.replace(header, payload_bytes=0), json.dumps(progress).encode()


class _Script:
    """The nodes that are read from a recording.

    Args:
        recording: what was recorded.
        network: where the real ones are.
        real: names of nodes that others run.
    """

    def __init__(self, recording: Recording, network: MemoryNetwork, real: Collection[str]):
        self._recording = recording
        self._nodes = {
            name: network.join(identity(name), ClockError()) for name in NAMES if name not in real
        }
        self._ends: dict[tuple[int, str], asyncio.Future[MemoryStream]] = {}
        self._sent: dict[tuple[int, str], list[bytes]] = {}
        """Frames of the recording by stream and sender that have not been compared yet."""
        for number, name, what, *packed in recording["events"]:
            if what == "sent":
                self._sent.setdefault((number, name), []).append(bytes.fromhex(packed[0]))

    async def serve(self) -> None:
        """Accept the streams that real nodes open."""
        for name, node in self._nodes.items():
            for protocol in PROTOCOLS:
                await node.serve_streams(protocol, self._taker(name, protocol))

    def _taker(self, name: str, protocol: str) -> Callable[[Any], Awaitable[None]]:
        async def take(stream: MemoryStream) -> None:
            opener = NAME_OF[stream.remote]
            wanted = {"protocol": protocol, "from": opener, "to": name}
            number = self._recording["streams"].index(wanted)
            self._end(number, name).set_result(stream)
            await asyncio.Event().wait()

        return take

    def _end(self, number: int, name: str) -> asyncio.Future[MemoryStream]:
        return self._ends.setdefault((number, name), asyncio.get_running_loop().create_future())

    async def play(self) -> None:
        """Say what was said then, and compare what comes."""
        for number, name, what, *packed in self._recording["events"]:
            stream = self._recording["streams"][number]
            other = stream["to"] if name == stream["from"] else stream["from"]
            if name not in self._nodes or other in self._nodes:
                continue
            end = self._end(number, name)
            if not end.done() and name == stream["from"]:
                end.set_result(
                    await self._nodes[name].open_stream(
                        PEERS[other], (), stream["protocol"], _WAIT_S
                    )
                )
            async with asyncio.timeout(_WAIT_S):
                near = await end
                if what == "sent":
                    await near.send(*_parts(bytes.fromhex(packed[0])))
                elif what == "received":
                    header, payload = await near.receive()
                    expected, expected_payload = _parts(self._sent[number, other].pop(0))
                    assert _comparable(header, bytes(payload)) == _comparable(
                        expected, expected_payload
                    )
                else:
                    near.abort()


def _parts(packed: bytes) -> tuple[FrameHeader, bytes]:
    return FrameHeader.unpack(packed[:HEADER_BYTES]), packed[HEADER_BYTES:]


def replay(recording: Recording, real: Collection[str], servers: dict[str, ServerInfo]) -> None:
    """Run the session with these nodes of today and the others as they were.

    Args:
        recording: what was recorded.
        real: names of today's nodes.
        servers: what a real client knows of the servers.
    """
    with pytest.MonkeyPatch.context() as patch:
        _fix_what_is_drawn(patch)

        async def main(loop: VirtualTimeLoop) -> None:
            network = MemoryNetwork(loop, random.Random(1))
            script = _Script(recording, network, real)
            await script.serve()
            running = [await _launch(network, name) for name in SPANS if name in real]
            jobs = [script.play()]
            if "client" in real:
                jobs.append(_converse(network.join(identity("client"), ClockError()), servers))
            await asyncio.gather(*jobs)
            await asyncio.sleep(5.0)
            assert [server.handler.num_sessions for server in running] == [0] * len(running)
            assert [dict(server.handler.counters) for server in running] == [{}] * len(running)
            await asyncio.gather(*(server.close() for server in running))

        virtual_time.run(main)


if __name__ == "__main__":
    lines = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, items)) + "\n]"
        for name, items in record().items()
    )
    Path(sys.argv[1]).write_text("{\n" + lines + "\n}\n", encoding="utf-8")
